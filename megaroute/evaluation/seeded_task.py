"""A task of lm-evaluation-harness whose examples depend on the document alone."""

import json
import random
from typing import Any

from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask

SEED = 1234
"""Enters the choice of every example."""


class OtherDocuments(ContextSampler):
    """Draws the examples of a document by what it says, and never the document itself.

    The harness's own sampler is one generator that walks along with the documents, so its examples change with the
    number of processes; and it leaves a document out only where two of the task's settings name the same split.
    """

    def __init__(self, pool: Any, name: str) -> None:
        super().__init__(pool, rnd=SEED)
        self.name = name
        self.document: Any = None
        """The document that examples are for."""

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> list[Any]:
        """`n` different documents of the pool that are not `document`, or fewer when the pool has no more."""
        draw = random.Random(f"{SEED}/{self.name}/{json.dumps(self.document, sort_keys=True, default=str)}")
        found: list[Any] = []
        seen: set[int] = set()
        while len(found) < n and len(seen) < len(self.df):
            place = draw.randrange(len(self.df))
            if place not in seen and self.df[place] != self.document:
                found.append(self.df[place])
            seen.add(place)
        return found


class SeededTask(ConfigurableTask):
    """What a task file with `class: !function megaroute.evaluation.seeded_task.SeededTask` describes."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self.sampler = OtherDocuments(self.fewshot_docs(), self.config.task)

    def fewshot_context(self, doc: Any, *arguments: Any, **named: Any) -> Any:
        """The prompt of a document: its examples, then itself without its answer."""
        self.sampler.document = doc
        return super().fewshot_context(doc, *arguments, **named)
