"""Evaluation sets from files, one JSON object a line: what the task files `local_*.yaml` read."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

from megaroute.common.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
ALIASES = {
    "openbookqa": ("openbook_qa",),
    "nq_open": ("nq_open_dev",),
    "webqs": ("webquestions_test", "webquestions"),
    "lambada": ("lambada_openai",),
    "winograd": ("wsc273",),
}
"""Other names that a task's file may have."""
FIELDS = {
    "choices": ("query", "choices", "gold"),
    "context_options": ("context_options", "continuation", "gold"),
    "sentence_good": ("sentence_good", "sentence_bad"),
    "continuation": ("context", "continuation"),
    "question": ("question", "answers"),
}
"""Fields of each kind of document, by the field that tells the kind."""
RENAMED = {"qText": "question", "answer": "answers"}


def find(name: str, data_dir: Path) -> Path | None:
    """The file of a task in the folder, or None."""
    for stem in (name, *ALIASES.get(name, ())):
        for suffix in SUFFIXES:
            if (path := data_dir / (stem + suffix)).is_file():
                return path
    return None


def load(name: str, data_dir: str | None = None, **_: Any) -> Any:
    """The documents of a task as a data set with the one split `test`; the harness calls it.

    Raises DataError when the file is missing or does not hold documents of one of the kinds of FIELDS.
    """
    from datasets import Dataset, DatasetDict

    if data_dir is None:
        raise DataError(f"{name} is read from a file, but no folder was named; give --data-dir")
    path = find(name, Path(data_dir))
    if path is None:
        wanted = ", ".join(stem + SUFFIXES[0] for stem in (name, *ALIASES.get(name, ())))
        raise DataError(f"{data_dir} has no file for the task {name} ({wanted}); put it there or leave the task out")
    return DatasetDict({"test": Dataset.from_list(documents(path))})


def documents(path: Path) -> list[dict[str, Any]]:
    """Documents of a file, the fields of their kind only."""
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opened(path, "rt", encoding="utf-8") as file:  # type: ignore[operator]
            found = [_document(json.loads(line), path, number) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read ({error}), so its task cannot be scored; repair the file") from error
    if not found:
        raise DataError(f"{path} holds no document, so its task has no score; give another file")
    return found


def _document(raw: Any, path: Path, number: int) -> dict[str, Any]:
    known = raw if isinstance(raw, dict) else {}
    fields: dict[str, Any] = {RENAMED.get(str(key), str(key)): value for key, value in known.items()}
    for kind in FIELDS.values():
        if all(key in fields for key in kind):
            document = {key: fields[key] for key in kind}
            if "query" in document:  # the blank or line end before an answer comes from the task file
                document["query"] = document["query"].rstrip()
            return document
    kinds = "; ".join(", ".join(kind) for kind in FIELDS.values())
    raise DataError(f"{path}:{number} has the fields {', '.join(fields) or 'none'}, must have one of: {kinds}")
