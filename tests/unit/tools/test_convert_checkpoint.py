"""tools/convert_checkpoint.py: what it prints, and what it refuses."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="conversions want pip install 'megaroute[export]'")

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
