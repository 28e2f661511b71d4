"""Rows that end in padding: nothing is learned from it, nothing is executed for it, and no mean has it."""

import numpy as np
import pytest
import torch

from megaroute.training.evaluate import score, validate
from megaroute.training.trace import trace

LENGTH = 48
PADDED = [
    *("data.packing=best_fit", "data.packing_window=2", f"data.sequence_length={LENGTH}", "routing.init_logit_std=2"),
]
CAPACITY = "routing.dispatch.mode=capacity"
MICROBATCH = "routing.budget.estimator=microbatch"
RUNS = {
    "dense": ["routing.router=dense"],
    "exact": [],
    "separate, within documents": ["routing.unit=separate", "data.attend_across_documents=false"],
    "microbatch": [MICROBATCH],
    "soft": ["routing.budget.density=soft"],
    "soft, microbatch": ["routing.budget.density=soft", MICROBATCH],
    "second order": ["routing.benefit=second_order"],
    "every token": ["routing.force=keep_all"],
    "masked": ["routing.dispatch.mode=masked", "routing.gradient=all"],
    "capacity": [CAPACITY, "routing.capacity.factor=0.8"],
    "stage": [CAPACITY, "routing.capacity.scope=stage", "routing.density=0.3"],
    "random": ["routing.router=random"],
    "random_ltd": ["routing.router=random_ltd"],
    "highway": ["routing.router=highway"],
    "mod": ["routing.router=mod"],
    "early_exit": ["routing.router=early_exit"],
}
INDEPENDENT = {name: more for name, more in RUNS.items() if "microbatch" not in name}
"""Those whose gradients are no matter of what shares a micro-batch."""


def fill(parts, ids: int) -> None:
    """Have the stream put other ids where rows are empty."""
    take = parts.stream.take

    def filled(count: int):
        batch = take(count)
        for row, targets in zip(batch.ids, batch.targets, strict=True):
            row[targets + 1 :] = ids
        return batch

    parts.stream.take = filled


@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)
def test_padding_is_in_no_decision_count_or_mean(start, advance, tiny, overrides):
    config = tiny("train.micro_batch=2", *PADDED, *overrides)
    (result,) = advance(start(config), 1)
    totals, micros = result.totals, result.micros
    real = [micro.info.routing.real_SB for micro in micros]
    tokens = [int(real_SB.sum()) for real_SB in real]
    assert totals.tokens == sum(tokens) and totals.positions == 8 * LENGTH and totals.padding > 20
    assert totals.tokens + 8 == sum(totals.supply.tokens.values())
    for index, unit in enumerate(config.units):
        records = [micro.info.routing.records[unit.key] for micro in micros]
        assert not any((record.keep_SB & ~real_SB).any() for record, real_SB in zip(records, real, strict=True))
        kept = [int(record.keep_SB.sum()) for record in records]
        assert totals.density[index] == sum(kept) / sum(tokens)
        if config.routing.force == "keep_all":
            assert totals.density[index] == 1.0
        if config.routing.budget.density == "hard":
            gaps = [(k / n - 0.5) ** 2 for k, n in zip(kept, tokens, strict=True)]
            if MICROBATCH in overrides:
                assert totals.squared_gap[index] == pytest.approx(sum(gaps) / len(gaps), rel=1e-6)
    if config.routing.router in ("mod", "random_ltd"):
        for micro, real_SB in zip(micros, real, strict=True):
            for record in micro.info.routing.records.values():
                assert record.keep_SB.sum(0).tolist() == [max(round(0.5 * n), 1) for n in real_SB.sum(0).tolist()]


@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)
def test_what_stands_in_the_padding_changes_nothing(start, advance, snapshot, tiny, overrides):
    found = []
    for ids in (0, 7):
        parts = start(tiny(*PADDED, *overrides))
        fill(parts, ids)
        results = advance(parts, 3)
        found.append(([result.totals.loss for result in results], [r.grad_norm for r in results], snapshot(parts)))
    (losses, norms, state), (other_losses, other_norms, other_state) = found
    assert (losses, norms) == (other_losses, other_norms)
    assert state.keys() == other_state.keys()
    for name, value in state.items():
        assert not torch.is_tensor(value) or torch.equal(value, other_state[name]), name


@pytest.mark.parametrize("overrides", INDEPENDENT.values(), ids=INDEPENDENT)
def test_the_loss_is_the_mean_over_all_targets_however_rows_are_cut(start, advance, tiny, overrides):
    whole, *others = (advance(start(tiny(f"train.micro_batch={n}", *PADDED, *overrides)), 3) for n in (8, 1, 4))
    for other in others:
        for a, b in zip(other, whole, strict=True):
            assert a.totals.loss == pytest.approx(b.totals.loss, rel=1e-6)
            assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
            assert (a.totals.kept, a.totals.tokens) == (b.totals.kept, b.totals.tokens)
            assert a.totals.soft == pytest.approx(b.totals.soft, rel=1e-5)


def test_counts_of_the_run_are_those_of_tokens(start, advance, tiny):
    parts = start(tiny(*PADDED))
    results = advance(parts, 2)
    assert parts.state.samples == 16
    assert parts.state.tokens == sum(result.totals.tokens for result in results) < 16 * LENGTH


def test_validation_is_the_mean_over_targets_and_their_bytes(start, advance, tiny):
    parts = start(tiny(*PADDED, "train.validate_samples=16"))
    with torch.no_grad():
        micros, reports = score(parts, 16)
    real = torch.cat([micro.info.routing.real_SB.T for micro in micros])
    losses = torch.cat([report["losses"] for report in reports]).double()[real]
    labels = torch.cat([micro.labels_BS for micro in micros])[real]
    found = validate(parts)
    assert 0 < len(losses) < 16 * LENGTH - 20
    assert found.loss == pytest.approx(float(losses.mean()), rel=1e-9)
    text = int(parts.token_bytes[labels.numpy()].sum())
    assert found.bits_per_byte == pytest.approx(float(losses.sum()) / np.log(2) / text, rel=1e-9)


def test_passages_of_the_report_end_where_their_rows_do(start, tiny):
    parts = start(tiny(*PADDED))
    found = trace(parts, 4)
    with torch.no_grad():
        micros, _ = score(parts, 4)
    lengths = [count for micro in micros for count in micro.row_tokens]
    assert [len(passage["tokens"]) for passage in found["passages"]] == lengths and min(lengths) < LENGTH
    for passage, length in zip(found["passages"], lengths, strict=True):
        assert {len(keep) for keep in passage["keep"]} == {len(passage["loss"])} == {length}
