"""`evaluate`: tasks that are scored while the run goes on."""

from pathlib import Path

from pydantic import PositiveInt, field_validator

from megaroute.config.section import Section


class EvaluateConfig(Section):
    """Tasks of the suite, scored on the model in training; results go into the metrics."""

    tasks: tuple[str, ...] = ()
    """Names of tasks, such as piqa or blimp (docs/evaluation.md); none are scored when empty."""
    every: PositiveInt | None = None
    """Steps between two times; also after the last step."""
    data_dir: Path | None = None
    """Folder of their files; when not given they come from their usual sources, over the network."""
    limit: PositiveInt = 100
    """Documents of each task, evenly spaced over all of them, always the same ones."""

    @field_validator("tasks")
    @classmethod
    def _named_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"{', '.join(value)} names a task twice")
        return value
