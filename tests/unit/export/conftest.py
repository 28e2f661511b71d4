"""Models in one process, and their exported twins."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="tests of exports want pip install 'megaroute[export]'")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

import torch

from megaroute.config.root import Config
from megaroute.config.units import Unit


class Twins(NamedTuple):
    """The same weights in the model that is trained and in the one that is served."""

    config: Config
    native: Any
    served: Any

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits [B, T, V] of the native model's full forward pass, and who was executed, bool [B, T] per unit."""
        from megaroute.model.microbatch import micro_batch
        from megaroute.routing.context import RoutingContext

        context = RoutingContext(seed=self.config.train.seed, samples_B=torch.zeros(len(ids), dtype=torch.int64))
        starts = None
        if not self.config.data.attend_across_documents:
            ends = torch.where(ids == EOD, torch.arange(1, ids.shape[1] + 1), 0)
            starts = torch.nn.functional.pad(ends, (1, 0))[:, :-1].cummax(1).values.T.int().contiguous()
        logits = self.native(ids, None, None, packed_seq_params=micro_batch(ids.shape[1], context, starts))
        units: list[Unit] = list(self.config.units)
        return logits, [context.records[unit.key].keep_SB.T for unit in units]


EOD = 1


@pytest.fixture
def twins(one_process: None) -> Callable[[Config], Twins]:
    from layers import model_of

    from megaroute.export.architecture import OURS, model_settings
    from megaroute.export.in_memory import assemble
    from megaroute.parallel import groups
    from megaroute.parallel.dims import ParallelDims

    def twins(config: Config) -> Twins:
        groups.bring_up(ParallelDims(1, 1, 1), seed=1)
        native = model_of(config).eval()
        draw = torch.Generator().manual_seed(4)
        with torch.no_grad():  # norms that are not 1, biases that are not 0
            for name, value in native.state_dict().items():
                if value is not None and not name.endswith(("density", "slope")):
                    value += 0.1 * torch.randn(value.shape, generator=draw)
        weights = native.state_dict()
        settings = model_settings(config, OURS, step=0, pieces=config.model.vocab_size, eod=EOD)
        return Twins(config, native, assemble(config, settings, weights.__getitem__, torch.device("cpu")))

    return twins
