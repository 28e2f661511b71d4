"""Capacity against plain Python, and under a compiler that forbids reading the device."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaroute.routing.capacity import Pool, capacity_plan, capacity_rows, limit
from megaroute.routing.plan import make_plan


@st.composite
def decisions(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """keep_SB, margin_SB with many equal values, rows and chunks."""
    chunks = draw(st.sampled_from([1, 2, 4]))
    length, batch = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    count = chunks * length * batch
    bits = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    margins = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 2.0]), min_size=count, max_size=count))
    shape = (chunks * length, batch)
    return torch.tensor(bits).view(shape), torch.tensor(margins).view(shape), draw(st.integers(1, length)), chunks


def plain_limit(keep: list[bool], margin: list[float], rows: int) -> list[bool]:
    kept = [i for i, k in enumerate(keep) if k]
    stays = set(sorted(kept, key=lambda i: (-margin[i], i))[:rows])
    return [i in stays for i in range(len(keep))]


def limited(keep_SB: Tensor, margin_SB: Tensor, rows: int, chunks: int) -> Tensor:
    """`limit` of every chunk, as tensor ranks do it under sequence parallelism."""
    pairs = zip(keep_SB.chunk(chunks), margin_SB.chunk(chunks), strict=True)
    return torch.cat([limit(keep, margin, rows) for keep, margin in pairs])


@settings(deadline=None, max_examples=200)
@given(decisions())
def test_each_sample_keeps_its_highest_margins_and_of_equal_ones_the_earlier(case):
    keep_SB, margin_SB, rows, chunks = case
    result = limited(keep_SB, margin_SB, rows, chunks)
    length = keep_SB.shape[0] // chunks
    for chunk in range(chunks):
        at = slice(chunk * length, (chunk + 1) * length)
        for b in range(keep_SB.shape[1]):
            plain = plain_limit(keep_SB[at, b].tolist(), margin_SB[at, b].tolist(), rows)
            assert result[at, b].tolist() == plain


@settings(deadline=None, max_examples=100)
@given(decisions())
def test_a_sample_is_limited_as_if_it_were_alone(case):
    keep_SB, margin_SB, rows, _ = case
    together = limit(keep_SB, margin_SB, rows)
    for b in range(keep_SB.shape[1]):
        alone = limit(keep_SB[:, b : b + 1], margin_SB[:, b : b + 1], rows)
        assert torch.equal(together[:, b : b + 1], alone)


def plain_choice(keep: list[bool], rows: int) -> list[int]:
    kept = [i for i, k in enumerate(keep) if k]
    skipped = [i for i, k in enumerate(keep) if not k]
    return sorted(kept + skipped[: rows - len(kept)])


@settings(deadline=None, max_examples=300)
@given(decisions())
def test_a_plan_has_the_kept_tokens_and_the_earliest_skipped_ones(case):
    keep_SB, margin_SB, rows, chunks = case
    seq, batch = keep_SB.shape
    length = seq // chunks
    keep_SB = limited(keep_SB, margin_SB, rows, chunks)
    plan = capacity_plan(keep_SB, rows, chunks)
    expected = []
    for chunk in range(chunks):
        for b in range(batch):
            keep = keep_SB[chunk * length : (chunk + 1) * length, b].tolist()
            expected += [(chunk * length + i) * batch + b for i in plain_choice(keep, rows)]
    assert plan.rows_R.tolist() == expected
    assert plan.valid_R is not None and plan.kept is None
    assert plan.valid_R.tolist() == keep_SB.flatten()[plan.rows_R].tolist()
    assert plan.valid_R.sum() == keep_SB.sum()
    assert plan.everything == (rows == length)
    assert plan.per_sample == (chunks * rows,) * batch


@settings(deadline=None, max_examples=200)
@given(decisions())
def test_order_and_positions_go_by_sample_then_position(case):
    keep_SB, margin_SB, rows, chunks = case
    batch = keep_SB.shape[1]
    plan = capacity_plan(limited(keep_SB, margin_SB, rows, chunks), rows, chunks)
    sorted_rows = plan.rows_R if plan.order_R is None else plan.rows_R[plan.order_R]
    assert torch.equal(sorted_rows // batch, plan.positions_R)
    keys = [(row % batch, row // batch) for row in sorted_rows.tolist()]
    assert keys == sorted(set(keys))
    locals_ = [plan.local(chunk) for chunk in range(chunks)]
    assert torch.equal(torch.cat([part.rows_r for part in locals_]), plan.rows_R)
    assert all(part.kept is None and part.valid_r is not None for part in locals_)


@settings(deadline=None, max_examples=200)
@given(decisions())
def test_valid_rows_are_those_of_the_exact_plan_when_capacity_suffices(case):
    keep_SB, _, _, chunks = case
    rows = keep_SB.shape[0] // chunks
    plan, exact = capacity_plan(keep_SB, rows, chunks), make_plan(keep_SB, chunks)
    for chunk in range(chunks):
        mine, theirs = plan.local(chunk), exact.local(chunk)
        assert mine.rows_r[mine.valid_r].tolist() == theirs.rows_r[: theirs.kept].tolist()


def random_case(seed: int = 0, share: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(64, 3, generator=generator) < share, torch.randn(64, 3, generator=generator)


def plan_of(keep_SB: Tensor, margin_SB: Tensor) -> tuple[Any, ...]:
    plan = capacity_plan(limit(keep_SB, margin_SB, 16), 16, 2)
    return plan.rows_R, plan.valid_R, plan.order_R, plan.positions_R


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_nothing_reads_the_device(backend):
    # fullgraph refuses .item(), and nonzero and boolean indexing, whose shapes depend on values.
    torch._dynamo.reset()
    compiled = torch.compile(plan_of, fullgraph=True, backend=backend)
    for seed, share in ((0, 0.5), (1, 0.0), (2, 1.0)):
        keep_SB, margin_SB = random_case(seed, share)
        for got, expected in zip(compiled(keep_SB, margin_SB), plan_of(keep_SB, margin_SB), strict=True):
            assert torch.equal(got, expected)


def exact_plan_of(keep_SB: Tensor) -> Tensor:
    return make_plan(keep_SB).rows_R


def test_the_check_above_does_catch_a_plan_that_reads_the_device():
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(exact_plan_of, fullgraph=True, backend="eager")(random_case()[0])


def test_shapes_do_not_depend_on_decisions():
    shapes = set()
    for share in (0.0, 0.3, 1.0):
        keep_SB, margin_SB = random_case(share=share)
        plan = capacity_plan(limit(keep_SB, margin_SB, 16), 16)
        shapes.add((plan.rows_R.shape, plan.per_sample, plan.everything))
    assert len(shapes) == 1


def test_none_kept_computes_the_earliest_rows_and_none_of_them_counts():
    plan = capacity_plan(torch.zeros(6, 2, dtype=torch.bool), 2)
    assert plan.positions_R.tolist() == [0, 1, 0, 1]
    assert plan.valid_R is not None and not plan.valid_R.any()


def test_all_kept_of_all_equal_margins_keeps_the_earliest():
    keep_SB = torch.ones(6, 2, dtype=torch.bool)
    keep_SB = limit(keep_SB, torch.zeros(6, 2), 4)
    assert keep_SB.sum(1).tolist() == [2, 2, 2, 2, 0, 0]
    plan = capacity_plan(keep_SB, 4)
    assert plan.positions_R.tolist() == [0, 1, 2, 3] * 2
    assert plan.valid_R is not None and plan.valid_R.all()


@settings(deadline=None)
@given(st.floats(0.25, 4), st.floats(0.01, 1), st.integers(1, 5000))
def test_rows_are_the_least_multiple_of_16_that_suffices(factor, density, tokens):
    rows = capacity_rows(factor, density, tokens)
    assert rows == tokens or rows % 16 == 0
    assert rows >= min(factor * density * tokens - 1e-5, tokens)
    assert rows - 16 < math.ceil(factor * density * tokens)
    assert rows <= tokens


def test_rows_of_round_numbers():
    assert capacity_rows(1.0, 0.5, 1024) == 512
    assert capacity_rows(1.1, 0.1, 1600) == 176  # 1.1 * 0.1 * 1600 is 176.00000000000003
    assert capacity_rows(1.25, 1.0, 1000) == 1000
    assert capacity_rows(1.0, 0.001, 64) == 16
    assert capacity_rows(1.0, 0.5, 10) == 10


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_units_of_a_pool_never_compute_more_than_their_shares_together(data):
    length, batch = 16 * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    pool, shares, computed, unused = Pool(), 0, 0, [0] * batch
    for _ in range(data.draw(st.integers(1, 4))):
        share = capacity_rows(1.0, data.draw(st.floats(0.05, 1)), length)
        bits = data.draw(st.lists(st.booleans(), min_size=length * batch, max_size=length * batch))
        wanted_SB = torch.tensor(bits).view(length, batch)
        kept_SB = pool.limit(wanted_SB, torch.zeros(length, batch), share)
        shares, computed = shares + batch * share, computed + make_plan(kept_SB, multiple=16).rows_per_chunk
        assert computed <= shares
        for b in range(batch):  # each sample uses all of what it has
            kept = min(int(wanted_SB[:, b].sum()), share + unused[b])
            assert kept_SB[:, b].sum() == kept
            unused[b] += share - -(-kept // 16) * 16
    assert pool.unused_B is not None and pool.unused_B.tolist() == unused


def test_a_sample_has_no_part_in_what_others_left():
    pool, few = Pool(), torch.zeros(64, 2, dtype=torch.bool)
    few[:10, 0] = few[:, 1] = True
    assert pool.limit(few, torch.zeros(64, 2), 32).sum(0).tolist() == [10, 32]
    everyone = torch.ones(64, 2, dtype=torch.bool)
    assert pool.limit(everyone, torch.zeros(64, 2), 32).sum(0).tolist() == [48, 32]
    assert pool.limit(everyone, torch.zeros(64, 2), 32).sum(0).tolist() == [32, 32]


def test_rows_may_differ_by_sample():
    margin = torch.arange(6.0).view(3, 2)
    kept = limit(torch.ones(3, 2, dtype=torch.bool), margin, torch.tensor([1, 2]))
    assert kept.tolist() == [[False, False], [False, True], [True, True]]
