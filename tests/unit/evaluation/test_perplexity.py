"""Bits per byte of files: against a sum by hand, free of batch and stride where it must be, and refusals."""

import gzip
import json
import lzma
import math

import numpy as np
import pytest

from megaroute import cli
from megaroute.common.errors import DataError
from megaroute.data.formats import TextFile
from megaroute.evaluation import command
from megaroute.evaluation.perplexity import bits_per_byte, cost, sentence, text_files
from megaroute.model.flops import dense_forward


def score(scorer, path, **settings):
    return bits_per_byte(scorer, text_files([path]), **settings)


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_result_is_the_sum_by_hand(scorer, text_file):
    short = [text for text in texts_of(text_file) if len(scorer.tokenizer.encode(text)) < scorer.context]
    eod = scorer.tokenizer.eod
    rows = [[eod, *scorer.tokenizer.encode(text), eod] for text in short]
    nats = [answer.nats.sum() for answer in scorer.score(rows, 1)]
    sizes = [len(text.encode()) for text in short]
    path = text_file.with_name("short.jsonl")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in short))
    result = score(scorer, path)
    assert result["documents"] == result["windows"] == len(short) > 3
    assert result["bytes"] == sum(sizes)
    assert result["tokens"] == sum(len(row) - 1 for row in rows)
    assert result["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / sum(sizes), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(sum(nats) / result["tokens"]), rel=1e-6)


def test_batch_does_not_change_the_result(scorer, text_file):
    one, many = (score(scorer, text_file, batch=batch) for batch in (1, 8))
    assert one == {
        key: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value for key, value in many.items()
    }
    assert one["bits_per_byte_stderr"] > 0 and one["stderr_over"] == "documents"


def test_longer_context_costs_windows_and_scores_the_same_tokens(scorer, text_file):
    short, long = (score(scorer, text_file, stride=stride) for stride in (scorer.context, 4))
    assert short["tokens"] == long["tokens"] and short["windows"] < long["windows"]
    assert short["bits_per_byte"] != long["bits_per_byte"]
    assert score(scorer, text_file)["stride"] == scorer.context // 2


def test_every_kind_of_file_gives_the_same(scorer, text_file, tmp_path):
    raw = text_file.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(raw))
    expected = score(scorer, text_file)["bits_per_byte"]
    for name in ("a.jsonl.gz", "a.jsonl.xz"):
        assert score(scorer, tmp_path / name)["bits_per_byte"] == expected
    (tmp_path / "a.txt").write_text(texts_of(text_file)[0] * 5)
    plain = score(scorer, tmp_path / "a.txt")
    assert plain["documents"] == 1 and plain["stderr_over"] == "windows" and plain["bits_per_byte_stderr"] > 0


def test_limit_takes_the_first_documents(scorer, text_file):
    assert score(scorer, text_file, limit=3)["bytes"] == sum(len(t.encode()) for t in texts_of(text_file)[:3])


def test_one_window_has_no_error(scorer, text_file):
    result = score(scorer, text_file, limit=1)
    assert result["bits_per_byte_stderr"] is None if result["windows"] == 1 else result["bits_per_byte_stderr"] > 0
    assert "bits per byte" in sentence(result)


def test_cost_of_tokens_that_execute_everything_is_that_of_a_dense_model(scorer):
    config, tokens = scorer.config, 32
    pairs, units = tokens * (tokens + 1) // 2, len(scorer.config.units)
    everything = cost(config, np.array([0, 0, 0, tokens, pairs, *[tokens] * units, *[pairs] * units], dtype=float))
    dense = dense_forward(config.model, 1, tokens)
    routers = 2 * config.model.hidden_size * units
    assert everything["dense_flops_per_token"] == dense / tokens
    assert everything["flops_per_token"] == dense / tokens + routers
    assert everything["layers_executed"] == config.model.num_layers
    nothing = cost(config, np.array([0, 0, 0, tokens, pairs, *[0] * 2 * units], dtype=float))
    assert nothing["layers_executed"] == config.model.num_layers - units
    assert nothing["flops_per_token"] < everything["flops_per_token"]


def test_layers_executed_are_those_of_the_tokens_that_predict(scorer, text_file):
    result = score(scorer, text_file, limit=3)
    eod = scorer.tokenizer.eod
    rows = [[eod, *scorer.tokenizer.encode(text), eod] for text in texts_of(text_file)[:3]]
    assert all(len(row) <= scorer.context + 1 for row in rows)
    executed = np.concatenate([answer.executed for answer in scorer.score(rows, 3)], axis=1)
    assert result["layers_executed"] == pytest.approx(1 + executed.sum() / executed.shape[1])
    assert list(result["density"].values()) == pytest.approx(executed.mean(1))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.jsonl", None, "none.jsonl is not a file, so there is no text to score"),
        ("a.pdf", "x", "a.pdf is not a .jsonl, .*file, so its text cannot be found"),
        ("empty.jsonl", "", "empty.jsonl: no document has any text"),
        (
            "bad.jsonl",
            '{"body": "x"}\n',
            r"bad.jsonl:1 has no string field 'text'; name the right one with --text-field",
        ),
        ("cut.jsonl", '{"text": ', "cut.jsonl:1 is not JSON"),
    ],
)
def test_bad_files_are_refused(scorer, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        score(scorer, tmp_path / name)


def test_stride_beyond_the_context_is_refused(scorer, text_file):
    with pytest.raises(DataError, match="--stride 33 is more than the model's context, 32 tokens"):
        score(scorer, text_file, stride=33)


@pytest.fixture
def kept_groups(monkeypatch):
    """The process group and the logger serve other tests too."""
    monkeypatch.setattr(command.groups, "tear_down", lambda: None)
    monkeypatch.setattr(command.distributed, "stop", lambda: None)
    monkeypatch.setattr(command.log, "configure", lambda: None)


@pytest.fixture
def in_this_process(monkeypatch, scorer, kept_groups):
    """The command on the model of the other tests."""
    monkeypatch.setattr(command, "open_model", lambda *_: scorer)


def test_command_prints_json_and_a_line(in_this_process, capsys, scorer, text_file, tmp_path):
    words = ["evaluate", "run", "--bits-per-byte", str(text_file)]
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    expected = bits_per_byte(scorer, [TextFile(text_file, str(text_file))])
    assert json.loads(shown.out) == expected
    assert shown.err == sentence(expected) + "\n"
    assert cli.main([*words, "--out", str(tmp_path / "result.json")]) == 0
    assert json.loads((tmp_path / "result.json").read_text()) == expected
    assert capsys.readouterr().out == ""


def test_result_that_could_not_be_written_is_refused_before_any_work(in_this_process, capsys, text_file, tmp_path):
    words = ["evaluate", "run", "--bits-per-byte", str(text_file), "--out", str(tmp_path / "no" / "result.json")]
    assert cli.main(words) == 2
    assert "is not a file in a folder that exists" in capsys.readouterr().err


def test_place_without_a_checkpoint_is_refused(one_process, kept_groups, capsys, text_file, tmp_path):
    assert cli.main(["evaluate", str(tmp_path / "none"), "--bits-per-byte", str(text_file)]) == 2
    assert "does not exist; name a run directory" in capsys.readouterr().err
