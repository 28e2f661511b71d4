"""FlexAttention of chosen queries on a GPU: numbers, gradients, and no waiting for the device."""

import warnings

import pytest
import torch
from plain_attention import plain_attention, random_plan, random_starts, sorted_rows
from torch import Tensor

from megaroute.model.chosen_attention import attention_pairs, chosen_attention, masked_attention
from megaroute.model.flex_attention import flex_chosen_attention
from megaroute.platform import device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device.resolve().on_cpu, reason="needs an accelerator"),
]
DEVICE = device.resolve().device
BATCH, HEADS = 2, 4
STARTS = pytest.mark.parametrize("documents", [None, 10], ids=["across documents", "within documents"])
PLANS = pytest.mark.parametrize("kind", ["exact", "capacity"])


def random_qkv(seq: int, groups: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(seq, BATCH, heads, width) for heads in (HEADS, groups, groups)]
    return [torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes]


def starts_of(documents: int | None, seq: int) -> Tensor | None:
    return None if documents is None else random_starts(seq, BATCH, documents).to(DEVICE)


@STARTS
@PLANS
@pytest.mark.parametrize("density", [-1, 0.05, 0.5, 2], ids=["none", "few", "half", "all"])
@pytest.mark.parametrize("groups, width", [(4, 64), (2, 128), (1, 96), (2, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients_are_those_of_plain_attention(dtype, groups, width, density, kind, documents):
    seq = 600  # no multiple of a block
    inputs = random_qkv(seq, groups, width, dtype)
    plan, starts = random_plan(kind, density, seq, BATCH, device=DEVICE), starts_of(documents, seq)
    rows = sorted_rows(plan)
    q, k, v = inputs
    ours = flex_chosen_attention(q.flatten(0, 1)[rows], k, v, plan, starts)
    plain = plain_attention(q.double(), k.double(), v.double(), starts).flatten(0, 1)[rows]
    upstream = torch.randn_like(plain)
    grads = [torch.autograd.grad((out * upstream).sum(), inputs) for out in (ours.double(), plain)]
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2  # bfloat16 has 8 bits, and the kernel rounds weights to them
    for a, b in zip((ours, *grads[0]), (plain, *grads[1]), strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm().clamp(min=1e-6)


@PLANS
def test_the_seam_takes_flex_attention_and_its_pairs(kind):
    q, k, v = random_qkv(512, 2, 64, torch.bfloat16)
    plan = random_plan(kind, 0.5, 512, BATCH, device=DEVICE)
    q_RnD = q.flatten(0, 1)[sorted_rows(plan)]
    out = chosen_attention(q_RnD, k, v, plan)
    assert torch.equal(out, flex_chosen_attention(q_RnD, k, v, plan))
    torch.testing.assert_close(out, masked_attention(q_RnD, k, v, plan), atol=2e-2, rtol=2e-2)
    pairs = attention_pairs(plan, 512, k.device)
    assert pairs.device == k.device and 0 < int(pairs) < plan.rows_R.numel() * 512


@STARTS
def test_a_capacity_plan_does_not_wait_for_the_device(documents):
    q, k, v = random_qkv(1024, 2, 64, torch.bfloat16)
    plan, starts = random_plan("capacity", 0.5, 1024, BATCH, device=DEVICE), starts_of(documents, 1024)

    def step() -> None:
        flex_chosen_attention(q.flatten(0, 1)[sorted_rows(plan)], k, v, plan, starts).sum().backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_new_plans_do_not_compile_anew():
    from torch._dynamo.utils import counters

    def step(kind: str, density: float, documents: int | None) -> None:
        q, k, v = random_qkv(1024, 2, 64, torch.bfloat16)
        plan = random_plan(kind, density, 1024, BATCH, device=DEVICE)
        flex_chosen_attention(q.flatten(0, 1)[sorted_rows(plan)], k, v, plan, starts_of(documents, 1024))

    step("capacity", 0.5, None)
    step("exact", 0.5, None)
    before = counters["stats"]["unique_graphs"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when it gives up compiling
        for density in (0.3, 0.4, 0.6, 0.9):
            for kind in ("capacity", "exact"):
                step(kind, density, 10)
    assert counters["stats"]["unique_graphs"] == before
