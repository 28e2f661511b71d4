"""What counts as a checkpoint, which one is found, and what is said of damaged ones.  No torch."""

import hashlib
import json
import logging
import shutil

import pytest

from megaroute.checkpoint import integrity, layout
from megaroute.checkpoint.integrity import FileRecord
from megaroute.checkpoint.layout import RunRecord
from megaroute.common.errors import CheckpointError

MODEL = {"num_layers": 4, "hidden_size": 32}
ROUTING = {"routing.router": "gumbel", "routing.unit": "layer", "routing.layers": [1, 2]}


def record(step: int) -> RunRecord:
    return RunRecord(
        step=step, samples=8 * step, tokens=256 * step, nonfinite=0, model=MODEL, routing=ROUTING, layout="tp1"
    )


@pytest.fixture
def root(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def write(root):
    """`write(step)`: a checkpoint with one file of tensors."""

    def write(step: int):
        path = layout.directory(root, step)
        path.mkdir(parents=True)
        (path / "weights.distcp").write_bytes(b"12345")
        layout.finish(path, record(step), {"samples": 8 * step})
        return path

    return write


@pytest.fixture
def warnings_of_layout(monkeypatch, caplog):
    """What layout.py logs, whatever another test did to the package's logger."""
    monkeypatch.setattr(layout, "log", logging.getLogger("layout under test"))
    return caplog


def test_finish_makes_a_checkpoint_that_reads_back(write, root):
    path = write(3)
    assert layout.is_complete(path)
    assert layout.read_run(path) == record(3)
    assert layout.read_cursor(path) == {"samples": 24}
    assert (root / "latest").read_text() == "step-00000003\n"
    marker = json.loads((path / "complete.json").read_text())
    assert marker["step"] == 3
    assert marker["files"]["weights.distcp"] == {"bytes": 5, "sha256": hashlib.sha256(b"12345").hexdigest()}
    assert set(marker["files"]) == {"weights.distcp", "run.json", "cursor.json"}


@pytest.mark.parametrize("fails", ["run.json", "cursor.json", "complete.json"])
def test_marker_is_written_last(monkeypatch, root, write, fails):
    write(1)
    path = layout.directory(root, 2)
    path.mkdir()
    real = layout.write_json

    def dies(file, value, **how):
        assert not layout.is_complete(path), f"{file} is written after the marker"
        if file.name == fails:
            raise OSError("disk full")
        real(file, value, **how)

    for module in (layout, integrity):
        monkeypatch.setattr(module, "write_json", dies)
    with pytest.raises(OSError, match="disk full"):
        layout.finish(path, record(2), {})
    assert not layout.is_complete(path)
    assert layout.find_latest(root).name == "step-00000001"
    assert (root / "latest").read_text() == "step-00000001\n"


def test_latest_moves_only_once_the_marker_is_there(monkeypatch, root):
    path = layout.directory(root, 2)
    path.mkdir(parents=True)
    monkeypatch.setattr(
        layout, "atomic_write", lambda file, _: layout.is_complete(path) or pytest.fail(f"{file} early")
    )
    layout.finish(path, record(2), {})


def test_find_latest_takes_the_newest_complete_one_and_says_what_it_passes_over(write, root, warnings_of_layout):
    for step in (5, 100, 20):
        write(step)
    (root / "step-00000100" / "complete.json").unlink()
    assert layout.find_latest(root).name == "step-00000020"
    assert [entry.getMessage() for entry in warnings_of_layout.records] == [
        f"passing over {root / 'step-00000100'}: it has no complete.json, so its writing did not finish"
    ]


def test_find_latest_of_nothing_is_none(root):
    assert layout.find_latest(root) is None


def test_resolve_takes_a_run_a_folder_of_checkpoints_a_checkpoint_or_latest(write, root):
    older, newest = write(5), write(6)
    for named in (root.parent, root, newest, root / "latest"):
        assert layout.resolve(named) == newest
    assert layout.resolve(older) == older


def test_resolve_refuses_a_place_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; name a run directory"):
        layout.resolve(tmp_path / "nowhere")


def test_resolve_refuses_a_run_with_incomplete_checkpoints_only(write, root):
    (write(5) / "complete.json").unlink()
    for named in (root.parent, root, root / "step-00000005"):
        with pytest.raises(CheckpointError, match=r"holds no complete checkpoint \(a folder with complete.json\)"):
            layout.resolve(named)


def test_check_model_knows_what_a_checkpoint_older_than_a_key_has(write):
    path = write(1)
    layout.check_model(path, {**MODEL, "qk_norm": False}, ROUTING)
    with pytest.raises(
        CheckpointError, match="^model.qk_norm: checkpoint .* was written with False, this run has True"
    ):
        layout.check_model(path, {**MODEL, "qk_norm": True}, ROUTING)


def test_check_model_accepts_its_own_model(write):
    layout.check_model(write(1), MODEL, ROUTING)


@pytest.mark.parametrize(
    "model, routing, message",
    [
        (
            {**MODEL, "hidden_size": 64},
            ROUTING,
            r"^model.hidden_size: checkpoint .* written with 32, this run has 64; use",
        ),
        ({**MODEL, "head_dim": 8}, ROUTING, r"^model.head_dim: checkpoint .* written with None, this run has 8"),
        ({"num_layers": 4}, ROUTING, r"^model.hidden_size: checkpoint .* written with 32, this run has None"),
        (
            MODEL,
            {**ROUTING, "routing.layers": [1, 3]},
            r"^routing.layers: checkpoint .* written with \[1, 2\], this run has \[1, 3\]; use routing.layers=\[1, 2\]",
        ),
        (MODEL, {**ROUTING, "routing.moe.experts": 8}, r"^routing.moe.experts: .* written with None, this run has 8"),
    ],
)
def test_check_model_names_the_key_that_differs(write, model, routing, message):
    with pytest.raises(CheckpointError, match=message):
        layout.check_model(write(1), model, routing)


def test_discard_removes_the_marker_first(monkeypatch, write):
    path = write(1)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if it were killed here
    layout.discard(path)
    assert path.is_dir()
    assert not layout.is_complete(path)


def test_discard_removes_everything_and_minds_nothing_that_is_missing(write):
    path = write(1)
    layout.discard(path)
    assert not path.exists()
    layout.discard(path)


def test_finish_puts_the_folder_it_was_written_in_in_its_place(write, root):
    old = write(3)
    work = layout.work_directory(root, 3, "me")
    work.mkdir()
    (work / "weights.distcp").write_bytes(b"67890")
    known = {"weights.distcp": FileRecord(5, "taken while it was written"), "gone": FileRecord(1, "")}
    files = layout.finish(old, record(3), {}, known, work)
    assert not work.exists() and layout.complete_checkpoints(root) == [old]
    assert (old / "weights.distcp").read_bytes() == b"67890"
    assert files["weights.distcp"].sha256 == "taken while it was written" and "gone" not in files


def test_leftovers_are_what_is_not_complete(write, root):
    write(3)
    (write(4) / "complete.json").unlink()
    layout.work_directory(root, 5, "me").mkdir()
    assert [path.name for path in layout.leftovers(root)] == ["step-00000004", "step-00000005.partial-me"]


DAMAGE = [
    ("run.json", "{", r"run.json cannot be read \(Expecting property name"),
    ("run.json", "[1]", r"run.json cannot be read \(it holds a list, not an object\)"),
    ("run.json", '{"format": 3, "step": 2}', r"run.json cannot be read \(missing 6 required positional arguments"),
    ("run.json", '{"format": 9}', r"run.json has format 9, this version of megaroute reads 3"),
    ("run.json", None, r"run.json cannot be read \(.*No such file"),
    ("cursor.json", "\x00", r"cursor.json cannot be read \(Expecting value"),
    ("cursor.json", "[1]", r"cursor.json cannot be read \(it holds a list"),
    ("complete.json", "", r"complete.json cannot be read \(Expecting value"),
    ("complete.json", '{"format": 2, "bytes": {}}', r"complete.json has format 2, this version of megaroute reads 3"),
    ("complete.json", '{"format": 3}', r"complete.json cannot be read \(it has no sizes and checksums"),
    ("complete.json", '{"format": 3, "files": {"a": {}}}', r"complete.json cannot be read \(it has no sizes"),
    ("weights.distcp", "12346", r"weights.distcp cannot be read \(its 5 bytes are not those that were written"),
    ("weights.distcp", "123", r"weights.distcp cannot be read \(it has 3 bytes and was written with 5"),
    ("weights.distcp", None, r"weights.distcp cannot be read \(it is missing"),
]


@pytest.mark.parametrize("name, content, message", DAMAGE)
def test_damaged_file_is_one_sentence_with_its_name(write, name, content, message):
    path = write(1)
    reads = {"run.json": layout.read_run, "cursor.json": layout.read_cursor}.get(name, integrity.verify)
    reads(path)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        reads(path)
    assert "\n" not in str(caught.value)
