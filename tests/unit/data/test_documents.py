import gzip
import importlib
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaroute.common.errors import DataError
from megaroute.data.documents import Document, input_files, read_documents, stdlib_files
from megaroute.data.formats import Piece, read_piece
from megaroute.data.plan import plan_parts

pytestmark = pytest.mark.data

RECORDS: list[dict[str, Any]] = [
    {"id": "one", "text": "line 1\nline 2 \r\n\u2028 é"},
    {"id": 2, "text": "  spaces\t"},
    {"text": "no id"},
    {"id": "empty", "text": ""},
]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS) + "\n"
WRITERS = {
    "c.jsonl": lambda path: path.write_text(LINES, newline=""),
    "c.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "c.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES.encode())),
    "c.jsonl.zst": lambda path: path.write_bytes(zstd(LINES.encode()[:30]) + zstd(LINES.encode()[30:])),
}


def zstd(raw: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(raw)


def read(*patterns: object, **options: Any) -> list[Document]:
    return list(read_documents(input_files([str(pattern) for pattern in patterns]), **options))


@pytest.mark.parametrize("name", WRITERS)
def test_json_lines_plain_and_packed(tmp_path, name):
    WRITERS[name](tmp_path / name)
    texts = [record["text"] for record in RECORDS[:3]]
    offset = LINES.encode().index(b'{"text": "no id"}')
    ids = ["one", "2", f"{name}@{offset}"]
    assert read(tmp_path / name) == [Document(*pair) for pair in zip(ids, texts, strict=True)]


def test_text_files_are_one_document_each(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfbom\r\nkept")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.txt").write_text("")
    assert read(tmp_path / "*.txt") == [Document("a.txt", "first"), Document("b.txt", "bom\r\nkept")]


def test_patterns_keep_their_order_and_files_come_once(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert [d.text for d in read(tmp_path / "c.txt", tmp_path / "*.txt")] == ["c", "a", "b"]


def test_fields_can_be_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"content": "words", "url": "u", "id": 7, "year": 1884}')
    names = {"text_field": "content", "id_field": "url"}
    assert read(tmp_path / "x.jsonl", **names) == [Document("u", "words")]
    kept = read(tmp_path / "x.jsonl", metadata=["year", "none"], **names)
    assert kept == [Document("u", "words", {"year": 1884})]
    assert read(tmp_path / "x.jsonl", metadata=["all"], **names) == [Document("u", "words", {"id": 7, "year": 1884})]


def test_files_of_one_name_in_two_folders_keep_their_ids_apart(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    assert [d.id for d in read(tmp_path / "*/x.txt")] == ["a/x.txt", "b/x.txt"]
    paths = [tmp_path / folder / "x.txt" for folder in "ab"]
    assert [d.id for d in read(*paths)] == [str(path) for path in paths]


def write_parquet(path: Path, rows: int = 10, group: int = 4, **columns: list[Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    values = {"text": [f"text {i}" for i in range(rows)], **columns}
    importlib.import_module("pyarrow.parquet").write_table(pyarrow.table(values), path, row_group_size=group)


def test_parquet(tmp_path):
    write_parquet(tmp_path / "x.parquet", year=list(range(10)))
    expected = [Document(f"x.parquet@{i}", f"text {i}") for i in range(10)]
    assert read(tmp_path / "x.parquet") == expected
    file = input_files([str(tmp_path / "x.parquet")])[0]
    assert list(read_piece(Piece(file, 1, 2))) == expected[4:8]
    assert [d.metadata for d in read(tmp_path / "x.parquet", metadata=["all"])][:2] == [{"year": 0}, {"year": 1}]
    with pytest.raises(DataError, match=r"x\.parquet has no column 'body', it has text, year; .*--text-field"):
        read(tmp_path / "x.parquet", text_field="body")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl.zst", lambda: zstd(b"") and b"not packed at all", r"x\.jsonl\.zst cannot be read"),
        ("x.jsonl.zst", lambda: zstd(LINES.encode() * 50)[:-3], "the file ends inside a frame"),
        ("x.parquet", lambda: pytest.importorskip("pyarrow") and b"PAR1 no", r"x\.parquet cannot be read"),
    ],
    ids=["zst", "cut", "parquet"],
)
def test_damaged_files_of_the_extras_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content())
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("x.jsonl.zst", "zstandard", "zstd"), ("x.parquet", "pyarrow", "parquet")]
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name, module, extra):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"{name} needs the package {module}, .* pip install 'megaroute\[{extra}\]'"):
        read(tmp_path / name)


@given(st.lists(st.text(st.sampled_from("ab\u2028é\r"), max_size=30), max_size=12), st.integers(1, 60))
@settings(deadline=None, max_examples=60)
def test_cut_lines_are_read_once_by_any_cut(tmp_path_factory, texts, size):
    path = tmp_path_factory.mktemp("cut") / "x.jsonl"
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" * (1 + len(text) % 2) for text in texts)
    path.write_bytes(lines.encode())
    files = input_files([str(path)])
    whole = list(read_documents(files))
    pieces = [piece for part in plan_parts(files, size) for piece in part]
    assert [document for piece in pieces for document in read_piece(piece)] == whole
    assert [d.text for d in whole] == [text for text in texts if text]


def test_an_error_in_a_cut_file_names_the_line_of_the_file(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 40 + "{bad\n")
    (file,) = input_files([str(tmp_path / "x.jsonl")])
    with pytest.raises(DataError, match=r"x\.jsonl:41 is not JSON"):
        list(read_piece(Piece(file, 300, None)))


def test_small_files_share_a_part_and_large_ones_are_cut(tmp_path):
    for name, size in {"a.txt": 40, "b.txt": 50, "c.txt": 30, "d.jsonl": 250, "e.txt": 300, "f.txt": 1}.items():
        (tmp_path / name).write_text("x" * size)
    parts = plan_parts(input_files([str(tmp_path / "*")]), 100)
    cut = [[(piece.file.name, piece.start, piece.end) for piece in part] for part in parts]
    assert cut == [
        [("a.txt", 0, None), ("b.txt", 0, None)],
        [("c.txt", 0, None)],
        [("d.jsonl", 0, 100)],
        [("d.jsonl", 100, 200)],
        [("d.jsonl", 200, 250)],
        [("e.txt", 0, None)],
        [("f.txt", 0, None)],
    ]


def test_parquet_is_cut_by_row_groups(tmp_path):
    write_parquet(tmp_path / "x.parquet", rows=40, group=10)
    files = input_files([str(tmp_path / "x.parquet")])
    pieces = [piece for part in plan_parts(files, 200) for piece in part]
    assert [(piece.start, piece.end) for piece in pieces] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [document for piece in pieces for document in read_piece(piece)] == list(read_documents(files))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": ', r"x\.jsonl:2 is not JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}', r"x\.jsonl:2 has no string field 'text'.*--text-field"),
        ("x.jsonl", b'{"text": 5}', "no string field"),
        ("x.jsonl", b'["text"]', "no string field"),
        ("x.jsonl", b'{"text": "\\ud800"}', r"x\.jsonl:1 has text that is not valid Unicode"),
        ("x.jsonl", b'{"text": "\xff"}', r"x\.jsonl:1 is not UTF-8 \('utf-8"),
        ("x.jsonl.gz", b"not packed", r"x\.jsonl\.gz cannot be read"),
        ("x.jsonl.gz", gzip.compress(LINES.encode())[:40], r"x\.jsonl\.gz cannot be read"),
        ("x.jsonl.xz", b"not packed", r"x\.jsonl\.xz cannot be read"),
        ("x.jsonl.xz", lzma.compress(LINES.encode() * 50)[:80], r"x\.jsonl\.xz cannot be read"),
        ("x.txt", b"\xff\xfe", r"x\.txt cannot be read"),
        ("x.csv", b"a,b", r"x\.csv is not a \.jsonl"),
    ],
)
def test_bad_input_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_pattern_without_a_match_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"--input: no file matches '.*none\*\.txt'"):
        read(tmp_path / "none*.txt")


def test_a_part_of_the_corpus_has_something_of_every_file(tmp_path):
    for name in "abcd":
        lines = [json.dumps({"id": f"{name}{i}", "text": "x" * 10}) for i in range(50)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    part = read(tmp_path / "*.jsonl", max_bytes=395)
    assert len(part) == 40
    assert sorted(d.id for d in part) == sorted(f"{name}{i}" for name in "abcd" for i in range(10))
    everything = read(tmp_path / "*.jsonl", max_bytes=10**6)
    assert sorted(d.id for d in everything) == sorted(d.id for d in read(tmp_path / "*.jsonl"))


def test_many_small_files_share_the_bound(tmp_path):
    for i in range(60):
        (tmp_path / f"{i:02d}.txt").write_text("x" * 10)
    part = read(tmp_path / "*.txt", max_bytes=300)
    assert len(part) == 30
    assert [d.id for d in part] != [f"{i:02d}.txt" for i in range(30)]
    assert part == read(tmp_path / "*.txt", max_bytes=300)


def test_standard_library():
    names = [file.name for file in stdlib_files()]
    assert len(names) > 400
    assert {"json/decoder.py", "asyncio/events.py", "this.py"} <= set(names)
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert not folders & {"test", "tests", "site-packages", "idle_test", "__pycache__"}
    assert [file.path for file in stdlib_files()] == sorted(file.path for file in stdlib_files())


def test_undecodable_library_files_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert list(read_documents(stdlib_files())) == [Document("good.py", "x = 1\n")]
