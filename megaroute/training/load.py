"""How evenly the computed rows of a step lie on ranks and stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megaroute.config.root import Config
from megaroute.parallel.dims import ParallelDims
from megaroute.parallel.stages import chunks_of_stage
from megaroute.training.reduce import Totals


@dataclass(frozen=True)
class Load:
    """Rows of layers that ranks computed in a step, padding and layers without a router included.

    Attention and MLP count half a layer each.  Tensor ranks of one stage and replica compute the same number of rows.
    """

    rank_rows: tuple[tuple[float, ...], ...]
    """[stages][replicas]."""
    unit_rows: tuple[tuple[int, ...], ...]
    """[units][replicas], rows of the unit alone."""

    @property
    def ranks(self) -> float:
        """Maximum over mean of all ranks: 1 when all compute equally many."""
        return max_over_mean([rows for stage in self.rank_rows for rows in stage])

    @property
    def stages(self) -> tuple[float, ...]:
        """Mean rows of a rank of each stage."""
        return tuple(sum(stage) / len(stage) for stage in self.rank_rows)

    @property
    def units(self) -> tuple[float, ...]:
        """Maximum over mean of the replicas, per unit."""
        return tuple(max_over_mean(rows) for rows in self.unit_rows)

    def record(self) -> dict[str, Any]:
        """For the metrics, see TrainRecord.load."""
        return {
            "ranks": self.ranks,
            "rank_rows": self.rank_rows,
            "units": self.units,
            "stages": self.stages,
            "stages_max_over_mean": max_over_mean(self.stages),
        }


def load_of(config: Config, dims: ParallelDims, totals: Totals) -> Load:
    """The load of a step."""
    branches = _branches(config, totals)
    everything = [totals.positions / dims.data] * dims.data
    rank_rows = []
    for stage in range(dims.pipeline):
        chunks = chunks_of_stage(config.model.num_layers, dims, stage)
        places = [(layer, part) for chunk in chunks for layer in chunk.layers for part in ("attention", "mlp")]
        rows = [branches.get(place, everything) for place in places]
        rank_rows.append(tuple(sum(of_replica) / 2 for of_replica in zip(*rows, strict=True)))
    return Load(tuple(rank_rows), totals.replica_rows)


def _branches(config: Config, totals: Totals) -> dict[tuple[int, str], Sequence[float]]:
    """Rows by replica of each branch, (layer, part), behind a router."""
    found: dict[tuple[int, str], Sequence[float]] = {}
    for unit, rows in zip(config.units, totals.replica_rows, strict=True):
        for part in ("attention", "mlp") if unit.part == "layer" else (unit.part,):
            found[unit.layer, part] = rows
    return found


def max_over_mean(values: Sequence[float]) -> float:
    """Largest value over the mean; 1 for values that are all 0."""
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0
