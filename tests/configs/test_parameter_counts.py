"""The number of parameters by arithmetic is that of the model that is really built, without the memory for it."""

import resource
from pathlib import Path

import pytest
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megaroute.config.load import load_config
from megaroute.config.parallel import ParallelConfig
from megaroute.config.sizes import num_parameters
from megaroute.model.build import build_chunk
from megaroute.parallel.dims import ParallelDims
from megaroute.parallel.groups import bring_up
from megaroute.parallel.stages import chunks_of_stage

FOLDER = Path(__file__).resolve().parents[2] / "pretrain_configs"
FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))
WHOLE = ParallelDims(tensor=1, data=1, pipeline=1)


@pytest.mark.parametrize("file", FILES)
def test_arithmetic_counts_the_parameters_of_the_built_model(one_process, file):
    config = load_config(FOLDER / file).model_copy(update={"parallel": ParallelConfig()})
    bring_up(WHOLE, seed=0)
    (chunk,) = chunks_of_stage(config.model.num_layers, WHOLE, 0)
    before = peak_memory()
    with FakeTensorMode():  # tensors that have a shape and a device, but no storage
        model = build_chunk(config, chunk, WHOLE)
    parameters = list(model.parameters())
    assert all(isinstance(parameter.data, FakeTensor) for parameter in parameters)
    assert sum(parameter.numel() for parameter in parameters) == num_parameters(config.model, config.routing)
    assert peak_memory() - before < 500 * 2**20


@pytest.mark.parametrize("key", ["qkv_bias", "qk_norm"])
def test_biases_and_norms_of_heads_are_counted(one_process, key):
    config = load_config(FOLDER / "debug" / "cpu.yaml", [f"model.{key}=true"])
    bring_up(WHOLE, seed=0)
    (chunk,) = chunks_of_stage(config.model.num_layers, WHOLE, 0)
    model = build_chunk(config, chunk, WHOLE)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(config.model, config.routing)


def peak_memory() -> int:
    """Bytes; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
