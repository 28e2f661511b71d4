"""Tasks in the loop: the numbers of the checkpoint, at no cost to the run."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra `evaluate`")

from megaroute.common.errors import ConfigError
from megaroute.config.load import load_config
from megaroute.evaluation import suite, task_list
from megaroute.evaluation.in_loop import InLoop
from megaroute.evaluation.open import open_model
from megaroute.launch.rundir import prepare_run_directory
from megaroute.metrics.history import differences, read_history
from megaroute.training import loop
from megaroute.training.observer import Observer

TASKS = ["piqa", "blimp", "webqs"]


@pytest.fixture
def config_of(tiny, task_folder):
    settings = [f"evaluate.tasks=[{', '.join(TASKS)}]", f"evaluate.data_dir={task_folder}", "evaluate.limit=5"]
    return lambda *overrides: tiny("routing.init_logit_std=2", "evaluate.every=2", *settings, *overrides)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scores_are_those_of_the_checkpoint_and_nothing_else_changes(
    config_of, task_folder, start, advance, save, snapshot, precision
):
    config = config_of("train.micro_batch=4", f"train.precision={precision}")
    run = prepare_run_directory(config)
    parts = start(config)
    advance(parts, 3)
    score_tasks = InLoop(config)
    tensors, random_states = snapshot(parts), (random.getstate(), torch.get_rng_state(), str(np.random.get_state()))
    scores = score_tasks(parts)
    after = snapshot(parts)
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items()) and after.keys() == tensors.keys()
    assert random.getstate() == random_states[0] and torch.equal(torch.get_rng_state(), random_states[1])
    assert str(np.random.get_state()) == random_states[2]
    assert all(chunk.training for chunk in parts.wrapped)
    save(parts)
    tasks = task_list.choose(TASKS, task_folder)
    expected = suite.run(open_model(run, precision=precision), tasks, task_folder, batch=8, limit=5)["tasks"]
    assert list(scores) == TASKS
    for name, score in scores.items():
        row = expected[name]
        assert (score.value, score.stderr, score.documents) == (row["value"], row["stderr"], 5)
        assert score.layers_executed == pytest.approx(row["layers_executed"], rel=1e-6)


def test_run_with_tasks_is_the_run_without_them(config_of, start, tmp_path):
    histories = []
    for name, overrides in (("with", ()), ("without", ("evaluate.tasks=[]", "evaluate.every=null"))):
        config = config_of(f"run.directory={tmp_path / name}", "train.steps=5", *overrides)
        prepare_run_directory(config)
        parts = start(config)
        observer = Observer(parts, num_parameters=1000)
        loop.run(parts, observer, score_tasks=InLoop(config) if config.evaluate.tasks else None)
        observer.close()
        histories.append(read_history(parts.run_dir / "metrics.jsonl"))
    scored, plain = histories
    assert len(scored.train) == len(plain.train) == 5
    assert [differences(a, b) for a, b in zip(scored.train, plain.train, strict=True)] == [()] * 5
    assert plain.tasks == () and [record.step for record in scored.tasks] == [2, 4, 5]
    for record in scored.tasks:
        assert list(record.scores) == TASKS and record.seconds > 0
        assert all(0 <= score.value <= 1 and score.documents == 5 for score in record.scores.values())


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["evaluate.tasks=[piqua]"], "evaluate.tasks: piqua is not one of triviaqa, "),
        (["evaluate.tasks=[copa]"], "evaluate.data_dir .* has no file for copa"),
        (["evaluate.data_dir=/nowhere"], "evaluate.data_dir /nowhere is not a folder"),
        (["routing.router=mod", "routing.causal_evaluation=false"], "routing.causal_evaluation is false"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_work_begins(config_of, overrides, message):
    with pytest.raises(ConfigError, match=message):
        InLoop(config_of(*overrides))


def test_launch_refuses_tasks_that_are_not_there(tiny_file, capsys):
    from megaroute.cli import main

    overrides = ["evaluate.tasks=[copa]", "evaluate.every=2", "evaluate.data_dir=/nowhere"]
    assert main(["launch", str(tiny_file), "--dry-run", *overrides]) == 2
    assert "evaluate.data_dir /nowhere is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["evaluate.tasks=[piqa]"], "evaluate.tasks piqa would never be scored: evaluate.every is not given"),
        (["evaluate.every=3"], "evaluate.every 3 has nothing to score: evaluate.tasks is empty"),
    ],
)
def test_half_a_section_is_refused(tiny_file, overrides, message):
    from megaroute.config.checks import check_config

    with pytest.raises(ConfigError, match=message):
        check_config(load_config(tiny_file, overrides))
