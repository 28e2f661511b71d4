"""Jobs on a SLURM cluster that train the tiny run, and what tests ask of them and do to their nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ranks import REPOSITORY

STEPS = 100
"""So many that a run is still going when what a test does to it takes effect, also on a fast machine."""
OVERRIDES = [
    *(f"train.steps={STEPS}", "parallel.tensor=2", "checkpoint.every=10"),
    *("metrics.report=false", "metrics.tensorboard=false", "metrics.log_every=10"),
]


def wait_for(condition: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what()}"
        time.sleep(0.2)


class Run:
    """A job on the cluster and the run that it trains."""

    def __init__(self, cluster: "Cluster", folder: Path, job: str) -> None:
        self.cluster, self.folder, self.job = cluster, folder, job

    def records(self, kind: str = "train") -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue  # half-written, or cut by a power loss
        return [record for record in records if record["kind"] == kind]

    def losses(self) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in self.records()}

    def step(self) -> int:
        return max(self.losses(), default=0)

    def status(self) -> dict:
        path = self.folder / "status.json"
        return json.loads(path.read_text()) if path.exists() else {"state": "", "attempts": []}

    def reach(self, step: int) -> None:
        wait_for(lambda: self.step() >= step or self._over(), 300, lambda: f"step {step}; {self.log()}")
        assert self.step() >= step, self.log()

    def finish(self, seconds: float = 400) -> None:
        """Wait until the job is over, and nothing of it is left."""
        wait_for(self._over, seconds, lambda: f"the end of job {self.job} ({self.status()['state']}); {self.log()}")
        assert self.status()["state"] == "finished", self.log()
        assert self.cluster.leftovers() == []

    def stop(self) -> None:
        """What SLURM does for --signal=B:USR1@300, without the wait."""
        self.cluster.command("scancel", "--batch", "--signal=USR1", self.job)

    def stop_without_controller(self) -> None:
        """The same signal to the batch script, past SLURM."""
        for pid, line in _command_lines():
            if "megaroute.launch.job" in line and str(self.folder) in line:
                os.kill(pid, signal.SIGUSR1)

    def lose_node(self, node: str, how: str) -> None:
        """Break a node, have SLURM notice at once and take the job back, and only then repair it."""
        self.cluster.tool("fail", node, how)
        try:
            self.cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
            wait_for(
                lambda: "JobState=PENDING" in self._shown(), 120, lambda: f"job {self.job} to be requeued; {self.log()}"
            )
        finally:
            self.cluster.tool("heal", node)

    def wait_for_state(self, state: str) -> None:
        wait_for(lambda: self.status()["state"] == state, 100, lambda: f"state {state}; {self.log()}")

    def log(self) -> str:
        path = self.folder.parent / "job.log"
        return path.read_text()[-3000:] if path.exists() else "no log"

    def _over(self) -> bool:
        return any(word in self._shown() for word in ("JobState=COMPLETED", "JobState=FAILED", "JobState=CANCELLED"))

    def _shown(self) -> str:
        return self.cluster.command("scontrol", "show", "job", self.job)


class Cluster:
    """Commands on a cluster.  `variables` lead to it, `tool` made it (none for one that others use too)."""

    def __init__(
        self, variables: Mapping[str, str], config: Path, folder: Path, tool: Path | None, options: Sequence[str] = ()
    ) -> None:
        self.variables, self.config, self.folder, self._tool, self._options = variables, config, folder, tool, options
        (folder / "env.sh").write_text(
            f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={REPOSITORY} OMP_NUM_THREADS=1\n"
        )

    def command(self, *words: str) -> str:
        environment = {**os.environ, **self.variables}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
        return done.stdout + done.stderr

    def tool(self, *words: str) -> None:
        """Do something to the cluster itself."""
        assert self._tool is not None, "only a cluster of our own may be broken: ask for the fixture own_cluster"
        subprocess.run([str(self._tool), *words], env={**os.environ, **self.variables}, check=True, timeout=120)

    def submit(self, name: str, *options: str, script: str = "slurm/pretrain.sbatch", **settings: str) -> Run:
        """sbatch of a script with the tiny configuration, on two nodes of two tasks unless `options` say otherwise."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        variables = {"MEGAROUTE_ENV": str(self.folder / "env.sh"), "MEGAROUTE_HEALTH": "quick", **settings}
        command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--time=30", *self._options, *options]
        command += [f"--output={folder / 'job.log'}", f"--chdir={REPOSITORY}", script]
        command += [str(self.config), *OVERRIDES, f"run.directory={folder / 'run'}"]
        done = subprocess.run(
            command,
            env={**os.environ, **self.variables, **variables},
            capture_output=True,
            text=True,
            check=True,
            cwd=REPOSITORY,
            timeout=60,
        )
        return Run(self, folder / "run", done.stdout.strip())

    def leftovers(self) -> list[str]:
        """Command lines of ranks that still run; a killed one may take a moment to go."""
        found: list[str] = []
        for _ in range(50):
            found = [line for _, line in _command_lines() if "pretrain" in line and str(self.folder) in line]
            if not found:
                break
            time.sleep(0.2)
        return found


def _command_lines() -> Iterator[tuple[int, str]]:
    """Process id and command line of every process."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield int(path.parent.name), path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
