"""A routed layer on a GPU: capacity mode never waits for it, a recorded graph repeats it, and the bench times it."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megaroute.parallel import groups
from megaroute.parallel.dims import ParallelDims
from megaroute.platform import device, distributed, graphs

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from benchmarks import layer as bench

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device.resolve().on_cpu, reason="needs an accelerator"),
]
SMALL = ["--device", "cuda", "--hidden", "256", "--heads", "4", "--sequence", "512", "--precision", "bf16"]


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([*SMALL, *options])


@pytest.fixture
def layer() -> Iterator[bench.Layer]:
    """A routed layer of fixed capacity, at density 0.5."""
    platform, arguments = device.resolve(), parse()
    distributed.start(platform)
    groups.bring_up(ParallelDims(1, 1, 1), seed=1)
    built = bench.build(arguments, bench.layer_config(arguments, "layer", "capacity"), platform)[1]
    built.set(built.route(0.5))
    yield built
    groups.tear_down()
    distributed.stop()


def gradients(layer: bench.Layer) -> list[torch.Tensor]:
    return [weight.grad.clone() for weight in layer.layer.parameters() if weight.grad is not None]


def test_capacity_mode_does_not_wait_for_the_device(layer):
    layer.run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_recorded_graph_computes_what_the_layer_computes(layer):
    layer.run()
    expected = gradients(layer)
    replay = graphs.recorded(layer.run, device.resolve())
    replay()
    torch.cuda.synchronize()
    for ours, plain in zip(gradients(layer), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)


def test_bench_has_a_row_with_and_without_a_graph():
    rows = bench.main(parse("--units", "layer", "--modes", "capacity", "--densities", "0.5", "--repeat", "2"))
    assert [row["graph"] for row in rows] == [False, True]
    assert all(row["ratio_to_dense"] > 0 and row["rows"] == 512 for row in rows)
