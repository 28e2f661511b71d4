"""Back to the newest checkpoint, while the run goes on.

Weights, optimizer and routers go back.  Steps, learning rate and data go on: a bad row is not read again, no step has
two meanings, and the ledger counts every row as it does without a rollback.  Which steps were undone is in the state,
and with it in every later checkpoint.  So a rollback is a function of the steps before it: a run that is cut off after
one and starts from the same checkpoint goes through the same steps to the same rollback.
"""

from megaroute.training.guards import TrainingDiverged
from megaroute.training.parts import Parts
from megaroute.training.state import GuardState


def due(parts: Parts) -> bool:
    """Whether so many steps in a row were bad that the run should go back."""
    after = parts.config.train.rollback_after
    return after is not None and parts.state.guards.bad >= after


def may_save(parts: Parts) -> bool:
    """Whether the state is one to go back to: not in the middle of a series of bad steps."""
    return parts.config.train.rollback_after is None or not parts.state.guards.bad


def roll_back(parts: Parts) -> str:
    """Go back, on all ranks; returns a sentence that says so.

    Raises TrainingDiverged when there is no checkpoint, or train.max_rollbacks are used up.
    """
    train, state = parts.config.train, parts.state
    bad, before = state.guards.bad, state.guards
    why = f"{bad} steps in a row were spikes or not finite (train.rollback_after={train.rollback_after})"
    if before.rollbacks >= train.max_rollbacks:
        raise TrainingDiverged(
            f"{why} after {before.rollbacks} rollbacks (train.max_rollbacks), so going back does not help; start again "
            "from an earlier checkpoint with a lower optim.lr or optim.clip_grad, or look at the text of these steps"
        )
    parts.pulse.enter("rollback")
    restored = parts.checkpoints.restore()
    if restored is None:
        raise TrainingDiverged(
            f"{why} before the first checkpoint, so there is nothing to go back to; lower optim.lr or "
            "checkpoint.every, or raise optim.warmup_steps"
        )
    record, _ = restored
    saved = GuardState(**record.guards)
    undone = [*before.undone, [record.step + 1, state.step]]
    state.guards = GuardState(saved.losses, saved.grad_norms, 0, before.rollbacks + 1, undone)
    state.nonfinite = 0
    return (
        f"{why}: weights, optimizer and routers are those of step {record.step} again, rollback "
        f"{state.guards.rollbacks} of at most {train.max_rollbacks}; steps {record.step + 1} to {state.step} and their "
        "text are passed over"
    )
