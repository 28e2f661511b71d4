"""tools/inspect_checkpoint.py: which documents come next."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from megaroute.checkpoint import layout
from megaroute.config.load import dump_config
from megaroute.config.sizes import routing_shape
from megaroute.data.cursor import merge_parts
from megaroute.data.ledger import Ledger
from megaroute.data.stream import open_stream

pytestmark = pytest.mark.data

TOOL = Path(__file__).parents[3] / "tools" / "inspect_checkpoint.py"
SAMPLES = 40


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tool_inspect_checkpoint", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def saved(tiny):
    """(configuration, checkpoint without tensors, the rows that come next): after 40 rows of two sources."""
    sources = {name: str(getattr(tiny().data, split)) for name, split in (("a", "train"), ("b", "valid"))}
    train = json.dumps({name: {"path": path} for name, path in sources.items()})
    config = tiny(f"data.train={train}", "data.valid=null", "data.workers=2")
    path = layout.directory(config.run_directory / "checkpoints", 5)
    path.mkdir(parents=True)
    (config.run_directory / "config.yaml").write_text(dump_config(config))
    stream = open_stream(config.data, "train")
    batch = stream.take(SAMPLES)
    ledger = Ledger(batch.digest, dict(batch.tokens))
    cursor = merge_parts([stream.cursor_part()], SAMPLES, stream.identity, ledger)
    shape = routing_shape(config.model, config.routing)
    record = layout.RunRecord(5, SAMPLES, 32 * SAMPLES, 0, config.model.model_dump(mode="json"), shape, "tp2 x pp1")
    layout.finish(path, record, cursor.to_json())
    following = [stream.next_row() for _ in range(3)]
    stream.close()
    return path, cursor, following


def test_it_names_the_documents_of_the_rows_that_the_run_reads_next(saved, tool, capsys):
    path, cursor, following = saved
    assert tool.main(["--data", str(path), "--rows", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["samples"], found["layout"]) == (5, SAMPLES, "tp2 x pp1")
    data = found["data"]
    assert data["digest"] == Ledger(cursor.digest).text and data["tokens"] == dict(cursor.tokens)
    assert [row["row"] for row in data["next"]] == [row.sample for row in following]
    for shown, row in zip(data["next"], following, strict=True):
        expected = [(s.source, s.epoch, s.document, s.offset, s.tokens) for s in row.spans]
        keys = ("source", "epoch", "document", "offset", "tokens")
        assert [tuple(document[key] for key in keys) for document in shown["documents"]] == expected
        assert all(document["shard"].endswith(".tar") for document in shown["documents"])


def test_its_text_is_for_people(saved, tool, capsys):
    path, cursor, following = saved
    assert tool.main([str(path.parent.parent), "--data", "--rows", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("step 5, 40 rows, 1,280 tokens, written by tp2 x pp1")
    assert Ledger(cursor.digest).text in lines[2]
    assert lines[3] == "row 40 (lane 0):"
    assert lines[4].startswith(f"  {following[0].spans[0].source} epoch 0, shard-00000")
    assert tool.main([str(path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_skips_and_changes_are_shown(tool):
    found = {
        "checkpoint": "c", "step": 1, "samples": 1, "tokens": 1, "layout": "tp1",
        "data": {
            "digest": "0", "tokens": {}, "shares": {}, "next": [],
            "changes": [{"samples": 8, "field": "seed", "before": 3, "after": 9}],
            "skipped": [{"lane": 2, "source": "a", "slice": 4, "document": 1}],
        },
    }  # fmt: skip
    text = "\n".join(tool.as_text(found))
    assert "changed after row 8: seed from 3 to 9" in text
    assert "skipped: lane 2, a, its slice 4 from document 1 on" in text


def test_what_is_no_checkpoint_is_refused_in_a_sentence(tool, tmp_path, capsys):
    assert tool.main([str(tmp_path / "none"), "--data"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_cursor_that_does_not_fit_its_text_is_refused(saved, tool, capsys):
    path, cursor, _ = saved
    other = replace(cursor, identity={**cursor.identity, "seed": 99})
    (path / layout.CURSOR).write_text(json.dumps(other.to_json()))
    assert tool.main([str(path), "--data"]) == 2
    assert "data.seed" in capsys.readouterr().err
