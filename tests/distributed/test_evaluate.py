"""An evaluation says the same on any number of ranks and in any batch."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import run_ranks

from megaroute.config.load import load_config
from megaroute.evaluation import suite, task_list
from megaroute.evaluation.open import open_model
from megaroute.evaluation.perplexity import bits_per_byte, text_files
from megaroute.launch.rundir import prepare_run_directory

WORKER = Path(__file__).resolve().parents[1] / "support" / "evaluate_worker.py"
IN_LOOP_WORKER = WORKER.with_name("in_loop_worker.py")
SENTENCE = "the router reads every token and decides whether a layer is worth its time or not"


@pytest.fixture(scope="module")
def trained(start, advance, save, tiny_file, tmp_path_factory) -> Callable[..., Path]:
    """`trained(*overrides)`: the directory of a run of three steps."""

    def train(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("evaluated") / "run"
        settings = [f"run.directory={folder}", "routing.init_logit_std=2", "train.steps=3", *overrides]
        config = load_config(tiny_file, settings)
        run = prepare_run_directory(config)
        parts = start(config)
        advance(parts, 3)
        save(parts)
        return run

    return train


@pytest.fixture(scope="module")
def run(trained) -> Path:
    return trained()


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    draw = random.Random(4)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts = [" ".join(draw.choices(SENTENCE.split(), k=draw.randint(1, 60))) for _ in range(11)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def alone(run, texts):
    return bits_per_byte(open_model(run), text_files([texts]), batch=3)


def check(run, texts, alone, folder, world_size, tensor, pipeline, batch):
    spec = {"run": str(run), "texts": str(texts), "tensor": tensor, "pipeline": pipeline, "batch": batch}
    first, *others = run_ranks(WORKER, world_size, spec, folder, timeout_s=240)
    assert others == [None] * (world_size - 1)
    assert first.pop("layout") == f"tp{tensor} x pp{pipeline} x dp{world_size // tensor // pipeline}"
    expected = {key: value for key, value in alone.items() if key != "layout"}
    assert first["density"] == expected["density"]
    assert first == {k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in expected.items()}


@pytest.mark.parametrize("tensor, pipeline, batch", [(1, 1, 2)])
def test_two_ranks_say_what_one_says(run, texts, alone, tmp_path, tensor, pipeline, batch):
    check(run, texts, alone, tmp_path, 2, tensor, pipeline, batch)


@pytest.mark.slow
@pytest.mark.parametrize("world_size, tensor, pipeline", [(2, 2, 1), (2, 1, 2), (3, 1, 1), (4, 2, 2), (4, 1, 2)])
def test_layout_changes_nothing(run, texts, alone, tmp_path, world_size, tensor, pipeline):
    check(run, texts, alone, tmp_path, world_size, tensor, pipeline, batch=5)


@pytest.mark.slow
def test_layout_changes_nothing_of_a_model_that_was_trained_in_bfloat16(trained, texts, tmp_path):
    # In bfloat16 the sums of two tensor ranks round to other logits than those of one, and decisions flip.
    run = trained("train.precision=bf16")
    check(run, texts, bits_per_byte(open_model(run), text_files([texts]), batch=3), tmp_path, 2, 2, 1, batch=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tasks whose documents and answers are of the corpus's words: one by choice, one by generation."""
    draw = random.Random(5)
    root = tmp_path_factory.mktemp("tasks")

    def words(most: int) -> str:
        return " ".join(draw.choices(SENTENCE.split(), k=draw.randint(1, most)))

    choice = [{"query": words(3), "choices": [words(2), words(2)], "gold": draw.randint(0, 1)} for _ in range(11)]
    asked = [{"question": words(3), "answer": [words(1)]} for _ in range(5)]
    for name, rows in (("piqa", choice), ("nq_open", asked)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("world_size, tensor, pipeline", [(2, 1, 1), (3, 1, 1), (4, 2, 2)])
def test_tasks_have_one_result_on_any_ranks(run, folder, tmp_path, world_size, tensor, pipeline):
    pytest.importorskip("lm_eval", reason="needs the extra `evaluate`")
    alone = suite.run(open_model(run), task_list.choose(None, folder), folder, batch=4)
    spec = {"run": str(run), "tasks": str(folder), "tensor": tensor, "pipeline": pipeline, "batch": 3}
    first, *others = run_ranks(WORKER, world_size, spec, tmp_path, timeout_s=280)
    assert others == [None] * (world_size - 1)
    assert first["averages"] == alone["averages"] and len(first["tasks"]) == 2
    for name, row in alone["tasks"].items():
        layers = first["tasks"][name].pop("layers_executed")
        assert layers == pytest.approx(row.pop("layers_executed"), rel=1e-6)
        assert first["tasks"][name] == row


LAYOUTS = {
    "tp2-sp-pp2": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
    "interleaved": (
        2,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.batch_p2p=false", "train.micro_batch=2"],
    ),
    "exchange": (2, ["routing.unit=mlp", "routing.dispatch.exchange=dp"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tasks_in_the_loop_are_those_of_the_checkpoint(tiny_file, folder, tmp_path, layout):
    pytest.importorskip("lm_eval", reason="needs the extra `evaluate`")
    world_size, overrides = LAYOUTS[layout]
    run = tmp_path / "run"
    tasks = ["evaluate.tasks=[piqa, nq_open]", f"evaluate.data_dir={folder}", "evaluate.limit=4", "evaluate.every=1"]
    settings = [f"run.directory={run}", "routing.init_logit_std=2", "train.micro_batch=4", *tasks, *overrides]
    prepare_run_directory(load_config(tiny_file, settings))
    spec = {"config": str(tiny_file), "overrides": settings, "steps": 2}
    first, *others = run_ranks(IN_LOOP_WORKER, world_size, spec, tmp_path / "ranks", timeout_s=280)
    assert others == [first] * (world_size - 1)
    expected = suite.run(open_model(run), task_list.choose(["piqa", "nq_open"], folder), folder, limit=4)["tasks"]
    for name, score in first.items():
        row = {key: expected[name][key] for key in score}
        assert score == {k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in row.items()}
