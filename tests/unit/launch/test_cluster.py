"""The command of DeepSpeed's runner for several nodes, and the variables of ranks under each launcher."""

import pytest

from megaroute.common.errors import LaunchError
from megaroute.launch import cluster, rank, slurm

ALLOCATION = slurm.Allocation("123456", 1, ("node7", "node8"), 2)


@pytest.fixture
def launch(tmp_path, monkeypatch):
    def make(launcher):
        monkeypatch.setenv("SLURM_JOB_ID", "123456")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        return cluster.cluster_launch(tmp_path / "config.yaml", tmp_path, ALLOCATION, launcher, "cpu")

    return make


def test_runner_accepts_the_command_and_builds_srun_with_every_count(launch, tmp_path):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    multinode = pytest.importorskip("deepspeed.launcher.multinode_runner")
    arguments = runner.parse_args(list(launch("slurm").argv[3:]))
    (tmp_path / "hostfile").write_text(cluster.host_lines(ALLOCATION))
    pool = runner.fetch_hostfile(arguments.hostfile)
    assert dict(pool) == {"node7": 2, "node8": 2}
    active = runner.parse_inclusion_exclusion(pool, "", "")
    command = multinode.SlurmRunner(arguments, "", pool).get_cmd({}, active)
    assert command[:3] == ["srun", "-n", "4"]
    assert {"--nodes=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1", "--distribution=block"} <= set(command)
    words = command[command.index(rank.__file__) + 1 :]
    assert f"MEGAROUTE_EXITS={tmp_path}/exits/123456.1" in words
    assert words[-3:] == ["pretrain", str(tmp_path / "config.yaml"), "run.device=cpu"]
    assert "MASTER_ADDR=node7" in words
    assert f"MASTER_PORT={29500 + 456 + 101}" in words


def test_one_node_goes_through_srun_too(launch):
    assert "--force_multi" in launch("slurm").argv


def test_launcher_without_an_allocation_is_refused(monkeypatch, tmp_path):
    with pytest.raises(LaunchError, match="needs the nodes of a SLURM allocation"):
        cluster.check_launcher("slurm", inside=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="needs srun on PATH"):
        cluster.check_launcher("slurm", inside=True)
    cluster.check_launcher("local", inside=False)


def test_rank_of_open_mpi_is_mpis_and_not_that_of_the_daemons_task():
    environment = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    environment |= {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    words = rank.adopt(["MEGAROUTE_PROCESSES=4", "A=b=c", "pretrain", "x.yaml", "train.steps=3"], environment)
    assert words == ["pretrain", "x.yaml", "train.steps=3"]
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["A"]) == ("3", "1", "b=c")
    assert "SLURM_PROCID" not in environment
    assert rank.world_size_error(environment) == ""


@pytest.mark.parametrize("environment", [{}, {"SLURM_NTASKS": "2"}, {"WORLD_SIZE": "1", "SLURM_NTASKS": "4"}], ids=str)
def test_launcher_that_starts_another_number_of_ranks_is_refused(environment):
    assert "where 4 ranks were asked for" in rank.world_size_error({**environment, "MEGAROUTE_PROCESSES": "4"})


@pytest.mark.parametrize(
    "environment, inside",
    [({}, False), ({"SLURM_JOB_ID": "1"}, True), ({"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}, False)],
)
def test_allocation_is_known_from_a_step(environment, inside):
    assert slurm.in_allocation(environment) == inside


@pytest.mark.parametrize(
    "environment, tasks",
    [
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_NTASKS": "8"}, 4),
        ({"SLURM_NTASKS": "8"}, 4),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, 4),
    ],
    ids=str,
)
def test_tasks_per_node(environment, tasks):
    assert slurm._tasks_per_node(environment, 2) == tasks


@pytest.mark.parametrize("environment", [{}, {"SLURM_NTASKS": "5"}], ids=str)
def test_uneven_tasks_are_refused(environment):
    with pytest.raises(LaunchError, match="--ntasks-per-node"):
        slurm._tasks_per_node(environment, 2)
