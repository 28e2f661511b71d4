"""When saving fails: the older checkpoints stay, and one sentence says what to do."""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaroute.checkpoint import lease, manager, space
from megaroute.checkpoint.layout import complete_checkpoints, leftovers, work_directory
from megaroute.common.errors import CheckpointWriteError, LeaseLostError
from megaroute.training.setup import gather_cursor, run_record


def names(root: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(root)]


def one_sentence(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 1
    return message


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    if (
        not mounted
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_too_full_is_noticed_before_anything_is_written(start, advance, save, tiny, small_disk):
    parts = start(tiny(f"run.directory={small_disk / 'run'}", "checkpoint.keep=1"))
    advance(parts, 1)
    root = save(parts).parent
    (small_disk / "other").write_bytes(bytes(4 << 20))
    advance(parts, 1)
    before = sorted(small_disk.rglob("*"))
    with pytest.raises(CheckpointWriteError, match=r"GB free and the checkpoint of step 2 needs .* was not begun"):
        save(parts)
    assert sorted(small_disk.rglob("*")) == before and names(root) == ["step-00000001"]
    (small_disk / "other").unlink()
    save(parts)
    assert names(root) == ["step-00000002"]


@pytest.mark.parametrize("wait", [True, False], ids=["at once", "beside training"])
def test_a_disk_that_fills_up_meanwhile_keeps_the_older_checkpoint(start, advance, tiny, small_disk, monkeypatch, wait):
    monkeypatch.setattr(space, "MARGIN", 0)
    monkeypatch.setattr(manager, "check_space", lambda *_: None)
    parts = start(tiny(f"run.directory={small_disk / 'run'}", "checkpoint.keep=1"))
    advance(parts, 1)
    checkpoints = parts.checkpoints
    checkpoints.save(run_record(parts), lambda: gather_cursor(parts))
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(free - (100 << 10)))
    advance(parts, 1)
    with pytest.raises(
        CheckpointWriteError, match="of step 2 could not be written .*No space left on device"
    ) as caught:
        checkpoints.save(run_record(parts), lambda: gather_cursor(parts), wait)
        checkpoints.drain()
    assert "rank 0 on " in one_sentence(caught)
    assert names(checkpoints.root) == ["step-00000001"] and leftovers(checkpoints.root) == []
    (small_disk / "other").unlink()
    assert start(tiny(f"run.directory={small_disk / 'run'}")).resumed_from == 1


def test_a_folder_that_became_read_only_ends_the_run_in_one_sentence(start, advance, save, tiny, small_disk):
    parts = start(tiny(f"run.directory={small_disk / 'run'}"))
    advance(parts, 1)
    root = save(parts).parent
    advance(parts, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointWriteError, match="of step 2 could not be written .*Read-only file system") as caught:
        save(parts)
    one_sentence(caught)
    assert names(root) == ["step-00000001"]


def test_a_start_that_lost_its_lease_touches_nothing(start, advance, save, tiny):
    config = tiny("checkpoint.keep=1")
    root = config.run_directory / "checkpoints"
    mine = lease.take(root)
    parts = start(config)
    parts.checkpoints._lease = mine
    advance(parts, 1)
    save(parts)
    advance(parts, 1)
    taken_over = '{"host": "later", "pid": 1, "started": 1, "job": "7", "restart": 1, "token": "x"}'
    (root / lease.FILE).write_text(taken_over)
    theirs = work_directory(root, 2, "theirs")
    theirs.mkdir()
    before = sorted(root.rglob("*"))
    with pytest.raises(LeaseLostError, match="names job 7 restart 1, process 1 on later, not process") as caught:
        save(parts)
    one_sentence(caught)
    assert sorted(root.rglob("*")) == before
    mine.release()
    assert (root / lease.FILE).read_text() == taken_over


def test_a_start_that_loses_its_lease_while_it_writes_declares_nothing(start, advance, save, tiny, monkeypatch):
    config = tiny("checkpoint.keep=1")
    parts = start(config)
    parts.checkpoints._lease = mine = lease.take(config.run_directory / "checkpoints")
    advance(parts, 1)
    save(parts)
    advance(parts, 1)
    go_on = threading.Event()
    original = manager.write
    monkeypatch.setattr(manager, "write", lambda *place: (go_on.wait(60), original(*place))[1])
    parts.checkpoints.save(run_record(parts), lambda: gather_cursor(parts), wait=False)
    mine.release()
    go_on.set()
    with pytest.raises(LeaseLostError, match="names nobody"):
        parts.checkpoints.drain()
    assert names(parts.checkpoints.root) == ["step-00000001"] and leftovers(parts.checkpoints.root) == []
    assert (parts.checkpoints.root / "latest").read_text() == "step-00000001\n"


def test_what_writers_left_that_were_killed_goes_with_the_next_save(start, advance, save, tiny):
    parts = start(tiny())
    advance(parts, 1)
    root = save(parts).parent
    left = work_directory(root, 9, "killed")
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    assert start(tiny()).resumed_from == 1  # passed over
    advance(parts, 1)
    save(parts)
    assert leftovers(root) == [] and names(root) == ["step-00000001", "step-00000002"]


def test_the_best_by_validation_loss_stays(start, advance, save, tiny):
    parts = start(tiny("checkpoint.keep=1", "checkpoint.keep_best=1", "checkpoint.keep_every=3"))
    for loss in (3.0, 2.0, 2.5, 2.7, 2.6):
        advance(parts, 1)
        parts.state.valid_loss = loss
        root = save(parts).parent
    assert names(root) == [f"step-{step:08d}" for step in (2, 3, 5)]
    advance(parts, 1)
    assert parts.state.valid_loss is None  # belongs to the step that was validated


def test_figures_of_a_save(start, advance, tiny):
    parts = start(tiny())
    advance(parts, 1)
    path = parts.checkpoints.save(run_record(parts), lambda: gather_cursor(parts))
    (saved,) = parts.checkpoints.poll()
    assert saved.path == path and parts.checkpoints.poll() == []
    assert saved.bytes == sum(file.stat().st_size for file in path.iterdir() if file.name != "complete.json")
    assert 0 < saved.stall_seconds <= saved.seconds
