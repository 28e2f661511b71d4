"""Worker processes: they work ahead, end with their reader, and what happens to them has a name."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megaroute.common.errors import ConfigError, DataError
from megaroute.config.checks import check_config
from megaroute.data.stream import Stream, open_stream
from megaroute.data.workers import RowWorkers, WorkerError

pytestmark = pytest.mark.data

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def working(data):
    """The corpus with two workers that make two rows ahead."""
    return data.model_copy(update={"workers": 2, "prefetch": 2})


def processes(stream: Stream) -> list[psutil.Process]:
    assert isinstance(stream._rows, RowWorkers)
    return [psutil.Process(pid) for pid in stream._rows.processes]


def test_batches_are_those_of_no_workers(working, data):
    plain, stream = open_stream(data, "train"), open_stream(working, "train")
    for count in (3, 8, 5):
        expected, found = plain.take(count), stream.take(count)
        assert np.array_equal(found.ids, expected.ids) and np.array_equal(found.starts, expected.starts)
        assert (found.digest, found.tokens, found.skipped) == (expected.digest, expected.tokens, expected.skipped)
        assert found.wait_s > 0
    stream.close()


def test_they_end_when_the_stream_is_closed(working):
    stream = open_stream(working, "train")
    stream.take(4)
    found = processes(stream)
    stream.close()
    assert not any(process.is_running() for process in found)


def test_signals_that_ask_a_run_to_stop_do_not_end_them(working):
    stream = open_stream(working, "train")
    stream.take(2)
    for process in processes(stream):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
    assert stream.take(100).samples[-1] == 101
    stream.close()


def test_a_killed_worker_ends_in_an_error_that_names_it(working):
    stream = open_stream(working, "train")
    stream.take(2)
    processes(stream)[1].kill()
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"data worker 1 \(process \d+\) was killed by signal 9"):
        stream.take(1000)
    assert time.monotonic() - began < 60
    stream.close()


def test_a_stalled_worker_ends_in_an_error_that_names_it(working):
    stream = open_stream(working.model_copy(update={"worker_timeout_s": 1.0}), "train")
    for process in processes(stream):
        process.suspend()
    with pytest.raises(WorkerError, match=r"data worker 0 .* made no row for 1 s, .* data.worker_timeout_s"):
        stream.take(1000)
    stream.close()


def test_damage_found_by_a_worker_is_the_error_of_no_workers(copied_data):
    shard = copied_data.train / "shard-000001.tar"
    os.truncate(shard, shard.stat().st_size - 1024)
    texts = set()
    for workers in (0, 2):
        stream = open_stream(copied_data.model_copy(update={"workers": workers}), "train")
        with pytest.raises(DataError, match=r"shard-000001.tar has \d+ bytes") as caught:
            for _ in range(200):
                stream.take(1)
        texts.add(str(caught.value))
        stream.close()
    assert len(texts) == 1


ORPHANS = """
import sys
from pathlib import Path
from megaroute.config.data import DataConfig
from megaroute.data.stream import open_stream
data = DataConfig(train=Path(sys.argv[1]), tokenizer=Path(sys.argv[2]), sequence_length=32, lanes=8, workers=2)
stream = open_stream(data, "train")
stream.take(2)
print(*stream._rows.processes, flush=True)
import time; time.sleep(600)
"""


def test_they_end_when_their_rank_is_killed(data):
    command = [sys.executable, "-c", ORPHANS, str(data.train), str(data.tokenizer)]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert rank.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
    assert len(workers) == 2
    rank.kill()
    rank.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    for process in alive:
        process.kill()
    assert alive == []


def test_a_number_of_workers_that_shares_no_lanes_is_refused(working, tiny):
    with pytest.raises(DataError, match=r"data.workers: 4 lanes of a replica % 3 workers = 1"):
        open_stream(working.model_copy(update={"workers": 3}), "train", 0, 2)
    with pytest.raises(ConfigError, match=r"data.lanes 8 % \(parallel.data 1 \* data.workers 3\) = 2"):
        check_config(tiny("data.workers=3"), 1)
