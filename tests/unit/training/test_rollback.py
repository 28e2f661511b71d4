"""Skipped spikes, and the way back to the newest checkpoint, in a run from its first step to its end."""

import pytest
import torch

from megaroute.common.errors import ConfigError
from megaroute.config.checks import check_config
from megaroute.launch.rundir import prepare_run_directory
from megaroute.metrics.history import read_history
from megaroute.metrics.report import write_report
from megaroute.training import forward, loop
from megaroute.training.guards import TrainingDiverged
from megaroute.training.observer import Observer

pytestmark = pytest.mark.survive

RUN = ["train.steps=14", "optim.decay_steps=14", "checkpoint.every=4", "checkpoint.keep=9", "train.rollback_after=2"]
BAD = (9, 10)
"""Steps, from 1, that go wrong: two in a row after the checkpoint of step 8."""


def nan_loss(_, losses_BS):
    return losses_BS.mean() * float("nan"), {"losses": losses_BS.detach()}


def high_loss(_, losses_BS):
    return losses_BS.mean() * 50, {"losses": losses_BS.detach() * 50}


@pytest.fixture
def run(start, monkeypatch):
    """`run(config, bad, loss)`: the parts of a run, at its end, in which the steps `bad` went wrong.

    It is asked to stop in step `stop_in`, from 1.
    """

    def run(config, bad=BAD, loss=nan_loss, stop_in=None):
        prepare_run_directory(config)
        parts = start(config)
        observer, run_step = Observer(parts, num_parameters=1000), loop.run_step

        def faulty(parts, stop):
            with monkeypatch.context() as patch:
                if parts.state.step + 1 in bad:
                    patch.setattr(forward, "_mean_loss", loss)
                return run_step(parts, parts.state.step + 1 == stop_in)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "run_step", faulty)
            try:
                loop.run(parts, observer)
            finally:
                observer.close()
        return parts

    return run


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_goes_back_and_on_and_says_so(run, start, tiny, snapshot, monkeypatch):
    from megaroute.training import rollback

    at, roll_back = {}, rollback.roll_back

    def looking(parts):
        told = roll_back(parts)
        at.update(snapshot(parts))
        return told

    monkeypatch.setattr(rollback, "roll_back", looking)
    config = tiny(*RUN)
    parts = run(config)
    assert (parts.state.step, parts.state.samples) == (14, 14 * 8), "steps and data go on"
    assert parts.state.guards.undone == [[9, 10]] and parts.state.guards.rollbacks == 1
    history = read_history(config.run_directory / "metrics.jsonl")
    alarms = [event for event in history.events if event.kind == "alarm"]
    (told,) = [event for event in alarms if "rollback" in event.values]
    assert told.step == 10 and "are those of step 8 again, rollback 1 of at most 2; steps 9 to 10" in told.message
    assert [record.step for record in history.train] == list(range(1, 15)), "no step has two meanings"
    assert [record.skipped_update for record in history.train].count(True) == 2
    assert "of step 8 again" in write_report(config.run_directory).read_text()
    # What it went back to is what a run that starts from that checkpoint has.
    for step in (12, 14):
        (config.run_directory / "checkpoints" / f"step-{step:08d}" / "complete.json").unlink()
    assert same(at, snapshot(start(config)))


def test_cut_off_after_a_rollback_it_goes_through_the_same_again(run, tiny, snapshot, tmp_path):
    whole = run(tiny(*RUN, f"run.directory={tmp_path}/whole"))
    config = tiny(*RUN, "train.steps=11")
    run(config)
    (config.run_directory / "checkpoints" / "step-00000011" / "complete.json").unlink()  # as a kill would have it
    resumed = run(tiny(*RUN))
    assert resumed.resumed_from == 8
    assert same(snapshot(resumed), snapshot(whole))
    assert resumed.state.guards == whole.state.guards
    assert resumed.ledger == whole.ledger


def test_stopped_among_bad_steps_it_goes_through_the_same_again(run, tiny, snapshot, tmp_path):
    spike = ["train.spike.window=8", "train.spike.loss=20", "train.spike.action=skip"]
    bad = (10, 12, 13)
    whole = run(tiny(*RUN, *spike, f"run.directory={tmp_path}/whole"), bad, high_loss)
    config = tiny(*RUN, *spike)
    run(config, bad, high_loss, stop_in=12)
    stopped = read_history(config.run_directory / "metrics.jsonl").events[-1]
    assert stopped.kind == "stop" and stopped.message.endswith("it goes on from step 8")
    resumed = run(config, bad, high_loss)
    assert resumed.resumed_from == 8 and resumed.state.guards.undone == [[9, 13]]
    assert same(snapshot(resumed), snapshot(whole))
    assert resumed.state.guards == whole.state.guards
    assert resumed.ledger == whole.ledger


def test_a_spike_that_is_skipped_changes_nothing_and_one_that_is_not_does(run, tiny, snapshot, tmp_path):
    base = ["train.steps=11", "optim.decay_steps=11", "train.spike.window=8", "train.spike.loss=20"]
    before = run(tiny(*base, "train.steps=10", f"run.directory={tmp_path}/before"), ())
    skip = tiny(*base, "train.spike.action=skip", f"run.directory={tmp_path}/skip")
    skipped = run(skip, (11,), high_loss)
    assert same(snapshot(skipped), snapshot(before))
    history = read_history(skip.run_directory / "metrics.jsonl")
    last = history.train[-1]
    assert last.skipped_update and last.nonfinite == 0 and last.spikes["loss"] > 20
    (alarm,) = [event for event in history.events if event.kind == "alarm"]
    assert "standard deviations above the median" in alarm.message and alarm.message.endswith("the update was left out")
    told = tiny(*base, f"run.directory={tmp_path}/alarm")
    taken = run(told, (11,), high_loss)
    last = read_history(told.run_directory / "metrics.jsonl").train[-1]
    assert not last.skipped_update and last.spikes["loss"] > 20
    assert not same(snapshot(taken), snapshot(before))


def test_it_ends_when_going_back_does_not_help(run, tiny):
    with pytest.raises(TrainingDiverged, match=r"2 steps in a row .* after 1 rollbacks \(train.max_rollbacks\)"):
        run(tiny(*RUN, "train.max_rollbacks=1"), bad=range(9, 15))


def test_before_the_first_checkpoint_there_is_nothing_to_go_back_to(run, tiny):
    with pytest.raises(TrainingDiverged, match="before the first checkpoint"):
        run(tiny(*RUN), bad=(2, 3))


def test_no_checkpoint_is_written_in_the_middle_of_a_series(run, tiny):
    config = tiny(*RUN, "train.rollback_after=3")
    run(config, bad=(7, 8))
    assert not (config.run_directory / "checkpoints" / "step-00000008").exists()
    assert (config.run_directory / "checkpoints" / "step-00000012").exists()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["train.rollback_after=2"], "needs checkpoints to go back to, but checkpoint.every is not given"),
        (["train.rollback_after=9", "checkpoint.every=5"], "train.rollback_after 9 > train.max_nonfinite 8"),
        (["run.hang_timeout_s=400"], r"2 \* run.hang_timeout_s 400 > run.timeout_s 600"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tiny, overrides, words):
    with pytest.raises(ConfigError, match=words):
        check_config(tiny(*overrides))
