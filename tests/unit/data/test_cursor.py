import json

import pytest

from megaroute.common.errors import DataError
from megaroute.data.cursor import Cursor, merge_parts
from megaroute.data.identity import data_identity
from megaroute.data.ledger import Ledger
from megaroute.data.stream import open_stream

pytestmark = pytest.mark.data

IDENTITY = {
    "manifest": {"train": "a" * 64},
    "mixture": {"train": 1.0},
    "tokenizer": "b" * 64,
    "sequence_length": 32,
    "lanes": 4,
    "seed": 7,
    "packing": "concat",
}


def part(**made: int) -> dict:
    state = {"sources": {"train": [0, 3, 80]}, "open": [["train", 0, 2, 5]], "skipped": [["train", 0, 1]]}
    return {"lanes": {lane[1:]: {"made": count, **state} for lane, count in made.items()}}


def test_merge_and_json_round_trip():
    ledger = Ledger(2**127 + 5, {"train": 198}, 4)
    cursor = merge_parts([part(v0=2, v2=1), part(v1=2, v3=1)], 6, IDENTITY, ledger)
    assert cursor.samples == 6 and sorted(cursor.lanes) == [0, 1, 2, 3]
    assert (cursor.digest, cursor.tokens, cursor.skipped) == (2**127 + 5, {"train": 198}, 4)
    assert Cursor.from_json(json.loads(json.dumps(cursor.to_json()))) == cursor


@pytest.mark.parametrize(
    ("parts", "samples", "message"),
    [
        ([part(v0=1, v1=1), part(v1=1)], 2, "two replicas claim lane 1"),
        ([part(v0=1)], 2, "lane 1 has made 0 rows, but after 2 samples in 4 lanes it has made 1"),
        ([part(v0=1, v1=1, v2=1)], 2, "lane 2 has made 1 rows"),
        ([part(v0=2, v1=1)], 2, "lane 0 has made 2 rows"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, samples, message):
    with pytest.raises(DataError, match=message):
        merge_parts(parts, samples, IDENTITY)


@pytest.mark.parametrize(
    ("field", "other", "key"),
    [
        ("manifest", {"train": "c" * 64}, "data.train: .* sha256 aaaaaaaaaaaa, this run has sha256 cccccccccccc;"),
        ("mixture", {"train": 0.5, "b": 0.5}, "data.train.b: .* no such source, this run has a share of 0.5;"),
        ("tokenizer", "c" * 64, "data.tokenizer: .* sha256 bbbbbbbbbbbb"),
        ("sequence_length", 64, "data.sequence_length: .* 32, this run has 64;"),
        ("lanes", 8, "data.lanes: .* 4, this run has 8"),
        ("seed", 0, "data.seed: .* 7, this run has 0"),
        ("packing", "best_fit of 8 documents", "data.packing: .* concat, this run has best_fit of 8"),
    ],
)
def test_another_identity_is_refused_by_name(field, other, key):
    cursor = Cursor(0, IDENTITY, {})
    assert cursor.continued(dict(IDENTITY)) is cursor
    with pytest.raises(DataError, match=key):
        cursor.continued({**IDENTITY, field: other})


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"digest": "xyz"},
        {"digest": 5},
        {"tokens": {"train": -1}},
        {"samples": -1},
        {"samples": 3},
        {"lanes": {"0": {"made": 1}}},
        {"lanes": {"0": {"made": "many"}}},
        {"lanes": {"0": {"made": 1, "open": [["train", 0, 2]]}, "1": {"made": 1}}},
        {"identity": {}},
        {"identity": {**IDENTITY, "lanes": None}},
    ],
    ids=str,
)
def test_a_damaged_cursor_is_refused(change):
    cursor = merge_parts([part(v0=1, v1=1)], 2, IDENTITY).to_json()
    with pytest.raises(DataError, match="data cursor"):
        Cursor.from_json({**cursor, **change})


@pytest.mark.parametrize("value", [None, [], "text", {}])
def test_what_is_no_cursor_is_refused(value):
    with pytest.raises(DataError, match="format"):
        Cursor.from_json(value)


def test_identity_names_what_the_stream_is_made_of(data, tokenizer, tmp_path):
    identity = data_identity(data)
    assert identity["tokenizer"] == tokenizer.fingerprint
    assert (identity["sequence_length"], identity["lanes"], identity["seed"]) == (32, 8, 3)
    assert data_identity(data.model_copy(update={"train": data.valid}))["manifest"] != identity["manifest"]
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        data_identity(data.model_copy(update={"tokenizer": tmp_path / "none"}))


def test_a_stream_refuses_the_cursor_of_another(data):
    cursor = Cursor(0, data_identity(data), {})
    with pytest.raises(DataError, match=r"data\.seed"):
        open_stream(data.model_copy(update={"seed": 4}), "train", cursor=cursor)
