"""Where a run stands."""

from dataclasses import dataclass


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
    attempt: int = 1
    """Which start of the run this is."""

    def advance(self, rows: int, sequence_length: int, skipped: bool, *, padding: int = 0) -> None:
        """Count a finished step of `rows` rows, of whose tokens `padding` are none."""
        self.step += 1
        self.valid_loss = None
        self.samples += rows
        self.tokens += rows * sequence_length - padding
        self.nonfinite = self.nonfinite + 1 if skipped else 0
