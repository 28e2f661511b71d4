"""What a checkpoint holds: its tensors, whether every byte is as it was written, how it differs from another.

With --data, where its run stands in the text, and which documents come next.  Reads one tensor at a time and needs no
accelerator.  The exit status is 0, 1 when two compared checkpoints differ, or 2 when one cannot be read.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megaroute.checkpoint.integrity import read_marker, total_bytes, verify
from megaroute.checkpoint.layout import read_cursor, read_run, resolve
from megaroute.common.errors import UserError
from megaroute.common.pipes import quietly
from megaroute.config.load import load_config
from megaroute.data.cursor import Cursor
from megaroute.data.ledger import Ledger
from megaroute.data.manifest import load_manifest
from megaroute.data.rows import Row
from megaroute.data.stream import open_stream
from megaroute.data.tokenizer import Tokenizer

SHOWN = 40  # characters of a document


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, help="checkpoint, folder of checkpoints, or run directory (its newest)"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor: shape, type, bytes")
    parser.add_argument("--verify", action="store_true", help="compare every byte with the checksums of the marker")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="compare every tensor with another checkpoint's")
    parser.add_argument("--data", action="store_true", help="show the data cursor and the documents that come next")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="rows to look ahead (default 8)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; the exit status."""
    return quietly(lambda: _run(parse_arguments(argv)))


def _run(arguments: argparse.Namespace) -> int:
    try:
        found = describe(arguments.checkpoint, arguments.rows if arguments.data else None)
        found |= describe_files(Path(found["checkpoint"]), arguments.tensors, arguments.verify, arguments.compare)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(found) if arguments.json else "\n".join(as_text(found)))
    return 1 if any(each["what"] for each in found.get("compared", {}).get("tensors", [])) else 0


def describe_files(checkpoint: Path, tensors: bool, check: bool, other: Path | None) -> dict[str, Any]:
    """Bytes of the checkpoint, and what else is asked for; raises CheckpointError where it cannot be read."""
    files = read_marker(checkpoint)
    found: dict[str, Any] = {"files": len(files), "bytes": total_bytes(files.values())}
    if check:
        verify(checkpoint)
        found["verified"] = True
    if tensors or other is not None:
        from megaroute.checkpoint.tensors import Tensors, compare  # torch takes seconds to import

        held = Tensors(checkpoint)
        if tensors:
            found["tensors"] = [
                {
                    "key": info.key,
                    "shape": info.shape,
                    "dtype": str(info.dtype).removeprefix("torch."),
                    "bytes": info.bytes,
                }
                for info in held
            ]
        if other is not None:
            second = resolve(other)
            differences = [each._asdict() for each in compare(held, Tensors(second))]
            found["compared"] = {"with": str(second), "tensors": differences}
    return found


def describe(path: Path, rows: int | None) -> dict[str, Any]:
    """What is known of the checkpoint; with `rows`, also its data and so many rows that come next."""
    checkpoint = resolve(path)
    run = read_run(checkpoint)
    found: dict[str, Any] = {"checkpoint": str(checkpoint), "layout": run.layout}
    found |= {name: getattr(run, name) for name in ("step", "samples", "tokens", "nonfinite")}
    return found if rows is None else {**found, "data": describe_data(checkpoint, rows)}


def describe_data(checkpoint: Path, rows: int) -> dict[str, Any]:
    """The data cursor of a checkpoint, and the `rows` rows that follow it.

    Raises UserError when the cursor cannot be read, or its text is not at hand.
    """
    value = read_cursor(checkpoint)
    cursor = Cursor.from_json(value)
    # One process reads; what a run may skip or change, an inspection may too.
    data = load_config(checkpoint.parent.parent / "config.yaml").data.model_copy(update={"workers": 0})
    ledger = Ledger(cursor.digest, dict(cursor.tokens), cursor.skipped)
    keys = list(data.folders)
    shards = {
        name: [entry.name for entry in load_manifest(source.path, key).shards]
        for (name, source), key in zip(data.sources.items(), keys, strict=False)
    }
    with open_stream(data, "train", cursor=cursor) as stream:
        tokenizer = Tokenizer(data.tokenizer)
        following = [_row(stream.next_row(), shards, tokenizer) for _ in range(rows)]
    return {
        "samples": cursor.samples,
        "digest": ledger.text,
        "tokens": ledger.tokens,
        "shares": ledger.shares,
        "identity": value["identity"],
        "changes": value["changes"],
        "skipped": [
            {"lane": lane, **skip._asdict()} for lane, state in sorted(cursor.lanes.items()) for skip in state.skipped
        ],
        "next": following,
    }


def _row(row: Row, shards: dict[str, list[str]], tokenizer: Tokenizer) -> dict[str, Any]:
    documents, at = [], 0
    for span in row.spans:
        text = tokenizer.decode(row.ids[at : at + span.tokens])
        documents.append({**span._asdict(), "shard": shards[span.source][span.shard], "text": text[:SHOWN]})
        at += span.tokens
    return {"row": row.sample, "lane": row.lane, "documents": documents}


def as_text(found: dict[str, Any]) -> list[str]:
    """Lines for people."""
    lines = [
        f"{found['checkpoint']}: step {found['step']:,}, {found['samples']:,} rows, {found['tokens']:,} tokens, "
        f"written by {found['layout']}"
    ]
    if "bytes" in found:
        verified = ", every byte as it was written" if found.get("verified") else ""
        lines.append(f"{found['files']} files, {found['bytes']:,} bytes{verified}")
    lines += [
        f"  {tensor['key']}  {'x'.join(map(str, tensor['shape'])) or 'scalar'}  {tensor['dtype']}  {tensor['bytes']:,}"
        for tensor in found.get("tensors", [])
    ]
    if "compared" in found:
        lines += _compared(found["compared"])
    data = found.get("data")
    return lines if data is None else lines + _data(data)


def _compared(compared: dict[str, Any]) -> list[str]:
    differing = [each for each in compared["tensors"] if each["what"]]
    lines = [f"{len(differing)} of {len(compared['tensors'])} tensors differ from {compared['with']}"]
    return lines + [f"  {each['key']}: {each['what']}, by up to {each['largest']:.3g}" for each in differing]


def _data(data: dict[str, Any]) -> list[str]:
    shares = ", ".join(
        f"{name} {count:,} tokens ({data['shares'][name]:.2%})" for name, count in data["tokens"].items()
    )
    lines = [f"data: {shares or 'nothing read yet'}", f"checksum of all rows: {data['digest']}"]
    lines += [
        f"changed after row {change['samples']:,}: {change['field']} from {change['before']} to {change['after']}"
        for change in data["changes"]
    ]
    lines += [
        f"skipped: lane {skip['lane']}, {skip['source']}, its slice {skip['slice']} from document {skip['document']} on"
        for skip in data["skipped"]
    ]
    for row in data["next"]:
        lines.append(f"row {row['row']:,} (lane {row['lane']}):")
        lines += [_line(document) for document in row["documents"]]
    return lines


def _line(document: dict[str, Any]) -> str:
    first, last = document["offset"], document["offset"] + document["tokens"]
    return (
        f"  {document['source']} epoch {document['epoch']}, {document['shard']} document {document['document']}, "
        f"tokens {first}-{last - 1}: {document['text']!r}"
    )


if __name__ == "__main__":
    sys.exit(main())
