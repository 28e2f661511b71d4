import pytest

from megaroute.training.guards import TrainingDiverged, check_nonfinite
from megaroute.training.state import TrainState


def test_advance_counts_steps_rows_and_tokens():
    state = TrainState()
    state.advance(8, 32, skipped=False)
    state.advance(16, 32, skipped=False)
    assert (state.step, state.samples, state.tokens, state.nonfinite) == (2, 24, 768, 0)


def test_skipped_steps_count_in_a_row():
    state = TrainState()
    counts = []
    for skipped in (True, True, False, True):
        state.advance(8, 32, skipped)
        counts.append(state.nonfinite)
    assert counts == [1, 2, 0, 1]
    assert state.step == 4, "a skipped step has consumed its rows and is a step"


def test_guard_allows_as_many_as_it_says():
    for consecutive in range(4):
        check_nonfinite(consecutive, allowed=3)
    with pytest.raises(TrainingDiverged, match=r"^4 steps in a row .* \(train.max_nonfinite=3\).*lower optim.lr"):
        check_nonfinite(4, allowed=3)
    with pytest.raises(TrainingDiverged):
        check_nonfinite(1, allowed=0)


def test_divergence_is_not_the_users_input():
    assert TrainingDiverged.exit_code == 1
