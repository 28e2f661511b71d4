"""What ends jobs on a cluster: each time the job comes back by itself and finishes as if nothing had been."""

import pytest
from slurm_jobs import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

SAVED = 12
"""A step soon after the first checkpoint."""


def endings(run) -> list[str]:
    return [attempt["ending"] for attempt in run.status()["attempts"]]


def test_signal_before_the_limit_saves_and_requeues(cluster, reference):
    run = cluster.submit("signal")
    run.reach(SAVED)
    run.stop()
    run.finish()
    assert endings(run) == ["stopped", "finished"]
    first, second = run.status()["attempts"]
    assert second["first_step"] == first["last_step"] >= SAVED
    assert run.losses() == reference


def test_node_that_loses_power(own_cluster, reference):
    run = own_cluster.submit("power")
    run.reach(SAVED)
    run.lose_node("mrnode2", "power")
    run.finish()
    assert endings(run)[-1] == "finished"
    assert len(endings(run)) >= 2
    assert run.losses() == reference


def test_preemption_by_an_urgent_job(own_cluster, reference):
    run = own_cluster.submit("preempted", "--partition=preemptible")
    run.reach(SAVED)
    urgent = ["--partition=urgent", "--nodes=2", "--ntasks-per-node=4", "--time=1", "--output=/dev/null"]
    own_cluster.command("sbatch", *urgent, "--wrap=sleep 2")
    run.finish()
    assert endings(run) == ["stopped", "finished"]
    assert run.losses() == reference


def test_run_goes_on_with_fewer_nodes(cluster, reference):
    run = cluster.submit("fewer", "--no-requeue", MEGAROUTE_REQUEUE="chain")
    run.reach(SAVED)
    run.stop()
    run.wait_for_state("requeued")
    again = cluster.submit("fewer", "--nodes=1")
    again.finish()
    losses = again.losses()
    assert sorted(losses) == sorted(reference)
    assert losses == pytest.approx(reference, rel=1e-6)


@pytest.mark.slurm_long
def test_network_that_is_cut(own_cluster, reference):
    run = own_cluster.submit("network")
    run.reach(SAVED)
    run.lose_node("mrnode2", "net")
    run.finish()
    assert len(endings(run)) >= 2
    assert run.losses() == reference


@pytest.mark.slurm_long
def test_slurmd_that_is_killed_while_its_ranks_live_on(own_cluster, reference):
    run = own_cluster.submit("slurmd")
    run.reach(SAVED)
    run.lose_node("mrnode2", "slurmd")
    run.finish()
    assert len(endings(run)) >= 2
    assert run.losses() == reference


@pytest.mark.slurm_long
def test_controller_that_is_killed_and_started_again(own_cluster, reference):
    run = own_cluster.submit("controller")
    run.reach(SAVED)
    own_cluster.tool("ctld", "kill")
    own_cluster.command("sleep", "2")
    own_cluster.tool("ctld", "start")
    run.finish()
    assert run.losses() == reference


@pytest.mark.slurm_long
def test_controller_that_is_away_when_the_job_goes_back_to_the_queue(own_cluster, reference):
    run = own_cluster.submit("away")
    run.reach(SAVED)
    own_cluster.tool("ctld", "kill")
    run.stop_without_controller()
    wait_for(lambda: "back to the queue" in run.log(), 100, run.log)
    own_cluster.command("sleep", "2")
    own_cluster.tool("ctld", "start")
    run.finish()
    assert endings(run) == ["stopped", "finished"]
    assert run.losses() == reference
