import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaroute.routing.plan import make_plan, round_up


@st.composite
def decisions(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    chunks = draw(st.sampled_from([1, 2, 4]))
    seq, batch = chunks * draw(st.integers(1, 6)), draw(st.integers(1, 4))
    bits = draw(st.lists(st.booleans(), min_size=seq * batch, max_size=seq * batch))
    return torch.tensor(bits).view(seq, batch), chunks, draw(st.sampled_from([1, 4, 16]))


@settings(deadline=None, max_examples=200)
@given(decisions())
def test_every_kept_row_is_planned_once_in_its_chunk_and_padding_comes_last(case):
    keep_SB, chunks, multiple = case
    seq, batch = keep_SB.shape
    plan = make_plan(keep_SB, chunks, multiple)
    per_chunk = seq // chunks * batch
    assert plan.kept is not None and plan.valid_R is None
    seen = []
    for chunk in range(chunks):
        rows, kept, valid = plan.local(chunk)
        assert kept is not None and valid is None
        assert len(rows) == plan.rows_per_chunk
        assert all(chunk * per_chunk <= row < (chunk + 1) * per_chunk for row in rows.tolist())
        assert set(rows[kept:].tolist()) <= {chunk * per_chunk}
        seen += rows[:kept].tolist()
    assert sorted(seen) == keep_SB.flatten().nonzero().flatten().tolist()
    wanted = max(1, *plan.kept)
    assert wanted <= plan.rows_per_chunk < wanted + multiple
    assert plan.rows_per_chunk % multiple == 0 or plan.rows_per_chunk == per_chunk
    assert plan.everything == bool(keep_SB.all())


@settings(deadline=None, max_examples=200)
@given(decisions())
def test_order_sorts_rows_by_sample_then_position(case):
    keep_SB, chunks, multiple = case
    batch = keep_SB.shape[1]
    plan = make_plan(keep_SB, chunks, multiple)
    rows = plan.rows_R if plan.order_R is None else plan.rows_R[plan.order_R]
    assert torch.equal(rows // batch, plan.positions_R)
    keys = [(row % batch, row // batch) for row in rows.tolist()]
    assert keys == sorted(keys)
    assert [sum(1 for sample, _ in keys if sample == b) for b in range(batch)] == list(plan.per_sample)


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_plan_of_nothing_computes_one_row_per_chunk(chunks):
    plan = make_plan(torch.zeros(4, 2, dtype=torch.bool), chunks)
    assert plan.rows_R.numel() == plan.chunks == chunks
    assert plan.kept == (0,) * chunks and not plan.everything


def test_a_plan_of_everything_is_plainly_causal():
    plan = make_plan(torch.ones(4, 2, dtype=torch.bool), 2)
    assert plan.everything
    assert plan.positions_R.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_an_exact_plan_without_padding_needs_no_permutation():
    keep_SB = torch.tensor([[True, False], [True, True]])
    plan = make_plan(keep_SB)
    assert plan.order_R is None
    assert plan.rows_R.tolist() == [0, 2, 3]  # sample 0 at positions 0 and 1, then sample 1 at position 1
    assert plan.positions_R.tolist() == [0, 1, 1]


def test_rounding_up_stops_at_the_limit():
    assert [round_up(rows, 16, 40) for rows in (1, 16, 17, 33, 40)] == [16, 16, 32, 40, 40]
