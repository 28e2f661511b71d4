"""Shares of several sources are held in tokens, whatever the length of their documents."""

from collections import Counter

import numpy as np
import pytest
from texts import Texts

from megaroute.common.errors import ConfigError
from megaroute.config.data import DataConfig, SourceConfig
from megaroute.data.lanes import Lane
from megaroute.data.packing import Concat
from megaroute.data.stream import open_stream

pytestmark = pytest.mark.data


def test_shares_are_exact_to_a_document_at_any_moment():
    long, short = [["a" * 40] * 30], [["b", "", "c" * 3] * 50]
    weights = {"long": 0.3, "middle": 0.2, "short": 0.5}
    texts = {"long": long, "middle": [["m" * 9] * 40], "short": short}
    lane = Lane(0, 1, 10, [Texts(texts[n], 1, n, weight) for n, weight in weights.items()], Concat())
    taken: Counter[str] = Counter()
    for made in range(1, 400):
        for span in lane.next().spans:
            taken[span.source] += span.tokens
        for name, weight in weights.items():
            assert abs(taken[name] - weight * 10 * made) <= 2 * 41  # the longest document, begun too early or too late


def test_lanes_begin_with_different_sources_in_the_shares():
    """Of long documents the first rows of all lanes would otherwise be of one source."""
    texts = [[["a" * 500] * 64], [["b" * 500] * 64]]
    begun: Counter[str] = Counter()
    for number in range(64):
        sources = [Texts(of, 64, name, weight) for of, name, weight in zip(texts, "ab", (0.75, 0.25), strict=True)]
        begun[Lane(number, 64, 10, sources, Concat()).next().spans[0].source] += 1
    assert begun == {"a": 48, "b": 16}


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
    assert batch.tokens["a"] / (160 * 33) == pytest.approx(0.7, abs=0.05)


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
