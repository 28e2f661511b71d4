"""A batch job: check the nodes, start the ranks, pass signals on, and decide what comes next.

    python -m megaroute.launch.job CONFIG [KEY=VALUE ...]

`slurm/pretrain.sbatch` becomes this process, so that SLURM's signals reach it.  Settings are environment variables:

MEGAROUTE_REQUEUE        requeue (default), or chain for sites that forbid it: see submit.py
MEGAROUTE_MAX_FAILURES   how many attempts may die or hang before the job gives up (10)
MEGAROUTE_HEALTH         full (default), quick (without the all-reduce), off
MEGAROUTE_SWEEP          a file with the overrides of one run per line, for array jobs
MEGAROUTE_SRUN           more options for srun, such as --cpu-bind=none
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megaroute.common import log as logging
from megaroute.common.errors import ConfigError, LaunchError, MegarouteError
from megaroute.common.exit_codes import FAILED, FINISHED, STOPPED
from megaroute.config.load import load_config
from megaroute.config.root import Config
from megaroute.launch import exits, health, requeue, slurm, status
from megaroute.launch.exits import Outcome
from megaroute.launch.slurm_env import PORT_BASE, PORTS
from megaroute.launch.status import Attempt, Status

CHECK_S = 300
"""Seconds that a check of the nodes may take."""
AGAIN_S = 5.0
"""A request to stop is repeated: ranks that were still starting may have missed it."""

log = logging.get_logger(__name__)


class Requests:
    """Notes SIGUSR1 (time limit, preemption), SIGTERM and SIGINT."""

    def __init__(self) -> None:
        self.asked = ""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.asked = self.asked or signal.Signals(number).name


@dataclass(frozen=True)
class Job:
    """What stays the same during one start of a job."""

    config: Config
    argv: tuple[str, ...]
    """Configuration file and overrides, as ranks get them."""
    allocation: slurm.Allocation
    chain: str

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.config.run_directory

    @property
    def exits(self) -> Path:
        """Where the ranks of this start write how they ended."""
        return exits.folder_of(self.run_dir, self.allocation.name)


def main(argv: Sequence[str]) -> int:
    """Run the job; returns 0 when the run has finished, else the code that says why not.  See exit_codes."""
    logging.configure()
    requests = Requests()
    try:
        words = [*argv, *sweep_overrides(os.environ)]
        config = load_config(words[0], words[1:])
        chain = os.environ.get("MEGAROUTE_CHAIN", "")
        return _run(Job(config, tuple(words), slurm.allocation(), chain), requests)
    except MegarouteError as error:
        log.error("error: %s", error)
        return error.exit_code


def sweep_overrides(environment: "os._Environ[str] | dict[str, str]") -> list[str]:
    """Overrides of this task of an array job: line SLURM_ARRAY_TASK_ID, from 0, of the file MEGAROUTE_SWEEP."""
    file, task = environment.get("MEGAROUTE_SWEEP"), environment.get("SLURM_ARRAY_TASK_ID")
    if file is None:
        return []
    if task is None:
        raise LaunchError(f"MEGAROUTE_SWEEP is {file}, but this is no array job; submit with --array")
    lines = [line for line in Path(file).read_text().splitlines() if line.strip() and not line.startswith("#")]
    if int(task) >= len(lines):
        raise ConfigError(f"{file} has {len(lines)} lines, task {task} has none; use --array=0-{len(lines) - 1}")
    words = shlex.split(lines[int(task)])
    if not any(word.startswith(("run.name=", "run.directory=")) for word in words):
        raise ConfigError(f"{file}: line {task} has no run.name, so runs would share one directory; add run.name=...")
    return words


def _run(job: Job, requests: Requests) -> int:
    try:
        begun = _begin(job)
    except OSError as error:
        raise LaunchError(
            f"{job.run_dir} cannot be written ({error}), so the run could keep no status and no checkpoint; nothing "
            "was started, and the job is not requeued: make room or mend the path (run.directory), and submit again"
        ) from error
    if isinstance(begun, int):
        return begun
    bad: dict[str, str] = {}
    if os.environ.get("MEGAROUTE_HEALTH", "full") != "off":
        bad = _check_nodes(job)
    if bad:
        outcome = Outcome("died", "; ".join(f"{host}: {why}" for host, why in bad.items()), FAILED)
    elif requests.asked:
        outcome = Outcome("stopped", f"{requests.asked} came before the ranks were started", STOPPED)
    else:
        code = _train(job, begun, requests)
        outcome = exits.outcome(job.exits, job.allocation.processes, code)
    if outcome.ending == "died" and requests.asked:
        outcome = replace(
            outcome, ending="stopped", why=f"{requests.asked} came, and not every rank could save in time"
        )
    return _end(job, begun, outcome, [host for host in bad if host in job.allocation.hosts])


def _begin(job: Job) -> Status | int:
    """The run's status at the start, or the exit code of a job that has nothing to do or must not go on."""
    job.exits.mkdir(parents=True, exist_ok=True)
    allocation, step = job.allocation, status.checkpoint_step(job.run_dir)
    before = status.read(job.run_dir) or Status("queued")
    if job.chain and before.chain == job.chain and before.state in ("finished", "failed"):
        log.info("nothing to do: the run has %s %s", before.state, before.why)
        return FINISHED if before.state == "finished" else FAILED
    past = _with_ends(before.attempts, step)
    counted = requeue.of_this_submission(past, allocation.job, job.chain)
    attempt = Attempt(allocation.job, allocation.restart, allocation.hosts, status.now(), step, chain=job.chain)
    begun = replace(
        replace(before, state="running", why="", job=allocation.job, restart=allocation.restart, chain=job.chain),
        hosts=allocation.hosts,
        started=status.now(),
        attempts=(*past, attempt),
    )
    refused = requeue.refuse(counted, step, _max_failures())
    if refused:
        log.error("error: %s", refused)
        status.write(job.run_dir, replace(begun, state="failed", why=refused, attempts=past))
        return FAILED
    log.info(
        "job %s, restart %d: attempt %d of %s on %s from step %d",
        *(allocation.job, allocation.restart, len(begun.attempts), job.run_dir, ",".join(allocation.hosts), step),
    )
    return status.write(job.run_dir, begun)


def _with_ends(attempts: Sequence[Attempt], step: int) -> tuple[Attempt, ...]:
    """The last one has no end when it was killed together with its job."""
    if attempts and attempts[-1].last_step is None:
        lost = replace(attempts[-1], last_step=step, ended="", ending="", why="the job was killed: node failure?")
        return (*attempts[:-1], lost)
    return tuple(attempts)


def _check_nodes(job: Job) -> dict[str, str]:
    """{node: what is wrong}; a problem that is no single node's has the key "nodes"."""
    allocation, device = job.allocation, job.config.run.device
    folder = job.exits / "health"
    folder.mkdir(exist_ok=True)
    command = slurm.srun(allocation, 1, "--kill-on-bad-exit=0", *_more_options(), sys.executable, "-m")
    command += ["megaroute.launch.health", str(job.run_dir), str(folder), device]
    code = _quietly(command, {"MEGAROUTE_TASKS_PER_NODE": str(allocation.tasks_per_node)})
    bad = health.bad_hosts(folder, allocation.hosts)
    if bad:
        return bad
    unreached = health.unreached(folder, allocation.hosts)
    if unreached or code:
        return {"nodes": "; ".join(unreached) or f"their check ended with exit status {code}"}
    if os.environ.get("MEGAROUTE_HEALTH", "full") == "quick":
        return {}
    command = slurm.srun(allocation, allocation.tasks_per_node, *_more_options(), sys.executable, "-m")
    port = PORT_BASE + PORTS + (int(allocation.job) + 101 * allocation.restart) % PORTS
    code = _quietly([*command, "megaroute.training.probe", device], {"MASTER_PORT": str(port)})
    return {"nodes": f"an all-reduce over all tasks ended with exit status {code}"} if code else {}


def _quietly(command: Sequence[str], variables: dict[str, str]) -> int:
    try:
        return subprocess.run(command, env={**os.environ, **variables}, timeout=CHECK_S, check=False).returncode
    except subprocess.TimeoutExpired:
        return 124


def _train(job: Job, begun: Status, requests: Requests) -> int:
    """Start the ranks and wait for their end; returns srun's exit status."""
    command = slurm.srun(job.allocation, job.allocation.tasks_per_node, *_more_options())
    command += [sys.executable, "-u", "-m", "megaroute.cli", "pretrain", *job.argv]
    log.info("%s", shlex.join(command))
    step = subprocess.Popen(command, env={**os.environ, exits.FOLDER: str(job.exits.absolute())})
    ask_from, renew_from = 0.0, time.monotonic() + status.RENEW_S
    while step.poll() is None:
        now = time.monotonic()
        if requests.asked and now >= ask_from:
            if ask_from == 0:
                log.info("%s: the ranks are asked to save and stop", requests.asked)
            step.send_signal(signal.SIGUSR1)
            ask_from = now + AGAIN_S
        if now >= renew_from:
            status.keep(job.run_dir, begun)
            renew_from = now + status.RENEW_S
        time.sleep(0.2)
    return step.returncode if step.returncode >= 0 else 128 - step.returncode


def _end(job: Job, begun: Status, outcome: Outcome, bad: Sequence[str]) -> int:
    """Write how it ended and do what follows from it; returns the job's exit code."""
    checkpoint = status.checkpoint_step(job.run_dir)
    now = begun.ended(outcome, checkpoint)
    counted = requeue.of_this_submission(now.attempts, job.allocation.job, job.chain)
    decision = requeue.decide(outcome, counted, checkpoint, _max_failures())
    log.info("%s at checkpoint %d%s", outcome.ending, checkpoint, f": {outcome.why}" if outcome.why else "")
    if not status.keep(job.run_dir, now):
        return _left_alone(job)
    if decision.action == "finish":
        status.keep(job.run_dir, replace(now, state="finished", why=""))
        return FINISHED
    if decision.action == "fail":
        log.error("error: %s", decision.why)
        status.keep(job.run_dir, replace(now, state="failed", why=decision.why))
        return outcome.code if outcome.ending in ("failed", "bad input") else FAILED
    return _again(job, replace(now, why=decision.why, excluded=(*now.excluded, *bad)))


def _again(job: Job, now: Status) -> int:
    """Back to the queue.  Where SLURM does it by itself, or a person cancelled the job, only the status is written."""
    state = slurm.job_state(job.allocation.job, job.allocation.restart)
    if state == slurm.RESTARTED:
        return _left_alone(job)
    if state == "CANCELLED":
        status.keep(job.run_dir, replace(now, state="stopped", why="cancelled; submit again to go on"))
        return STOPPED
    status.keep(job.run_dir, replace(now, state="requeued"))
    if os.environ.get("MEGAROUTE_REQUEUE") == "chain" or state not in ("RUNNING", ""):
        return STOPPED
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    log.info("back to the queue%s", f", away from {','.join(now.excluded)}" if now.excluded else "")
    objection = slurm.requeue(job.allocation.job, job.allocation.restart, now.excluded)
    if objection:
        why = f"SLURM does not requeue the job ({objection}); submit again to go on, or use a chain"
        log.error("error: %s", why)
        status.keep(job.run_dir, replace(now, state="stopped", why=why))
    return STOPPED


def _left_alone(job: Job) -> int:
    """This start was cut off, and SLURM has started the job again: to requeue it now would end the one that trains."""
    log.warning("job %s was started again after restart %d: left alone", job.allocation.job, job.allocation.restart)
    return STOPPED


def _max_failures() -> int:
    text = os.environ.get("MEGAROUTE_MAX_FAILURES", "10")
    if not text.isdigit():
        raise LaunchError(f"MEGAROUTE_MAX_FAILURES is {text!r}, must be a whole number")
    return int(text)


def _more_options() -> list[str]:
    return shlex.split(os.environ.get("MEGAROUTE_SRUN", ""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
