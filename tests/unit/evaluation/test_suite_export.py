"""An exported model in the harness's own class says what its checkpoint says natively, example by example."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `evaluate`")
pytest.importorskip("accelerate", reason="the harness's class for transformers needs it")
pytest.importorskip("transformers", reason="needs the extra `export`")

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from megaroute.config.load import load_config
from megaroute.evaluation import suite, task_list
from megaroute.evaluation.harness_model import HarnessModel
from megaroute.evaluation.open import open_model
from megaroute.export.to_hf import to_hf
from megaroute.launch.rundir import prepare_run_directory

SETS = Path(os.environ.get("MEGAROUTE_SHARED", Path(__file__).parents[4] / "shared")) / "data/eval"
TASKS = [f"sl24_{name}_local" for name in ("piqa", "winogrande", "webqs", "blimp", "lambada")]


@pytest.fixture(scope="module")
def run_of(start, advance, save, tiny_file, tmp_path_factory):
    """A model whose routers skip here and there, with a context of so many tokens."""

    def run_of(length):
        root = tmp_path_factory.mktemp("exported")
        settings = [f"data.sequence_length={length}", "routing.init_logit_std=2", "train.steps=2"]
        config = load_config(tiny_file, [f"run.directory={root / 'run'}", *settings])
        run = prepare_run_directory(config)
        parts = start(config)
        advance(parts, 2)
        save(parts)
        return run

    return run_of


@pytest.fixture(scope="module")
def run(run_of):
    """With a context that the prompts fit into, mostly."""
    return run_of(96)


def compare(run, folder, tasks, out, documents) -> int:
    """Answers of the checkpoint and of its export in the harness's class, example by example; how many there were."""
    scorer = open_model(run)
    to_hf(run, out, 10**9, None)
    exported = HFLM(
        pretrained=str(out), trust_remote_code=True, add_bos_token=True, device="cpu", dtype="float32", batch_size=4
    )
    samples = []
    for model in (HarnessModel(scorer, 3), exported):
        manager = TaskManager(
            include_path=str(suite.FOLDER), include_defaults=False, metadata={"data_dir": str(folder)}
        )
        chosen = {name: list(range(documents)) for name in tasks}
        found = simple_evaluate(model, tasks=tasks, task_manager=manager, samples=chosen, bootstrap_iters=0)
        samples.append(found["samples"])
    compared = 0
    for name in tasks:
        for native, converted in zip(samples[0][name], samples[1][name], strict=True):
            assert native["arguments"] == converted["arguments"]  # the same prompts, with the same examples
            for (mine,), (theirs,) in zip(native["resps"], converted["resps"], strict=True):
                if isinstance(mine, str):
                    assert mine == theirs
                else:
                    assert mine[0] == pytest.approx(theirs[0], abs=1e-4) and mine[1] == theirs[1]
                compared += 1
    return compared


def test_answers_of_each_example(run, task_folder, tmp_path):
    assert compare(run, task_folder, TASKS, tmp_path / "exported", 9) == 9 * (2 + 2 + 1 + 2 + 1)


@pytest.mark.slow
@pytest.mark.skipif(not SETS.is_dir(), reason="needs evaluation sets in ../shared/data/eval")
def test_answers_of_every_local_task(run_of, tmp_path):
    tasks = [f"sl24_{task.name}_local" for task in task_list.choose(None, SETS)]
    assert len(tasks) == 10
    assert compare(run_of(768), SETS, tasks, tmp_path / "exported", 5) >= 5 * len(tasks)


@pytest.mark.slow
def test_command_of_the_harness_says_what_ours_says(run, task_folder, tmp_path):
    names = ["piqa", "winogrande", "webqs", "blimp", "lambada"]
    expected = suite.run(open_model(run), task_list.choose(names, task_folder), task_folder)["tasks"]
    to_hf(run, tmp_path / "exported", 10**9, None)
    model = f"pretrained={tmp_path / 'exported'},trust_remote_code=True,add_bos_token=True,dtype=float32"
    arguments = {
        "--model": "hf",
        "--model_args": model,
        "--device": "cpu",
        "--batch_size": "4",
        "--include_path": str(suite.FOLDER),
        "--metadata": json.dumps({"data_dir": str(task_folder)}),
        "--tasks": ",".join(f"sl24_{name}_local" for name in names),
        "--output_path": str(tmp_path / "results.json"),
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *(word for pair in arguments.items() for word in pair)],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.rglob("results*.json")
    found = json.loads(file.read_text())["results"]
    for name in names:
        row, theirs = expected[name], found[f"sl24_{name}_local"]
        (value,) = [v for key, v in theirs.items() if key.split(",")[0] == row["metric"]]
        assert value == pytest.approx(row["value"], abs=1e-9), name
