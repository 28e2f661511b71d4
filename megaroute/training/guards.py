"""When a run had better end."""

from megaroute.common.errors import MegarouteError


class TrainingDiverged(MegarouteError):
    """Loss or gradient stayed non-finite."""


def check_nonfinite(consecutive: int, allowed: int) -> None:
    """Raise TrainingDiverged when more than `allowed` steps in a row were skipped; all ranks count alike."""
    if consecutive > allowed:
        raise TrainingDiverged(
            f"{consecutive} steps in a row had a non-finite loss or gradient (train.max_nonfinite={allowed}), so "
            "nothing is learned any more; go back to an earlier checkpoint with a lower optim.lr or optim.clip_grad"
        )
