import json
import os

import numpy as np
import pytest

from megaroute.common.errors import DataError
from megaroute.config.data import DataConfig
from megaroute.data.cursor import Cursor, merge_parts
from megaroute.data.identity import data_identity
from megaroute.data.stream import open_stream

pytestmark = pytest.mark.data


def run_replicas(
    data: DataConfig, dp_size: int, counts: list[int], cursor: Cursor | None = None
) -> tuple[dict, Cursor]:
    """Steps of `counts` rows a replica: (rows in global order as {sample: ids}, cursor after them, through JSON)."""
    streams = [open_stream(data, "train", rank, dp_size, cursor) for rank in range(dp_size)]
    rows: dict[int, list[int]] = {}
    samples = cursor.samples if cursor else 0
    for count in counts:
        batches = [stream.take(count) for stream in streams]
        numbers = sorted(int(g) for batch in batches for g in batch.samples)
        assert numbers == list(range(samples, samples + count * dp_size))
        samples += count * dp_size
        rows |= {int(g): ids.tolist() for b in batches for g, ids in zip(b.samples, b.ids, strict=True)}
    parts = json.loads(json.dumps([stream.cursor_part() for stream in streams]))
    merged = merge_parts(parts, samples, data_identity(data))
    return rows, Cursor.from_json(json.loads(json.dumps(merged.to_json())))


@pytest.fixture(scope="module")
def uninterrupted(data):
    """400 rows: the 8 lanes come to their third epoch."""
    return run_replicas(data, 1, [400])


@pytest.mark.parametrize(("dp_size", "counts"), [(2, [200]), (4, [25, 75]), (8, [1] * 50)], ids=str)
def test_rows_and_cursor_do_not_depend_on_replicas(data, uninterrupted, dp_size, counts):
    assert run_replicas(data, dp_size, counts) == uninterrupted


def test_segments_on_other_replicas_equal_the_uninterrupted_run(data, uninterrupted):
    """Some segments start where the replicas do not divide g, some are shorter than a round of the lanes."""
    rows: dict[int, list[int]] = {}
    cursor = None
    plan = [(4, [3, 2]), (1, [1]), (1, [2]), (8, [1]), (2, [1]), (2, [10, 5]), (1, [52]), (4, [13, 50]), (1, [33])]
    for dp_size, counts in plan:
        part, cursor = run_replicas(data, dp_size, counts, cursor)
        rows |= part
    assert cursor is not None and cursor.samples == 400
    assert (rows, cursor) == uninterrupted


def test_the_test_reaches_later_epochs(data):
    stream = open_stream(data, "train")
    epochs = {span.epoch for _ in range(400) for span in stream.next_row().spans}
    assert epochs >= {0, 1, 2}


def test_batch_shapes_and_types(data):
    batch = open_stream(data, "train", dp_rank=1, dp_size=4).take(3)
    assert batch.samples.tolist() == [1, 5, 9] and batch.samples.dtype == np.int64
    assert batch.ids.shape == (3, 33) and batch.ids.dtype == np.int32
    assert batch.starts.shape == (3, 32) and batch.starts.dtype == np.int32


def test_starts_follow_the_ends_of_documents(data, tokenizer):
    batch = open_stream(data, "train").take(40)
    for ids, starts in zip(batch.ids.tolist(), batch.starts.tolist(), strict=True):
        ends = [position for position, token in enumerate(ids[:-1]) if token == tokenizer.eod]
        assert starts == [max((end + 1 for end in ends if end < position), default=0) for position in range(32)]
    assert (batch.starts > 0).any()


def test_one_epoch_has_the_text_of_every_document_once(data, tokenizer, train_documents):
    """Real shards, tokenizer and lanes: texts put together from the spans of epoch 0 are the corpus."""
    stream = open_stream(data, "train")
    parts: dict[tuple[int, int], dict[int, list[int]]] = {}
    for _ in range(400):
        row = stream.next_row()
        at = 0
        for span in row.spans:
            if span.epoch == 0:
                document = parts.setdefault((span.shard, span.document), {})
                assert span.offset not in document
                document[span.offset] = row.ids[at : at + span.tokens].tolist()
            at += span.tokens
    whole = [[i for _, ids in sorted(document.items()) for i in ids] for document in parts.values()]
    assert all(ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1] for ids in whole)
    assert sorted(tokenizer.decode(ids) for ids in whole) == sorted(document.text for document in train_documents)


def test_seed_orders_training_but_not_validation_text(data):
    other = data.model_copy(update={"seed": 4})
    assert not np.array_equal(open_stream(data, "train").take(8).ids, open_stream(other, "train").take(8).ids)
    assert np.array_equal(open_stream(data, "valid").take(8).ids, open_stream(other, "valid").take(8).ids)


def test_validation_is_the_same_on_any_replicas_and_starts_at_the_beginning(data):
    whole = open_stream(data, "valid").take(16)
    halves = [open_stream(data, "valid", rank, 2).take(8) for rank in (0, 1)]
    assert np.array_equal(np.concatenate([half.ids for half in halves], axis=1).reshape(16, -1), whole.ids)
    with pytest.raises(ValueError, match="no cursor"):
        open_stream(data, "valid", cursor=Cursor(0, data_identity(data), {}))


def test_settings_that_cannot_work_are_refused(data, tmp_path):
    with pytest.raises(DataError, match=r"data.lanes: 8 lanes % 3 data-parallel replicas = 2"):
        open_stream(data, "train", 0, 3)
    with pytest.raises(ValueError, match="dp_rank 2"):
        open_stream(data, "train", 2, 2)
    with pytest.raises(DataError, match=r"data\.valid is not set"):
        open_stream(data.model_copy(update={"valid": None}), "valid")
    with pytest.raises(DataError, match=r"data.train: .*manifest.json cannot be read"):
        open_stream(data.model_copy(update={"train": tmp_path}), "train")


def test_a_truncated_shard_stops_the_stream(copied_data):
    shard = copied_data.train / "shard-000001.tar"
    os.truncate(shard, shard.stat().st_size - 1024)
    with pytest.raises(DataError, match=r"shard-000001.tar has \d+ bytes, its manifest says"):
        open_stream(copied_data, "train").take(200)


def test_a_missing_shard_stops_the_stream(copied_data):
    (copied_data.train / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000002.tar is listed in the manifest but cannot be read"):
        open_stream(copied_data, "train").take(200)


def test_a_shard_cut_while_it_is_read_stops_the_stream(copied_data):
    stream = open_stream(copied_data, "train")
    stream.take(100)
    for shard in copied_data.train.glob("*.tar"):
        os.truncate(shard, 2000)
    with pytest.raises(DataError, match="damaged"):
        stream.take(100)


def test_closing_and_reading_on(data):
    stream = open_stream(data, "train")
    first = stream.take(4)
    stream.close()
    second = stream.take(4)
    assert np.array_equal(np.concatenate([first.ids, second.ids]), open_stream(data, "train").take(8).ids)
