"""Shards at a URL: passing errors are tried again, others have a name, nothing hangs."""

import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megaroute.common.errors import DamagedShard, DataError
from megaroute.config.data import CacheConfig, DataConfig, RemoteConfig, is_remote
from megaroute.data import cache as cache_module
from megaroute.data import remote as remote_module
from megaroute.data.cache import CacheFull, ShardCache
from megaroute.data.manifest import load_manifest
from megaroute.data.remote import chunks, fetch, register_opener, url_of
from megaroute.data.retry import pause_s
from megaroute.data.shards import ShardSet
from megaroute.data.verify import check_data
from tests.support import http_server
from tests.support.http_server import Server, serve

pytestmark = pytest.mark.data

# Time limits that a busy machine keeps, and ones for what never comes.
QUICK = RemoteConfig(attempts=3, connect_s=30.0, stall_s=30.0, backoff_s=0.01, max_backoff_s=0.05)
IMPATIENT = QUICK.model_copy(update={"connect_s": 2.0, "stall_s": 2.0})
SHARD = "shard-000001.tar"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def server(copied_data):
    with serve(copied_data.train) as site:
        yield site


def open_set(server: Server, folder: Path, remote: RemoteConfig = QUICK, **cache: int) -> ShardSet:
    manifest = load_manifest(server.url, "data.train", QUICK)
    return ShardSet(server.url, manifest, "data.train", remote=remote, cache=CacheConfig(directory=folder, **cache))


def all_texts(shards: ShardSet) -> list[str]:
    counts = enumerate(entry.documents for entry in shards.manifest.shards)
    return [shards.read(shard, i) for shard, count in counts for i in range(count)]


def test_every_document_comes_and_each_file_is_fetched_once(server, train_documents, tmp_path):
    first = open_set(server, tmp_path / "cache")
    assert all_texts(first) == [document.text for document in train_documents]
    second = open_set(server, tmp_path / "cache")
    assert all_texts(second) == all_texts(first)
    tars = {entry.name for entry in first.manifest.shards}
    assert {server.requests[name] for name in tars} == {1}
    assert server.requests["manifest.json"] == 2
    names = {entry.sha256 for entry in first.manifest.shards} | {entry.index_sha256 for entry in first.manifest.shards}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == names | {".lock"}


@pytest.mark.parametrize("fault", ["slow", "cut", "error_500", "wrong_bytes", "too_many", "too_few", "stall", "silent"])
@pytest.mark.parametrize("name", [SHARD, "shard-000001.index.npy"])
def test_passing_faults_are_tried_again(server, tmp_path, fault, name):
    server.faults[name] = [getattr(http_server, fault)] * 2
    remote = IMPATIENT.model_copy(update={"attempts": 9}) if fault in ("stall", "silent") else QUICK
    text = open_set(server, tmp_path / "cache", remote).read(1, 0)
    assert text == ShardSet(server.folder, load_manifest(server.folder)).read(1, 0)
    assert server.requests[name] == (1 if fault == "slow" else 3) or remote is not QUICK


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("cut", DataError, "cannot be fetched after 3 tries .*bytes missing"),
        ("error_500", DataError, "cannot be fetched after 3 tries .*HTTP 500"),
        ("wrong_bytes", DamagedShard, "it has sha256 .* after 3 tries; put a good copy there"),
        ("too_many", DamagedShard, "more than the [0-9]+ bytes that its manifest says"),
        ("too_few", DamagedShard, "it has [0-9]+ bytes, its manifest says"),
        ("stall", DataError, "cannot be fetched .*stalled: not 64 KiB within 2 s.* data.remote.attempts"),
        ("silent", DataError, "cannot be fetched .*no answer within 2 s"),
        ("error_403", DataError, "may not be read .*HTTP 403.*credentials"),
    ],
)
def test_lasting_faults_are_named_in_time(server, tmp_path, fault, kind, message):
    server.faults[SHARD] = [getattr(http_server, fault)] * 9
    remote = IMPATIENT if fault in ("stall", "silent") else QUICK
    start = time.monotonic()
    with pytest.raises(DataError, match=rf"^data\.train: {server.url}/{SHARD} .*{message}") as caught:
        open_set(server, tmp_path / "cache", remote).read(1, 0)
    assert type(caught.value) is kind
    assert time.monotonic() - start < 40
    assert server.requests[SHARD] == (1 if fault == "error_403" else 3)
    assert not list((tmp_path / "cache").glob("*.part"))
    if kind is DamagedShard:
        assert caught.value.shard == f"{server.url}/{SHARD}"


def test_a_missing_shard_and_a_missing_manifest(server, tmp_path):
    (server.folder / SHARD).unlink()
    with pytest.raises(DamagedShard, match="is gone or damaged: HTTP 404"):
        open_set(server, tmp_path / "cache").read(1, 0)
    (server.folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"data\.train: .*manifest\.json cannot be fetched after 3 tries \(HTTP 404"):
        open_set(server, tmp_path / "cache")


def test_a_server_that_is_not_there():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(DataError, match=r"data\.valid: .* cannot be fetched after 3 tries .*refused"):
            load_manifest(url, "data.valid", QUICK)


def test_the_check_before_a_run_takes_remote_folders(server, copied_data):
    check_data(copied_data.model_copy(update={"train": server.url, "remote": QUICK}), 1000)
    (server.folder / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=rf"data\.train: {server.url}/manifest\.json is damaged"):
        check_data(copied_data.model_copy(update={"train": server.url, "remote": QUICK}), 1000)


# --- pipes and other schemes


def test_pipes(copied_data, tmp_path, train_documents):
    folder = f"pipe:cat {copied_data.train}/{{name}}"
    shards = ShardSet(
        folder, load_manifest(folder, remote=QUICK), "k", remote=QUICK, cache=CacheConfig(directory=tmp_path / "c")
    )
    assert all_texts(shards) == [document.text for document in train_documents]


def test_a_pipe_that_fails_after_all_bytes_is_not_believed():
    url = "pipe:printf abc; echo no credentials >&2; exit 3"
    with pytest.raises(DataError, match=r"cannot be fetched after 3 tries \(the command ended with status 3: no cred"):
        fetch(url, QUICK, "data.train")


def test_a_pipe_that_hangs_is_killed_with_its_children(tmp_path):
    pid_file = tmp_path / "pid"
    with pytest.raises(TimeoutError, match="stalled"):
        list(chunks(f"pipe:printf abc; sleep 300 & echo $! > {pid_file}; wait", IMPATIENT))
    end = time.monotonic() + 10
    while is_running(int(pid_file.read_text())):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_registered_openers_and_their_hangs(monkeypatch):
    import io

    monkeypatch.setattr(remote_module, "_openers", {})
    register_opener("mine", lambda url: io.BytesIO(url.encode()))
    assert fetch("mine://a/b", QUICK, "k") == b"mine://a/b"
    register_opener("hangs", lambda url: time.sleep(30))
    with pytest.raises(DataError, match="no answer within 2 s"):
        fetch("hangs://a", IMPATIENT.model_copy(update={"attempts": 1}), "k")


def test_fsspec_and_schemes_that_nobody_knows(monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://folder/x", "wb") as file:
        file.write(b"bytes")
    assert fetch("memory://folder/x", QUICK, "k") == b"bytes"
    with pytest.raises(DataError, match=r"cannot be fetched after 3 tries"):
        fetch("memory://folder/none", QUICK, "k")
    with pytest.raises(DataError, match=r"nobody://a cannot be opened .* install fsspec"):
        fetch("nobody://a", QUICK, "k")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DataError, match=r"s3://bucket/x cannot be opened .*megaroute\[s3\]"):
        fetch("s3://bucket/x", QUICK, "k")


def test_urls():
    assert url_of("https://h/a/", "m.json") == "https://h/a/m.json"
    assert url_of("https://h/a?sig=1/2", "m.json") == "https://h/a/m.json?sig=1/2"
    assert url_of("pipe:ssh h cat d/{name} | zcat", "x") == "pipe:ssh h cat d/x | zcat"
    assert [is_remote(text) for text in ("s3://b", "pipe:x", "a/b", "c:/d", Path("x"))] == [True, True] + [False] * 3


def test_configuration_takes_urls_and_paths(data):
    values = data.model_dump() | {"train": "s3://bucket/train", "valid": "data/valid"}
    config = DataConfig(**values)
    assert (config.train, config.valid) == ("s3://bucket/train", Path("data/valid"))
    assert DataConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValueError, match="does not say where the name of a file goes"):
        DataConfig(**values | {"train": "pipe:cat x"})


def test_pauses_grow_and_are_bounded():
    settings = RemoteConfig(backoff_s=1, max_backoff_s=10)
    for attempt, longest in ((1, 1), (2, 2), (4, 8), (5, 10), (500, 10)):
        drawn = {pause_s(attempt, settings) for _ in range(20)}
        assert len(drawn) > 1 and longest / 2 <= min(drawn) <= max(drawn) <= longest


# --- the cache


def entry_of(server: Server, number: int):
    return load_manifest(server.folder).shards[number]


def test_the_cache_is_bounded_and_drops_what_was_not_used(server, tmp_path):
    entries = [entry_of(server, i) for i in range(4)]
    size = max(entry.bytes for entry in entries)
    cache = ShardCache(CacheConfig(directory=tmp_path / "c", max_bytes=2 * size), QUICK, "data.train")

    def use(entry):
        cache.open(f"{server.url}/{entry.name}", entry.sha256, entry.bytes).close()
        time.sleep(0.02)

    for number in (0, 1, 0, 2):
        use(entries[number])
    there = {path.name for path in (tmp_path / "c").iterdir()} - {".lock"}
    assert there == {entries[0].sha256, entries[2].sha256}
    held = cache.open(f"{server.url}/{entries[0].name}", entries[0].sha256, entries[0].bytes)
    use(entries[2])
    use(entries[3])  # shard 0 is older, but in use
    assert (tmp_path / "c" / entries[0].sha256).exists() and not (tmp_path / "c" / entries[2].sha256).exists()
    other = cache.open(f"{server.url}/{entries[3].name}", entries[3].sha256, entries[3].bytes)
    with pytest.raises(CacheFull, match=r"^data\.cache\.max_bytes: .* in use and .* set \d+ or more"):
        use(entries[1])
    held.close()
    use(entries[1])
    other.close()


def test_a_small_cache_is_enough_for_a_reader(server, tmp_path, train_documents):
    """The reader closes its own shards when they leave no room."""
    manifest = load_manifest(server.folder)
    size = max(entry.bytes for entry in manifest.shards) + sum(128 + 8 + 8 * e.documents for e in manifest.shards)
    shards = open_set(server, tmp_path / "c", max_bytes=size)
    assert all_texts(shards) == [document.text for document in train_documents]


def test_a_damaged_copy_of_the_cache_is_fetched_again(server, tmp_path):
    shards = open_set(server, tmp_path / "c")
    text = shards.read(1, 0)
    shards.close()
    copy = tmp_path / "c" / shards.manifest.shards[1].sha256
    os.truncate(copy, 1000)
    assert open_set(server, tmp_path / "c").read(1, 0) == text
    assert server.requests[SHARD] == 2


def test_leftovers_of_a_killed_process_are_used_up(server, tmp_path):
    entry = entry_of(server, 1)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / f"{entry.sha256}.part").write_bytes(b"x" * 10_000_000)
    (tmp_path / "c" / f"{'0' * 64}.part").write_bytes(b"x" * 1000)
    shards = open_set(server, tmp_path / "c", max_bytes=entry.bytes + 900)
    assert shards.read(1, 0)
    assert not list((tmp_path / "c").glob("*.part"))


def test_ranks_of_a_node_share_one_fetch(server, tmp_path):
    server.faults[SHARD] = [http_server.slow]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (server.url, tmp_path / "c", queue)
    processes = [context.Process(target=read_one, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    texts = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert len(texts) == 1 and server.requests[SHARD] == 1


def read_one(url: str, folder: Path, queue) -> None:
    shards = ShardSet(url, load_manifest(url, remote=QUICK), "k", remote=QUICK, cache=CacheConfig(directory=folder))
    queue.put(shards.read(1, 0))


def test_a_fetch_goes_on_after_the_fetching_process_is_killed(server, tmp_path):
    server.faults[SHARD] = [http_server.stall]
    patient = QUICK.model_copy(update={"stall_s": 60.0})
    context = multiprocessing.get_context("fork")
    process = context.Process(target=open_one, args=(server.url, tmp_path / "c", patient))
    process.start()
    end = time.monotonic() + 30
    while not server.requests[SHARD]:
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert open_set(server, tmp_path / "c").read(1, 0)


def open_one(url: str, folder: Path, settings: RemoteConfig) -> None:
    ShardSet(url, load_manifest(url, remote=settings), "k", None, settings, CacheConfig(directory=folder)).read(1, 0)


def test_who_waits_sees_that_the_file_is_finished_though_others_read_it(server, tmp_path):
    """A finished file is the one that was waited for, and its readers lock it for as long as they like."""
    entry = load_manifest(server.url, "data.train", QUICK).shards[1]
    cache = ShardCache(CacheConfig(directory=tmp_path), QUICK, "data.train")
    path, part = tmp_path / entry.sha256, tmp_path / f"{entry.sha256}.part"
    with part.open("wb") as fetcher, ThreadPoolExecutor(1) as pool:
        fcntl.flock(fetcher, fcntl.LOCK_EX)
        waiting = pool.submit(cache.open, f"{server.url}/{entry.name}", entry.sha256, entry.bytes)
        time.sleep(0.3)
        assert not waiting.done()
        fetcher.write((server.folder / entry.name).read_bytes())
        fetcher.flush()
        part.replace(path)
        fcntl.flock(fetcher, fcntl.LOCK_SH)  # in one step: the lock is never free
        with waiting.result(timeout=10) as file:
            assert len(file.read()) == entry.bytes
    assert server.requests[entry.name] == 0


def test_waiting_for_another_process_has_an_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "PATIENCE_S", 0.0)
    entry = entry_of(server, 1)
    (tmp_path / "c").mkdir()
    with open(tmp_path / "c" / f"{entry.sha256}.part", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"^data\.train: another process has been fetching .*\.part for 4\.05 s"):
            open_set(server, tmp_path / "c", IMPATIENT).read(1, 0)


FULL_DISK = """
import resource, sys
from pathlib import Path
from megaroute.common.errors import DataError
from megaroute.config.data import CacheConfig, RemoteConfig
from megaroute.data.cache import ShardCache
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
cache = ShardCache(CacheConfig(directory=Path(sys.argv[2])), RemoteConfig(attempts=2, backoff_s=0.01), "data.train")
try:
    cache.open(sys.argv[1], sys.argv[3], int(sys.argv[4]) or None)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("known", [True, False], ids=["size known", "unknown"])
def test_a_full_disk_has_a_name(server, tmp_path, known):
    """A limit on the size of files stands for the end of the disk."""
    entry = entry_of(server, 1)
    arguments = [f"{server.url}/{SHARD}", tmp_path / "c", entry.sha256, entry.bytes if known else 0]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.startswith(f"data.cache.directory: {tmp_path / 'c'} cannot take {server.url}"), done.stderr
    assert "File too large" in done.stdout and "make room" in done.stdout
    assert server.requests[SHARD] <= 1 and not list((tmp_path / "c").glob("*.part"))


def test_a_cache_that_cannot_be_made_has_a_name(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^data\.cache\.directory: .*file/c cannot take"):
        open_set(server, tmp_path / "file/c").read(1, 0)
