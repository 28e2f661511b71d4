"""Rank variables from SLURM's, on a made-up environment."""

import os

import pytest

from megaroute.common.errors import LaunchError
from megaroute.launch import slurm_env

TASK = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"} | {
    "SLURM_STEP_ID": "0"
}


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A scontrol that knows the two hosts of node[7-8] only."""
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_ranks_come_from_slurm(scontrol):
    environment = {**TASK, "SLURM_STEP_NODELIST": "node[7-8]", "SLURM_JOB_NODELIST": "node[1-8]"}
    assert slurm_env.set_rank_environment(environment)
    assert environment["RANK"] == "5"
    assert environment["WORLD_SIZE"] == "8"
    assert environment["LOCAL_RANK"] == "1"
    assert environment["MASTER_ADDR"] == "node7"
    assert environment["MASTER_PORT"] == str(29500 + 456)


def test_requeued_job_meets_at_another_port(scontrol):
    environment = {**TASK, "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_RESTART_COUNT": "6"}
    slurm_env.set_rank_environment(environment)
    assert environment["MASTER_PORT"] == str(29500 + (456 + 606) % 1000)


def test_address_and_port_that_are_given_stay():
    environment = {**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert slurm_env.set_rank_environment(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "1234")


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_outside_slurm_nothing_changes(environment):
    before = dict(environment)
    assert not slurm_env.set_rank_environment(environment)
    assert environment == before


def test_rank_that_is_set_stays():
    environment = {**TASK, "RANK": "2", "WORLD_SIZE": "8"}
    assert not slurm_env.set_rank_environment(environment)
    assert environment["RANK"] == "2"


@pytest.mark.parametrize("more", [{"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0"}, {"WORLD_SIZE": "4"}], ids=str)
def test_world_size_that_is_not_the_number_of_tasks_is_refused(more):
    with pytest.raises(LaunchError, match=r"WORLD_SIZE is .*SLURM started 8 tasks"):
        slurm_env.set_rank_environment({**TASK, **more})


def test_missing_variable_is_named():
    with pytest.raises(LaunchError, match="SLURM_LOCALID is '' in a SLURM task"):
        slurm_env.set_rank_environment({name: value for name, value in TASK.items() if name != "SLURM_LOCALID"})


def test_missing_node_list_is_named():
    with pytest.raises(LaunchError, match="SLURM_JOB_NODELIST"):
        slurm_env.set_rank_environment(dict(TASK))


def test_missing_scontrol_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="scontrol is not on PATH.*MASTER_ADDR"):
        slurm_env.set_rank_environment({**TASK, "SLURM_JOB_NODELIST": "node1"})


def test_failing_scontrol_is_named(scontrol):
    with pytest.raises(LaunchError, match=r"scontrol show hostnames node\[9\] failed"):
        slurm_env.set_rank_environment({**TASK, "SLURM_JOB_NODELIST": "node[9]"})
