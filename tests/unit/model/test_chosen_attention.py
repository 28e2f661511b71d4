"""Attention of chosen queries against a plain softmax over explicit masks."""

import pytest
import torch
from torch import Tensor

from megaroute.model import blocked_attention
from megaroute.model.blocked_attention import blocks
from megaroute.model.chosen_attention import (
    attention_pairs,
    causal_attention,
    chosen_attention,
    every_row,
    masked_attention,
)
from megaroute.model.flops import causal_pairs
from megaroute.routing.capacity import capacity_plan, limit
from megaroute.routing.plan import Plan, make_plan

CPU = torch.device("cpu")
SEQ, BATCH, HEADS, WIDTH = 24, 3, 4, 6


def plain_attention(q_SBnD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, starts_SB: Tensor | None = None) -> Tensor:
    """Causal softmax attention of every position, [S, B, n * D], one head after the other."""
    seq, _, heads, width = q_SBnD.shape
    shared = heads // k_SBGD.shape[2]
    hidden_BSS = torch.ones(seq, seq).triu(1).bool()[None]
    if starts_SB is not None:
        hidden_BSS = hidden_BSS | (torch.arange(seq) < starts_SB.t()[:, :, None])
    outs = []
    for head in range(heads):
        q, k, v = q_SBnD[:, :, head], k_SBGD[:, :, head // shared], v_SBGD[:, :, head // shared]
        scores = torch.einsum("sbd,tbd->bst", q, k) / width**0.5
        weights = scores.masked_fill(hidden_BSS, float("-inf")).softmax(-1)
        outs.append(torch.einsum("bst,tbd->sbd", weights, v))
    return torch.cat(outs, -1)


def random_qkv(groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(SEQ, BATCH, heads, WIDTH) for heads in (HEADS, groups, groups)]
    return [torch.randn(shape, generator=generator, dtype=torch.double, requires_grad=True) for shape in shapes]


def random_keep(density: float) -> Tensor:
    return torch.rand(SEQ, BATCH, generator=torch.Generator().manual_seed(1)) < density


def sorted_rows(plan: Plan) -> Tensor:
    """Rows of the flattened micro-batch in the order of attention: by sample, then by position."""
    return plan.rows_R if plan.order_R is None else plan.rows_R[plan.order_R]


def one_sample_empty() -> Tensor:
    keep_SB = random_keep(0.5)
    keep_SB[:, 1] = False
    return keep_SB


KEEPS = {
    "half": random_keep(0.5),
    "few": random_keep(0.05),
    "everything": random_keep(2.0),
    "nothing": random_keep(-1.0),
    "one sample empty": one_sample_empty(),
}
# Documents of one sample in each column: several, one alone, and single tokens at the end.
STARTS = torch.stack(
    (torch.tensor([0] * 7 + [7] * 11 + [18] * 6), torch.zeros(SEQ), torch.tensor([0] * 20 + [20, 21, 22, 23])), 1
).int()
BOUNDARIES = pytest.mark.parametrize("starts", [None, STARTS], ids=["across documents", "within documents"])


def small_blocks(patch: pytest.MonkeyPatch, size: int) -> None:
    patch.setattr(blocked_attention, "BLOCK", size)
    patch.setattr(blocked_attention, "SPARSE_BLOCK", max(size // 2, 1))


def assert_same_with_gradients(ours: Tensor, plain: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, plain)
    upstream = torch.randn_like(plain)
    grads = [torch.autograd.grad((out * upstream).sum(), inputs) for out in (ours, plain)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@BOUNDARIES
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_causal_attention_is_plain_attention(groups, starts):
    q, k, v = random_qkv(groups)
    assert_same_with_gradients(causal_attention(q, k, v, starts), plain_attention(q, k, v, starts), [q, k, v])


@BOUNDARIES
@pytest.mark.parametrize("block", [1, 6], ids=lambda size: f"blocks of {size}")
@pytest.mark.parametrize("kept", [0, 100], ids=["weights computed again", "weights kept"])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("keep", KEEPS)
def test_chosen_attention_is_plain_attention_of_the_chosen(monkeypatch, keep, groups, chunks, kept, block, starts):
    small_blocks(monkeypatch, block)
    monkeypatch.setattr(blocked_attention, "KEPT_WEIGHTS", kept)
    q, k, v = random_qkv(groups)
    plan = make_plan(KEEPS[keep], chunks)
    rows = sorted_rows(plan)
    ours = chosen_attention(q.reshape(-1, HEADS, WIDTH)[rows], k, v, plan, starts)
    plain = plain_attention(q, k, v, starts).reshape(-1, HEADS * WIDTH)[rows]
    assert_same_with_gradients(ours, plain, [q, k, v])


@BOUNDARIES
@pytest.mark.parametrize("keep", KEEPS)
def test_masked_attention_is_the_same(keep, starts):
    q, k, v = random_qkv(2)
    plan = make_plan(KEEPS[keep])
    results = [
        attend(q.reshape(-1, HEADS, WIDTH)[plan.rows_R], k, v, plan, starts)
        for attend in (masked_attention, chosen_attention)
    ]
    assert_same_with_gradients(*results, [q, k, v])


def test_rows_of_a_capacity_plan_attend_like_any_other(monkeypatch):
    small_blocks(monkeypatch, 4)
    q, k, v = random_qkv(2)
    plan = capacity_plan(limit(random_keep(0.3), torch.rand(SEQ, BATCH), 8), 8)
    ours = chosen_attention(q.reshape(-1, HEADS, WIDTH)[plan.rows_R], k, v, plan, STARTS)
    assert_same_with_gradients(ours, plain_attention(q, k, v, STARTS).reshape(-1, 24)[plan.rows_R], [q, k, v])


def test_bfloat16_is_computed_in_float32():
    q, k, v = (x.detach().bfloat16() for x in random_qkv(2))
    plan = make_plan(random_keep(0.5))
    rows_q = q.reshape(-1, HEADS, WIDTH)[plan.rows_R]
    ours = chosen_attention(rows_q, k, v, plan)
    wide = chosen_attention(rows_q.float(), k.float(), v.float(), plan)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, wide.bfloat16())


@BOUNDARIES
@pytest.mark.parametrize("block", [2, 64])
@pytest.mark.parametrize("keep", KEEPS)
def test_pairs_are_those_that_attention_computes(monkeypatch, keep, block, starts):
    small_blocks(monkeypatch, block)
    plan = make_plan(KEEPS[keep])
    computed = []
    real = torch.softmax
    monkeypatch.setattr(
        torch, "softmax", lambda x, *_, **keywords: computed.append(x.numel()) or real(x, -1, **keywords)
    )
    q, k, v = random_qkv(2)
    chosen_attention(q.reshape(-1, HEADS, WIDTH)[plan.rows_R], k, v, plan, starts)
    assert attention_pairs(plan, SEQ, CPU, starts) * HEADS == sum(computed)


def test_pairs_by_hand(monkeypatch):
    small_blocks(monkeypatch, 4)
    keep_SB = torch.zeros(8, 2, dtype=torch.bool)
    keep_SB[[1, 2, 6], 0] = True  # fewer than half, blocks of two: 1 and 2 see 3 keys each, 6 sees 7
    keep_SB[[4], 1] = True  # sees 5
    assert attention_pairs(make_plan(keep_SB), 8, CPU) == 2 * 3 + 7 + 5
    starts_SB = torch.tensor([0, 0, 2, 2, 2, 2, 6, 6])[:, None].expand(8, 2)
    assert attention_pairs(make_plan(keep_SB), 8, CPU, starts_SB) == 2 * 3 + 1 + 3
    # All of them, blocks of four.
    assert attention_pairs(make_plan(torch.ones(8, 2, dtype=torch.bool)), 8, CPU) == 2 * 4 * (4 + 8)
    assert causal_pairs(rows=2, sequence_length=8) == 2 * 36


def test_blocks_cover_every_query_of_every_sample_once():
    rows = [0, 1, 40, 200, 33]
    found = blocks(rows, 256)
    assert [query for block in found for query in range(block.start, block.stop)] == list(range(sum(rows)))
    for block in found:
        assert sum(rows[: block.sample]) <= block.start < block.stop <= sum(rows[: block.sample + 1])


def test_torch_compile_does_not_break_on_reading_positions():
    q, k, v = random_qkv(2)
    plan = every_row(SEQ, BATCH, CPU)

    def attend(q, k, v):
        return chosen_attention(q.transpose(0, 1).flatten(0, 1), k, v, plan, STARTS)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_same_with_gradients(compiled(q, k, v), attend(q, k, v), [q, k, v])


def test_the_operators_keep_the_rules_of_the_library():
    q, k, v = random_qkv(2)
    plan = make_plan(random_keep(0.4))
    rows_q = q.detach().reshape(-1, HEADS, WIDTH)[plan.rows_R].requires_grad_()
    arguments = (rows_q, k, v, plan.positions_R, STARTS, list(plan.per_sample))
    operator = torch.ops.megaroute.blocked_attention.default
    torch.library.opcheck(operator, (*arguments, False))
    # Room for weights that do not exist is not written to, so two runs cannot be compared there.
    comparing_nothing = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (*arguments, True), test_utils=comparing_nothing)


def test_weights_are_kept_for_training_on_few_rows_only(monkeypatch):
    monkeypatch.setattr(blocked_attention, "KEPT_WEIGHTS", 1)
    q, k, v = random_qkv(4)
    kept = []
    for density, training in ((0.2, True), (0.2, False), (1.0, True)):
        plan = make_plan(random_keep(density) if density < 1 else torch.ones(SEQ, BATCH, dtype=torch.bool))
        q_RnD = q.reshape(-1, HEADS, WIDTH)[plan.rows_R]
        with torch.set_grad_enabled(training), torch.profiler.profile(record_shapes=True) as profile:
            chosen_attention(q_RnD, k, v, plan)
        calls = [event for event in profile.events() if event.name == "megaroute::blocked_attention"]
        kept.append(any(event.concrete_inputs[-1] for event in calls))
    assert kept == [True, False, False]
