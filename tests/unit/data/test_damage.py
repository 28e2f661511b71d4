"""What cannot be read ends the run, or is skipped, recorded, and the same on every topology."""

import os

import numpy as np
import pytest
from streams import content, run_replicas
from texts import Texts, make_texts

from megaroute.common.errors import DataError
from megaroute.data.lanes import Lane
from megaroute.data.packing import Concat
from megaroute.data.rows import Position, Skip
from megaroute.data.stream import open_stream
from megaroute.data.verify import check_data

pytestmark = pytest.mark.data

ROWS = 160


@pytest.fixture
def damaged(copied_data):
    """A shard is missing, another is cut off, and both may be skipped."""
    (copied_data.train / "shard-000000.tar").unlink()
    shard = copied_data.train / "shard-000002.tar"
    os.truncate(shard, shard.stat().st_size - 512)
    return copied_data.model_copy(update={"on_damage": "skip"})


def test_a_run_goes_on_without_what_is_damaged_the_same_on_every_topology(damaged):
    rows, cursor = run_replicas(damaged, 1, [ROWS])
    assert {span.shard for row in rows.values() for span in row.spans} & {0, 2} == set()
    assert cursor.skipped == sum(len(state.skipped) for state in cursor.lanes.values()) > 10
    for dp_size, workers in ((4, 0), (2, 2)):
        other = run_replicas(damaged.model_copy(update={"workers": workers}), dp_size, [ROWS // dp_size])
        assert content(other[0]) == content(rows) and other[1] == cursor


def test_segments_equal_the_uninterrupted_run_and_repeat_skips_though_shards_were_repaired(damaged, data):
    rows, cursor = run_replicas(damaged, 1, [ROWS])
    found, at = run_replicas(damaged, 4, [10])
    more, at = run_replicas(damaged, 2, [10], at)
    rest, end = run_replicas(damaged, 1, [ROWS - 60], at)
    assert content(found | more | rest) == content(rows) and end == cursor
    repaired = data.model_copy(update={"on_damage": "skip"})
    read, after = run_replicas(repaired, 1, [100], at)
    assert {span.shard for row in read.values() for span in row.spans} >= {0, 2}
    assert after.skipped == at.skipped


def test_only_lanes_that_read_the_damage_change(copied_data):
    whole = open_stream(copied_data, "train").take(160)
    shard = copied_data.train / "shard-000001.tar"
    raw = bytearray(shard.read_bytes())
    raw[148:156] = b"damaged!"  # the checksum of one member's header
    shard.write_bytes(raw)
    stream = open_stream(copied_data.model_copy(update={"on_damage": "skip"}), "train")
    part = stream.take(160)
    differing = {int(g) % 8 for g, same in zip(whole.samples, (whole.ids == part.ids).all(1), strict=True) if not same}
    assert len(differing) == 1 and part.skipped == 1


def test_without_leave_damage_ends_the_run(damaged):
    with pytest.raises(DataError, match=r"data.train: shard .*tar"):
        open_stream(damaged.model_copy(update={"on_damage": "fail"}), "train").take(ROWS)


@pytest.mark.parametrize("budget", [0, 3])
def test_more_than_the_budget_ends_the_run(damaged, budget):
    with pytest.raises(DataError, match=rf"skipped {budget + 1} slices, more than data.skip_budget {budget}, the last"):
        open_stream(damaged.model_copy(update={"skip_budget": budget}), "train").take(1000)


def test_when_everything_is_damaged_the_budget_ends_the_search(damaged):
    for shard in damaged.train.glob("*.tar"):
        shard.unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"more than data.skip_budget 100"):
        open_stream(damaged, "train").take(1)


def test_preflight_lets_damage_pass_that_may_be_skipped_but_not_that_of_validation(damaged):
    check_data(damaged, 1000)
    assert damaged.valid is not None
    next(damaged.valid.glob("*.tar")).unlink()
    with pytest.raises(DataError, match=r"data\.valid"):
        check_data(damaged, 1000)


def test_the_rest_of_the_slice_is_skipped_and_the_state_says_from_where():
    source = Texts(make_texts([24]), 1)  # four slices of six documents
    _, shard, numbers = source.order.documents(1)
    source.damaged = {(shard, int(numbers[2]))}
    lane = Lane(0, 1, 10, [source], Concat(), skip_budget=1)
    seen, row = set(), lane.next()
    while row.spans[-1].epoch == 0:
        seen |= {span.document for span in row.spans if span.epoch == 0}
        row = lane.next()
    seen |= {span.document for span in row.spans if span.epoch == 0}
    assert seen == set(range(24)) - {int(number) for number in numbers[2:]}
    assert row.state.skipped == (Skip("train", 1, 2),)


def test_a_document_that_was_begun_and_is_damaged_on_resume_is_given_up():
    source = Texts([["x" * 25, "y" * 25, "z" * 25, "w" * 25]], 1)
    row = Lane(0, 1, 10, [source], Concat(), skip_budget=1).next()
    (opened,) = row.state.open
    _, shard, numbers = source.order.documents(opened.slice)
    source.damaged = {(shard, int(numbers[opened.document]))}
    resumed = Lane(0, 1, 10, [source], Concat(), row.state, skip_budget=1).next()
    assert resumed.state.skipped == (Skip("train", 0, 0),)
    assert resumed.state.sources["train"] == Position(slice=1, document=1, taken=20)
    assert np.unique(resumed.ids).size == 1
