"""The whole configuration of a run."""

from pathlib import Path

from megaroute.config.data import DataConfig
from megaroute.config.evaluate import EvaluateConfig
from megaroute.config.model import ModelConfig
from megaroute.config.parallel import ParallelConfig
from megaroute.config.routing import RoutingConfig
from megaroute.config.section import Section
from megaroute.config.training import CheckpointConfig, MetricsConfig, OptimConfig, RunConfig, TrainConfig
from megaroute.config.units import Unit


class Config(Section):
    """One run: a YAML file has these sections at its top level."""

    run: RunConfig
    model: ModelConfig
    routing: RoutingConfig = RoutingConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    metrics: MetricsConfig = MetricsConfig()

    @property
    def run_directory(self) -> Path:
        """Where everything of the run is written."""
        return Path(self.run.directory.format(name=self.run.name))

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """Indices, from 0, of the layers that carry a router."""
        return self.routing.routed_layers(self.model.num_layers)

    @property
    def units(self) -> tuple[Unit, ...]:
        """Routed units in the order in which a token meets them; metrics list densities in this order."""
        return self.routing.units(self.model.num_layers)
