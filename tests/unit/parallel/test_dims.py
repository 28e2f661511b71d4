import pytest

from megaroute.common.errors import ConfigError
from megaroute.config.parallel import ParallelConfig
from megaroute.parallel.dims import ParallelDims
from megaroute.parallel.stages import chunks_of_stage


def test_auto_fills_the_processes():
    assert ParallelDims.from_config(ParallelConfig(tensor=2, pipeline=2), 12).data == 3


def test_world_that_model_parallelism_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"2 \* parallel.pipeline 2 = 4 does not divide 6"):
        ParallelDims.from_config(ParallelConfig(tensor=2, pipeline=2), 6)


def test_wrong_data_degree_names_the_right_one():
    with pytest.raises(ConfigError, match=r"parallel.data=2"):
        ParallelDims.from_config(ParallelConfig(tensor=2, data=3), 4)


def test_coordinates_cover_the_grid_with_tensor_fastest():
    dims = ParallelDims(tensor=2, data=3, pipeline=2)
    places = [dims.coordinates(rank) for rank in range(dims.world_size)]
    assert len(set(places)) == 12
    assert places[:3] == [(0, 0, 0), (1, 0, 0), (0, 1, 0)]
    assert places[6] == (0, 0, 1)


@pytest.mark.parametrize("pipeline,virtual", [(1, 1), (2, 1), (2, 2), (4, 3)])
def test_stages_hold_every_layer_once_and_the_ends_are_where_they_belong(pipeline, virtual):
    dims = ParallelDims(1, 1, pipeline, virtual)
    chunks = [chunk for rank in range(pipeline) for chunk in chunks_of_stage(24, dims, rank)]
    assert sorted(layer for chunk in chunks for layer in chunk.layers) == list(range(24))
    (first,) = [chunk for chunk in chunks if chunk.first]
    (last,) = [chunk for chunk in chunks if chunk.last]
    assert first.layers[0] == 0 and last.layers[-1] == 23


def test_interleaved_chunks_go_round_the_stages():
    dims = ParallelDims(1, 1, pipeline=2, virtual_pipeline=2)
    layers = [[list(chunk.layers) for chunk in chunks_of_stage(8, dims, rank)] for rank in range(2)]
    assert layers == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@pytest.mark.parametrize(
    "dims, words",
    [
        (ParallelDims(tensor=2, data=3, pipeline=4), "tp2 x pp4 x dp3"),
        (ParallelDims(tensor=1, data=1, pipeline=2, virtual_pipeline=3), "tp1 x pp2 (x3 interleaved) x dp1"),
    ],
)
def test_layout_in_words(dims, words):
    assert dims.describe() == words
