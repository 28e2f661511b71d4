"""A plan: which rows of a micro-batch a unit computes, in which order."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Rows to compute of a flattened [S * B] micro-batch, where row s * B + b is position s of sample b.

    The sequence is cut into T equal chunks, one a tensor rank under sequence parallelism.  Every chunk gets the same
    number of rows, R / T, so that collectives over chunks have one size; the surplus is padding, computed and thrown
    away.  Within a chunk rows go by sample, then by position.
    """

    rows_R: Tensor
    """int64 [R], rows of the flattened micro-batch; padding repeats the first row of its chunk."""
    kept: tuple[int, ...]
    """Kept rows of each of the T chunks; they come first in their chunk."""
    order_R: Tensor | None
    """int64 [R], a permutation that sorts rows_R by sample, then position; None when they already are."""
    per_sample: tuple[int, ...]
    """Rows of each sample, padding included; sums to R."""
    positions_R: Tensor
    """int64 [R], positions in the sequence after the permutation."""
    everything: bool
    """Whether every row is kept, in which case attention is plainly causal."""

    @property
    def rows_per_chunk(self) -> int:
        """R / T."""
        return self.rows_R.numel() // len(self.kept)

    def local(self, chunk: int) -> tuple[Tensor, int]:
        """(int64 [R / T] rows of the flattened chunk, number of kept ones) for one chunk."""
        size = self.rows_per_chunk
        rows = self.rows_R[chunk * size : (chunk + 1) * size]
        return rows, self.kept[chunk]


def make_plan(keep_SB: Tensor, chunks: int = 1) -> Plan:
    """The plan that computes exactly the kept rows (and, where a chunk has fewer than another or none, padding).

    At least one row per chunk is computed, so that every parameter takes part in every backward pass and every rank in
    every collective.  Reads the counts back to the host.

    Args:
        keep_SB: bool [S, B], S a multiple of `chunks`.
    """
    seq, batch = keep_SB.shape
    keep_TBs = keep_SB.view(chunks, seq // chunks, batch).transpose(1, 2)
    counts_TB = keep_TBs.sum(2)
    kept = tuple(counts_TB.sum(1).tolist())
    size = max(*kept, 1) if chunks > 1 else max(kept[0], 1)
    chunk_K, sample_K, offset_K = keep_TBs.nonzero(as_tuple=True)
    rows_K = (chunk_K * (seq // chunks) + offset_K) * batch + sample_K
    if sum(kept) == size * chunks:
        rows_R = rows_K
    else:
        rows_R = torch.arange(chunks, device=keep_SB.device).mul(seq // chunks * batch).repeat_interleave(size)
        for chunk, rows in enumerate(rows_K.split(kept)):
            rows_R[chunk * size : chunk * size + kept[chunk]] = rows
    return _sorted_by_sample(rows_R, kept, counts_TB.sum(0), seq, batch)


def _sorted_by_sample(rows_R: Tensor, kept: tuple[int, ...], counts_B: Tensor, seq: int, batch: int) -> Plan:
    samples_R, positions_R = rows_R % batch, rows_R // batch
    padding = rows_R.numel() - sum(kept)
    per_sample = counts_B.tolist()
    per_sample[0] += padding  # padding repeats a chunk's first row, which belongs to sample 0
    if len(kept) == 1:
        order_R = None
    else:
        order_R = torch.argsort(samples_R * seq + positions_R, stable=True)
        positions_R = positions_R[order_R]
    everything = sum(kept) == seq * batch
    return Plan(rows_R, kept, order_R, tuple(per_sample), positions_R, everything)
