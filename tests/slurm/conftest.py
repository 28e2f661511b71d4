"""A SLURM cluster of two nodes, and one run to compare with.

SLURM_CLUSTER_TOOL names the script that makes a cluster on this machine; without it the one beside the checkout is
used.  It wants root, namespaces, and SLURM's packages or a way to install them; without these the tests are skipped.

MEGAROUTE_SLURM_FOLDER names a folder that all nodes of an existing cluster share, as they must the checkout: jobs then
go there, with the options for sbatch in MEGAROUTE_SLURM_OPTIONS, and tests that break nodes are skipped.

With MEGAROUTE_SLURM_BUDGET_S no test begins later than so many seconds: what a busy machine has no time for is skipped.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from ranks import REPOSITORY
from slurm_jobs import STEPS, Cluster
from training import make_corpus, write_config

TOOL = Path(os.environ.get("SLURM_CLUSTER_TOOL") or REPOSITORY.parent / "shared" / "tools" / "slurm-cluster")
FOLDER = "MEGAROUTE_SLURM_FOLDER"
BEGAN = time.monotonic()
UP_S = 240
"""Seconds to install SLURM and bring the cluster up."""
OWN = {
    "SLURM_CLUSTER_DIR": "/tmp/megaroute-slurm",
    "SLURM_CLUSTER_PREFIX": "mrnode",
    "SLURM_CLUSTER_PORT": "16917",
    "SLURM_CLUSTER_MODE": "namespaces",  # nodes that share a network and a process table cannot be broken one by one
}


def prepare(folder: Path) -> Path:
    """Configuration of the tiny run, with its corpus in the folder."""
    (folder / "corpus").mkdir()
    return write_config(folder, make_corpus(folder / "corpus"))


def bring_up() -> None:
    """Make the cluster, in place of one that a killed session left; skips where that does not work."""
    environment = {**os.environ, **OWN}
    subprocess.run([str(TOOL), "down"], env=environment, capture_output=True, timeout=120, check=False)
    up = subprocess.Popen(
        [str(TOOL), "up", "2", "4"], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said = up.communicate(timeout=UP_S)[1]
    except subprocess.TimeoutExpired:
        os.killpg(up.pid, signal.SIGKILL)
        up.wait()
        said = f"not within {UP_S} s"
    if up.returncode:
        pytest.skip(f"the cluster does not come up: {said.strip()[-300:]}")


def take_down() -> None:
    subprocess.run([str(TOOL), "down"], env={**os.environ, **OWN}, timeout=120, check=False)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The existing cluster that the environment names, else one of our own."""
    if os.environ.get(FOLDER):
        folder = Path(tempfile.mkdtemp(prefix="megaroute-test-", dir=os.environ[FOLDER]))
        try:
            options = shlex.split(os.environ.get("MEGAROUTE_SLURM_OPTIONS", ""))
            yield Cluster({}, prepare(folder), folder, tool=None, options=options)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    if not os.access(TOOL, os.X_OK):
        pytest.skip(f"no {TOOL}: set SLURM_CLUSTER_TOOL to a script that makes a SLURM cluster")
    # So that the end of a session that is told to go, as by timeout(1), takes the cluster down as well.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        bring_up()
        folder = tmp_path_factory.mktemp("slurm")
        variables = {**OWN, "SLURM_CONF": f"{OWN['SLURM_CLUSTER_DIR']}/etc/slurm.conf"}
        yield Cluster(variables, prepare(folder), folder, TOOL)
    finally:
        take_down()
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def within_budget() -> None:
    budget = float(os.environ.get("MEGAROUTE_SLURM_BUDGET_S") or "inf")
    used = time.monotonic() - BEGAN
    if used > budget:
        pytest.skip(f"{used:.0f} s have gone by, more than MEGAROUTE_SLURM_BUDGET_S={budget:g}")


@pytest.fixture
def own_cluster(cluster: Cluster) -> Cluster:
    """A cluster that a test may break, with partitions that preempt each other."""
    if os.environ.get(FOLDER):
        pytest.skip(f"{FOLDER} names a cluster that others use: nothing of it is broken")
    return cluster


@pytest.fixture(scope="session")
def reference(cluster: Cluster) -> dict[int, float]:
    """Loss by step of the run that nothing interrupted, with the whole check of the nodes before it."""
    run = cluster.submit("reference", MEGAROUTE_HEALTH="full")
    run.finish()
    losses = run.losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses
