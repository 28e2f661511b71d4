"""Rows from text: how fast one core makes them, what a resume costs, and what more worker processes give.

Times of one process are of the processor, so that other processes do not count; those of several workers are on a
clock.  The encoder beside which the stream is put is sentencepiece alone, on the same documents, in turns with it.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import sentencepiece

from benchmarks.common import cpu_name, no_collection
from benchmarks.corpus import make_corpus
from megaroute.config.data import DataConfig, SourceConfig
from megaroute.data.cursor import Cursor, merge_parts
from megaroute.data.manifest import MANIFEST_NAME, load_manifest
from megaroute.data.shards import ShardSet
from megaroute.data.stream import Stream, open_stream

CHUNK = 64  # rows in memory at a time
MOST_ROWS = 8192  # timed; a larger corpus is read in part
PLACES = (0.01, 0.5, 0.99)
"""Shares of an epoch after which a run is resumed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this benchmark."""
    parser.add_argument(
        "--corpus", type=Path, metavar="FOLDER", help="tokenizer.model and shards in train/; made if new"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=8192, help="pieces of a tokenizer that is made (default 8192)"
    )
    parser.add_argument("--max-bytes", type=int, default=8_000_000, help="text of a corpus that is made (default 8 MB)")
    parser.add_argument(
        "--tokenize", choices=["no", "beside"], default="no", help="store tokens in a corpus that is made (%(default)s)"
    )
    parser.add_argument(
        "--mixture", type=_weight, nargs="+", metavar="NAME=WEIGHT", help="folders of --corpus instead of train/"
    )
    parser.add_argument("--packing", choices=["concat", "best_fit"], default="concat", help="(%(default)s)")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens of a row (default 1024)")
    parser.add_argument("--lanes", type=int, default=64, help="virtual lanes (default 64)")
    parser.add_argument("--turns", type=int, default=3, help="repetitions, of which the median counts (default 3)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers (default 1 2)")


def _weight(text: str) -> tuple[str, float]:
    name, _, weight = text.partition("=")
    return name, float(weight)


def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row with everything."""
    if arguments.corpus is not None:
        return [_measure(arguments, arguments.corpus)]
    with tempfile.TemporaryDirectory() as folder:
        return [_measure(arguments, Path(folder))]


def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    mixture = arguments.mixture or [("train", 1.0)]
    if not arguments.mixture and not (folder / "train" / MANIFEST_NAME).exists():
        make_corpus(folder, arguments.vocab_size, arguments.max_bytes, arguments.tokenize)
    data = DataConfig(
        train={name: SourceConfig(path=folder / name, weight=weight) for name, weight in mixture},
        packing=arguments.packing,
        tokenizer=folder / "tokenizer.model",
        sequence_length=arguments.sequence_length,
        lanes=arguments.lanes,
    )
    texts = _texts(data)
    rows = max(2 * data.lanes, sum(map(len, texts)) // 4 // data.sequence_length)
    rows = min(rows, MOST_ROWS)
    return {
        "benchmark": "stream",
        "sequence_length": data.sequence_length,
        "lanes": data.lanes,
        "packing": data.packing,
        "documents": len(texts),
        "mean_characters": statistics.mean(map(len, texts)),
        **_throughput(data, texts, rows, arguments.turns),
        **_shares(data, rows),
        **_resume(data),
        "worker_scaling": _scaling(data, rows, arguments.workers),
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


def _texts(data: DataConfig) -> list[str]:
    texts = []
    for source in data.sources.values():
        with ShardSet(source.path, load_manifest(source.path)) as shards:
            entries = enumerate(shards.manifest.shards)
            texts += [shards.read(number, i) for number, entry in entries for i in range(entry.documents)]
    return texts


def _shares(data: DataConfig, rows: int) -> dict[str, Any]:
    """What the first rows are made of: share of each source in their tokens, and of padding in their positions."""
    tokens: Counter[str] = Counter()
    with open_stream(data, "train") as stream:
        for first in range(0, rows, CHUNK):
            tokens.update(stream.take(min(CHUNK, rows - first)).tokens)
    total = sum(tokens.values())
    shares = {name: round(count / total, 4) for name, count in sorted(tokens.items())}
    return {"rows": rows, "shares": shares, "padding": 1 - total / (rows * (data.sequence_length + 1))}


def _throughput(data: DataConfig, texts: list[str], rows: int, turns: int) -> dict[str, float]:
    """Tokens per second of processor time: of the stream, and of sentencepiece on the same documents."""
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(data.tokenizer))
    stream = open_stream(data, "train")
    found = []
    with no_collection():
        # Opens shards, warms caches: until each lane has its first document of each source, read to the end, behind it.
        smallest = min(source.weight for source in data.sources.values()) / sum(s.weight for s in data.sources.values())
        _consume(stream, data.lanes * (1 + math.ceil(1 / smallest)))
        for _ in range(turns):
            bare = _processor_seconds(lambda: sum(len(encoder.encode(text)) for text in texts))
            ours = _processor_seconds(lambda: _consume(stream, rows) * (data.sequence_length + 1))
            found.append((ours, bare, ours / bare))
    stream.close()
    ours, bare, share = (statistics.median(column) for column in zip(*found, strict=True))
    return {"tokens_per_second_per_core": ours, "encoder_tokens_per_second": bare, "share_of_encoder": share}


def _processor_seconds(run: Callable[[], int]) -> float:
    """Tokens that `run` returns, per second of processor time."""
    began = time.process_time()
    tokens = run()
    return tokens / (time.process_time() - began)


def _consume(stream: Stream, rows: int) -> int:
    for first in range(0, rows, CHUNK):
        stream.take(min(CHUNK, rows - first))
    return rows


def _resume(data: DataConfig) -> dict[str, Any]:
    """Cost of going on from a cursor, per lane, first row of each lane included, at PLACES of the epoch of all text."""
    epoch = sum(load_manifest(source.path).tokens or 0 for source in data.sources.values()) // data.sequence_length
    found = {}
    with open_stream(data, "train") as stream:
        for place in PLACES:
            _consume(stream, max(data.lanes, round(place * epoch) - stream.samples))
            cursor = _cursor(stream, stream.samples)
            found[f"{place:.0%}"] = _resume_from(data, cursor)
    state = json.dumps(cursor.to_json()).encode()
    middle = found[f"{PLACES[1]:.0%}"]
    return {
        "resume_ms": middle["ms"],
        "resume_ms_by_place": {place: cost["ms"] for place, cost in found.items()},
        "resume_open_ms": middle["open_ms"],
        "bytes_read_on_resume": middle["bytes"],
        "state_bytes": len(state) / data.lanes,
        "state_bytes_compressed": len(zlib.compress(state)) / data.lanes,
    }


def _resume_from(data: DataConfig, cursor: Cursor) -> dict[str, float]:
    began, process = time.process_time(), psutil.Process()
    stream = open_stream(data, "train", cursor=cursor)
    opened, read = time.process_time(), process.io_counters().read_chars
    stream.take(data.lanes)
    first, read_first = time.process_time(), process.io_counters().read_chars
    stream.take(data.lanes)
    second, read_second = time.process_time(), process.io_counters().read_chars
    stream.close()
    # The first row of each lane reads again what was at hand; the second one only goes on.
    again = 2 * read_first - read - read_second
    return {
        "ms": 1e3 * (first - opened) / data.lanes,
        "open_ms": 1e3 * (opened - began),
        "bytes": max(0, again) / data.lanes,
        "next_ms": 1e3 * (second - first) / data.lanes,
    }


def _cursor(stream: Stream, samples: int) -> Cursor:
    return merge_parts([stream.cursor_part()], samples, stream.identity)


def _scaling(data: DataConfig, rows: int, counts: list[int]) -> dict[str, float]:
    """Tokens per second on a clock, by the number of workers, after each has made its first rows."""
    found = {}
    for count in counts:
        stream = open_stream(data.model_copy(update={"workers": count}), "train")
        _consume(stream, 2 * data.lanes)
        began = time.perf_counter()
        _consume(stream, rows)
        found[str(count)] = rows * (data.sequence_length + 1) / (time.perf_counter() - began)
        stream.close()
    return found
