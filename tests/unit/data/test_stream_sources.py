"""The same rows from shards with texts, with token ids, and from a server."""

import numpy as np
import pytest
from http_server import error_500, serve, stall, wrong_bytes
from streams import content, run_replicas

from megaroute.common.errors import DataError
from megaroute.config.data import CacheConfig, RemoteConfig
from megaroute.data.build import build_shards
from megaroute.data.stream import open_stream

pytestmark = pytest.mark.data

QUICK = RemoteConfig(attempts=3, connect_s=30, stall_s=30, backoff_s=0.01, max_backoff_s=0.02)


@pytest.mark.parametrize("tokenize", ["beside", "only"])
def test_stored_tokens_give_the_same_rows(data, tokenizer, train_documents, tmp_path, tokenize):
    build_shards(train_documents, tmp_path / "ids", shard_bytes=3000, tokenizer=tokenizer, tokenize=tokenize)
    stored = data.model_copy(update={"train": tmp_path / "ids"})
    rows, _ = run_replicas(data, 1, [160])
    for dp_size, workers in ((1, 0), (2, 2)):
        changed = stored.model_copy(update={"workers": workers})
        assert content(run_replicas(changed, dp_size, [160 // dp_size])[0]) == content(rows)


def test_a_server_gives_the_same_rows_to_every_worker(copied_data, tmp_path):
    expected = open_stream(copied_data, "train").take(60).ids
    with serve(copied_data.train) as server:
        server.faults["shard-000001.tar"] = [error_500, wrong_bytes]
        remote = {
            "train": server.url,
            "remote": QUICK,
            "cache": CacheConfig(directory=tmp_path / "cache"),
            "workers": 2,
        }
        stream = open_stream(copied_data.model_copy(update=remote), "train")
        assert np.array_equal(stream.take(60).ids, expected)
        stream.close()
        assert server.requests["shard-000001.tar"] == 3
        assert max(count for name, count in server.requests.items() if "000001.tar" not in name) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_out_of_reach_ends_the_run_and_is_never_skipped(copied_data, tmp_path, workers):
    impatient = QUICK.model_copy(update={"stall_s": 1.0, "attempts": 2})
    with serve(copied_data.train) as server:
        for path in copied_data.train.glob("*.tar"):
            server.faults[path.name] = [stall] * 50
        remote = {"train": server.url, "remote": impatient, "cache": CacheConfig(directory=tmp_path / "cache")}
        options = {"on_damage": "skip", "workers": workers}
        with pytest.raises(DataError, match=r"data\.train: .*cannot be fetched after 2 tries \(stalled"):
            open_stream(copied_data.model_copy(update=remote | options), "train").take(60)


def test_a_shard_that_is_wrong_on_the_server_may_be_skipped(copied_data, tmp_path):
    with serve(copied_data.train) as server:
        server.faults["shard-000001.tar"] = [wrong_bytes] * 200
        remote = {"train": server.url, "remote": QUICK, "cache": CacheConfig(directory=tmp_path / "cache")}
        stream = open_stream(copied_data.model_copy(update=remote | {"on_damage": "skip"}), "train")
        assert stream.take(60).skipped > 0
