"""tools/inspect_checkpoint.py: which documents come next."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megaroute.checkpoint import layout
from megaroute.checkpoint.tensors import Tensors, _difference, compare
from megaroute.common.errors import CheckpointError
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
    assert lines[1].startswith("2 files, ") and lines[1].endswith(" bytes")
    assert Ledger(cursor.digest).text in lines[3]
    assert lines[4] == "row 40 (lane 0):"
    assert lines[5].startswith(f"  {following[0].spans[0].source} epoch 0, shard-00000")
    assert tool.main([str(path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


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


@pytest.fixture
def two(start, advance, save, tiny):
    """Checkpoints after one step and after two."""
    parts = start(tiny("train.precision=bf16"))
    found = []
    for _ in range(2):
        advance(parts, 1)
        found.append(save(parts))
    return found


def test_it_lists_every_tensor(two, tool, capsys):
    assert tool.main([str(two[0]), "--tensors", "--json"]) == 0
    tensors = {each.pop("key"): each for each in json.loads(capsys.readouterr().out)["tensors"]}
    name = "embedding.word_embeddings.weight"
    assert tensors[name] == {"shape": [320, 32], "dtype": "bfloat16", "bytes": 320 * 32 * 2}
    assert tensors[f"optimizer.state.exp_avg.{name}"] == {"shape": [320, 32], "dtype": "float32", "bytes": 320 * 32 * 4}
    assert tool.main([str(two[0]), "--tensors"]) == 0
    assert f"  {name}  320x32  bfloat16  20,480" in capsys.readouterr().out.splitlines()


def test_it_verifies_every_byte(two, tool, capsys):
    assert tool.main([str(two[1].parent), "--verify"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(" bytes, every byte as it was written")
    file = two[1] / "__0_0.distcp"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert tool.main([str(two[1]), "--verify"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file} cannot be read") and error.count("\n") == 1


def test_it_compares_tensor_by_tensor(two, tool, capsys, tmp_path):
    same = tmp_path / "copy"
    shutil.copytree(two[0], same)
    assert tool.main([str(two[0]), "--compare", str(same)]) == 0
    assert " tensors differ from " in capsys.readouterr().out
    assert tool.main([str(two[0]), "--compare", str(two[1]), "--json"]) == 1
    tensors = {each["key"]: each for each in json.loads(capsys.readouterr().out)["compared"]["tensors"]}
    found = tensors["embedding.word_embeddings.weight"]
    assert found["what"].endswith(" of 10,240 numbers differ") and 0 < found["largest"] < 0.1
    assert any(not each["what"] for each in tensors.values())  # such as the router's target
    assert tool.main([str(two[0]), "--compare", str(two[1])]) == 1
    assert "numbers differ, by up to " in capsys.readouterr().out


def test_a_tensor_that_is_not_all_there_is_refused(two):
    tensors = Tensors(two[0])
    name = "embedding.word_embeddings.weight"
    assert tensors.read(name).shape == (320, 32)
    tensors._metadata.state_dict_metadata[name].chunks.clear()
    with pytest.raises(CheckpointError, match="has 10240 numbers, of which 0 are there"):
        tensors.read(name)


def test_differences_of_shape_type_and_presence_are_named(two):
    one, other = Tensors(two[0]), Tensors(two[0])
    first, second, *_ = [info.key for info in one if len(info.shape) == 2]
    del other._metadata.state_dict_metadata[first]
    other._metadata.state_dict_metadata[second].size = torch.Size((1, 1))
    found = {each.key: each.what for each in compare(one, other) if each.what}
    assert found[first] == f"only in {two[0]}" and found[second].startswith("shape (") and len(found) == 2
    assert _difference("x", torch.zeros(2), torch.zeros(2).half()).what == (
        "torch.float32 and torch.float16; 0 of 2 numbers differ"
    )
    nan = _difference("x", torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]))
    assert nan.what == "1 of 2 numbers differ" and nan.largest == float("inf")
