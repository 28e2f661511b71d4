"""What a job asks of SLURM's controller, when that is away, refuses, or has taken the job back already."""

import os

import pytest

from megaroute.launch import slurm

SCONTROL = """#!/bin/bash
# Away for the first AWAY calls, as while slurmctld is restarted; then it says REFUSAL to a requeue, or does it.
echo "$*" >>"$LOG"
if [ "$(wc -l <"$LOG")" -le "$AWAY" ]; then
  echo "slurm_update error: Unable to contact slurm controller (connect failure)" >&2
  exit 1
fi
case "$1" in
  show) echo "JobId=$3 JobState=$STATE Reason=None" ;;
  requeue) [ -z "$REFUSAL" ] || { echo "$REFUSAL" >&2; exit 1; } ;;
esac
"""


@pytest.fixture
def controller(tmp_path, monkeypatch):
    """Sets how the controller answers; returns what it was asked since."""
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setattr(slurm, "AGAIN_S", 0.01)

    def answers(away=0, state="RUNNING", refusal=""):
        for name, value in (("AWAY", str(away)), ("STATE", state), ("REFUSAL", refusal)):
            monkeypatch.setenv(name, value)
        return lambda: (tmp_path / "log").read_text().splitlines()

    return answers


def test_requeue_waits_for_a_controller_that_is_being_restarted(controller):
    asked = controller(away=6)
    assert slurm.requeue("71", 0) == ""
    assert asked()[-1] == "requeue 71"
    assert asked().count("requeue 71") == 4


def test_requeue_does_not_wait_for_ever(controller):
    asked = controller(away=1000)
    assert "Unable to contact slurm controller" in slurm.requeue("71", 0)
    assert asked().count("requeue 71") == slurm.TRIES


@pytest.mark.parametrize(
    "answer", [{"refusal": "Requeue is disabled"}, {"refusal": "Job is completing", "state": "COMPLETING"}], ids=str
)
def test_refusal_is_final(controller, answer):
    asked = controller(**answer)
    assert slurm.requeue("71", 0) == answer["refusal"]
    assert asked().count("requeue 71") == 1
