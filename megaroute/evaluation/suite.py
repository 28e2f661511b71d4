"""The suite `skiplayer24`: how its tasks are run on a model, and what is kept of the result."""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megaroute.common.log import get_logger
from megaroute.evaluation.scoring import Scorer
from megaroute.evaluation.task_list import AVERAGES, BEYOND, NAME, TASKS, SuiteTask

log = get_logger(__name__)

FOLDER = Path(__file__).parent / "tasks"
"""Task files of lm-evaluation-harness: NAME.yaml reads the usual source, local_NAME.yaml a file."""
SOURCES = ("seeded_task.py", "local_documents.py", "record_task.py")
"""Beside this file; with the task files they decide what is asked and how it is judged."""


def fingerprint() -> str:
    """Hexadecimal sha256 of all that decides a result: task files, choice of examples, reading of files, metrics."""
    digest = hashlib.sha256(repr([astuple(task) for task in TASKS + BEYOND]).encode())
    for path in (
        *sorted(FOLDER.glob("*.yaml")),
        *map(Path(__file__).with_name, SOURCES),
    ):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Questions:
    """What the harness asks a model in one task.  Made once, it can be asked as often as one likes."""

    def __init__(self, task: SuiteTask, data_dir: Path | None, limit: int | None = None) -> None:
        """Read the documents: of a file in `data_dir`, or where that is None of the usual source; `limit` as in `run`.

        Raises DataError for a file that does not hold documents.
        """
        from lm_eval.tasks import TaskManager

        _silence_harness()
        metadata = {} if data_dir is None else {"data_dir": str(data_dir)}
        manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
        self.task = task
        self._name = f"sl24_{task.name}{'_local' if data_dir is not None else ''}"
        self._loaded = manager.load([self._name])
        count = len(self._loaded["tasks"][self._name].eval_docs)
        self._chosen = range(count) if limit is None else _spread(min(limit, count), count)

    def ask(self, model: Any) -> dict[str, Any]:
        """The row of a result.  All ranks call it with their part of the same model, and get the same."""
        from lm_eval.evaluator import evaluate

        task, chosen = self.task, {self._name: list(self._chosen)}
        found = evaluate(model, self._loaded, samples=chosen, bootstrap_iters=0)
        documents = sorted(found["samples"][self._name], key=lambda sample: sample["doc_id"])
        scores = [float(document[task.metric]) for document in documents]
        told = "".join(str(document["doc_hash"]) for document in documents)
        return {
            "title": task.title,
            "group": task.group,
            "metric": task.metric,
            "chance": task.chance,
            "value": float(np.mean(scores)),
            "stderr": standard_error(scores),
            "documents": len(scores),
            "documents_sha256": hashlib.sha256(told.encode()).hexdigest(),
            "layers_executed": model.layers_executed(),
            "scores": scores,
        }


def _spread(chosen: int, count: int) -> list[int]:
    return [i * count // chosen for i in range(chosen)]


def _silence_harness() -> None:
    """No word of progress and no bars, which it has a few of for each task, without a switch."""
    from lm_eval.api import model, task

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model.tqdm = task.tqdm = lambda things, **_: things


def run(
    scorer: Scorer, tasks: Sequence[SuiteTask], data_dir: Path | None, batch: int = 8, limit: int | None = None
) -> dict[str, Any] | None:
    """Score the model on the tasks; on rank 0 the result as JSON can hold it, else None.  All ranks call it.

    Args:
        data_dir: folder of files; None: the usual sources, over the network or from the cache of data sets.
        batch: as in Scorer.score; does not change the result.
        limit: so many documents of each task, evenly spaced, for a first look; the result says so.
    """
    from megaroute.evaluation.harness_model import HarnessModel

    model = HarnessModel(scorer, batch)
    scored = {}
    for task in tasks:
        model.task = task.title
        row = scored[task.name] = Questions(task, data_dir, limit).ask(model)
        if dist.get_rank() == 0:
            log.info("%s: %s %.1f %% of %d documents", task.title, task.metric, 100 * row["value"], row["documents"])
    if dist.get_rank():
        return None
    return {
        "suite": NAME,
        "fingerprint": fingerprint(),
        "lm_eval": version("lm_eval"),
        "source": "files" if data_dir is not None else "usual",
        "limit": limit,
        "checkpoint": str(scorer.checkpoint),
        "step": scorer.step,
        "num_layers": scorer.config.model.num_layers,
        "layout": scorer.groups.dims.describe(),
        "precision": scorer.config.train.precision,
        "missing": [task.name for task in TASKS if task.name not in scored],
        "averages": averages(scored),
        "tasks": scored,
    }


def standard_error(scores: Sequence[float]) -> float | None:
    """Of the mean; None for a single score."""
    return float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else None


def averages(scored: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean over the tasks of each group that were run, each task counting once, with its standard error."""
    found = {}
    for name in AVERAGES:
        wanted = [task.name for task in TASKS if name in ("all", task.group)]
        rows = [scored[task] for task in wanted if scored.get(task)]
        if rows:
            errors = [row["stderr"] or 0.0 for row in rows]
            found[name] = {
                "value": float(np.mean([row["value"] for row in rows])),
                "stderr": math.sqrt(sum(error**2 for error in errors)) / len(rows),
                "tasks": len(rows),
                "of": len(wanted),
            }
    return found
