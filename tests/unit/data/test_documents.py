import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from megaroute.common.errors import DataError
from megaroute.data.documents import Document, input_files, read_documents, stdlib_files

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
}


def read(*patterns: object, **options: Any) -> list[Document]:
    return list(read_documents(input_files([str(pattern) for pattern in patterns]), **options))


@pytest.mark.parametrize("name", WRITERS)
def test_json_lines_plain_and_packed(tmp_path, name):
    WRITERS[name](tmp_path / name)
    texts = [record["text"] for record in RECORDS[:3]]
    assert read(tmp_path / name) == [Document(*pair) for pair in zip(["one", "2", f"{name}:3"], texts, strict=True)]


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
    (tmp_path / "x.jsonl").write_text('{"content": "words", "url": "u"}')
    assert read(tmp_path / "x.jsonl", text_field="content", id_field="url") == [Document("u", "words")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": ', r"x\.jsonl:2 is not JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}', r"x\.jsonl:2 has no string field 'text'.*--text-field"),
        ("x.jsonl", b'{"text": 5}', "no string field"),
        ("x.jsonl", b'["text"]', "no string field"),
        ("x.jsonl", b'{"text": "\\ud800"}', r"x\.jsonl:1 has text that is not valid Unicode"),
        ("x.jsonl", b'{"text": "\xff"}', r"x\.jsonl cannot be read \('utf-8"),
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
