"""Degrees of parallelism and a rank's place among them: plain arithmetic, no process group needed."""

from dataclasses import dataclass

from megaroute.common.errors import ConfigError
from megaroute.config.parallel import ParallelConfig


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the axes.  Ranks are laid out as Megatron-core does: tensor fastest, then data, then pipeline."""

    tensor: int
    data: int
    pipeline: int
    virtual_pipeline: int = 1

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world_size: int) -> "ParallelDims":
        """The dims of `parallel` on `world_size` processes; raises ConfigError with the failing equation."""
        if world_size % parallel.model_size:
            raise ConfigError(
                f"parallel.tensor {parallel.tensor} * parallel.pipeline {parallel.pipeline} = {parallel.model_size} "
                f"does not divide {world_size} processes; launch a multiple of {parallel.model_size}"
            )
        data = world_size // parallel.model_size
        if parallel.data not in ("auto", data):
            raise ConfigError(
                f"parallel.tensor {parallel.tensor} * parallel.pipeline {parallel.pipeline} * parallel.data "
                f"{parallel.data} is not {world_size} processes; set parallel.data={data}"
            )
        return cls(parallel.tensor, data, parallel.pipeline, parallel.virtual_pipeline)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor * self.data * self.pipeline

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tensor rank, data rank, pipeline rank) of a global rank."""
        return rank % self.tensor, rank // self.tensor % self.data, rank // (self.tensor * self.data)

    def describe(self) -> str:
        """The layout in a few characters, such as "tp2 x pp2 x dp1"."""
        interleaved = f" (x{self.virtual_pipeline} interleaved)" if self.virtual_pipeline > 1 else ""
        return f"tp{self.tensor} x pp{self.pipeline}{interleaved} x dp{self.data}"
