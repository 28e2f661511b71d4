"""Choice, capacity, gates and load balance of experts, against plain loops and autograd of the formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaroute.routing.experts import (
    ExpertRouter,
    balance,
    balance_loss,
    choose,
    expert_capacity,
    expert_plan,
    gates,
    limit,
    sample_shares,
)

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 5), st.integers(0, 10_000))


def probabilities(seq: int, batch: int, experts: int, seed: int, levels: int | None = None) -> torch.Tensor:
    """Random softmax probabilities [S, B, E]; with `levels`, of so few logits that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(seq, batch, experts, generator=generator)
    if levels is not None:
        logits = torch.randint(0, levels, logits.shape, generator=generator).float()
    return logits.softmax(-1)


@given(SHAPES, st.integers(1, 2), st.sampled_from([None, 2]))
@settings(deadline=None, max_examples=60)
def test_each_token_gets_its_most_probable_experts(shape, top_k, levels):
    p_SBE = probabilities(*shape, levels=levels)
    chosen_SBE = choose(p_SBE, top_k)
    for s, row in enumerate(p_SBE.tolist()):
        for b, values in enumerate(row):
            best = sorted(range(len(values)), key=lambda e: (-values[e], e))[:top_k]
            assert chosen_SBE[s, b].nonzero().flatten().tolist() == sorted(best)


@given(SHAPES, st.integers(1, 2), st.integers(1, 9), st.sampled_from([None, 2]))
@settings(deadline=None, max_examples=100)
def test_the_limit_drops_the_least_probable_of_each_sample_and_the_later_of_equals(shape, top_k, capacity, levels):
    p_SBE = probabilities(*shape, levels=levels)
    chosen_SBE = choose(p_SBE, top_k)
    kept_SBE = limit(p_SBE, chosen_SBE, capacity)
    _, batch, experts = p_SBE.shape
    for b in range(batch):
        for e in range(experts):
            wanted = chosen_SBE[:, b, e].nonzero().flatten().tolist()
            expected = sorted(wanted, key=lambda s: (-p_SBE[s, b, e].item(), s))[:capacity]
            assert kept_SBE[:, b, e].nonzero().flatten().tolist() == sorted(expected)


def test_samples_do_not_compete_for_room():
    p_SBE = probabilities(12, 4, 3, seed=0)
    together = limit(p_SBE, choose(p_SBE, 1), 3)
    for b in range(4):
        alone = p_SBE[:, b : b + 1]
        assert torch.equal(limit(alone, choose(alone, 1), 3), together[:, b : b + 1])


@pytest.mark.parametrize(
    ("factor", "top_k", "seq", "experts", "rows"),
    [
        (1.25, 1, 64, 4, 20),
        (1.25, 2, 64, 4, 40),
        (1.0, 1, 10, 4, 3),
        (1.25, 1, 64, 1, 64),
        (0.01, 1, 64, 4, 1),
        (1.1, 1, 100, 11, 10),  # 1.1 * 100 / 11 is 10.000000000000002 in floating point
    ],
)
def test_capacity_is_rounded_up_and_at_most_the_sample(factor, top_k, seq, experts, rows):
    assert expert_capacity(factor, top_k, seq, experts) == rows


def test_one_expert_is_weighted_by_its_probability_and_two_by_their_shares():
    p_SBE = torch.tensor([[[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]])
    one = gates(p_SBE, choose(p_SBE, 1), 1)
    assert torch.equal(one, torch.tensor([[[0.0, 0.6, 0.0], [0.5, 0.0, 0.0]]]))
    two = gates(p_SBE, choose(p_SBE, 2), 2)
    torch.testing.assert_close(two, torch.tensor([[[0.0, 2 / 3, 1 / 3], [5 / 8, 0.0, 3 / 8]]]))


@pytest.mark.parametrize("top_k", [1, 2])
def test_gates_are_differentiated_through_the_softmax(top_k):
    logits = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    chosen_SBE = choose(logits, top_k)
    assert torch.autograd.gradcheck(lambda z: gates(z.softmax(-1), chosen_SBE, top_k), logits)


@given(SHAPES, st.integers(1, 2))
@settings(deadline=None, max_examples=60)
def test_the_plan_lists_the_pairs_expert_by_expert(shape, top_k):
    p_SBE = probabilities(*shape)
    kept_SBE = limit(p_SBE, choose(p_SBE, top_k), 2)
    seq, batch, experts = kept_SBE.shape
    pairs = [(e, s * batch + b) for e in range(experts) for s in range(seq) for b in range(batch) if kept_SBE[s, b, e]]
    plan = expert_plan(kept_SBE)
    assert plan.rows_R.tolist() == [row for _, row in pairs]
    assert plan.per_expert == tuple(sum(expert == e for expert, _ in pairs) for e in range(experts))
    assert p_SBE.flatten()[plan.slots_R].tolist() == [p_SBE.view(-1, experts)[row, e].item() for e, row in pairs]


@pytest.mark.parametrize("scope", ["global", "sample"])
def test_the_added_gradient_is_that_of_the_balance_loss(scope):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 2, 3, generator=generator, requires_grad=True)
    upstream = torch.randn(6, 2, 3, generator=generator)
    share = torch.tensor([0.7, 0.2, 0.1]) if scope == "global" else torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])
    p_SBE = logits.softmax(-1)
    mean = p_SBE.mean((0, 1)) if scope == "global" else p_SBE.mean(0)
    (expected,) = torch.autograd.grad((p_SBE * upstream).sum() + 8.0 * balance_loss(share, mean, 0.5), logits)
    p_SBE = logits.softmax(-1)
    out_SBE = balance(p_SBE, share, weight=0.5, scale=8.0)
    assert torch.equal(out_SBE, p_SBE)
    (found,) = torch.autograd.grad((out_SBE * upstream).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_the_gradient_over_micro_batches_is_that_over_the_whole_batch():
    p_SBE = probabilities(8, 4, 3, seed=8).requires_grad_()
    share_BE = sample_shares(choose(p_SBE, 1))
    (whole,) = torch.autograd.grad((balance(p_SBE, share_BE, 0.5, 1.0) * 0.0).sum(), p_SBE)
    pairs = zip(p_SBE.split(2, 1), share_BE.split(2), strict=True)
    halves = sum((balance(part, share, 0.5, 0.5) * 0.0).sum() for part, share in pairs)
    assert whole.abs().min() == 0 < whole.abs().max()
    torch.testing.assert_close(torch.autograd.grad(halves, p_SBE)[0], whole)


def test_shares_of_a_sample_are_those_of_its_choices():
    first, second = [[1, 0, 1], [1, 1, 0]], [[0, 1, 1], [0, 1, 1]]
    chosen_SBE = torch.tensor([first, second]).transpose(0, 1).bool()
    assert sample_shares(chosen_SBE).tolist() == [[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]]


def test_the_balance_loss_is_its_weight_when_all_experts_are_alike_and_grows_with_the_gap():
    even, skewed = torch.full((4,), 0.25), torch.tensor([0.7, 0.1, 0.1, 0.1])
    assert balance_loss(even, even, 0.01).item() == pytest.approx(0.01)
    assert balance_loss(skewed, skewed, 0.01).item() == pytest.approx(0.01 * 4 * (0.49 + 0.03))


def test_a_balance_gradient_evens_out_a_skewed_router():
    router = ExpertRouter(8, 4)
    generator = torch.Generator().manual_seed(5)
    h_SBH = torch.randn(64, 4, 8, generator=generator) + 0.5
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        router.weight[0] += 0.5
    spread = []
    for _ in range(200):
        p_SBE = router(h_SBH)
        counts_E = choose(p_SBE, 1).sum((0, 1))
        spread.append((counts_E.max() / counts_E.float().mean()).item())
        (balance(p_SBE, router.state.share_E, 1.0, 1.0) * 0.0).sum().backward()
        with torch.no_grad():
            router.weight -= 0.5 * router.weight.grad
        router.weight.grad = None
        router.update(counts_E)
    assert spread[0] > 2.0
    assert spread[-1] < 1.4


def test_a_router_before_its_first_step_feels_no_balance():
    router = ExpertRouter(8, 4)
    h_SBH = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(6))
    (balance(router(h_SBH), router.state.share_E, 1.0, 1.0) * 0.0).sum().backward()
    assert router.weight.grad.abs().max() < 1e-7


def test_the_load_stays_in_float32_when_the_model_is_cast():
    router = ExpertRouter(8, 3)
    router.update(torch.tensor([1, 1, 1]))
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.state.share_E.tolist() == torch.full((3,), 1 / 3).tolist()
    assert router(torch.zeros(2, 1, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_load_is_part_of_the_state():
    router, other = ExpertRouter(8, 3), ExpertRouter(8, 3)
    router.update(torch.tensor([5, 3, 2]))
    other.load_state_dict(router.state_dict())
    assert other.state.share_E.tolist() == torch.tensor([0.5, 0.3, 0.2]).tolist()


def test_probabilities_are_the_softmax_of_a_linear_map():
    router = ExpertRouter(6, 3)
    generator = torch.Generator().manual_seed(7)
    h_SBH = torch.randn(4, 2, 6, generator=generator)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
    for s in range(4):
        for b in range(2):
            logits = [
                sum(x * w for x, w in zip(h_SBH[s, b].tolist(), row, strict=True)) for row in router.weight.tolist()
            ]
            total = sum(math.exp(z) for z in logits)
            assert router(h_SBH)[s, b].tolist() == pytest.approx([math.exp(z) / total for z in logits], rel=1e-5)
