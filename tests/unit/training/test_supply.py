"""What a step took from the data reaches every rank, the ledger, and the checkpoint."""

import json
import os
import shutil

import pytest

from megaroute.checkpoint.layout import read_cursor
from megaroute.common.errors import DataError, MegarouteError
from megaroute.data.ledger import Ledger
from megaroute.data.stream import open_stream
from megaroute.parallel.dims import ParallelDims
from megaroute.parallel.groups import Groups
from megaroute.training import loop
from megaroute.training.observer import Observer
from megaroute.training.supply import columns, supply_of

pytestmark = pytest.mark.data


def groups_of(data_rank: int, data: int, tensor_rank: int = 0) -> Groups:
    dims = ParallelDims(2, data, 1)
    return Groups(dims, 2 * data_rank + tensor_rank, tensor_rank, data_rank, 0, None)


def mixture(tiny) -> str:
    paths = {"a": str(tiny().data.train), "b": str(tiny().data.valid)}
    return "data.train=" + json.dumps({name: {"path": path} for name, path in paths.items()})


def test_the_sum_over_ranks_is_that_of_one_replica_with_all_rows(tiny):
    config = tiny(mixture(tiny))
    whole = open_stream(config.data, "train").take(8)
    batches = [open_stream(config.data, "train", rank, 2).take(4) for rank in range(2)]
    shares = [
        columns(config, groups_of(rank, 2, tensor), batch) for rank, batch in enumerate(batches) for tensor in (0, 1)
    ]
    supply = supply_of(config, 2, [sum(column) for column in zip(*shares, strict=True)])
    supply.check(1)
    assert (supply.digest, supply.tokens, supply.skipped) == (whole.digest, {"a": 0, "b": 0} | dict(whole.tokens), 0)
    assert supply.wait_s == max(batch.wait_s for batch in batches)


def test_ranks_of_a_replica_that_read_different_rows_end_the_run(tiny):
    config = tiny()
    streams = [open_stream(config.data, "train", rank, 2) for rank in (0, 0, 1, 1)]
    batches = [stream.take(4) for stream in streams]
    batches[3] = streams[3].take(4)  # one rank goes on with other rows
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    shares = [
        columns(config, groups_of(rank, 2, tensor), batch)
        for (rank, tensor), batch in zip(places, batches, strict=True)
    ]
    supply = supply_of(config, 2, [sum(column) for column in zip(*shares, strict=True)])
    with pytest.raises(MegarouteError, match="different rows in step 7"):
        supply.check(7)


def test_a_rank_that_reads_nothing_adds_nothing(tiny):
    config = tiny()
    assert not any(columns(config, groups_of(0, 2), None))


def test_ledger_and_checkpoint_know_all_rows_also_after_a_resume(tiny, start, advance, save):
    overrides = [mixture(tiny), "checkpoint.every=2"]
    config = tiny(*overrides)
    parts = start(config)
    advance(parts, 2)
    path = save(parts)
    cursor = read_cursor(path)
    expected = open_stream(config.data, "train").take(16)
    assert cursor["digest"] == parts.ledger.text == Ledger(expected.digest).text
    assert cursor["tokens"] == dict(expected.tokens)
    resumed = start(tiny(*overrides, "data.workers=2"))
    assert resumed.ledger == parts.ledger
    advance(resumed, 1)
    assert resumed.ledger.text == Ledger(open_stream(config.data, "train").take(24).digest).text


def test_the_loop_counts_damage_and_ends_above_the_budget(tiny, tiny_corpus, start, tmp_path):
    shutil.copytree(tiny_corpus / "train", tmp_path / "shards")
    shard = sorted((tmp_path / "shards").glob("*.tar"))[0]
    os.truncate(shard, 4096)
    damaged = [f"data.train={tmp_path / 'shards'}", "data.on_damage=skip", "train.steps=30", "data.valid=null"]
    parts = start(tiny(*damaged, "data.skip_budget=7"))
    parts.run_dir.mkdir(parents=True)
    observer = Observer(parts, 1)
    with pytest.raises(DataError, match=r"data.skip_budget: the run skipped \d+ slices .* more than 7|lane \d+ .* 7"):
        loop.run(parts, observer)
    observer.close()
    lines = [json.loads(line) for line in (parts.run_dir / "metrics.jsonl").read_text().splitlines()]
    alarms = [line["message"] for line in lines if line["kind"] == "alarm"]
    assert any("could not be read and were skipped" in message for message in alarms)
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert last["data"]["skipped"] == parts.ledger.skipped > 7
    assert last["data"]["digest"] == parts.ledger.text
