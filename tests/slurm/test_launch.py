"""Starting ranks on several nodes: DeepSpeed's runner, its dry run, and exit codes."""

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

LAUNCH = """#!/bin/bash
. "$MEGAROUTE_ENV"
python -m megaroute.cli launch "$@" --dry-run
python -m megaroute.cli launch "$@"
"""


@pytest.fixture
def script(cluster):
    path = cluster.folder / "launch.sbatch"
    path.write_text(LAUNCH)
    return str(path)


def test_launch_in_an_allocation_starts_deepspeeds_runner_on_all_nodes(cluster, reference, script):
    run = cluster.submit("launch", script=script)
    run.finish()
    assert run.losses() == reference
    hosts = run.status()["attempts"][0]["hosts"]
    lines = [f"{host} slots=2\n" for host in hosts]
    assert len(hosts) == 2
    assert "".join(f"#   {line}" for line in lines) in (run.folder.parent / "job.log").read_text()
    assert (run.folder / "hostfile").read_text() == "".join(lines)
