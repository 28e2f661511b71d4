"""Saving and loading in one process: bit for bit, or refused."""

import shutil
import threading
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megaroute.checkpoint import manager as manager_module
from megaroute.checkpoint.staging import Staging
from megaroute.common.errors import CheckpointError, CheckpointWriteError
from megaroute.config.load import load_config
from megaroute.config.training import CheckpointConfig
from megaroute.optim import build as optim_build
from megaroute.training.setup import gather_cursor, run_record


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert set(a) == set(b)
    return [name for name in a if not (a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]))]


def flip(file: Path, at: int) -> None:
    """Change one bit of a file."""
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(start, advance, save, snapshot, tiny, precision):
    config = tiny(f"train.precision={precision}", "routing.controller.gain=0.1")
    parts = start(config)
    advance(parts, 2)
    save(parts)
    saved, state = snapshot(parts), deepcopy(parts.state)
    losses = [result.totals.loss for result in advance(parts, 2)]
    resumed = start(config)
    assert resumed.resumed_from == 2 and resumed.state == state
    assert differing(saved, snapshot(resumed)) == []
    assert [result.totals.loss for result in advance(resumed, 2)] == losses
    assert differing(snapshot(parts), snapshot(resumed)) == []


def test_a_snapshot_has_what_decides_the_next_step(start, advance, snapshot, tiny):
    # Or else the comparison above would compare nothing.
    parts = start(tiny("routing.controller.gain=0.1"))
    advance(parts, 3)
    found = snapshot(parts)
    steps = [value.item() for name, value in found.items() if name.startswith("step ")]
    assert len(steps) == len(list(parts.chunks[0].parameters())) and set(steps) == {3.0}
    assert all(value.abs().max() > 0 for name, value in found.items() if name.startswith("exp_avg"))
    biases = [value.item() for name, value in found.items() if name.endswith("router.state.bias")]
    assert len(biases) == 3 and all(biases)


@pytest.fixture(scope="module")
def written(start, advance, save, tiny_file, tmp_path_factory):
    """A run directory with a checkpoint after one step."""
    root = tmp_path_factory.mktemp("written")
    parts = start(load_config(tiny_file, [f"run.directory={root}"]))
    advance(parts, 1)
    save(parts)
    return root


@pytest.fixture
def checkpoint(written, tiny):
    """A copy of that checkpoint in the run directory that `start(tiny())` resumes from."""
    run = tiny().run_directory
    shutil.copytree(written, run)
    return run / "checkpoints" / "step-00000001"


def test_a_resume_needs_the_repairs_of_torch_adam(monkeypatch, checkpoint, start, tiny):
    # When this fails, Megatron-core has mended itself and optim/torch_adam.py can go.
    config = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(optim_build, "init_state", lambda _: None)
        with pytest.raises(AssertionError):
            start(config)
    assert start(config).resumed_from == 1
    repaired = DistributedOptimizer._set_main_param_and_optimizer_states
    monkeypatch.setattr(DistributedOptimizer, "_set_main_param_and_optimizer_states", repaired.__wrapped__)
    monkeypatch.setattr(optim_build, "repair_load", lambda: None)
    with pytest.raises(KeyError, match="step"):
        start(config)


def test_a_resume_without_a_step_count_of_its_own_for_each_weight_goes_wrong(
    monkeypatch, checkpoint, start, advance, tiny
):
    # The second half of repair_load: with the KeyError out of the way the run goes on, and is another one.
    losses = [result.totals.loss for result in advance(start(tiny()), 2)]
    original = DistributedOptimizer._set_main_param_and_optimizer_states.__wrapped__

    def keeps_the_shared_count(self, param, tensors):
        group, order = self.model_param_group_index_map[param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        return original(self, param, {"step": state["step"].clone(), **tensors} if "step" in state else tensors)

    monkeypatch.setattr(DistributedOptimizer, "_set_main_param_and_optimizer_states", keeps_the_shared_count)
    monkeypatch.setattr(optim_build, "repair_load", lambda: None)
    assert [result.totals.loss for result in advance(start(tiny()), 2)] != losses


def test_folder_without_its_marker_is_not_loaded(checkpoint, start, tiny):
    (checkpoint / "complete.json").unlink()
    assert start(tiny()).resumed_from is None
    manager = start(tiny()).checkpoints
    with pytest.raises(CheckpointError, match="has no complete.json, so its writing did not finish"):
        manager_module.load_state(checkpoint, manager._chunks, manager._optimizer, manager._replicas)


@pytest.mark.parametrize("left", [None, 0.5], ids=["missing", "cut short"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt"])
def test_damaged_checkpoint_is_refused_in_one_sentence(checkpoint, start, tiny, name, left):
    file = checkpoint / name
    content = file.read_bytes()
    file.unlink()
    if left is not None:
        file.write_bytes(content[: int(len(content) * left)])
    with pytest.raises(CheckpointError, match="remove its folder, to go on from an older one") as caught:
        start(tiny())
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json", "common.pt", "run.json"])
def test_a_flipped_byte_is_refused_in_one_sentence(checkpoint, start, tiny, name):
    file = checkpoint / name
    flip(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="are not those that were written: their sha256 differs") as caught:
        start(tiny())
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_is_not_looked_for_where_only_sizes_are_compared(checkpoint, start, tiny):
    file = checkpoint / "run.json"
    flip(file, file.read_bytes().index(b'"layout": "') + len('"layout": "'))
    with pytest.raises(CheckpointError):
        start(tiny())
    assert start(tiny("checkpoint.verify=sizes")).resumed_from == 1
    file.write_text(file.read_text() + " ")
    with pytest.raises(CheckpointError, match="bytes and was written with"):
        start(tiny("checkpoint.verify=sizes"))
    assert start(tiny("checkpoint.verify=off")).resumed_from == 1


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json", "common.pt"])
def test_garbage_is_refused_in_one_sentence_also_where_nothing_is_compared(checkpoint, start, tiny, name):
    file = checkpoint / name
    file.write_bytes(b"\x07" * file.stat().st_size)
    with pytest.raises(CheckpointError, match="cannot be (read|loaded into this model)") as caught:
        start(tiny("checkpoint.verify=off"))
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_passed_over_when_asked_for(checkpoint, start, advance, save, tiny, snapshot):
    parts = start(tiny())
    before = snapshot(parts)
    advance(parts, 1)
    newest = save(parts)
    flip(newest / "__0_0.distcp", 5000)
    with pytest.raises(CheckpointError, match="set checkpoint.fallback=true"):
        start(tiny())
    resumed = start(tiny("checkpoint.fallback=true"))
    assert resumed.resumed_from == 1
    assert differing(before, snapshot(resumed)) == []
    flip(checkpoint / "__0_0.distcp", 5000)
    with pytest.raises(CheckpointError, match="step-00000001"):  # nothing is left to go back to
        start(tiny("checkpoint.fallback=true"))


def test_checkpoint_of_another_shape_is_refused_in_one_sentence(checkpoint, start, tiny):
    with pytest.raises(CheckpointError, match="cannot be loaded into this model") as caught:
        start(tiny("model.ffn_hidden_size=64"))
    assert "\n" not in str(caught.value)


def test_the_old_checkpoint_goes_only_when_the_new_one_is_complete(monkeypatch, checkpoint, start, advance, save, tiny):
    parts = start(tiny("checkpoint.keep=1"))
    advance(parts, 1)

    def dies(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(manager_module, "finish", dies)
        with pytest.raises(CheckpointWriteError, match=r"of step 2 could not be written \(rank 0 on .*disk full\)"):
            save(parts)
    assert [found for found in checkpoint.parent.iterdir() if found.is_dir()] == [checkpoint]
    resumed = start(tiny("checkpoint.keep=1"))
    assert resumed.resumed_from == 1
    advance(resumed, 1)
    path = save(resumed)
    assert [found for found in checkpoint.parent.iterdir() if found.is_dir()] == [path]


def test_save_replaces_what_an_interrupted_writer_left(checkpoint, start, save, tiny):
    parts = start(tiny())
    shutil.move(checkpoint / "complete.json", checkpoint / "leftover")
    assert save(parts) == checkpoint
    assert not (checkpoint / "leftover").exists()
    assert start(tiny()).resumed_from == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_written_beside_training_is_the_one_of_its_step(
    start, advance, snapshot, tiny, precision, monkeypatch
):
    # Weights, moments and counters all change before anything is written.
    config = tiny(f"train.precision={precision}", "routing.controller.gain=0.1", "checkpoint.keep=9")
    go_on = threading.Event()
    original = manager_module.write
    monkeypatch.setattr(manager_module, "write", lambda *place: (go_on.wait(60), original(*place))[1])
    parts = start(config)
    advance(parts, 1)
    saved = {}
    for _ in range(2):  # the second copies into the buffers of the first
        saved[parts.state.step] = snapshot(parts)
        go_on.clear()
        parts.checkpoints.save(run_record(parts), lambda: gather_cursor(parts), wait=False)
        assert parts.checkpoints.poll() == [] and parts.checkpoints.last != parts.state.step
        advance(parts, 1)
        go_on.set()
        parts.checkpoints.drain()
        (done,) = parts.checkpoints.poll()
        assert done.bytes == sum(file.stat().st_size for file in done.path.iterdir() if file.name != "complete.json")
        assert 0 < done.stall_seconds < done.seconds
    resumed = start(config)
    assert resumed.resumed_from == 2 and differing(saved[2], snapshot(resumed)) == []
    advance(resumed, 1)
    assert differing(snapshot(parts), snapshot(resumed)) == []
    shutil.rmtree(done.path)
    resumed = start(config)
    assert resumed.resumed_from == 1 and differing(saved[1], snapshot(resumed)) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_waits_for_the_copy_and_the_pass_before_it_does_not(
    start, advance, snapshot, tiny, precision, monkeypatch
):
    config, go_on, passed = tiny(f"train.precision={precision}"), threading.Event(), threading.Event()
    fill = Staging.fill
    monkeypatch.setattr(Staging, "fill", lambda *items: (go_on.wait(60), fill(*items))[1])
    parts = start(config)
    advance(parts, 1)
    before = snapshot(parts)
    parts.checkpoints.save(run_record(parts), lambda: gather_cursor(parts), wait=False)
    prepare = parts.optimizer.prepare_grads
    monkeypatch.setattr(parts.optimizer, "prepare_grads", lambda: (passed.set(), prepare())[1])
    stepping = threading.Thread(target=advance, args=(parts, 1))
    stepping.start()
    assert passed.wait(60)  # forward and backward pass are through
    stepping.join(0.3)
    assert stepping.is_alive() and not parts.checkpoints.can_advance
    go_on.set()
    stepping.join(60)
    parts.checkpoints.drain()
    (done,) = parts.checkpoints.poll()
    assert done.stall_seconds > 0.3  # the update stood still
    resumed = start(config)
    assert resumed.resumed_from == 1 and differing(before, snapshot(resumed)) == []


def test_an_update_does_not_wait_for_a_copy_that_failed(start, advance, tiny, monkeypatch):
    parts = start(tiny())
    advance(parts, 1)
    monkeypatch.setattr(Staging, "fill", lambda *_: 1 / 0)
    parts.checkpoints.save(run_record(parts), lambda: gather_cursor(parts), wait=False)
    advance(parts, 1)
    with pytest.raises(CheckpointWriteError, match="of step 1 could not be written .*ZeroDivisionError"):
        parts.checkpoints.drain()


def test_a_checkpoint_goes_on_when_all_ranks_say_that_they_are_done(start, advance, tiny):
    parts = start(tiny())
    checkpoints, found, deadline = parts.checkpoints, [], time.monotonic() + 60
    advance(parts, 1)
    checkpoints.save(run_record(parts), lambda: gather_cursor(parts), wait=False)
    while not found and time.monotonic() < deadline:
        (result,) = advance(parts, 1)
        assert checkpoints.poll() == []
        found += checkpoints.poll(result.totals.saved)
    assert [saved.path.name for saved in found] == ["step-00000001"] and not checkpoints.can_advance


def test_due_counts_steps():
    def manager(every):
        return manager_module.CheckpointManager(None, CheckpointConfig(every=every), [], None, None)

    assert [step for step in range(1, 8) if manager(3).due(step)] == [3, 6]
    assert not manager(None).due(3)
