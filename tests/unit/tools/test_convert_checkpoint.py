"""tools/convert_checkpoint.py: what it prints, and what it refuses."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="conversions want pip install 'megaroute[export]'")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

from foreign import save_foreign

TOOL = Path(__file__).parents[3] / "tools" / "convert_checkpoint.py"


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("tool_convert_checkpoint", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_stop", lambda: None)  # the process group serves other tests too
    return module


def test_says_what_it_wrote_and_what_it_found(tool, capsys, trained_run, tmp_path):
    assert tool.main(["to-hf", str(trained_run), str(tmp_path / "out")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(
        "out: MegarouteForCausalLM (its tokens skip layers, so not as a plain Llama model), 0.2 MB of weights"
    )
    assert second.startswith("checked in float32 on 128 tokens: logits differ by at most ")
    assert second.endswith("greedy continuation of 24 tokens identical")


def test_says_that_it_did_not_check(tool, capsys, trained_run, tmp_path):
    assert tool.main(["to-hf", str(trained_run), str(tmp_path / "out"), "--no-check"]) == 0
    assert "not checked (--no-check): whether it is the same model is not known" in capsys.readouterr().out


def test_text_may_be_given(tool, capsys, trained_run, tmp_path):
    (tmp_path / "text").write_text("the router reads every token " * 9)
    assert tool.main(["to-hf", str(trained_run), str(tmp_path / "out"), "--text", str(tmp_path / "text")]) == 0
    assert "greedy continuation" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, reason",
    [
        (["{folder}", "{folder}/out"], "holds no complete checkpoint"),
        (["{run}", "{run}"], "exists and is not an empty folder"),
        (["{run}", "{folder}/out", "--text", "{folder}/none"], "--text .* cannot be read as text"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tool, capsys, trained_run, tmp_path, words, reason):
    assert tool.main(["to-hf", *(word.format(folder=tmp_path, run=trained_run) for word in words)]) == 2
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1 and shown.out == "" and re.search(reason, shown.err)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def llama(tiny_corpus, tmp_path):
    return save_foreign(tmp_path / "llama", tiny_corpus / "tok.model")


def test_import_says_what_it_wrote_what_it_found_and_how_to_train_it(tool, capsys, one_process, llama, tmp_path):
    out = tmp_path / "out"
    assert tool.main(["from-hf", str(llama), str(out), "--as", "routed", "routing.first_dense=1"]) == 0
    wrote, tokenizer, found, train = capsys.readouterr().out.splitlines()
    assert wrote.endswith("out: llama model, 2 of 3 layers routed, upcycled, 0.2 MB of weights")
    assert tokenizer.startswith(f"tokenizer: {out}/tokenizer.model, sha256 ")
    assert found.startswith("checked in float32 on 256 tokens: logits differ by at most ")
    assert train.startswith(f"train it: megaroute launch {out}/config.yaml run.name=NAME data.train=SHARDS ")


def test_import_without_a_check_says_so(tool, capsys, llama, tmp_path):
    assert tool.main(["from-hf", str(llama), str(tmp_path / "out"), "--no-check"]) == 0
    assert "not checked (--no-check): whether it is the same model is not known" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, reason",
    [
        (["{folder}", "{folder}/out"], "is no folder of a Hugging Face model"),
        (["{folder}/llama", "{folder}/llama"], "exists and is not an empty folder"),
        (["{folder}/llama", "{folder}/out", "--text", "{folder}/none"], "--text .* cannot be read as text"),
        (["{folder}/llama", "{folder}/out", "--tokenizer", "{folder}/none"], "^error: --tokenizer: .* cannot be read"),
        (
            ["{folder}/llama", "{folder}/out", "routing.density=0.5", "nothing.is=this"],
            "nothing .* is not a configuration key",
        ),
    ],
)
def test_bad_import_is_one_sentence_and_exit_code_2(tool, capsys, llama, tmp_path, words, reason):
    assert tool.main(["from-hf", *(word.format(folder=tmp_path) for word in words)]) == 2
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1 and shown.out == "" and re.search(reason, shown.err)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_universal_says_what_it_wrote_and_how_to_load_it(tool, capsys, trained_run, tmp_path):
    out = tmp_path / "out"
    assert tool.main(["to-universal", str(trained_run), str(out)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    parameters = len(list((out / "global_step12" / "zero").iterdir())) - 1
    wrote = f"global_step12, {parameters} parameters with their AdamW moments after 12 steps, 0.6 MB"
    assert first == f"{out}: {wrote}"
    assert '"checkpoint": {"load_universal": true}' in second and f"engine.load_checkpoint('{out}')" in second


@pytest.mark.parametrize(
    "words, reason",
    [
        (["{folder}", "{folder}/out"], "^error: .* holds no complete checkpoint"),
        (["{run}", "{run}"], "^error: .* exists and is not an empty folder"),
    ],
)
def test_bad_universal_is_one_sentence_and_exit_code_2(tool, capsys, trained_run, tmp_path, words, reason):
    before = sorted(trained_run.rglob("*"))
    assert tool.main(["to-universal", *(word.format(folder=tmp_path, run=trained_run) for word in words)]) == 2
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1 and shown.out == "" and re.search(reason, shown.err)
    assert list(tmp_path.iterdir()) == [] and sorted(trained_run.rglob("*")) == before


def test_universal_does_without_transformers(tool, monkeypatch, trained_run, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    assert tool.main(["to-universal", str(trained_run), str(tmp_path / "out")]) == 0


def test_as_a_process_it_says_nothing_but_that_sentence(tmp_path):
    """Megatron-core and torch warn while they are imported."""
    command = [sys.executable, str(TOOL), "from-hf", str(tmp_path / "none"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .*none is no folder of a Hugging Face model: .*\n", done.stderr)
