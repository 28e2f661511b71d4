"""Whether a job may start again."""

import pytest

from megaroute.launch.exits import Outcome
from megaroute.launch.requeue import decide, of_this_submission, refuse
from megaroute.launch.status import Attempt


def attempt(first_step: int, ending: str = "stopped", job: str = "7", chain: str = "") -> Attempt:
    return Attempt(job, 0, ("a",), "", first_step, chain=chain, last_step=first_step, ending=ending)


def action(ending: str, attempts: list[Attempt], checkpoint: int) -> str:
    return decide(Outcome(ending, "why", 1), attempts, checkpoint, max_failures=2).action


@pytest.mark.parametrize(
    "ending, expected",
    [
        ("finished", "finish"),
        ("failed", "fail"),
        ("bad input", "fail"),
        ("stopped", "requeue"),
        ("died", "requeue"),
        ("hung", "requeue"),
    ],
)
def test_ending_decides(ending, expected):
    assert action(ending, [attempt(0, ending)], checkpoint=10) == expected


def test_run_that_makes_progress_goes_on_for_ever():
    assert action("stopped", [attempt(step) for step in range(0, 1000, 10)], checkpoint=1000) == "requeue"


def test_one_attempt_without_a_checkpoint_is_forgiven_and_two_are_not():
    assert action("died", [attempt(0), attempt(10, "died")], checkpoint=10) == "requeue"
    assert action("died", [attempt(10, "died"), attempt(10, "died")], checkpoint=10) == "fail"
    assert "2 attempts in a row ended without a new checkpoint (the newest is of step 10)" in refuse(
        [attempt(10, ""), attempt(10, "stopped")], 10, 5
    )


def test_deaths_are_counted_though_each_made_progress():
    died = [attempt(step, "died") for step in (0, 10, 20)]
    assert action("died", died[:2], checkpoint=20) == "requeue"
    decision = decide(Outcome("died", "rank 1 ended", 1), died, 30, max_failures=2)
    assert decision.action == "fail"
    assert "MEGAROUTE_MAX_FAILURES=2" in decision.why
    assert decision.why.endswith("the last one: rank 1 ended")


def test_attempt_killed_with_its_node_counts_as_a_death():
    assert "died or hung" in refuse([attempt(0, ""), attempt(10, ""), attempt(20, "")], 30, 2)


def test_new_submission_is_a_fresh_start_and_a_chain_is_one_submission():
    attempts = [attempt(0, job="7"), attempt(1, job="8", chain="c"), attempt(2, job="9", chain="c")]
    assert of_this_submission(attempts, "7", "") == (attempts[0],)
    assert of_this_submission(attempts, "10", "") == ()
    assert of_this_submission(attempts, "9", "c") == (attempts[1], attempts[2])
    assert of_this_submission(attempts, "9", "d") == ()
