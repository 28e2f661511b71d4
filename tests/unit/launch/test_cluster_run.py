"""What `megaroute launch` keeps of a run on several nodes while it waits for DeepSpeed's runner."""

import signal
import sys

import pytest

from megaroute.launch import cluster, slurm, status
from megaroute.launch.command import Launch

ALLOCATION = slurm.Allocation("71", 0, ("node7",), 1)
RUNNER = """
import json, sys, time
from pathlib import Path
run = Path(sys.argv[1])
(run / "metrics.jsonl").write_text('{"kind": "train", "step": 5, "loss": 2.5}\\n')
end = time.monotonic() + 30
while json.loads((run / "status.json").read_text())["step"] != 5:
    if time.monotonic() > end:
        sys.exit(3)
    time.sleep(0.05)
(run / "exits" / "71.0" / "rank-00000.json").write_text('{"code": 0, "host": "node7", "why": ""}')
"""


def test_status_is_renewed_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "RENEW_S", 0.2)
    launch = Launch((sys.executable, "-c", RUNNER, str(tmp_path)), {})
    assert cluster.run(launch, tmp_path, ALLOCATION, grace_s=1.0) == 0
    found = status.read(tmp_path)
    assert found is not None
    assert (found.state, found.attempts[-1].ending) == ("finished", "finished")


SRUN = """#!/bin/sh
trap 'touch {asked}' USR1
kill -HUP $PPID
for _ in 1 2 3 4 5 6 7 8 9 10; do sleep 0.1; done
"""


@pytest.mark.parametrize("ignored", [True, False])
def test_hangup_asks_the_ranks_to_stop_unless_it_is_ignored(tmp_path, ignored):
    """As under nohup."""
    srun, asked = tmp_path / "srun", tmp_path / "asked"
    srun.write_text(SRUN.format(asked=asked))
    srun.chmod(0o755)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        cluster.run(Launch((str(srun),), {}), tmp_path, ALLOCATION, grace_s=60.0)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert asked.exists() is not ignored
