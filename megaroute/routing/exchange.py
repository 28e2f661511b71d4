"""Exchange: even out the rows of an MLP unit over the ranks of one data-parallel group.

Replicas read different text, so they keep different numbers of tokens, and the step waits for the one that keeps most.
Ranks above the mean send their last rows to ranks below it and get the results back.  A row's result depends on that
row alone in an MLP, so neither results nor gradients change, but for rounding: a row's share of the weight gradient
arises on another rank of a group that sums these gradients anyway.

What it takes to pay: a row sent saves the slowest rank 6 * M * H * F FLOPs, forward and backward pass through M
matrices of H x F, and moves 4 * H numbers, there and back in both passes.  So a link must carry

    bytes per second > FLOPs per second * 2 * bytes per number / (3 * M * F)

where FLOPs and bytes are those reached, not promised; H cancels.  Collectives of equal size are padded to the largest
transfer between any two ranks, so that in groups of more than two ranks more is sent than rows are moved.

Here K are this rank's rows, C the rows that every rank computes, N ranks, L the largest transfer, H width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Transfer:
    """Rows that one rank sends to another."""

    source: int
    target: int
    rows: int


def mean_rows(counts: Sequence[int]) -> int:
    """Rows that every rank computes: the mean rounded up, at least one so that every weight takes part."""
    return max(-(-sum(counts) // len(counts)), 1)


def transfers(counts: Sequence[int]) -> list[Transfer]:
    """Who sends how many rows to whom so that no rank has more than the mean, rounded up.

    A function of the counts alone, so every rank comes to the same list.  No rank both sends and receives, which makes
    the rows sent as few as possible; ordered by source, then target, at most one transfer for a pair.
    """
    mean = mean_rows(counts)
    room = [max(mean - count, 0) for count in counts]
    found, target = [], 0
    for source, count in enumerate(counts):
        surplus = count - mean
        while surplus > 0:
            rows = min(surplus, room[target])
            if rows:
                found.append(Transfer(source, target, rows))
                surplus, room[target] = surplus - rows, room[target] - rows
            else:
                target += 1
    return found


@dataclass(frozen=True)
class Exchange:
    """One exchange as one rank sees it.  Buffers have L rows for each of the N ranks, in order of ranks."""

    rows: int
    """C."""
    own: int
    """Rows that this rank has and computes itself: its first ones."""
    slots: int
    """N * L."""
    sent: tuple[int, ...]
    """Slot of each row that is sent, in order of the rows after the first `own`."""
    received: tuple[int, ...]
    """Slots in which rows arrive."""

    @classmethod
    def of(cls, counts: Sequence[int], rank: int) -> "Exchange":
        """The exchange of ranks with `counts` rows, for one of them."""
        plan = transfers(counts)
        largest = max((transfer.rows for transfer in plan), default=0)
        mean = mean_rows(counts)

        def slots(rank: int, rows: int) -> range:
            return range(rank * largest, rank * largest + rows)

        return cls(
            rows=mean,
            own=min(counts[rank], mean),
            slots=len(counts) * largest,
            sent=tuple(slot for t in plan if t.source == rank for slot in slots(t.target, t.rows)),
            received=tuple(slot for t in plan if t.target == rank for slot in slots(t.source, t.rows)),
        )


def balanced(rows_KH: Tensor, compute: Callable[[Tensor], Tensor], group: dist.ProcessGroup) -> tuple[Tensor, int]:
    """`compute(rows_KH)` with the work evened out over the ranks of a group.

    Every rank calls it equally often and in the same order, also with no rows, and lets the result take part in its
    loss: both passes communicate.  Reads the counts back to the host.  The same inputs lead to the same transfers, so
    a recomputation is one more call.

    Args:
        rows_KH: any number of rows; of one width, type and need of gradient on all ranks.
        compute: [C, H] -> [C, H'], each row for itself, with weights that are equal on all ranks and whose gradients
            are summed or averaged over the group afterwards.  Padding rows are zeros.
        group: ranks that hold replicas of the weights; with gloo or NCCL.

    Returns:
        ([K, H'], C), the results of this rank's own rows and the rows it computed.
    """
    exchange = Exchange.of(_all_counts(rows_KH, group), dist.get_rank(group))
    if exchange.slots == 0:  # on all ranks alike
        out_CH = compute(_padded(rows_KH, exchange.rows))
        return out_CH[: exchange.own], exchange.rows
    sent_X = torch.tensor(exchange.sent, dtype=torch.int64, device=rows_KH.device)
    received_Y = torch.tensor(exchange.received, dtype=torch.int64, device=rows_KH.device)
    foreign_YH = _swap(rows_KH[exchange.own :], sent_X, exchange.slots, group).index_select(0, received_Y)
    out_CH = compute(_padded(torch.cat((rows_KH[: exchange.own], foreign_YH)), exchange.rows))
    results_YH = out_CH[exchange.own : exchange.own + len(exchange.received)]
    returned_XH = _swap(results_YH, received_Y, exchange.slots, group).index_select(0, sent_X)
    return torch.cat((out_CH[: exchange.own], returned_XH)), exchange.rows


def _all_counts(rows_KH: Tensor, group: dist.ProcessGroup) -> list[int]:
    mine = torch.tensor([rows_KH.shape[0]], device=rows_KH.device)
    counts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, mine, group=group)
    return torch.cat(counts).tolist()


def _padded(rows_KH: Tensor, rows: int) -> Tensor:
    missing = rows - rows_KH.shape[0]
    return torch.cat((rows_KH, rows_KH.new_zeros(missing, rows_KH.shape[1]))) if missing else rows_KH


def _swap(rows_XH: Tensor, slots_X: Tensor, slots: int, group: dist.ProcessGroup) -> Tensor:
    """Put rows into their slots and swap slots with the other ranks."""
    buffer = rows_XH.new_zeros(slots, rows_XH.shape[1]).index_copy(0, slots_X, rows_XH)
    return _AllToAll.apply(buffer, group)


class _AllToAll(torch.autograd.Function):
    """Slots for rank j arrive on rank j in the slots of this rank; the backward pass is the same operation."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(buffer)
        dist.all_to_all_single(received, buffer, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        received = torch.empty_like(grads[0])
        dist.all_to_all_single(received, grads[0].contiguous(), group=ctx.group)
        return received, None
