"""Which checkpoints stay."""

import json

import pytest

from megaroute.checkpoint import layout
from megaroute.checkpoint.layout import RunRecord
from megaroute.checkpoint.retention import Retention


@pytest.fixture
def write(tmp_path):
    """`write(step, loss)`: a checkpoint without tensors whose validation loss was `loss`."""

    def write(step, loss=None):
        path = layout.directory(tmp_path, step)
        path.mkdir()
        layout.finish(path, RunRecord(step, 0, 0, 0, {}, {}, "tp1", loss), {})
        return path

    return write


def steps(root) -> list[int]:
    return [layout.read_run(path).step for path in layout.complete_checkpoints(root)]


@pytest.mark.parametrize("keep, left", [(1, [40]), (2, [30, 40]), (9, [10, 20, 30, 40])])
def test_the_newest_stay(write, tmp_path, keep, left):
    for step in (10, 20, 30, 40):
        write(step)
    Retention(keep).apply(tmp_path)
    assert steps(tmp_path) == left


def test_every_nth_stays_for_ever(write, tmp_path):
    for step in (10, 20, 30, 40, 50):
        write(step)
        Retention(1, every=20).apply(tmp_path)
    assert steps(tmp_path) == [20, 40, 50]


def test_the_best_stay_until_there_are_better_ones(write, tmp_path):
    for step, loss in ((10, 3.0), (20, 2.0), (30, None), (40, 2.5), (50, 9.0)):
        write(step, loss)
        Retention(1, best=2).apply(tmp_path)
    assert steps(tmp_path) == [20, 40, 50]
    write(60, 1.0)
    Retention(1, best=2).apply(tmp_path)
    assert steps(tmp_path) == [20, 60]


def test_what_cannot_be_read_is_not_the_best_and_the_newest_stays_all_the_same(write, tmp_path):
    damaged, _, newest = write(10, 1.0), write(20, 2.0), write(30)
    (damaged / "run.json").write_text("{")
    (newest / "run.json").write_text(json.dumps({"format": 2}))
    assert Retention(1, best=1).removable(tmp_path) == [damaged]


def test_folders_that_are_not_complete_are_left_alone(write, tmp_path):
    unfinished = write(10)
    write(20)
    (unfinished / "complete.json").unlink()
    assert Retention(1).apply(tmp_path) == []
    assert unfinished.is_dir()


def test_each_removal_is_allowed_first_and_the_oldest_goes_first(write, tmp_path):
    for step in (10, 20, 30, 40):
        write(step)
    asked = []

    def allowed():
        asked.append(steps(tmp_path))
        if len(asked) == 3:
            raise PermissionError

    with pytest.raises(PermissionError):
        Retention(1).apply(tmp_path, allowed)
    assert asked == [[10, 20, 30, 40], [20, 30, 40], [30, 40]]
    assert steps(tmp_path) == [30, 40]
