"""Which checkpoints stay.  No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megaroute.checkpoint.layout import complete_checkpoints, discard, read_run
from megaroute.common.errors import CheckpointError


@dataclass(frozen=True)
class Retention:
    """The rule: the newest `keep`, every one whose step `every` divides, and the `best` by validation loss."""

    keep: int = 2
    every: int | None = None
    best: int = 0

    def removable(self, root: Path) -> list[Path]:
        """Complete checkpoints below `root` that need not stay, oldest first; never the newest."""
        complete = complete_checkpoints(root)
        stay = set(complete[-self.keep :]) | set(self._best(complete))
        return [path for path in complete if path not in stay and not self._for_ever(path)]

    def apply(self, root: Path, allowed: Callable[[], None] = lambda: None) -> list[Path]:
        """Remove what need not stay, oldest first, and return it; `allowed` is called before each and may raise."""
        removed = self.removable(root)
        for path in removed:
            allowed()
            discard(path)
        return removed

    def _for_ever(self, path: Path) -> bool:
        return self.every is not None and int(path.name.removeprefix("step-")) % self.every == 0

    def _best(self, complete: list[Path]) -> list[Path]:
        losses = [(loss, path) for path in complete if self.best and (loss := _valid_loss(path)) is not None]
        return [path for _, path in sorted(losses)[: self.best]]


def _valid_loss(path: Path) -> float | None:
    try:
        return read_run(path).valid_loss
    except CheckpointError:  # damaged or of another version: nothing is known of it
        return None
