"""Attention of chosen queries against a plain softmax over explicit masks."""

import pytest
import torch

from megaroute.model import attention
from megaroute.model.attention import attention_pairs, causal_attention, causal_pairs, chosen_attention
from megaroute.routing.plan import Plan, make_plan

CPU = torch.device("cpu")
SEQ, BATCH, HEADS, WIDTH = 24, 3, 4, 6


def plain_attention(q_SBnD, k_SBGD, v_SBGD) -> torch.Tensor:
    """Causal softmax attention of every position, [S, B, n * D], one head after the other."""
    seq, _, heads, width = q_SBnD.shape
    shared = heads // k_SBGD.shape[2]
    hidden = torch.ones(seq, seq).triu(1).bool()
    outs = []
    for head in range(heads):
        q, k, v = q_SBnD[:, :, head], k_SBGD[:, :, head // shared], v_SBGD[:, :, head // shared]
        scores = torch.einsum("sbd,tbd->bst", q, k) / width**0.5
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outs.append(torch.einsum("bst,tbd->sbd", weights, v))
    return torch.cat(outs, -1)


def random_qkv(groups: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(SEQ, BATCH, heads, WIDTH) for heads in (HEADS, groups, groups)]
    return [torch.randn(shape, generator=generator, dtype=torch.double, requires_grad=True) for shape in shapes]


def random_keep(density: float) -> torch.Tensor:
    return torch.rand(SEQ, BATCH, generator=torch.Generator().manual_seed(1)) < density


def sorted_rows(plan: Plan) -> torch.Tensor:
    """Rows of the flattened micro-batch in the order of attention: by sample, then by position."""
    return plan.rows_R if plan.order_R is None else plan.rows_R[plan.order_R]


def one_sample_empty() -> torch.Tensor:
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


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_causal_attention_is_plain_attention(groups):
    q, k, v = random_qkv(groups)
    torch.testing.assert_close(causal_attention(q, k, v), plain_attention(q, k, v))


@pytest.mark.parametrize("block", [4, 256], ids=lambda size: f"blocks of {size}")
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("keep", KEEPS)
def test_chosen_attention_is_plain_attention_of_the_chosen(monkeypatch, keep, groups, chunks, block):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    q, k, v = random_qkv(groups)
    plan = make_plan(KEEPS[keep], chunks)
    rows = sorted_rows(plan)
    ours = chosen_attention(q.reshape(-1, HEADS, WIDTH)[rows], k, v, plan)
    plain = plain_attention(q, k, v).reshape(-1, HEADS * WIDTH)[rows]
    torch.testing.assert_close(ours, plain)
    upstream = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad((ours * upstream).sum(), (q, k, v)),
        torch.autograd.grad((plain * upstream).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("block", [1, 4, 256])
@pytest.mark.parametrize("keep", KEEPS)
def test_pairs_are_those_of_the_calls_that_attention_makes(monkeypatch, keep, block):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    plan = make_plan(KEEPS[keep])
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        queries, keys = q.shape[2], k.shape[2]
        calls.append(keys * (keys + 1) // 2 if options.get("is_causal") else queries * keys)
        return real(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k, v = random_qkv(2)
    chosen_attention(q.reshape(-1, HEADS, WIDTH)[plan.rows_R], k, v, plan)
    assert attention_pairs(plan, SEQ, CPU) == sum(calls)


def test_pairs_by_hand(monkeypatch):
    keep_SB = torch.zeros(8, 2, dtype=torch.bool)
    keep_SB[[1, 2, 6], 0] = True  # blocks of two queries: 1 and 2 see 3 keys each, 6 sees 7
    keep_SB[[4], 1] = True  # sees 5
    monkeypatch.setattr(attention, "QUERY_BLOCK", 2)
    assert attention_pairs(make_plan(keep_SB), 8, CPU) == 2 * 3 + 7 + 5
    assert attention_pairs(make_plan(torch.ones(8, 2, dtype=torch.bool)), 8, CPU) == 2 * 2 * (2 + 4 + 6 + 8)
    assert causal_pairs(batch=2, seq=8) == 2 * 36


def test_on_an_accelerator_each_chosen_query_is_masked_over_the_whole_sequence():
    plan = make_plan(random_keep(0.5))
    assert attention_pairs(plan, SEQ, torch.device("cuda")) == plan.rows_R.numel() * SEQ
