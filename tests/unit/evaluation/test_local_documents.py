"""Evaluation sets from files: their kinds, their names, and what is refused."""

import json
import lzma

import pytest

from megaroute.common.errors import DataError
from megaroute.evaluation.local_documents import documents, find

CHOICE = {"query": "Q\n", "choices": ["a", "b"], "gold": 1}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_kind_keeps_its_fields(tmp_path):
    rows = [
        {**CHOICE, "id": 3},
        {"context_options": ["x", "y"], "continuation": "z", "gold": 0},
        {"context": "x", "continuation": "y"},
        {"qId": "1", "qText": "who", "answers": ["me"]},
        {"question": "who", "answer": ["me", "I"]},
        {"sentence_good": "x", "sentence_bad": "y", "UID": "z"},
    ]
    assert documents(write(tmp_path / "a.jsonl", *rows)) == [
        {"query": "Q", "choices": ["a", "b"], "gold": 1},
        {"context_options": ["x", "y"], "continuation": "z", "gold": 0},
        {"context": "x", "continuation": "y"},
        {"question": "who", "answers": ["me"]},
        {"question": "who", "answers": ["me", "I"]},
        {"sentence_good": "x", "sentence_bad": "y"},
    ]


def test_files_are_found_by_each_name_and_suffix(tmp_path):
    assert find("openbookqa", tmp_path) is None
    path = write(tmp_path / "openbook_qa.jsonl", CHOICE)
    assert find("openbookqa", tmp_path) == path
    packed = tmp_path / "piqa.jsonl.xz"
    packed.write_bytes(lzma.compress(path.read_bytes()))
    assert find("piqa", tmp_path) == packed
    assert documents(packed) == documents(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no document, so its task has no score"),
        ("{", "cannot be read .*; repair the file"),
        ('{"query": "x"}\n', r"a.jsonl:1 has the fields query, must have one of: query, choices, gold; "),
        ("[1]\n", "a.jsonl:1 has the fields none"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        documents(tmp_path / "a.jsonl")
