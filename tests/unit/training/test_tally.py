"""What a step reports is what a plain loop over its records finds, for every router and dispatch mode."""

import pytest
import torch

from megaroute.routing.experts import balance_loss

CAPACITY = "routing.dispatch.mode=capacity"
MOE = ["routing.router=moe", "routing.unit=mlp"]
RUNS = [
    [],
    ["routing.unit=separate"],
    ["routing.unit=mlp", "routing.budget.density=soft", "routing.budget.estimator=microbatch"],
    ["routing.unit=attention", "routing.budget.estimator=microbatch"],
    ["routing.dispatch.mode=masked"],
    [CAPACITY, "routing.capacity.factor=0.6"],
    [CAPACITY, "routing.capacity.scope=stage", "routing.density=0.3"],
    ["routing.router=random"],
    ["routing.router=highway"],
    ["routing.router=mod"],
    ["routing.router=early_exit"],
    ["routing.router=random_ltd"],
    ["data.attend_across_documents=false"],
    [*MOE, "routing.moe.capacity_factor=0.5"],
    [*MOE, "routing.moe.top_k=2"],
]


def plain(micros, unit, across_documents):
    """The sums of one unit, by a loop over micro-batches and tokens."""
    sums = {"kept": 0, "rows": 0, "pairs": 0, "needed_pairs": 0, "overflow": 0, "soft": 0.0, "choices": []}
    for micro in micros:
        record = micro.info.routing.records[unit.key]
        kept = record.keep_SB.nonzero().tolist()
        starts = 0 if across_documents else micro.info.starts_SB
        keys = sum(s + 1 - (0 if across_documents else int(starts[s, b])) for s, b in kept)
        pairs = int(record.attention_pairs)
        sums["kept"] += len(kept)
        sums["rows"] += int(record.rows)
        sums["pairs"] += pairs
        sums["needed_pairs"] += min(keys, pairs)
        sums["overflow"] += int(record.overflow) if record.overflow is not None else 0
        sums["soft"] += float(record.probability) / len(micros) if record.probability is not None else 0.0
        if record.counts_E is not None:
            sums["choices"] = [a + b for a, b in zip(sums["choices"] or [0] * 4, record.counts_E.tolist(), strict=True)]
    return sums


@pytest.mark.parametrize("overrides", RUNS, ids=str)
def test_totals_are_those_of_a_plain_loop(start, advance, tiny, overrides):
    config = tiny("train.micro_batch=2", *overrides)
    result = advance(start(config), 2)[-1]
    totals, across = result.totals, config.data.attend_across_documents
    assert len(result.micros) == 4
    for index, unit in enumerate(config.units):
        expected = plain(result.micros, unit, across)
        for name in ("kept", "rows", "pairs", "needed_pairs", "overflow"):
            assert getattr(totals, name)[index] == expected[name], name
        assert totals.soft[index] == pytest.approx(expected["soft"], rel=1e-6)
        assert list(totals.choices[index]) == expected["choices"]
        assert totals.replica_rows[index] == (expected["rows"],)
    if CAPACITY in overrides or "routing.moe.capacity_factor=0.5" in overrides:
        assert sum(totals.overflow) > 0
    needed = sum(totals.needed_pairs)
    assert needed > 0 or config.routing.unit == "mlp"


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("overrides", [RUNS[1], RUNS[5], RUNS[6], RUNS[10], RUNS[13]], ids=str)
def test_recomputation_counts_nothing_twice(start, advance, tiny, overrides, recompute):
    plain, again = (advance(start(tiny(*overrides, *more)), 2) for more in ([], [f"train.recompute={recompute}"]))
    for once, twice in zip(plain, again, strict=True):
        for name in ("kept", "rows", "pairs", "needed_pairs", "overflow", "choices", "replica_rows", "tokens"):
            assert getattr(once.totals, name) == getattr(twice.totals, name), name
        assert once.totals.soft == pytest.approx(twice.totals.soft, rel=1e-6)
        assert once.flops == twice.flops


@pytest.mark.parametrize("density", ["hard", "soft"])
def test_the_budget_of_each_micro_batch_is_the_mean_of_their_gaps(start, advance, tiny, density):
    config = tiny("train.micro_batch=2", "routing.budget.estimator=microbatch", f"routing.budget.density={density}")
    result = advance(start(config), 1)[0]
    expected = 0.0
    for unit in config.units:
        records = [micro.info.routing.records[unit.key] for micro in result.micros]
        means = [float(r.keep_SB.float().mean() if density == "hard" else r.probability) for r in records]
        expected += 0.1 * sum((mean - 0.5) ** 2 for mean in means) / len(means)
    assert result.budget_loss == pytest.approx(expected, rel=1e-5)


def test_the_soft_budget_is_about_probabilities(start, advance, tiny):
    parts = start(tiny("routing.budget.density=soft"))
    (result,) = advance(parts, 1)
    totals = result.totals
    assert result.budget_loss == pytest.approx(0.1 * sum((soft - 0.5) ** 2 for soft in totals.soft))
    for index, unit in enumerate(parts.config.units):
        assert float(parts.routers[unit].state.density) == pytest.approx(totals.soft[index], rel=1e-6)
        assert totals.soft[index] != totals.density[index]


@pytest.mark.parametrize(
    "overrides",
    [[f"routing.router={router}"] for router in ("random", "highway", "mod", "random_ltd", "dense")]
    + [["routing.force=keep_none"]],
    ids=str,
)
def test_what_has_no_budget_reports_none(start, advance, tiny, overrides):
    assert advance(start(tiny(*overrides)), 1)[0].budget_loss == 0.0


def test_experts_report_their_balance_and_remember_the_load(start, advance, tiny):
    parts = start(tiny(*MOE, "routing.moe.balance_weight=0.5"))
    (result,) = advance(parts, 1)
    expected = 0.0
    for unit in parts.config.units:
        records = [micro.info.routing.records[unit.key] for micro in result.micros]
        share = sum(record.counts_E for record in records).double() / result.totals.tokens
        probability = torch.stack([record.probability_E for record in records]).double().mean(0)
        expected += float(balance_loss(share, probability, 0.5))
        assert parts.routers[unit].state.share_E.tolist() == pytest.approx(share.tolist(), rel=1e-6)
    assert result.budget_loss == pytest.approx(expected, rel=1e-5)


def test_documents_that_do_not_attend_to_each_other_need_fewer_pairs(start, advance, tiny):
    apart, together = (
        advance(start(tiny(f"data.attend_across_documents={str(across).lower()}")), 1)[0] for across in (False, True)
    )
    assert together.totals.dense_pairs == (8 * 32 * 33 // 2,) * 2
    computed, needed = apart.totals.dense_pairs
    assert needed < together.totals.dense_pairs[1] and needed <= computed
    starts = [micro.info.starts_SB for micro in apart.micros]
    assert needed == sum(s + 1 - int(at[s, b]) for at in starts for s in range(32) for b in range(at.shape[1]))
    assert apart.flops.parts["attention"] < together.flops.parts["attention"]
