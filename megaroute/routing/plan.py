"""A plan: which rows of a micro-batch a unit computes, in which order."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class ChunkRows(NamedTuple):
    """Rows of one chunk; exactly one of `kept` and `valid_r` is given, see Plan.  r is R / T."""

    rows_r: Tensor
    """int64 [R / T], rows of the whole flattened micro-batch."""
    kept: int | None
    """That many rows at the beginning count, the others are padding."""
    valid_r: Tensor | None
    """bool [R / T], the rows that count."""


@dataclass(frozen=True)
class Plan:
    """Rows to compute of a flattened [S * B] micro-batch, where row s * B + b is position s of sample b.

    The sequence is cut into T equal chunks, one a tensor rank under sequence parallelism.  Every chunk gets the same
    number of rows, R / T, so that collectives over chunks have one size; what is computed beyond the kept rows is
    thrown away.  Within a chunk rows go by sample, then by position.

    An exact plan knows on the host how many rows are kept (`kept`); its surplus is padding after them.  A plan of fixed
    capacity has the same number of rows for every sample and knows on the device which of them are kept (`valid_R`).
    """

    rows_R: Tensor
    """int64 [R], rows of the flattened micro-batch.  Padding of an exact plan repeats the first row of its chunk; rows
    of a capacity plan are distinct."""
    chunks: int
    """T."""
    kept: tuple[int, ...] | None
    """Kept rows of each of the T chunks; they come first in their chunk.  None in a capacity plan."""
    valid_R: Tensor | None
    """bool [R], whether a row is kept, in the order of rows_R.  None in an exact plan."""
    order_R: Tensor | None
    """int64 [R], a permutation that sorts rows_R by sample, then position; None when they already are."""
    per_sample: tuple[int, ...]
    """Rows of each sample, padding included; sums to R."""
    positions_R: Tensor
    """int64 [R], positions in the sequence after the permutation."""
    everything: bool
    """Whether every row is computed, once, in which case attention is plainly causal.  An exact plan then keeps every
    row; a capacity plan may not."""

    @property
    def rows_per_chunk(self) -> int:
        """R / T."""
        return self.rows_R.numel() // self.chunks

    def local(self, chunk: int) -> ChunkRows:
        """The rows of one chunk."""
        mine = slice(chunk * self.rows_per_chunk, (chunk + 1) * self.rows_per_chunk)
        kept = None if self.kept is None else self.kept[chunk]
        valid_r = None if self.valid_R is None else self.valid_R[mine]
        return ChunkRows(self.rows_R[mine], kept, valid_r)


def make_plan(keep_SB: Tensor, chunks: int = 1, multiple: int = 1) -> Plan:
    """The plan that computes exactly the kept rows, and padding where a chunk needs it.

    At least one row per chunk is computed, so that every parameter takes part in every backward pass and every rank in
    every collective.  Reads the counts back to the host, once.

    Args:
        keep_SB: bool [S, B], S a multiple of `chunks`.
        multiple: rows of a chunk are rounded up to a multiple of this, as far as the chunk has tokens.
    """
    seq, batch = keep_SB.shape
    length = seq // chunks
    keep_TBs = keep_SB.view(chunks, length, batch).transpose(1, 2)
    counts = keep_TBs.sum(2).tolist()
    kept = tuple(sum(samples) for samples in counts)
    size = round_up(max(*kept, 1), multiple, length * batch)
    # With its size given, nonzero does not wait for the device once more.
    found_K = torch.nonzero_static(keep_TBs.flatten(), size=sum(kept))[:, 0]
    chunk_K, sample_K, offset_K = found_K // (batch * length), found_K // length % batch, found_K % length
    rows_K = (chunk_K * length + offset_K) * batch + sample_K
    per_sample = [sum(samples) for samples in zip(*counts, strict=True)]
    per_sample[0] += size * chunks - sum(kept)  # padding repeats a chunk's first row, which belongs to sample 0
    return _exact_plan(_pad(rows_K, kept, size, length * batch), kept, per_sample, seq)


def round_up(rows: int, multiple: int, limit: int) -> int:
    """`rows` rounded up to a multiple, but at most `limit`."""
    return min(-(-rows // multiple) * multiple, limit)


def _pad(rows_K: Tensor, kept: tuple[int, ...], size: int, chunk_tokens: int) -> Tensor:
    """Kept rows of each chunk, then its first row until there are `size`."""
    if sum(kept) == size * len(kept):
        return rows_K
    firsts_T = torch.arange(len(kept), device=rows_K.device) * chunk_tokens
    padded_TR = firsts_T[:, None].repeat(1, size)
    for chunk, rows in enumerate(rows_K.split(kept)):
        padded_TR[chunk, : kept[chunk]] = rows
    return padded_TR.flatten()


def _exact_plan(rows_R: Tensor, kept: tuple[int, ...], per_sample: list[int], seq: int) -> Plan:
    batch = len(per_sample)
    samples_R, positions_R = rows_R % batch, rows_R // batch
    order_R = None
    if len(kept) > 1 or 0 < sum(kept) < rows_R.numel():
        order_R = torch.argsort(samples_R * seq + positions_R, stable=True)
        positions_R = positions_R[order_R]
    everything = sum(kept) == seq * batch
    return Plan(
        rows_R=rows_R,
        chunks=len(kept),
        kept=kept,
        valid_R=None,
        order_R=order_R,
        per_sample=tuple(per_sample),
        positions_R=positions_R,
        everything=everything,
    )
