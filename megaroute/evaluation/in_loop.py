"""Tasks of the suite on a model in training."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from megaroute.config.root import Config
from megaroute.evaluation import task_list
from megaroute.metrics.records import TaskScore
from megaroute.training.parts import Parts


class InLoop:
    """Asks the model of a run what `megaroute evaluate --limit` asks its checkpoints, in the same words."""

    def __init__(self, config: Config) -> None:
        """Read the documents.  Raises UserError for what cannot be asked."""
        tasks, settings = task_list.of_run(config), config.evaluate
        task_list.stay_offline(settings.data_dir)
        from megaroute.evaluation.open import check_causal
        from megaroute.evaluation.suite import Questions

        check_causal(config)
        self._questions = [Questions(task, settings.data_dir, settings.limit) for task in tasks]

    def __call__(self, parts: Parts) -> dict[str, TaskScore]:
        """Scores by name, equal on all ranks, which call it together."""
        from megaroute.data.tokenizer import Tokenizer
        from megaroute.evaluation.harness_model import HarnessModel
        from megaroute.evaluation.scoring import Scorer

        tokenizer = Tokenizer(parts.config.data.tokenizer)
        scorer = Scorer(parts.config, parts.groups, parts.wrapped, tokenizer, parts.state.step)
        model = HarnessModel(scorer, parts.config.train.micro_batch)
        for chunk in parts.wrapped:
            chunk.eval()
        try:
            with _generators_kept():
                rows = {questions.task.name: questions.ask(model) for questions in self._questions}
        finally:
            for chunk in parts.wrapped:
                chunk.train()
        kept = ("metric", "value", "stderr", "documents", "layers_executed")
        return {name: TaskScore(**{key: row[key] for key in kept}) for name, row in rows.items()}


@contextmanager
def _generators_kept() -> Iterator[None]:
    """The harness seeds Python's generator; whoever draws in training must not notice."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
