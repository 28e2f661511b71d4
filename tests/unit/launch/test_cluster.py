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


@pytest.fixture
def started(launch, tmp_path):
    """The words of the command that DeepSpeed's runner makes of ours, for a launcher."""
    runner = pytest.importorskip("deepspeed.launcher.runner")
    multinode = pytest.importorskip("deepspeed.launcher.multinode_runner")

    def words(launcher):
        arguments = runner.parse_args(list(launch(launcher).argv[3:]))
        assert (arguments.launcher, arguments.force_multi, arguments.no_ssh_check) == (launcher, True, True)
        (tmp_path / "hostfile").write_text(cluster.host_lines(ALLOCATION))
        pool = runner.fetch_hostfile(arguments.hostfile)
        assert dict(pool) == {"node7": 2, "node8": 2}
        active = runner.parse_inclusion_exclusion(pool, "", "")
        if launcher == "pdsh":
            return multinode.PDSHRunner(arguments, "V29ybGQ=").get_cmd({}, active)[0]
        made = {"slurm": "SlurmRunner", "openmpi": "OpenMPIRunner", "mpich": "MPICHRunner"}[launcher]
        one = getattr(multinode, made)(arguments, "", pool)
        one.validate_args()
        return one.get_cmd({}, active)

    return words


@pytest.mark.parametrize("launcher", ["slurm", "openmpi", "mpich", "pdsh"])
def test_every_launcher_gives_each_rank_what_it_must_know(started, tmp_path, launcher):
    command = started(launcher)
    words = command[command.index(rank.__file__) + 1 :]
    assert words[-3:] == ["pretrain", str(tmp_path / "config.yaml"), "run.device=cpu"]
    assert set(words[:-3]) == {
        f"MEGAROUTE_EXITS={tmp_path}/exits/123456.1",
        "MEGAROUTE_PROCESSES=4",
        "MASTER_ADDR=node7",
        f"MASTER_PORT={29500 + 456 + 101}",
        "DS_ACCELERATOR=cpu",
    }


def test_srun_gets_every_count(started):
    command = started("slurm")
    assert command[:3] == ["srun", "-n", "4"]
    assert {"--nodes=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1", "--distribution=block"} <= set(command)


def test_open_mpi_gets_host_file_and_interface(started, monkeypatch, tmp_path):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("MEGAROUTE_LAUNCHER_ARGS", "--allow-run-as-root")
    command = started("openmpi")
    assert command[:5] == ["mpirun", "-n", "4", "-hostfile", str(tmp_path / "hostfile")]
    assert command[command.index("btl_tcp_if_include") + 1] == "ib0"
    assert "eth0" not in command and "--allow-run-as-root" in command


def test_mpich_gets_counts_and_hosts(started):
    command = started("mpich")
    assert command[:5] == ["mpirun", "-n", "4", "-ppn", "2"]
    assert command[command.index("-hosts") + 1] == "node7,node8"


def test_pdsh_reaches_every_node_and_tells_the_exit_code(started):
    command = started("pdsh")
    assert command[:2] == ["pdsh", "-S"]
    assert command[command.index("-w") + 1] == "node7,node8"
    assert {"--node_rank=%n", "--master_addr=node7", f"--master_port={29500 + 456 + 101}"} <= set(command)


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
