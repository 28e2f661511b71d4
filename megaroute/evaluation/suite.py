"""The suite `skiplayer24`: its tasks, how they are run on a model, and what is kept of the result."""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist

from megaroute.common.errors import DataError
from megaroute.common.log import get_logger
from megaroute.data.formats import import_extra
from megaroute.evaluation import local_documents
from megaroute.evaluation.scoring import Scorer

log = get_logger(__name__)

NAME = "skiplayer24"
FOLDER = Path(__file__).parent / "tasks"
"""Task files of lm-evaluation-harness: NAME.yaml reads the usual source, local_NAME.yaml a file."""
SOURCES = ("seeded_task.py", "local_documents.py", "record_task.py")
"""Beside this file; with the task files they decide what is asked and how it is judged."""
AVERAGES = ("generation", "understanding", "all")


@dataclass(frozen=True)
class SuiteTask:
    """One task."""

    name: str
    title: str
    group: Literal["generation", "understanding", "beyond"]
    """`beyond`: not of the 24, in no average, and read from a file only."""
    metric: str = "acc"
    """The number that counts: accuracy, by the length of answers where the name says so, exact match, or F1."""
    chance: float | None = None
    """What guessing gets; None where it differs by document."""


TASKS = (
    SuiteTask("triviaqa", "TriviaQA", "generation", "exact_match", 0.0),
    SuiteTask("nq_open", "Natural Questions", "generation", "exact_match", 0.0),
    SuiteTask("webqs", "WebQuestions", "generation", "exact_match", 0.0),
    SuiteTask("hellaswag", "HellaSwag", "understanding", "acc_norm", 0.25),
    SuiteTask("storycloze", "StoryCloze", "understanding", chance=0.5),
    SuiteTask("winograd", "Winograd", "understanding", chance=0.5),
    SuiteTask("winogrande", "WinoGrande", "understanding", chance=0.5),
    SuiteTask("race_middle", "RACE-middle", "understanding", chance=0.25),
    SuiteTask("race_high", "RACE-high", "understanding", chance=0.25),
    SuiteTask("piqa", "PIQA", "understanding", "acc_norm", 0.5),
    SuiteTask("arc_easy", "ARC-easy", "understanding", "acc_norm", 0.25),
    SuiteTask("arc_challenge", "ARC-challenge", "understanding", "acc_norm", 0.25),
    SuiteTask("openbookqa", "OpenBookQA", "understanding", "acc_norm", 0.25),
    SuiteTask("boolq", "BoolQ", "understanding", chance=0.5),
    SuiteTask("cb", "CB", "understanding", chance=1 / 3),
    SuiteTask("copa", "COPA", "understanding", chance=0.5),
    SuiteTask("rte", "RTE", "understanding", chance=0.5),
    SuiteTask("wic", "WiC", "understanding", chance=0.5),
    SuiteTask("wsc", "WSC", "understanding", chance=0.5),
    SuiteTask("multirc", "MultiRC", "understanding", chance=0.5),
    SuiteTask("record", "ReCoRD", "understanding", "f1"),
    SuiteTask("anli_r1", "ANLI R1", "understanding", chance=1 / 3),
    SuiteTask("anli_r2", "ANLI R2", "understanding", chance=1 / 3),
    SuiteTask("anli_r3", "ANLI R3", "understanding", chance=1 / 3),
)
BEYOND = (
    SuiteTask("blimp", "BLiMP", "beyond", chance=0.5),
    SuiteTask("lambada", "LAMBADA", "beyond", chance=0.0),
)


def fingerprint() -> str:
    """Hexadecimal sha256 of all that decides a result: task files, choice of examples, reading of files, metrics."""
    digest = hashlib.sha256(repr([astuple(task) for task in TASKS + BEYOND]).encode())
    for path in (
        *sorted(FOLDER.glob("*.yaml")),
        *map(Path(__file__).with_name, SOURCES),
    ):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def choose(names: Sequence[str] | None, data_dir: Path | None) -> list[SuiteTask]:
    """The tasks to run: those named, or all that there is a source for.

    Raises DataError for a name that is not of the suite, a folder or file that is not there, or no task at all.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise DataError(f"--data-dir {data_dir} is not a folder, so there are no tasks in it; check the path")
    known = {task.name: task for task in (TASKS if data_dir is None else TASKS + BEYOND)}
    wrong = [name for name in names or () if name not in known]
    if wrong:
        raise DataError(f"--tasks: {', '.join(wrong)} is not one of {', '.join(known)}; correct the name")
    chosen = [known[name] for name in names or known]
    if data_dir is None:
        return chosen
    present = [task for task in chosen if local_documents.find(task.name, data_dir) is not None]
    missing = [task.name for task in chosen if task not in present]
    if names and missing:
        raise DataError(f"--data-dir {data_dir} has no file for {', '.join(missing)}; put it there or leave it out")
    if not present:
        raise DataError(f"--data-dir {data_dir} has a file for none of the tasks (such as piqa.jsonl); check the path")
    return present


def check_installed() -> None:
    """Raise DataError, naming the extra, when lm-evaluation-harness is missing."""
    import_extra("lm_eval", "evaluate", f"the suite {NAME}")


def run(
    scorer: Scorer, tasks: Sequence[SuiteTask], data_dir: Path | None, batch: int = 8, limit: int | None = None
) -> dict[str, Any] | None:
    """Score the model on the tasks; on rank 0 the result as JSON can hold it, else None.  All ranks call it.

    Args:
        data_dir: folder of files; None: the usual sources, over the network or from the cache of data sets.
        batch: rows of a forward pass; does not change the result.
        limit: so many documents of each task, evenly spaced, for a first look; the result says so.
    """
    from lm_eval.tasks import TaskManager

    from megaroute.evaluation.harness_model import HarnessModel

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metadata = {} if data_dir is None else {"data_dir": str(data_dir)}
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    model = HarnessModel(scorer, batch)
    scored = {task.name: _run_task(model, manager, task, data_dir is not None, limit) for task in tasks}
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
        "missing": [task.name for task in TASKS if task.name not in scored],
        "averages": averages(scored),
        "tasks": scored,
    }


def _run_task(model: Any, manager: Any, task: SuiteTask, local: bool, limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    name = f"sl24_{task.name}{'_local' if local else ''}"
    chosen = None
    if limit is not None:
        count = len(manager.load([name])["tasks"][name].eval_docs)
        chosen = {name: [i * count // min(limit, count) for i in range(min(limit, count))]}
    found = simple_evaluate(
        model=model,
        tasks=[name],
        task_manager=manager,
        samples=chosen,
        bootstrap_iters=0,
        log_samples=True,
    )
    layers = model.layers_executed()
    if found is None:  # a rank to which the harness gives nothing back
        return {}
    documents = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    scores = [float(document[task.metric]) for document in documents]
    log.info("%s: %s %.1f %% of %d documents", task.title, task.metric, 100 * np.mean(scores), len(scores))
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
        "layers_executed": layers,
        "scores": scores,
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
