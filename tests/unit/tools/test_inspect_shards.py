"""tools/inspect_shards.py as a user runs it."""

import importlib.util
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaroute.data.build import build_shards
from megaroute.data.documents import Document
from megaroute.data.manifest import load_manifest
from megaroute.data.shards import ShardSet
from megaroute.data.tokenizer import Tokenizer
from tests.support.http_server import serve

pytestmark = pytest.mark.data

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("tool_inspect_shards", ROOT / "tools/inspect_shards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, capsys):
    """`run(*arguments)`: (status, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = tool.main(list(map(str, arguments)))
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def tokenizer(tiny_corpus) -> Tokenizer:
    return Tokenizer(tiny_corpus / "tok.model")


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    """Three shards of texts and token ids."""
    documents = [Document(f"id-{i % 25}", f"the router é {i} " * 5, {"year": i}) for i in range(30)]
    build_shards(documents, tmp_path / "s", shard_bytes=1200, tokenizer=tokenizer, tokenize="beside")
    return tmp_path / "s"


def test_lists_shards_with_their_counts(run, folder):
    manifest = load_manifest(folder)
    status, out, err = run(folder)
    lines = out.splitlines()
    assert (status, err) == (0, "") and len(lines) == len(manifest.shards) + 3
    assert lines[1].split() == [
        "shard-000000.tar",
        *(f"{n:,}" for n in (manifest.shards[0].documents, manifest.shards[0].bytes, manifest.shards[0].text_bytes)),
        f"{manifest.shards[0].tokens:,}",
        manifest.shards[0].sha256[:12],
    ]
    assert f"{manifest.tokens:,}" in lines[-2] and manifest.fingerprint[:12] in lines[-2]
    assert "token ids stored as uint16" in lines[-1]
    assert json.loads(run(folder, "--json")[1]) == json.loads((folder / "manifest.json").read_text())


def test_counts_tokens_that_the_manifest_does_not_know(run, tiny_corpus):
    assert load_manifest(tiny_corpus / "untied").tokens is None
    known = load_manifest(tiny_corpus / "train")
    out = run(tiny_corpus / "untied", "--tokenizer", tiny_corpus / "tok.model", "--json")[1]
    assert [shard["tokens"] for shard in json.loads(out)["shards"]] == [shard.tokens for shard in known.shards]


def test_shows_documents_by_number_and_by_id(run, folder, tokenizer):
    status, out, _ = run(folder, "--show", 28, "--tokenizer", tokenizer.path)
    about, text = out.split("\n", 1)
    assert status == 0 and text == "the router é 28 " * 5 + "\n"
    shown = json.loads(about)
    assert shown["id"] == "id-3" and shown["metadata"] == {"year": 28}
    assert shown["tokens"] == len(tokenizer.encode("the router é 28 " * 5)) + 1
    status, out, _ = run(folder, "--id", "id-3", "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert [record["metadata"]["year"] for record in found] == [3, 28]
    assert run(folder, "--show", 30)[::2] == (
        2,
        "error: --show 30: documents are numbered 0 to 29; give one of these\n",
    )
    assert "no document has this id" in run(folder, "--id", "none")[2]


def test_shows_documents_that_are_ids_only(run, tmp_path, tokenizer):
    build_shards([Document("a", "é router")], tmp_path / "s", shard_bytes=99, tokenizer=tokenizer, tokenize="only")
    assert json.loads(run(tmp_path / "s", "--show", 0, "--json")[1])["ids"] == tokenizer.encode("é router")
    shown = json.loads(run(tmp_path / "s", "--show", 0, "--json", "--tokenizer", tokenizer.path)[1])
    assert shown["text"] == "é router"


def test_lists_and_shows_over_http(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with serve(folder) as server:
        assert run(server.url)[0] == 0
        assert "the router é 7" in run(server.url, "--show", 7)[1]


def test_verifies_a_good_folder(run, folder, tokenizer):
    for options in ((), ("--tokenizer", tokenizer.path)):
        status, out, err = run(folder, "--verify", *options)
        assert (status, err) == (0, "") and ": 0 faults in " in out


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_verification_names_every_fault(run, folder):
    names = [entry.name for entry in load_manifest(folder).shards]
    flip(folder / names[0], 700)
    (folder / names[1]).unlink()
    os.truncate(folder / names[2], 1000)
    status, out, err = run(folder, "--verify")
    assert status == 2 and ": 3 faults in " in out and len(err.splitlines()) == 3
    for line, name, word in zip(err.splitlines(), names, ("sha256", "No such file", "bytes"), strict=False):
        assert name in line and word in line


def test_verification_sees_an_index_and_tokens_that_only_look_right(run, folder, tokenizer):
    manifest = load_manifest(folder)
    first = manifest.shards[0]
    index = np.load(folder / first.index)
    index[1] += 512
    np.save(folder / first.index, index)
    from megaroute.common.files import sha256_file
    from megaroute.data.manifest import write_manifest

    lies = first.model_copy(update={"index_sha256": sha256_file(folder / first.index)})
    counts = manifest.shards[1].model_copy(update={"tokens": 5})
    write_manifest(folder, manifest.model_copy(update={"shards": (lies, counts, *manifest.shards[2:])}))
    assert "is not the index of its shard" in run(folder, "--verify")[2]
    np.save(folder / first.index, np.r_[index[:1], index[1] - 512, index[2:]])
    good = first.model_copy(update={"index_sha256": sha256_file(folder / first.index)})
    write_manifest(folder, manifest.model_copy(update={"shards": (good, counts, *manifest.shards[2:])}))
    assert "tokens, its manifest says 5" in run(folder, "--verify", "--tokenizer", tokenizer.path)[2]


def write_tar(path: Path, members: dict[str, bytes], **options: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, raw in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            tar.addfile(member, io.BytesIO(raw))


def test_foreign_shards_get_an_index(run, tmp_path, tokenizer):
    long_name = "folder/" + "x" * 150
    foreign = {
        "./": b"",
        "./notes": b"no extension",
        "__about__": b"skipped",
        "__notes__/x.json": b"skipped",
        "docs/a.json": b'{"title": "A"}',
        "docs/a.txt": "first é".encode(),
        "docs/": b"",
        f"{long_name}.txt": b"second",
        "docs/c.txt": b"",
    }
    write_tar(tmp_path / "f/b.tar", foreign, format=tarfile.PAX_FORMAT, pax_headers={"comment": "of the whole tar"})
    write_tar(tmp_path / "f/a.tar", {"x.txt": b"zero"}, format=tarfile.GNU_FORMAT)
    status, out, err = run(tmp_path / "f", "--make-index", "--tokenizer", tokenizer.path)
    assert (status, err) == (0, ""), err
    assert out.splitlines()[1].startswith("a.tar")
    manifest = load_manifest(tmp_path / "f")
    shards = ShardSet(tmp_path / "f", manifest)
    texts = [shards.read(*place) for place in ((0, 0), (1, 0), (1, 1), (1, 2))]
    assert texts == ["zero", "first é", "second", ""] and manifest.documents == 4
    assert manifest.tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert run(tmp_path / "f", "--verify", "--tokenizer", tokenizer.path)[0] == 0
    assert "exists and would be replaced" in run(tmp_path / "f", "--make-index")[2]
    assert run(tmp_path / "f", "--make-index", "--overwrite")[0] == 0


def test_foreign_shards_with_the_text_in_their_json(run, tmp_path):
    write_tar(tmp_path / "f/a.tar", {"0.json": b'{"body": "words"}', "1.json": b'{"body": "more"}'})
    status, _, err = run(tmp_path / "f", "--make-index")
    assert status == 2 and "document 0 of" in err and "--text-member" in err
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["a.tar"]
    assert run(tmp_path / "f", "--make-index", "--text-member", "json.body")[0] == 0
    assert run(tmp_path / "f", "--show", 1)[1].endswith("more\n")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder.mkdir(), "holds no .tar file"),
        (lambda folder: None, "is no folder"),
        (lambda folder: write_tar(folder / "a.tar.gz", {"a.txt": b"x"}), "is compressed"),
        (lambda folder: write_tar(folder / "a.tar", {}), "holds no document"),
        (lambda folder: (folder.mkdir(), (folder / "a.tar").write_bytes(b"no tar" * 200)), "is no tar file"),
        (
            lambda folder: (write_tar(folder / "a.tar", {"a.txt": b"x" * 9000}), os.truncate(folder / "a.tar", 5000)),
            "a.tar",
        ),
    ],
    ids=["empty", "missing", "compressed", "no document", "no tar", "cut"],
)
def test_foreign_folders_that_cannot_be_indexed(run, tmp_path, prepare, message):
    prepare(tmp_path / "f")
    status, out, err = run(tmp_path / "f", "--make-index")
    assert status == 2 and out == "" and message in err and err.count("\n") == 1
    assert not list(tmp_path.glob("f/*.npy")) + list(tmp_path.glob("f/*.json"))


def test_bad_arguments(run, folder, tiny_corpus):
    assert "go with --make-index" in run(folder, "--overwrite")[2]
    assert "need a local folder" in run("http://host/x", "--verify")[2]
    assert "the folder: " in run(folder / "none")[2]
    assert "was prepared with" in run(folder, "--verify", "--tokenizer", tiny_corpus / "other.model")[2]
