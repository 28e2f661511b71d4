"""Finds ranks that hold different bits where they should hold the same.

Compared, by one all-gather of a few numbers a rank:
- over replicas of the same stage and tensor rank: every parameter and buffer;
- over all ranks of a stage: those that tensor ranks hold alike, such as norms and routers;
- over the two ends of a pipeline: an embedding that they tie;
- over tensor ranks: the routing decisions of the step.

The comparison stands before the update: the optimizer then sends every parameter from the one replica that owns it to
the others, and what had gone wrong in a replica would be gone as well, but not from the gradients that it gave.
"""

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaroute.common.errors import MegarouteError
from megaroute.parallel.dims import ParallelDims
from megaroute.training.batches import Micro
from megaroute.training.parts import Parts

SHARDED, SHARED, TIED, DECISIONS = range(4)
"""Kinds of what is compared, and their columns in the all-gather."""

_PIECE = 1 << 20
_ODD = -7046029254386353131  # 0x9E3779B97F4A7C15, of which multiples spread over all bits
_ABSENT = 0


class Desynchronised(MegarouteError):
    """Ranks hold different values of what should be the same."""


@dataclass
class Sums:
    """Checksums of a rank, int64 scalars on the device, by name; a name says the pipeline stage."""

    of: tuple[dict[str, Tensor], ...] = field(default_factory=lambda: ({}, {}, {}, {}))

    def heads(self, device: torch.device) -> Tensor:
        """int64 [4], one checksum for each kind, 0 where the rank has nothing of it."""
        rows = [checksum(torch.stack(list(kind.values()))) if kind else _zero(device) for kind in self.of]
        return torch.stack(rows)

    def details(self) -> tuple[dict[str, int], ...]:
        """Every checksum by kind and name."""
        return tuple({name: int(value) for name, value in kind.items()} for kind in self.of)


def due(parts: Parts) -> bool:
    """Whether the step that is being computed ends with a comparison."""
    every = parts.config.train.desync_every
    return every is not None and (parts.state.step + 1) % every == 0 and parts.groups.dims.world_size > 1


def check(parts: Parts, micros: list[Micro]) -> None:
    """Compare, on all ranks together; raises Desynchronised on all of them, naming what differs, ranks and hosts."""
    sums = checksums(parts, micros)
    mine = sums.heads(parts.platform.device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    heads = torch.stack(gathered).tolist()
    dims = parts.groups.dims
    if not any(_parties(ranks, [row[kind] for row in heads]) for kind in range(4) for ranks in alike(dims, kind)):
        return
    everybody: list[Any] = [None] * len(heads)
    dist.all_gather_object(everybody, (socket.gethostname(), sums.details()))
    raise Desynchronised(_message(parts, everybody))


def checksums(parts: Parts, micros: list[Micro]) -> Sums:
    """What this rank holds now, and how `micros` were routed."""
    sums, stage = Sums(), parts.groups.pipeline_rank
    for name, value in _held(parts):
        kind = SHARDED if getattr(value, "tensor_model_parallel", False) else SHARED
        sums.of[kind][f"{name} of stage {stage}"] = checksum(value)
    for chunk in parts.chunks:
        if chunk.share_embeddings_and_output_weights and (chunk.pre_process or chunk.post_process):
            sums.of[TIED]["the tied embedding"] = checksum(chunk.shared_embedding_or_output_weight())
    for micro in micros:
        for unit, record in sorted(micro.info.routing.records.items()):
            name = f"the routing decisions of unit {unit} of stage {stage}"
            so_far = sums.of[DECISIONS].get(name, _zero(record.keep_SB.device))
            sums.of[DECISIONS][name] = so_far * _ODD + checksum(record.keep_SB)
    return sums


def _held(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    for index, chunk in enumerate(parts.chunks):
        where = f"chunk {index} " if len(parts.chunks) > 1 else ""
        for name, value in [*chunk.named_parameters(), *chunk.named_buffers()]:
            yield where + name, value


def checksum(tensor: Tensor) -> Tensor:
    """int64 scalar of the bits and their order; one flipped bit always changes it.  Nothing leaves the device.

    The sum modulo 2^64 of every word times an odd number that belongs to its place: a flipped bit adds a power of two
    times an odd number, which is not 0.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = _zero(bits.device)
    factors = _factors(min(_PIECE, bits.numel()), bits.device)
    for start in range(0, bits.numel(), _PIECE):
        piece = bits[start : start + _PIECE].to(torch.int64)
        total = total * _ODD + (piece * factors[: piece.numel()]).sum()
    return total


def _factors(count: int, device: torch.device) -> Tensor:
    return (torch.arange(1, count + 1, dtype=torch.int64, device=device) * _ODD) | 1


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=device)


def alike(dims: ParallelDims, kind: int) -> list[list[int]]:
    """Sets of ranks that hold the same of a kind."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(dims.world_size):
        tensor, data, pipeline = dims.coordinates(rank)
        if kind == TIED and pipeline not in (0, dims.pipeline - 1):
            continue
        keys = {SHARDED: (tensor, pipeline), SHARED: (pipeline,), TIED: (tensor,), DECISIONS: (data, pipeline)}
        found.setdefault(keys[kind], []).append(rank)
    return [ranks for ranks in found.values() if len(ranks) > 1]


def _parties(ranks: Sequence[int], values: Sequence[Any]) -> list[list[int]]:
    """Those of `ranks` that agree, the fewest first; nothing when all do."""
    parties: dict[Any, list[int]] = {}
    for rank in ranks:
        parties.setdefault(values[rank], []).append(rank)
    return sorted(parties.values(), key=len) if len(parties) > 1 else []


def _message(parts: Parts, everybody: list[tuple[str, tuple[dict[str, int], ...]]]) -> str:
    found = list(_differences(parts.groups.dims, everybody))
    name, parties = found[0]
    hosts = [host for host, _ in everybody]
    sides = " and another on ".join(_ranks(ranks, hosts) for ranks in parties)
    more = f", as have {len(found) - 1} others" if len(found) > 1 else ""
    every, step = parts.config.train.desync_every, parts.state.step + 1
    passed = step - (every or 0)
    sound = f"those of the last check, step {passed}, or earlier" if passed > 0 else "none"
    return (
        f"in step {step} {name} has one value on {sides}{more} (train.desync_every={every}), so the ranks do not train "
        f"the same model; suspect memory or device of the host that stands alone.  Checkpoints known to be sound: "
        f"{sound}; remove younger ones and start again, without that host if it comes again"
    )


def _differences(
    dims: ParallelDims, everybody: list[tuple[str, tuple[dict[str, int], ...]]]
) -> Iterator[tuple[str, list[list[int]]]]:
    """What differs, decisions last, since they follow from parameters."""
    for kind in (SHARED, SHARDED, TIED, DECISIONS):
        for ranks in alike(dims, kind):
            for name in everybody[ranks[0]][1][kind]:
                parties = _parties(ranks, [sums[kind].get(name, _ABSENT) for _, sums in everybody])
                if parties:
                    yield name, parties


def _ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    where = ", ".join(sorted({hosts[rank] for rank in ranks})[:4])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown} ({where})"
