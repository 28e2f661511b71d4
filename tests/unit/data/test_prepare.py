"""Shards from a corpus by any number of processes: the same bytes, also after a kill."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaroute.common.errors import DataError, MegarouteError
from megaroute.data import parts as parts_module
from megaroute.data import prepare
from megaroute.data.documents import input_files, read_documents
from megaroute.data.formats import Fields
from megaroute.data.manifest import load_manifest
from megaroute.data.prepare import Request, prepare_shards
from megaroute.data.ranks import Ranks, join_ranks, lowest_error, started_as_first
from megaroute.data.shards import ShardSet

pytestmark = pytest.mark.data

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools/make_shards.py"
SHARED_TEXT = Path(os.environ.get("MEGAROUTE_SHARED", Path(__file__).parents[4] / "shared")) / "data/corpus"
SHARD = 6000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cut JSON lines file, a packed one, and many small texts: some ten parts."""
    folder = tmp_path_factory.mktemp("input")
    draw = random.Random(5)
    for name, count in (("large.jsonl", 150), ("other.jsonl", 20)):
        texts = ["".join(draw.choices("abc é\n", k=draw.randint(1, 600))) for _ in range(count)]
        records = [{"text": text, "year": 1800 + i, "topic": "x"} for i, text in enumerate(texts)]
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    for i in range(20):
        (folder / f"small-{i:02d}.txt").write_text(f"text {i} " * 40)
    return folder


def request(out: Path, **changes: object) -> Request:
    values = {"out": out / "train", "valid_out": out / "valid", "valid_fraction": 0.1, "shard_bytes": SHARD, **changes}
    return Request(**values)


def prepare_here(corpus: Path, request: Request, **options) -> list:
    return prepare_shards(request, lambda: input_files([f"{corpus}/*"]), Ranks(), **options)


def tool_command(corpus: Path, out: Path, *options: object) -> list[str]:
    fixed = ["--input", f"{corpus}/*", "--shard-bytes", SHARD, "--out", out / "train"]
    split = ["--valid-out", out / "valid", "--valid-fraction", 0.1]
    return [sys.executable, str(TOOL), *map(str, [*fixed, *split, *options])]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200, check=False)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory) -> dict[str, bytes]:
    """What one process writes without a stop."""
    out = tmp_path_factory.mktemp("expected")
    prepare_here(corpus, request(out))
    assert sorted(path.name for path in out.iterdir()) == ["train", "valid"]
    return tree(out)


def texts_of(folder: Path) -> list[str]:
    shards = ShardSet(folder, load_manifest(folder))
    counts = enumerate(entry.documents for entry in shards.manifest.shards)
    return [shards.read(shard, i) for shard, count in counts for i in range(count)]


def test_every_document_is_there_once_and_shards_are_bounded(corpus, tmp_path):
    (manifest,) = prepare_here(corpus, request(tmp_path, valid_out=None))
    documents = list(read_documents(input_files([f"{corpus}/*"])))
    assert texts_of(tmp_path / "train") == [document.text for document in documents]
    assert len(manifest.shards) > 8
    assert max(entry.text_bytes for entry in manifest.shards) < SHARD + 3000


def test_workers_write_the_same_bytes(corpus, expected, tmp_path):
    done = run(tool_command(corpus, tmp_path, "--workers", 2))
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path) == expected


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_write_the_same_bytes(corpus, expected, tmp_path, ranks):
    pytest.importorskip("mpi4py")
    mpirun = shutil.which("mpirun") or str(Path(sys.executable).parent / "mpirun")
    if not Path(mpirun).exists():
        pytest.skip("no mpirun")
    done = run([mpirun, "-n", str(ranks), *tool_command(corpus, tmp_path)])
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path) == expected
    assert done.stdout.count("train: ") == 1
    if ranks == 3:
        again = run([mpirun, "-n", str(ranks), *tool_command(corpus, tmp_path)])
        assert again.returncode == 2 and again.stderr.count("error: ") == 1
        (tmp_path / "bad.jsonl").write_text("{")
        bad = run([mpirun, "-n", "3", *tool_command(corpus, tmp_path / "b", "--input", tmp_path / "bad.jsonl")])
        assert bad.returncode == 2 and "bad.jsonl:1 is not JSON" in bad.stderr and not (tmp_path / "b").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_job_goes_on_with_what_is_missing(corpus, expected, tmp_path, workers):
    command = tool_command(corpus, tmp_path, "--workers", workers)
    slow = "import time, megaroute.data.parts as p; w = p._write_marker\n" + (
        "def late(*a):\n    w(*a)\n    time.sleep(0.5)\np._write_marker = late\n"
    )
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(slow)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path / 'hook'}"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    journal = tmp_path / ".train.journal"
    wait_until(lambda: len(list(journal.glob("part-*"))) >= 3, process)
    process.kill()
    process.wait()
    assert not (tmp_path / "train").exists() and not (tmp_path / "valid").exists()
    time.sleep(0.2)  # the kernel ends the workers
    kept = {path: path.stat().st_mtime_ns for path in journal.glob("part-*")}
    half = tmp_path / ".train.draft/shard-00009-000000.tar"
    half.write_bytes(b"half written")
    shutil.rmtree(tmp_path / "hook")
    done_parts = []
    write = parts_module.write_part

    def counting(job, number, part, progress):
        done_parts.append(number)
        return write(job, number, part, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megaroute.data.pool.write_part", counting)
        prepare_here(corpus, request(tmp_path))
    assert not {int(path.stem.split("-")[1]) for path in kept} & set(done_parts)
    assert tree(tmp_path) == expected


def wait_until(condition, process) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def interrupted(corpus: Path, request: Request, after: int, error: BaseException) -> list[str]:
    """Stop a job before part `after`; what it noted."""
    notes: list[str] = []
    write = parts_module.write_part

    def failing(job, number, part, progress):
        if number == after:
            raise error
        return write(job, number, part, progress)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(type(error)):
        patch.setattr("megaroute.data.pool.write_part", failing)
        prepare_here(corpus, request, note=notes.append)
    return notes


def test_damage_and_changes_of_finished_parts_are_redone(corpus, expected, tmp_path):
    asked = request(tmp_path)
    notes = interrupted(corpus, asked, 5, KeyboardInterrupt())
    assert len(notes) == 1 and "5 of " in notes[0]
    draft = tmp_path / ".train.draft"
    with open(next(draft.glob("shard-00001-*.tar")), "r+b") as file:
        file.write(b"x")
    next(draft.glob("shard-00002-*.npy")).unlink()
    (tmp_path / ".train.journal/part-00003.json").write_text("{")
    prepare_here(corpus, asked)
    assert tree(tmp_path) == expected


def test_another_request_takes_nothing_of_the_earlier_one(corpus, tmp_path):
    interrupted(corpus, request(tmp_path, fields=Fields(metadata=("year",))), 4, KeyboardInterrupt())
    prepare_here(corpus, request(tmp_path))
    assert b"1801" not in b"".join(tree(tmp_path / "train").values())


def test_a_first_part_that_fails_leaves_nothing_and_a_later_one_leaves_the_finished(corpus, tmp_path):
    assert interrupted(corpus, request(tmp_path / "a/b"), 0, DataError("bad")) == []
    assert list(tmp_path.iterdir()) == []
    interrupted(corpus, request(tmp_path), 2, DataError("bad"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".train.draft", ".train.journal", ".valid.draft"]


def test_two_jobs_never_write_one_folder(corpus, tmp_path):
    with prepare._only_one(request(tmp_path), Ranks()), pytest.raises(DataError, match="another process is writing"):
        prepare_here(corpus, request(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_worker_is_an_error_with_a_remedy(corpus, tmp_path):
    """The worker that reads the marked text is killed, as for want of memory."""
    kill = "import os, signal, megaroute.data.parts as p\ndef die(*a): os.kill(os.getpid(), signal.SIGKILL)\n"
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(kill + "p._write_marker = die\n")
    command = tool_command(corpus, tmp_path / "out", "--workers", 2)
    done = run(command, PYTHONPATH=f"{ROOT}:{tmp_path / 'hook'}")
    assert done.returncode == MegarouteError.exit_code
    assert "error: a process of --workers died" in done.stderr
    assert not (tmp_path / "out").exists()


def test_metadata_is_kept_by_choice(corpus, tmp_path):
    from webdataset import WebDataset

    for names, expected_keys in (((), set()), (("year",), {"year"}), (("all",), {"year", "topic"})):
        out = tmp_path / "-".join(["out", *names])
        asked = request(out, valid_out=None, fields=Fields(metadata=names))
        prepare_shards(asked, lambda: input_files([f"{corpus}/other.jsonl"]), Ranks())
        urls = sorted(map(str, (out / "train").glob("*.tar")))
        sample = next(iter(WebDataset(urls, shardshuffle=False, nodesplitter=None).decode()))
        assert sample["json"]["id"] == "other.jsonl@0"
        assert set(sample["json"].get("metadata", {})) == expected_keys


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    class World:
        @staticmethod
        def Get_size() -> int:
            return 1

    assert join_ranks({}).size == 1
    assert join_ranks({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}).size == 1  # a batch script
    fake = type(sys)("mpi4py")
    fake.MPI = type(sys)("mpi4py.MPI")
    fake.MPI.COMM_WORLD = World
    monkeypatch.setitem(sys.modules, "mpi4py", fake)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", fake.MPI)
    for variables in ({"SLURM_STEP_NUM_TASKS": "8"}, {"PMI_SIZE": "8"}, {"OMPI_COMM_WORLD_SIZE": "8"}):
        with pytest.raises(DataError, match=r"8 processes .* rank 0 of 1 .* --mpi=pmi2"):
            join_ranks(variables)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(DataError, match=r"a job of 8 processes needs the package mpi4py.*megaroute\[mpi\]"):
        join_ranks({"SLURM_STEP_NUM_TASKS": "8"})


def test_one_of_the_processes_that_were_refused_speaks(corpus, tmp_path):
    command = tool_command(corpus, tmp_path / "out")
    for rank, lines in (("0", 1), ("1", 0)):
        done = run(command, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=rank)
        assert (done.returncode, done.stderr.count("error: ")) == (2, lines)
    assert started_as_first({}) and not (tmp_path / "out").exists()


def test_the_error_of_the_user_comes_first():
    bug, bad = RuntimeError("bug"), DataError("bad")
    assert lowest_error([(0, bug), None, (5, bad), (7, DataError("later"))]) is bad
    assert lowest_error([None]) is None


@pytest.mark.skipif(not SHARED_TEXT.is_dir(), reason="no corpus beside the checkout")
def test_books_and_peps(tmp_path):
    asked = Request(out=tmp_path / "out", shard_bytes=2**20, fields=Fields(metadata=("all",)))
    (manifest,) = prepare_shards(asked, lambda: input_files([f"{SHARED_TEXT}/*-valid.jsonl.xz"]), Ranks())
    assert manifest.documents == 121 + 37
    assert len(manifest.shards) >= 2
