"""The rows of a run are a function of its data and of nothing else."""

import pytest
from streams import content, run_replicas

from megaroute.config.data import DataConfig, SourceConfig

pytestmark = pytest.mark.data

ROWS = 480  # of 33 tokens in 8 lanes: the smaller source comes to its third epoch

TOPOLOGIES = [(1, 1), (1, 2), (1, 4), (2, 0), (2, 2), (4, 0), (4, 1), (8, 0)]


@pytest.fixture(scope="module", params=["concat", "best_fit"])
def mixed(data: DataConfig, request: pytest.FixtureRequest) -> DataConfig:
    """Two sources of different size, three parts to one."""
    assert data.valid is not None
    train = {"large": SourceConfig(path=data.train, weight=0.75), "small": SourceConfig(path=data.valid, weight=0.25)}
    return data.model_copy(update={"train": train, "valid": None, "prefetch": 2, "packing": request.param})


@pytest.fixture(scope="module")
def uninterrupted(mixed):
    return run_replicas(mixed, 1, [ROWS])


def with_workers(data: DataConfig, workers: int) -> DataConfig:
    return data.model_copy(update={"workers": workers})


@pytest.mark.parametrize(("dp_size", "workers"), TOPOLOGIES)
def test_order_tokens_and_spans_do_not_depend_on_replicas_and_workers(mixed, uninterrupted, dp_size, workers):
    rows, cursor = run_replicas(with_workers(mixed, workers), dp_size, [ROWS // dp_size])
    assert content(rows) == content(uninterrupted[0])
    assert cursor == uninterrupted[1]


def test_six_segments_on_six_topologies_equal_the_uninterrupted_run(mixed, uninterrupted):
    """The cursor is read back six times.  Some segments start where the replicas do not divide g."""
    plan = [((4, 0), [3, 2]), ((1, 2), [1, 2]), ((8, 0), [1]), ((2, 1), [10, 5]), ((1, 4), [53]), ((2, 0), [21])]
    rows, cursor = {}, None
    for (dp_size, workers), counts in plan:
        part, cursor = run_replicas(with_workers(mixed, workers), dp_size, counts, cursor)
        rows |= part
    rest, cursor = run_replicas(mixed, 1, [ROWS - len(rows)], cursor)
    assert content(rows | rest) == content(uninterrupted[0])
    assert cursor == uninterrupted[1]


def test_a_run_resumed_after_every_step_equals_the_uninterrupted_run(mixed, uninterrupted):
    rows, cursor = {}, None
    for _ in range(12):
        part, cursor = run_replicas(mixed, 2, [5], cursor)
        rows |= part
    assert content(rows) == {g: value for g, value in content(uninterrupted[0]).items() if g < 120}


def test_the_test_reaches_later_epochs_of_both_sources(uninterrupted):
    epochs = {(span.source, span.epoch) for row in uninterrupted[0].values() for span in row.spans}
    assert epochs >= {("large", 1), ("small", 1), ("small", 2)}
