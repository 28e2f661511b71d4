"""The tasks of the suite `skiplayer24`, and which of them there is a source for.  No torch."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megaroute.common.errors import ConfigError, DataError
from megaroute.config.root import Config
from megaroute.evaluation import local_documents

NAME = "skiplayer24"
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


def choose(
    names: Sequence[str] | None, data_dir: Path | None, names_key: str = "--tasks", folder_key: str = "--data-dir"
) -> list[SuiteTask]:
    """The tasks to run: those named, or all that there is a source for.  The keys are what errors call the arguments.

    Raises DataError for a name that is not of the suite, a folder or file that is not there, or no task at all.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise DataError(f"{folder_key} {data_dir} is not a folder, so there are no tasks in it; check the path")
    known = {task.name: task for task in (TASKS if data_dir is None else TASKS + BEYOND)}
    wrong = [name for name in names or () if name not in known]
    if wrong:
        raise DataError(f"{names_key}: {', '.join(wrong)} is not one of {', '.join(known)}; correct the name")
    chosen = [known[name] for name in names or known]
    if data_dir is None:
        return chosen
    present = [task for task in chosen if local_documents.find(task.name, data_dir) is not None]
    missing = [task.name for task in chosen if task not in present]
    if names and missing:
        raise DataError(f"{folder_key} {data_dir} has no file for {', '.join(missing)}; put it there or leave it out")
    if not present:
        raise DataError(
            f"{folder_key} {data_dir} has a file for none of the tasks (such as piqa.jsonl); check the path"
        )
    return present


def of_run(config: Config) -> list[SuiteTask]:
    """The tasks of the section `evaluate`.

    Raises ConfigError for a name or a file that does not exist, and where lm-evaluation-harness is missing.
    """
    settings = config.evaluate
    if not settings.tasks:
        return []
    try:
        check_installed("evaluate.tasks")
        return choose(settings.tasks, settings.data_dir, "evaluate.tasks", "evaluate.data_dir")
    except DataError as error:
        raise ConfigError(str(error)) from error


def check_installed(why: str = f"the suite {NAME}") -> None:
    """Raise DataError, naming the extra, when lm-evaluation-harness is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise DataError(
            f"{why} needs the package lm_eval, which is not installed; install it with pip install "
            "'megaroute[evaluate]'"
        )


def stay_offline(data_dir: Path | None) -> None:
    """Where tasks are read from files, look for nothing elsewhere.  Before the harness is imported."""
    if data_dir is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
