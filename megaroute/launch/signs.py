"""What the files of a run say by themselves: its last step, and how a start stands that keeps no `status.json`."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS, BEATS = "metrics.jsonl", "heartbeats/*/rank-*.json"
_WINDOW = 262_144
"""Bytes at the end of the metrics that are read."""
_ENDS = {"end": "finished", "stop": "stopped", "error": "failed"}


@dataclass(frozen=True)
class Sign:
    """How a start of a run stands."""

    state: str
    """running, finished, stopped or failed; "-" before the first step."""
    why: str
    age_s: float
    """Seconds since a rank last wrote anything."""
    hosts: tuple[str, ...]


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The last lines of `metrics.jsonl`, in their order; none where there is no such file."""
    try:
        with open(run_dir / METRICS, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _WINDOW))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return list(_parsed(lines))


def last_train(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last line of a step; empty without one."""
    return next((record for record in reversed(found) if record.get("kind") == "train"), {})


def of_start(run_dir: Path, found: Sequence[dict[str, Any]]) -> Sign:
    """How the newest start stands, of which `found` are the last lines of the metrics."""
    beats = sorted(run_dir.glob(BEATS))
    age, hosts = _age_s([run_dir / METRICS, *beats]), _hosts(beats)
    newest = max((record.get("attempt", 0) for record in found), default=0)
    ends = [r for r in found if r.get("kind") in _ENDS and r.get("attempt") == newest]
    if not found:
        return Sign("-", "no step yet", age, hosts)
    if not ends:
        return Sign("running", "", age, hosts)
    return Sign(_ENDS[ends[-1]["kind"]], str(ends[-1].get("message", "")), age, hosts)


def _age_s(paths: Sequence[Path]) -> float:
    times = []
    for path in paths:
        with suppress(OSError):  # a new start removes the beats of the old one
            times.append(path.stat().st_mtime)
    return max(0.0, time.time() - max(times)) if times else 0.0


def _hosts(beats: Sequence[Path]) -> tuple[str, ...]:
    hosts: dict[str, None] = {}
    for path in beats:
        with suppress(OSError):
            hosts |= {str(beat.get("host", "?")): None for beat in _parsed([path.read_text()])}
    return tuple(hosts)


def _parsed(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut by the window, or half-written
        if isinstance(record, dict):
            yield record
