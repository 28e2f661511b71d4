"""Rotary embedding against Megatron-core's own and against a plain rotation."""

import math

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor

from megaroute.model.rotary import rotate, rotate_keys

SEQ, BATCH, HEADS, WIDTH = 9, 2, 3, 8


@pytest.fixture
def angles() -> Tensor:
    halves = torch.outer(torch.arange(SEQ), 10000.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH))
    return torch.cat((halves, halves), -1)[:, None, None]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(SEQ, BATCH, HEADS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def test_each_pair_of_a_head_turns_by_its_angle(x, angles):
    turned = rotate(x, angles)
    for position, pair in ((0, 0), (3, 1), (8, 3)):
        angle = position * 10000.0 ** (-2 * pair / WIDTH)
        first, second = x[position, 1, 2, pair], x[position, 1, 2, pair + WIDTH // 2]
        assert turned[position, 1, 2, pair] == pytest.approx(
            float(first * math.cos(angle) - second * math.sin(angle)), abs=1e-6
        )
        assert turned[position, 1, 2, pair + WIDTH // 2] == pytest.approx(
            float(second * math.cos(angle) + first * math.sin(angle)), abs=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.double, torch.float, torch.bfloat16], ids=str)
def test_is_megatron_cores_convention(x, angles, dtype):
    x = x.to(dtype).requires_grad_()
    ours, theirs = rotate(x, angles), _apply_rotary_pos_emb_bshd(x, angles, rotary_interleaved=False)
    # Rounded once here, after each operation there.
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, theirs, **tolerance)
    upstream = torch.randn_like(theirs)
    grads = [torch.autograd.grad((y * upstream).sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*grads, **tolerance)


def test_gradcheck(x, angles):
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles[:4]), x[:4].clone().requires_grad_())


def test_chosen_rows_turn_by_the_angles_of_their_positions(x, angles):
    positions = torch.tensor([1, 4, 4, 8])
    rows = rotate(x[positions, 0], angles[:, 0].index_select(0, positions))
    torch.testing.assert_close(rows, rotate(x, angles)[positions, 0])


def test_keys_turn_and_values_do_not(x, angles):
    kv = torch.cat((x, x + 1), -1).requires_grad_()
    k, v = rotate_keys(kv, angles)
    torch.testing.assert_close(k, rotate(x, angles))
    assert torch.equal(v, x + 1)
    upstream_k, upstream_v = torch.randn_like(k), torch.randn_like(v)
    (grad,) = torch.autograd.grad((k * upstream_k).sum() + (v * upstream_v).sum(), kv)
    leaf = x.clone().requires_grad_()
    (grad_k,) = torch.autograd.grad((rotate(leaf, angles) * upstream_k).sum(), leaf)
    torch.testing.assert_close(grad, torch.cat((grad_k, upstream_v), -1))


def test_compiles_without_a_break(x, angles):
    kv = torch.cat((x, x + 1), -1).requires_grad_()

    def product(kv: Tensor) -> Tensor:
        k, v = rotate_keys(kv, angles)
        return (rotate(k, angles) * v).sum()

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(kv), kv)[0] for f in (compiled, product)]
    torch.testing.assert_close(*grads)
