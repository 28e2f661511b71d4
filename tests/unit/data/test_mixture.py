"""Shares of several sources are held in tokens, whatever the length of their documents."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
from texts import Texts

from megaroute.common.errors import ConfigError
from megaroute.config.data import DataConfig, SourceConfig
from megaroute.data.lanes import Lane
from megaroute.data.packing import BestFit, Concat, Packing
from megaroute.data.stream import open_stream

pytestmark = pytest.mark.data

CONCAT = Concat()


WEIGHTS = {"long": 0.3, "middle": 0.2, "short": 0.5}
TEXTS = {"long": [["a" * 40] * 30], "middle": [["m" * 9] * 40], "short": [["b", "", "c" * 3] * 50]}


def make_lanes(count: int, weights: Mapping[str, float], packing: Packing = CONCAT) -> list[Lane]:
    sources = [Texts(TEXTS[name], count, name, weight) for name, weight in weights.items()]
    return [Lane(number, count, 10, sources, packing) for number in range(count)]


@pytest.mark.parametrize("packing", [CONCAT, BestFit(4)])
def test_shares_are_exact_to_a_row_at_any_moment_in_every_lane(packing):
    """Whatever the lengths of documents, and of the padding behind them."""
    for lane in make_lanes(3, WEIGHTS, packing):
        taken: Counter[str] = Counter()
        for _ in range(400):
            row = lane.next()
            (name,) = {span.source for span in row.spans}
            taken[name] += row.filled
            for other, weight in WEIGHTS.items():
                assert abs(taken[other] - weight * taken.total()) <= 2 * 10


@pytest.mark.parametrize("weights", [WEIGHTS, {"long": 0.7, "short": 0.3}, {"long": 0.02, "short": 0.98}], ids=str)
def test_the_nth_rows_of_all_lanes_have_the_shares_too(weights):
    """A batch would otherwise be of one source, because lanes would go in step."""
    lanes = make_lanes(50, weights)
    for _ in range(20):
        begun = Counter(lane.next().spans[0].source for lane in lanes)
        for name, weight in weights.items():
            assert abs(begun[name] - 50 * weight) <= 2


def test_shares_do_not_depend_on_the_number_of_lanes():
    """An error that every lane makes alike would grow with them."""
    for count in (1, 16, 128):
        lanes = make_lanes(count, {"long": 0.7, "short": 0.3})
        rows = [lane.next() for _ in range(1280 // count) for lane in lanes]
        assert abs(sum(row.spans[0].source == "long" for row in rows) - 0.7 * 1280) <= 2


def test_weights_are_relative_and_the_order_of_sources_means_nothing(data: DataConfig):
    def first_rows(**weights: float) -> np.ndarray:
        folders = {"a": data.train, "b": data.valid}
        train = {name: SourceConfig(path=folders[name], weight=weight) for name, weight in weights.items()}
        return open_stream(data.model_copy(update={"train": train}), "train").take(24).ids

    assert np.array_equal(first_rows(a=3, b=1), first_rows(b=0.25, a=0.75))
    assert not np.array_equal(first_rows(a=3, b=1), first_rows(a=1, b=1))


def test_a_batch_counts_its_tokens_by_source(data: DataConfig):
    train = {"a": SourceConfig(path=data.train, weight=7), "b": SourceConfig(path=data.valid, weight=3)}
    batch = open_stream(data.model_copy(update={"train": train}), "train").take(160)
    assert sum(batch.tokens.values()) == 160 * 33
    assert batch.tokens["a"] / (160 * 33) == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{a: {path: x, wieght: 1}}", r"data.train.a.wieght .* did you mean data.train.a.weight"),
        ("{a: {weight: 1}}", r"data.train.a.path is missing"),
        ("{a: {path: x, weight: 0}}", r"data.train.a.weight is 0 .* must be greater than 0"),
        ("{a: x}", r"data.train.a is 'x' .* must be a mapping"),
        ("5", r"data.train .*: 5 is no path or URL"),
    ],
)
def test_a_mixture_that_cannot_work_is_refused_by_its_key(tiny, value, message):
    with pytest.raises(ConfigError, match=message):
        tiny(f"data.train={value}")


def test_sources_by_name_come_from_file_and_command_line(tiny):
    config = tiny("data.train={b: {path: x, weight: 2}, a: {path: y}}", "data.train.b.weight=5")
    assert {name: source.weight for name, source in config.data.sources.items()} == {"a": 1, "b": 5}
    assert list(config.data.folders) == ["data.train.a", "data.train.b", "data.valid"]
