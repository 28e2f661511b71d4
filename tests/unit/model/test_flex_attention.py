"""FlexAttention of chosen queries: its block masks, and its numbers by torch's reference on the CPU."""

from collections.abc import Iterator

import pytest
import torch
from plain_attention import plain_attention, random_plan, random_starts, sorted_rows, visible
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend

from megaroute.model import flex_attention
from megaroute.model.flex_attention import block_mask, flex_chosen_attention, flex_pairs, sight
from megaroute.routing.plan import make_plan

BATCH, HEADS = 2, 4
STARTS = pytest.mark.parametrize("documents", [None, 10, 300], ids=lambda count: f"{count} documents")
PLANS = pytest.mark.parametrize("kind", ["exact", "capacity"])
DENSITIES = pytest.mark.parametrize("density", [-1, 0.02, 0.5, 2], ids=["none", "few", "half", "all"])


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile nothing that a test does not ask for, and forget what was compiled."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    flex_attention.compiled.cache_clear()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random_qkv(seq: int, groups: int = 2, width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(seq, BATCH, heads, width, generator=generator) for heads in (HEADS, groups, groups)]


def starts_of(documents: int | None, seq: int) -> Tensor | None:
    return None if documents is None else random_starts(seq, BATCH, documents)


def read_by_the_kernel(mask, first_NR: Tensor, keys: int) -> Tensor:
    """Pairs that a kernel lets through, bool [N, R, T]: all of a full block, of a partial one those of mask_mod."""
    sequences, rows = first_NR.shape
    blocks = -(-rows // 128), -(-keys // 128)
    partial, full = (torch.zeros(sequences, *blocks, dtype=torch.bool) for _ in range(2))
    lists = (partial, mask.kv_num_blocks, mask.kv_indices), (full, mask.full_kv_num_blocks, mask.full_kv_indices)
    for found, counts, indices in lists:
        for n, q in torch.cartesian_prod(torch.arange(sequences), torch.arange(blocks[0])).tolist():
            for key in indices[n, 0, q, : counts[n, 0, q]].tolist():
                assert not found[n, q, key], "a block is listed twice"
                found[n, q, key] = True
    assert not (partial & full).any()
    n, r, t = torch.meshgrid(*(torch.arange(size) for size in (sequences, rows, keys)), indexing="ij")
    allowed = mask.mask_mod(n, torch.tensor(0), r, t)
    return full[n, r // 128, t // 128] | (partial[n, r // 128, t // 128] & allowed)


@STARTS
@PLANS
@DENSITIES
@pytest.mark.parametrize("seq, chunks", [(300, 1), (512, 2)], ids=str)
def test_blocks_let_through_exactly_what_each_query_sees(seq, chunks, kind, density, documents):
    plan, starts = random_plan(kind, density, seq, BATCH, chunks), starts_of(documents, seq)
    first_NR, last_NR = sight(plan, seq, starts)
    keys = seq if kind == "capacity" else seq * BATCH
    through = read_by_the_kernel(block_mask(first_NR, last_NR, keys), first_NR, keys).flatten(0, 1)
    expected = visible(seq, starts, BATCH).flatten(0, 1)[sorted_rows(plan)]
    if kind == "exact":  # one sequence of all samples: each sees its own stretch of keys
        whole = torch.zeros(len(expected), BATCH, seq, dtype=torch.bool)
        whole[torch.arange(len(expected)), sorted_rows(plan) % BATCH] = expected
        expected = whole.flatten(1)
    assert torch.equal(through, expected)


@STARTS
@PLANS
@DENSITIES
@pytest.mark.parametrize("groups, width", [(1, 16), (2, 24), (4, 6)], ids=str)
def test_numbers_are_those_of_plain_attention(groups, width, kind, density, documents):
    seq = 200
    q, k, v = random_qkv(seq, groups, width)
    plan, starts = random_plan(kind, density, seq, BATCH), starts_of(documents, seq)
    rows = sorted_rows(plan)
    ours = flex_chosen_attention(q.flatten(0, 1)[rows], k, v, plan, starts)
    torch.testing.assert_close(ours, plain_attention(q, k, v, starts).flatten(0, 1)[rows])


def test_blocks_that_nobody_sees_are_not_visited():
    keep_SB = torch.zeros(1024, 1, dtype=torch.bool)
    keep_SB[[*range(0, 100), *range(900, 928)]] = True  # one block of rows, which sees up to key 927
    plan = make_plan(keep_SB)
    assert flex_pairs(plan, 1024) == 8 * 128**2
    starts_SB = torch.zeros(1024, 1, dtype=torch.int32)
    starts_SB[300:] = 300
    keep_SB[:100] = False
    assert flex_pairs(make_plan(keep_SB), 1024, starts_SB) == 6 * 128**2  # keys 300 to 927, blocks 2 to 7


@STARTS
@PLANS
def test_pairs_are_the_blocks_of_the_mask(kind, documents):
    plan, starts = random_plan(kind, 0.5, 512, BATCH), starts_of(documents, 512)
    first_NR, last_NR = sight(plan, 512, starts)
    mask = block_mask(first_NR, last_NR, 512 if kind == "capacity" else 512 * BATCH)
    blocks = mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()
    assert flex_pairs(plan, 512, starts) == blocks * 128**2
    assert (mask.full_kv_num_blocks.sum() > 0) == (documents is None)  # these documents are shorter than two blocks


@PLANS
def test_new_plans_do_not_compile_anew(monkeypatch, kind):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(flex_attention, "attend_fixed", flex_attention.compiled(kind == "capacity", counter))
    q, k, v = random_qkv(512)
    for density in (0.3, 0.5, 0.6, 0.9):
        for starts in (None, random_starts(512, BATCH)):
            plan = random_plan(kind, density, 512, BATCH)
            flex_chosen_attention(q.flatten(0, 1)[sorted_rows(plan)], k, v, plan, starts)
    assert counter.frame_count == 1


def test_giving_up_compiling_is_an_error_and_not_a_slow_run(monkeypatch):
    monkeypatch.setattr(flex_attention, "attend_fixed", flex_attention.compiled(True, "eager"))
    plan = random_plan("capacity", 0.5, 256, BATCH)

    def attend(width: int, dtype: torch.dtype) -> None:
        q, k, v = (x.detach().to(dtype) for x in random_qkv(256, 2, width))
        flex_chosen_attention(q.flatten(0, 1)[sorted_rows(plan)], k, v, plan)

    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(FailOnRecompileLimitHit):
        for width in (16, 24, 32):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                attend(width, dtype)


def test_a_capacity_plan_is_traced_without_reading_the_device():
    q, k, v = random_qkv(256)
    plan, starts = random_plan("capacity", 0.5, 256, BATCH), random_starts(256, BATCH)
    q_RnD = q.flatten(0, 1)[sorted_rows(plan)]
    whole = torch.compile(flex_chosen_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(q_RnD, k, v, plan, starts), flex_chosen_attention(q_RnD, k, v, plan, starts))


@pytest.mark.slow
@PLANS
def test_compiled_kernel_of_the_cpu_reads_the_blocks(monkeypatch, kind):
    # Unlike the reference it follows the lists of blocks, so that a block too few or a wrong full one shows.
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    monkeypatch.setattr(flex_attention, "attend_fixed", flex_attention.compiled(fixed=kind == "capacity"))
    q, k, v = random_qkv(600)
    for density in (0.3, 0.9):
        for starts in (None, random_starts(600, BATCH)):
            plan = random_plan(kind, density, 600, BATCH)
            rows = sorted_rows(plan)
            ours = flex_chosen_attention(q.flatten(0, 1)[rows], k, v, plan, starts)
            torch.testing.assert_close(ours, plain_attention(q, k, v, starts).flatten(0, 1)[rows])
