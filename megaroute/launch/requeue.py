"""Whether a job that ended, or was killed, may start again.  Pure decisions: `job.py` carries them out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megaroute.launch.exits import Outcome
from megaroute.launch.status import Attempt

FRUITLESS = 2
"""Attempts in a row without a new checkpoint that end a job."""


@dataclass(frozen=True)
class Decision:
    """What to do, and the sentence for `status.json` and the job's log."""

    action: Literal["finish", "requeue", "fail"]
    why: str


def decide(outcome: Outcome, attempts: Sequence[Attempt], checkpoint: int, max_failures: int) -> Decision:
    """After an attempt ended with `outcome`; it is the last of `attempts`, and its newest checkpoint is `checkpoint`.

    A run that stopped on request and saved goes on for as long as it makes progress.  One that died or hung does so
    at most `max_failures` times.
    """
    if outcome.ending == "finished":
        return Decision("finish", "")
    if outcome.ending in ("failed", "bad input"):
        return Decision("fail", outcome.why)
    refused = refuse(attempts, checkpoint, max_failures)
    if refused:
        return Decision("fail", f"{refused}; the last one: {outcome.why}")
    return Decision("requeue", outcome.why)


def refuse(attempts: Sequence[Attempt], checkpoint: int, max_failures: int) -> str:
    """Why a run with these attempts, now at `checkpoint`, must not start again; "" when it may.

    An attempt without an ending was killed together with its job, as by a node failure.
    """
    tried = attempts[-FRUITLESS:]
    if len(tried) == FRUITLESS and all(attempt.first_step >= checkpoint for attempt in tried):
        return (
            f"{FRUITLESS} attempts in a row ended without a new checkpoint (the newest is of step {checkpoint}), so "
            "another one would be lost too; save more often (checkpoint.every) or see why they end"
        )
    failures = sum(attempt.ending not in ("finished", "stopped") for attempt in attempts)
    if failures > max_failures:
        return (
            f"{failures} attempts died or hung, more than MEGAROUTE_MAX_FAILURES={max_failures}; see log.txt, then "
            "submit again"
        )
    return ""


def of_this_submission(attempts: Sequence[Attempt], job: str, chain: str) -> tuple[Attempt, ...]:
    """The attempts that count: those of this job, or of this chain of jobs.  A new submission is a fresh start."""
    return tuple(one for one in attempts if (one.chain == chain if chain else one.job == job))
