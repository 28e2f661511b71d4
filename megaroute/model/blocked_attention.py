"""Attention of chosen queries on a CPU: block by block, touching only the keys that a block sees.

Shapes: S sequence, B batch, n query heads and G key-value heads, D head width, R queries, sorted by sample, then by
position; r queries of a block, m = n / G heads that share keys, t keys that a block sees.

Softmax weights of many queries are not kept for the backward pass but computed again, as in FlashAttention (Dao et al.
2022), so memory grows with S, not with its square; those of few are kept, which saves a seventh of the products.  Both
passes are operators of torch's library: they read positions on the host, which torch.compile must not look into.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""Queries of a block where at least half of the positions are chosen."""
SPARSE_BLOCK = 32
"""Queries of a block elsewhere: as many would lie further apart, and most see keys that must be masked for others."""
KEPT_WEIGHTS = 5
"""Softmax weights are kept for the backward pass where room for them, of which causality leaves about half unused, is
at most this many times that of keys and values: up to 10 * D rows of a sample, with as many heads of both kinds."""


class Block(NamedTuple):
    """Queries start..stop, all of one sample."""

    sample: int
    start: int
    stop: int


class View(NamedTuple):
    """Keys first..last that a block sees; those from `common` up to `position` are seen by each of its queries."""

    first: int
    common: int
    position: int
    last: int


def blocks(per_sample: list[int], seq: int) -> list[Block]:
    """Blocks for so many queries of each sample: a function of host numbers alone."""
    found, start = [], 0
    for sample, rows in enumerate(per_sample):
        size = SPARSE_BLOCK if 2 * rows < seq else BLOCK
        stop = start + rows
        found += [Block(sample, at, min(at + size, stop)) for at in range(start, stop, size)]
        start = stop
    return found


def blocked_pairs(positions_R: Tensor, per_sample: list[int], seq: int, starts_SB: Tensor | None = None) -> Tensor:
    """Query-key pairs that `blocked_attention` computes, masked ones included; int64 scalar, not read to the host."""
    found = blocks(per_sample, seq)
    first, _, _, last = _edges(found, positions_R, starts_SB)
    queries = torch.tensor([block.stop - block.start for block in found], device=positions_R.device)
    return (queries * (last + 1 - first)).sum()


def blocked_attention(
    q_RnD: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    positions_R: Tensor,
    per_sample: list[int],
    starts_SB: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each query to the keys of its sample up to its own position, [R, n, D].

    Args:
        positions_R: int64, ascending within a sample, repetitions allowed.
        per_sample: queries of each of the B samples.
        starts_SB: integers, first key that the token at each position sees; None for 0.
    """
    few = q_RnD.shape[0] * q_RnD.shape[1] * k_SBGD.shape[0] <= KEPT_WEIGHTS * (k_SBGD.numel() + v_SBGD.numel())
    keep = few and torch.is_grad_enabled()
    return torch.ops.megaroute.blocked_attention(q_RnD, k_SBGD, v_SBGD, positions_R, starts_SB, per_sample, keep)[0]


def _edges(found: list[Block], positions_R: Tensor, starts_SB: Tensor | None) -> tuple[Tensor, ...]:
    """The fields of each block's View, int64 [blocks] each, `last` itself still seen."""
    samples, starts, stops = torch.tensor(found, device=positions_R.device).unbind(1)
    position, last = positions_R[starts], positions_R[stops - 1]
    if starts_SB is None:
        zero = torch.zeros_like(last)
        return zero, zero, position, last
    return starts_SB[position, samples], starts_SB[last, samples], position, last


class _Call:
    """What both passes share: inputs in the precision of the computation, one block at a time."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions_R: Tensor,
        starts_SB: Tensor | None,
        per_sample: list[int],
        kept: Tensor,
    ) -> None:
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.v = (x.to(self.wide) for x in (q, k, v))
        self.positions_R, self.starts_SB, self.per_sample = positions_R, starts_SB, per_sample
        self.groups, self.scale = k.shape[2], q.shape[2] ** -0.5
        room = min(BLOCK, q.shape[0]) * q.shape[1] * k.shape[0]
        self._scores, self._kept = self.q.new_empty(room), kept
        self._weights = kept if kept.numel() else self.q.new_empty(room)

    def blocks(self) -> Iterator[tuple[Block, View]]:
        found = blocks(self.per_sample, self.k.shape[0])
        edges = torch.stack(_edges(found, self.positions_R, self.starts_SB), 1).tolist()
        for block, (first, common, position, last) in zip(found, edges, strict=True):
            yield block, View(first, common, position, last + 1)

    def keys(self, x_SBGD: Tensor, block: Block, view: View) -> Tensor:
        """What a block sees of keys, values or their gradients: a view [G, t, D]."""
        return x_SBGD[view.first : view.last, block.sample].transpose(0, 1)

    def rows(self, x_RnD: Tensor, block: Block) -> Tensor:
        """Queries of a block, or their gradients, as [G, m * r, D]."""
        x_rnD = x_RnD[block.start : block.stop]
        if x_rnD.shape[1] == self.groups:
            return x_rnD.transpose(0, 1)
        return x_rnD.unflatten(1, (self.groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)

    def put(self, out_RnD: Tensor, block: Block, x: Tensor) -> None:
        """The reverse of `rows`, into `out_RnD`."""
        queries = block.stop - block.start
        x_rnD = x.unflatten(1, (-1, queries)).permute(2, 0, 1, 3).flatten(1, 2)
        out_RnD[block.start : block.stop] = x_rnD

    def product(self, x: Tensor, keys: Tensor) -> Tensor:
        """x [G, m * r, D] times keys [G, t, D], transposed: [G, m * r, t], in memory that the next product reuses."""
        shape = (*x.shape[:2], keys.shape[1])
        return torch.bmm(x, keys.transpose(1, 2), out=self._scores[: math.prod(shape)].view(shape))

    def weights(self, q: Tensor, block: Block, view: View) -> Tensor:
        """Softmax weights of a block's scaled queries, [G, m * r, t]."""
        scores = self.product(q, self.keys(self.k, block, view))
        self._hide(scores.unflatten(1, (-1, block.stop - block.start)), block, view)
        return torch.softmax(scores, -1, out=self.place(block, view))

    def place(self, block: Block, view: View) -> Tensor:
        """Memory of a block's weights, [G, m * r, t]: one for all, or its own where weights are kept."""
        rows = self.q.shape[1] * (block.stop - block.start)
        start = block.start * self.q.shape[1] * self.k.shape[0] if self._kept.numel() else 0
        shape = (self.groups, rows // self.groups, view.last - view.first)
        return self._weights[start : start + math.prod(shape)].view(shape)

    def _hide(self, scores: Tensor, block: Block, view: View) -> None:
        """Mask keys after each query, which start behind the first query, and those of earlier documents."""
        at_r1 = self.positions_R[block.start : block.stop, None]
        if view.last > view.position + 1:
            later = torch.arange(view.position + 1, view.last, device=at_r1.device)
            scores[..., view.position + 1 - view.first :].masked_fill_(later > at_r1, -math.inf)
        if view.common > view.first and self.starts_SB is not None:
            earlier = torch.arange(view.first, view.common, device=at_r1.device)
            begins_r1 = self.starts_SB[at_r1, block.sample]
            scores[..., : view.common - view.first].masked_fill_(earlier < begins_r1, -math.inf)


@torch.library.custom_op("megaroute::blocked_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, positions_R: Tensor, starts_SB: Tensor | None, per_sample: list[int], keep: bool
) -> tuple[Tensor, Tensor]:
    """The result, and the weights of all blocks, or nothing."""
    kept = _room_for_weights(q, k, keep)
    call = _Call(q, k, v, positions_R, starts_SB, per_sample, kept)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for block, view in call.blocks():
        weights = call.weights(call.rows(call.q, block) * call.scale, block, view)
        call.put(out, block, torch.bmm(weights, call.keys(call.v, block, view)))
    return out, kept


@torch.library.custom_op("megaroute::blocked_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    positions_R: Tensor,
    starts_SB: Tensor | None,
    per_sample: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, positions_R, starts_SB, per_sample, kept)
    grad_RnD = grad.to(call.wide)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=call.wide, device=x.device) for x in (k, v))
    for block, view in call.blocks():
        scaled, upstream = call.rows(call.q, block) * call.scale, call.rows(grad_RnD, block)
        weights = call.place(block, view) if kept.numel() else call.weights(scaled, block, view)
        call.keys(grad_v, block, view).baddbmm_(weights.transpose(1, 2), upstream)
        pull = call.product(upstream, call.keys(call.v, block, view))
        torch.ops.aten._softmax_backward_data.out(pull, weights, -1, call.wide, grad_input=pull)
        call.keys(grad_k, block, view).baddbmm_(pull.transpose(1, 2), scaled)
        call.put(grad_q, block, torch.bmm(pull, call.keys(call.k, block, view)).mul_(call.scale))
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _room_for_weights(q: Tensor, k: Tensor, keep: bool) -> Tensor:
    """Memory for as many weights as there could be: how many there are depends on the positions."""
    return q.new_empty(q.shape[0] * q.shape[1] * k.shape[0] * keep, dtype=torch.promote_types(q.dtype, torch.float32))


@_attend.register_fake
def _(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), _room_for_weights(q, k, others[-1])


@_attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, positions_R, starts_SB, ctx.per_sample, _ = inputs
    ctx.save_for_backward(q, k, v, output[1], positions_R, starts_SB)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or the weights would get a gradient of zeros all the same


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_attend_backward(grad, *ctx.saved_tensors, ctx.per_sample), None, None, None, None)


_attend.register_autograd(_differentiate, setup_context=_save)
