"""Tasks in the loop, as training sees them.  What scores them is built on training, so it is handed in from above."""

from collections.abc import Mapping
from typing import Protocol

from megaroute.metrics.records import TaskScore
from megaroute.training.parts import Parts


class TaskScorer(Protocol):
    """Scores the tasks of the section `evaluate`."""

    def __call__(self, parts: Parts) -> Mapping[str, TaskScore]:
        """Scores by name of the task, equal on all ranks, which call it together; nothing of the run is changed."""
        ...


def due(parts: Parts) -> bool:
    """Whether they are to be scored after the step just counted."""
    every, step = parts.config.evaluate.every, parts.state.step
    return every is not None and (step % every == 0 or step == parts.config.train.steps)
