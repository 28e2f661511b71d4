"""Where a run stands."""

from dataclasses import dataclass, field


@dataclass
class GuardState:
    """What the guards remember; it is in the checkpoint, so that a resumed run decides as one never stopped."""

    losses: list[float] = field(default_factory=list)
    """Of the steps in the window of train.spike, the newest last; finite ones only."""
    grad_norms: list[float] = field(default_factory=list)
    """The same."""
    bad: int = 0
    """Consecutive steps, up to now, that were spikes or not finite."""
    rollbacks: int = 0
    """How often the run went back to a checkpoint."""
    undone: list[list[int]] = field(default_factory=list)
    """[first, last] steps whose updates a rollback took back: their rows were read and counted, but not learned."""


@dataclass
class TrainState:
    """Counters that, with weights, optimizer state and data cursor, decide the next step."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Rows consumed."""
    tokens: int = 0
    """Tokens consumed."""
    nonfinite: int = 0
    """Consecutive steps skipped for a non-finite loss or gradient."""
    valid_loss: float | None = None
    """Validation loss after this very step, nats per token; None when it was not validated."""
    guards: GuardState = field(default_factory=GuardState)
    """What the guards remember."""
    attempt: int = 1
    """Which start of the run this is."""

    def advance(
        self, rows: int, sequence_length: int, skipped: bool, *, spiked: bool = False, padding: int = 0
    ) -> None:
        """Count a finished step of `rows` rows, of whose tokens `padding` are none.

        `skipped` when its loss or gradient was not finite, `spiked` when one of them stood out.
        """
        self.step += 1
        self.valid_loss = None
        self.samples += rows
        self.tokens += rows * sequence_length - padding
        self.nonfinite = self.nonfinite + 1 if skipped else 0
        self.guards.bad = self.guards.bad + 1 if skipped or spiked else 0
