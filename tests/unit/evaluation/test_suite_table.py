"""Averages, tables and comparisons of results, and which results may be compared."""

import copy
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from megaroute.common.errors import DataError
from megaroute.evaluation import suite, task_list
from megaroute.evaluation.suite_table import comparison, table

TOOL = Path(__file__).parents[3] / "tools" / "compare_evaluations.py"


def row(task, scores):
    return {
        "title": task.title,
        "group": task.group,
        "metric": task.metric,
        "chance": task.chance,
        "value": float(np.mean(scores)),
        "stderr": suite.standard_error(scores),
        "documents": len(scores),
        "documents_sha256": task.name,
        "layers_executed": 3.25,
        "scores": scores,
    }


def result(**scores):
    known = {task.name: task for task in task_list.TASKS + task_list.BEYOND}
    tasks = {name: row(known[name], values) for name, values in scores.items()}
    return {
        "suite": suite.NAME,
        "fingerprint": "0123456789abcdef",
        "lm_eval": "0.4.13",
        "source": "files",
        "limit": None,
        "checkpoint": "runs/x/checkpoints/step-00000001",
        "num_layers": 4,
        "averages": suite.averages(tasks),
        "tasks": tasks,
    }


def test_suite_is_24_tasks_with_a_file_for_each_source():
    assert len(task_list.TASKS) == len({task.name for task in task_list.TASKS}) == 24
    assert sum(task.group == "generation" for task in task_list.TASKS) == 3
    for task in task_list.TASKS:
        assert (suite.FOLDER / f"{task.name}.yaml").is_file()
    for task in task_list.TASKS + task_list.BEYOND:
        assert (suite.FOLDER / f"local_{task.name}.yaml").is_file()
    assert len(list(suite.FOLDER.glob("*.yaml"))) == 24 + 26 + 3  # three are what the local ones include


class Loader(yaml.SafeLoader):
    """Reads the names of functions as text."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.mark.parametrize("task", task_list.TASKS, ids=lambda task: task.name)
def test_usual_source_is_named(task):
    """It cannot be read here; but what is asked of it, and how, is all there."""
    settings = yaml.load((suite.FOLDER / f"{task.name}.yaml").read_text(), Loader)
    assert settings["task"] == f"sl24_{task.name}" and settings["num_fewshot"] == 1
    assert re.fullmatch(r"[\w-]+/[\w.-]+", settings["dataset_path"])
    assert "test_split" in settings or "validation_split" in settings
    assert task.metric in [metric["metric"] for metric in settings["metric_list"]]
    assert {"doc_to_text", "doc_to_target"} <= settings.keys()
    assert settings["class"].endswith("SeededTask")


def test_fingerprint_follows_the_task_files(monkeypatch, tmp_path):
    before = suite.fingerprint()
    for path in suite.FOLDER.glob("*.yaml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(suite, "FOLDER", tmp_path)
    assert suite.fingerprint() == before
    (tmp_path / "piqa.yaml").write_text((tmp_path / "piqa.yaml").read_text().replace("Answer", "answer"))
    assert suite.fingerprint() != before


def test_each_task_counts_once_in_an_average():
    found = result(piqa=[1.0] * 90 + [0.0] * 10, copa=[0.0, 1.0], nq_open=[0.0] * 50, blimp=[1.0] * 4)["averages"]
    assert found["understanding"]["value"] == pytest.approx((0.9 + 0.5) / 2)
    assert found["all"]["value"] == pytest.approx((0.9 + 0.5 + 0.0) / 3)
    assert found["generation"] == {"value": 0.0, "stderr": 0.0, "tasks": 1, "of": 3}
    errors = [suite.standard_error([1.0] * 90 + [0.0] * 10), suite.standard_error([0.0, 1.0])]
    assert found["understanding"]["stderr"] == pytest.approx(np.hypot(*errors) / 2)


def test_table_says_what_was_run_and_what_it_is_worth():
    text = table(result(piqa=[1.0, 1.0, 0.0, 1.0]))
    assert "| PIQA | acc_norm | 75.0 ± 25.0 | 50.0 | 4 | 3.25 of 4 |" in text
    assert "**understanding**, 1 of 21 tasks" in text and "0123456789ab" in text
    assert "ONLY 9 DOCUMENTS" in table(result(piqa=[1.0]) | {"limit": 9})


def test_paired_differences_are_judged_by_their_pairs():
    draw = np.random.default_rng(0)
    hard = draw.random(400)  # documents differ in difficulty far more than the models do
    a = (draw.random(400) < hard).astype(float)
    b = np.where(np.arange(400) % 20 == 0, 1.0, a)  # right wherever a is, and on some more
    text = comparison([result(piqa=a.tolist()), result(piqa=b.tolist())], ["a", "b"])
    line = next(line for line in text.splitlines() if line.startswith("| PIQA"))
    assert f"{100 * (b - a).mean():+.1f} (" in line and line.endswith("* |")  # unpaired it would drown: ± 4.9 points
    same = comparison([result(piqa=a.tolist())] * 2, ["a", "b"])
    assert "+0.0 (+0.0 to +0.0) |" in same


def test_average_of_differences_is_over_the_shared_tasks():
    one, two = result(piqa=[0.0, 1.0], copa=[1.0, 1.0]), result(piqa=[1.0, 1.0])
    text = comparison([one, two], ["one", "two"])
    assert "COPA" not in text and "**all**, 1 tasks | 50.0 | 100.0 | +50.0" in text


def test_results_of_different_tests_are_refused():
    one = result(piqa=[0.0, 1.0])
    with pytest.raises(DataError, match="b has limit 5, a has None: they are not of the same test"):
        comparison([one, one | {"limit": 5}], ["a", "b"])
    other = copy.deepcopy(one)
    other["tasks"]["piqa"]["documents_sha256"] = "x"
    with pytest.raises(DataError, match="b and a were given other documents of piqa"):
        comparison([one, other], ["a", "b"])


def test_choice_of_tasks(tmp_path):
    assert task_list.choose(None, None) == list(task_list.TASKS)
    (tmp_path / "piqa.jsonl").write_text("")
    (tmp_path / "blimp.jsonl.xz").write_text("")
    assert [task.name for task in task_list.choose(None, tmp_path)] == ["piqa", "blimp"]
    with pytest.raises(DataError, match="--tasks: piqua is not one of triviaqa, "):
        task_list.choose(["piqua"], None)
    with pytest.raises(DataError, match="has no file for copa; put it there or leave it out"):
        task_list.choose(["copa"], tmp_path)
    with pytest.raises(DataError, match="is not a folder, so there are no tasks in it"):
        task_list.choose(None, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has a file for none of the tasks"):
        task_list.choose(None, tmp_path / "empty")


def test_tool_compares_files(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("compare_evaluations", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    paths = [tmp_path / "dense.json", tmp_path / "skip.json"]
    for path in paths:
        path.write_text(json.dumps(result(piqa=[0.0, 1.0])))
    assert tool.main([str(path) for path in paths]) == 0
    assert "| dense, % | skip, % | skip - dense |" in capsys.readouterr().out
    paths[1].write_text("{}")
    assert tool.main([str(path) for path in paths]) == 2
    assert "skip.json holds no result of a suite" in capsys.readouterr().err
