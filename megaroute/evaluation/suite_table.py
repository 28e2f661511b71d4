"""Results of the suite as Markdown: one model, or several side by side with a paired bootstrap."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megaroute.common.errors import DataError
from megaroute.evaluation.statistics import RESAMPLES
from megaroute.evaluation.task_list import AVERAGES, TASKS

SAME = ("suite", "fingerprint", "source", "limit")
"""What results must agree on to stand in one table."""


def table(result: dict[str, Any]) -> str:
    """One result: a row for each task with its standard error, then the averages."""
    lines = [
        f"{result['suite']} ({result['fingerprint'][:12]}, lm_eval {result['lm_eval']}, {_source(result)}), 1-shot: "
        f"{result['checkpoint']}",
        "",
        "| task | metric | result, % | chance, % | documents | layers executed |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["tasks"].values():
        chance = "" if row["chance"] is None else f"{100 * row['chance']:.1f}"
        layers = "" if row["layers_executed"] is None else f"{row['layers_executed']:.2f} of {result['num_layers']}"
        cells = [row["title"], row["metric"], _percent(row), chance, f"{row['documents']:,}", layers]
        lines.append(f"| {' | '.join(cells)} |")
    for name, row in result["averages"].items():
        lines.append(f"| **{name}**, {row['tasks']} of {row['of']} tasks | | **{_percent(row)}** | | | |")
    return "\n".join(lines)


def _source(result: dict[str, Any]) -> str:
    read = "from files" if result["source"] == "files" else "from the usual sources"
    return read if result["limit"] is None else f"{read}, ONLY {result['limit']} DOCUMENTS OF EACH TASK"


def _percent(row: dict[str, Any]) -> str:
    error = row["stderr"]
    return f"{100 * row['value']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def comparison(results: Sequence[dict[str, Any]], names: Sequence[str], seed: int = 0) -> str:
    """Several results side by side: each, and its difference to the first with a 95 % interval.

    The interval is a paired bootstrap: documents are drawn with replacement, the same ones for both models, and for an
    average in each task apart.  Raises DataError for results that cannot be compared.
    """
    check(results, names)
    first, *others = results
    shared = [name for name in first["tasks"] if all(name in other["tasks"] for other in others)]
    head = [f"{name}, %" for name in names] + [f"{name} - {names[0]}" for name in names[1:]]
    lines = [
        f"{first['suite']} ({first['fingerprint'][:12]}, {_source(first)}), 1-shot; differences with 95 % intervals",
        "",
        f"| task | {' | '.join(head)} |",
        f"|---|{'---|' * len(head)}",
    ]
    draws = {
        (number, name): _differences(first["tasks"][name]["scores"], other["tasks"][name]["scores"], seed)
        for number, other in enumerate(others)
        for name in shared
    }
    for name in shared:
        cells = [_percent(result["tasks"][name]) for result in results]
        cells += [_interval(*draws[number, name]) for number in range(len(others))]
        lines.append(f"| {first['tasks'][name]['title']} | {' | '.join(cells)} |")
    for average in AVERAGES:
        members = [task.name for task in TASKS if task.name in shared and average in ("all", task.group)]
        if members:
            cells = [f"{100 * np.mean([result['tasks'][m]['value'] for m in members]):.1f}" for result in results]
            for number in range(len(others)):
                means, resampled = zip(*(draws[number, member] for member in members), strict=True)
                cells.append(_interval(float(np.mean(means)), np.mean(resampled, axis=0)))
            lines.append(f"| **{average}**, {len(members)} tasks | {' | '.join(cells)} |")
    return "\n".join(lines)


def check(results: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Raise DataError unless the results are of the same tasks, files and documents."""
    for result, name in zip(results[1:], names[1:], strict=True):
        for key in SAME:
            if result[key] != results[0][key]:
                raise DataError(
                    f"{name} has {key} {result[key]}, {names[0]} has {results[0][key]}: they are not of the same test, "
                    "so their difference means nothing; evaluate both alike"
                )
        for task in set(result["tasks"]) & set(results[0]["tasks"]):
            if result["tasks"][task]["documents_sha256"] != results[0]["tasks"][task]["documents_sha256"]:
                raise DataError(f"{name} and {names[0]} were given other documents of {task}; evaluate both alike")


def _differences(first: Sequence[float], other: Sequence[float], seed: int) -> tuple[float, np.ndarray]:
    """Mean difference of paired scores, and float64 [RESAMPLES] of resampled documents."""
    gaps = np.array(other) - np.array(first)
    draw = np.random.default_rng([seed, len(gaps)])
    return float(gaps.mean()), np.array(
        [gaps[draw.integers(len(gaps), size=len(gaps))].mean() for _ in range(RESAMPLES)]
    )


def _interval(mean: float, resampled: np.ndarray) -> str:
    low, high = np.quantile(resampled, [0.025, 0.975])
    clear = "" if math.copysign(1, low) != math.copysign(1, high) or low == 0 or high == 0 else " *"
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}){clear}"
