"""Runs of several replicas in one process, as tests of the stream compare them."""

import json

from megaroute.config.data import DataConfig
from megaroute.data.cursor import Cursor, merge_parts
from megaroute.data.ledger import Ledger
from megaroute.data.rows import Row
from megaroute.data.stream import open_stream


def run_replicas(
    data: DataConfig, dp_size: int, counts: list[int], cursor: Cursor | None = None
) -> tuple[dict[int, Row], Cursor]:
    """Steps of `counts` rows a replica: (rows by number, cursor after them, through JSON)."""
    streams = [open_stream(data, "train", rank, dp_size, cursor) for rank in range(dp_size)]
    try:
        ledger = Ledger(cursor.digest, dict(cursor.tokens), cursor.skipped) if cursor else Ledger()
        rows: dict[int, Row] = {}
        samples = cursor.samples if cursor else 0
        for count in counts:
            for stream in streams:
                for _ in range(count):
                    row = stream.next_row()
                    rows[row.sample] = row
                    ledger.add(row.digest, {}, 0)
                    for span in row.spans:
                        ledger.add(0, {span.source: span.tokens}, 0)
            samples += count * dp_size
        assert len(rows) == sum(counts) * dp_size and max(rows) == samples - 1
        parts = json.loads(json.dumps([stream.cursor_part() for stream in streams]))
        ledger.skipped = sum(len(state["skipped"]) for part in parts for state in part["lanes"].values())
        merged = merge_parts(parts, samples, streams[0].identity, ledger, streams[0].changes)
    finally:
        for stream in streams:
            stream.close()
    return rows, Cursor.from_json(json.loads(json.dumps(merged.to_json())))


def content(rows: dict[int, Row]) -> dict[int, tuple]:
    """What must be equal of two runs' rows: tokens, spans and the lane's state, by number."""
    return {number: (row.ids.tolist(), row.spans, row.state) for number, row in sorted(rows.items())}
