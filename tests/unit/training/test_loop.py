"""A run from its first step to its report, in this process."""

import re

import pytest

from megaroute.launch.rundir import prepare_run_directory
from megaroute.metrics.history import read_history
from megaroute.metrics.report import write_comparison, write_report
from megaroute.metrics.trace import read_trace
from megaroute.training import loop
from megaroute.training.observer import Observer


@pytest.fixture
def finished(start, tiny):
    """`finished(overrides)`: the directory of a run that has come to its end."""

    def finished(*overrides):
        config = tiny("checkpoint.resume=false", *overrides)
        prepare_run_directory(config)
        parts = start(config)
        observer = Observer(parts, num_parameters=1000)
        assert loop.run(parts, observer) == 0
        observer.close()
        return config.run_directory

    return finished


def test_units_alarms_load_and_flops_reach_the_report(finished, tmp_path):
    alarm = ["routing.alarm.window=1", "routing.alarm.drift=1e-6"]
    run_dir = finished("routing.unit=separate", "train.validate_every=4", "train.validate_samples=8", *alarm)
    history = read_history(run_dir / "metrics.jsonl")
    labels = ("1 attention", "1 mlp", "2 attention", "2 mlp", "3 attention", "3 mlp")
    assert history.events[0].values["units"] == labels
    for record in history.train:
        assert len(record.density) == len(record.rows) == len(record.overflow) == 6
        assert sum(record.flops.values()) == record.executed_flops
        stages = record.load["stages"]
        assert record.load == {
            "ranks": 1.0,
            "rank_rows": (stages,),
            "units": (1.0,) * 6,
            "stages": stages,
            "stages_max_over_mean": 1.0,
        }
    (validated,) = history.valid[-1:]
    last = history.train[-1]
    # A forward pass is a third of a step, and validation executes its own share of the tokens.
    ratio = 3 * validated.flops_per_token * last.step_tokens / last.dense_flops
    assert 0.4 < ratio < 1.0
    raised = [event for event in history.events if event.kind == "alarm"]
    # Each unit once, when the window is full: nothing brings a density to within a millionth of its target.
    assert [(event.step, event.values["unit"]) for event in raised] == [(2, label) for label in labels]
    trace = read_trace(run_dir / "routing_trace.json")
    assert tuple(unit.label for unit in trace.units) == labels and trace.by_branch
    page = write_report(run_dir).read_text()
    assert "<td>layer 3 mlp</td>" in page and "layer 3 mlp: router wants" in page
    assert re.search(r">L3 mlp<", page)


def test_runs_of_other_routers_stand_side_by_side(finished, tmp_path):
    overrides = {
        "experts": ["routing.router=moe", "routing.unit=mlp"],
        "capacity": ["routing.dispatch.mode=capacity", "routing.capacity.factor=0.5"],
        "dense": ["routing.router=dense"],
    }
    runs = [finished(f"run.name={name}", f"run.directory={tmp_path / name}", *more) for name, more in overrides.items()]
    text = write_comparison(runs).read_text()
    assert all(f">{name}<" in text for name in overrides)
    assert "dispatch mode capacity drops tokens in training" in text
