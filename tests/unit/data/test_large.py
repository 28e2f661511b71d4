"""A thousand lanes and a hundred thousand shards: what a process holds and how long it takes to begin."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaroute.data.build import build_shards
from megaroute.data.documents import Document
from megaroute.data.manifest import load_manifest

pytestmark = pytest.mark.data

REPOSITORY = Path(__file__).resolve().parents[3]
SHARDS = 100_000

MEASURE = """
import resource, sys, time
from pathlib import Path
import psutil
from megaroute.config.data import DataConfig
from megaroute.data.stream import open_stream

began = time.process_time()
data = DataConfig(
    train=Path(sys.argv[1]), tokenizer=Path(sys.argv[2]), lanes=1024, sequence_length=64, workers=2, max_open_files=8
)
stream = open_stream(data, "train")
stream.take(1024)
workers = [psutil.Process(pid) for pid in stream._rows.processes]
print("seconds", time.process_time() - began + sum(sum(worker.cpu_times()[:2]) for worker in workers) / len(workers))
print("megabytes", max(worker.memory_info().rss for worker in workers) / 2**20)
print("files", max(len(worker.open_files()) for worker in workers))
print("torch", int(any("torch" in lib.path for worker in workers for lib in worker.memory_maps())))
stream.close()
"""


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory, tokenizer) -> Path:
    """A manifest of many shards that are all the same file, with documents of a few words."""
    folder = tmp_path_factory.mktemp("large") / "shards"
    documents = [Document(str(i), "simple is better than complex " * (1 + i % 5)) for i in range(40)]
    build_shards(documents, folder, shard_bytes=10**6, tokenizer=tokenizer)
    (entry,) = load_manifest(folder).shards
    manifest = json.loads((folder / "manifest.json").read_text())
    for number in range(64):
        (folder / f"copy-{number:02}.tar").hardlink_to(folder / entry.name)
    manifest["shards"] = [manifest["shards"][0] | {"name": f"copy-{number % 64:02}.tar"} for number in range(SHARDS)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_start_and_memory_stay_small(many_shards, tokenizer):
    began = time.monotonic()
    command = [sys.executable, "-c", MEASURE, str(many_shards), str(tokenizer.path)]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert shown.returncode == 0, shown.stderr
    found = {name: float(value) for name, value in (line.split() for line in shown.stdout.splitlines())}
    print(found, f"{time.monotonic() - began:.1f} s on the clock")
    assert found["seconds"] < 5
    assert found["megabytes"] < 200
    assert found["files"] <= 8
    assert found["torch"] == 0
