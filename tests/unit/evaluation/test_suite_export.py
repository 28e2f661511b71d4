"""An exported model in the harness's own class says what its checkpoint says natively, example by example."""

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `evaluate`")
pytest.importorskip("accelerate", reason="the harness's class for transformers needs it")
pytest.importorskip("transformers", reason="needs the extra `export`")

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from megaroute.config.load import load_config
from megaroute.evaluation import suite
from megaroute.evaluation.harness_model import HarnessModel
from megaroute.evaluation.open import open_model
from megaroute.export.to_hf import to_hf
from megaroute.launch.rundir import prepare_run_directory

TASKS = [f"sl24_{name}_local" for name in ("piqa", "winogrande", "webqs", "blimp", "lambada")]


@pytest.fixture(scope="module")
def run(start, advance, save, tiny_file, tmp_path_factory):
    """A model whose routers skip here and there, with a context that the prompts fit into, mostly."""
    root = tmp_path_factory.mktemp("exported")
    settings = ["data.sequence_length=96", "routing.init_logit_std=2", "train.steps=2"]
    config = load_config(tiny_file, [f"run.directory={root / 'run'}", *settings])
    run = prepare_run_directory(config)
    parts = start(config)
    advance(parts, 2)
    save(parts)
    return run


def test_answers_of_each_example(run, task_folder, tmp_path):
    scorer = open_model(run)
    to_hf(run, tmp_path / "exported", 10**9, None)
    exported = HFLM(
        pretrained=str(tmp_path / "exported"),
        trust_remote_code=True,
        add_bos_token=True,
        device="cpu",
        dtype="float32",
        batch_size=4,
    )
    samples = []
    for model in (HarnessModel(scorer, 3), exported):
        manager = TaskManager(
            include_path=str(suite.FOLDER), include_defaults=False, metadata={"data_dir": str(task_folder)}
        )
        samples.append(simple_evaluate(model, tasks=TASKS, task_manager=manager, bootstrap_iters=0)["samples"])
    compared = 0
    for name in TASKS:
        for native, converted in zip(samples[0][name], samples[1][name], strict=True):
            assert native["arguments"] == converted["arguments"]  # the same prompts, with the same examples
            for (mine,), (theirs,) in zip(native["resps"], converted["resps"], strict=True):
                if isinstance(mine, str):
                    assert mine == theirs
                else:
                    assert mine[0] == pytest.approx(theirs[0], abs=1e-4) and mine[1] == theirs[1]
                compared += 1
    assert compared == 9 * (2 + 2 + 1 + 2 + 1)
