"""Entry of one rank: bring up, set up, loop, clean up."""

import datetime
import json
import os
import shlex
from contextlib import nullcontext
from pathlib import Path

import torch.distributed as dist

from megaroute.checkpoint.lease import take
from megaroute.checkpoint.state import together
from megaroute.common import log as logging
from megaroute.common.errors import UserError
from megaroute.config.root import Config
from megaroute.config.sizes import num_parameters
from megaroute.launch.command import PREFLIGHT_DONE
from megaroute.launch.rundir import VERSION_FILE, prepare_run_directory
from megaroute.metrics.history import next_attempt
from megaroute.metrics.sinks import FILE_NAME
from megaroute.parallel import groups
from megaroute.platform import device, distributed
from megaroute.training import crash, heartbeat, loop, preflight
from megaroute.training.heartbeat import Board, Pulse
from megaroute.training.observer import Observer
from megaroute.training.parts import Parts
from megaroute.training.setup import setup
from megaroute.training.signals import StopRequest
from megaroute.training.tasks import TaskScorer
from megaroute.training.watchdog import Watchdog


def main(config: Config, stop: StopRequest | None = None, score_tasks: TaskScorer | None = None) -> int:
    """Train as `config` says on the ranks of the environment, until its end or `stop`; returns the exit code.

    `score_tasks` scores the tasks of the section `evaluate`, where there are any.

    Raises UserError on every rank alike when something can be refused before training.
    """
    platform, lease = device.resolve(config.run.device), None
    rank, world_size = distributed.start(platform, config.run.timeout_s)
    if stop is not None:
        stop.joined = True
    try:
        with crash.lost_peers(rank):
            board = _prepare(config, rank, world_size)
        logging.configure(rank, config.run_directory / crash.LOG_NAME)
        if rank == 0:
            logging.get_logger().info("%s", first_line(config.run_directory))
        pulse, timeout_s = Pulse(), config.run.hang_timeout_s
        watchdog = (
            Watchdog(board, pulse, timeout_s, rank, world_size, config.run_directory) if timeout_s else nullcontext()
        )
        with crash.logged(config.run_directory, rank), watchdog, crash.lost_peers(rank):
            lease = together(lambda: take(config.run_directory / "checkpoints") if rank == 0 else None, keep=True)[rank]
            code = _train(setup(config, platform, world_size, lease, pulse), board, stop, score_tasks)
            dist.barrier()
        return code
    finally:
        if lease is not None:
            lease.release()
        groups.tear_down()
        distributed.stop()


def _train(parts: Parts, board: Board, stop: StopRequest | None, score_tasks: TaskScorer | None) -> int:
    config, rank = parts.config, parts.groups.rank
    observer = Observer(parts, num_parameters(config.model, config.routing))
    with crash.recorded(config.run_directory, rank, board), crash.lost_peers(rank):
        try:
            code = loop.run(parts, observer, stop, score_tasks)
        finally:
            observer.close()
            if parts.stream is not None:
                parts.stream.close()
    if rank == 0 and config.metrics.report and code == 0:  # else there is no time, and the launcher writes it
        from megaroute.metrics.report import write_report  # takes a second to import, once, here

        logging.get_logger().info("report: %s", write_report(parts.run_dir))
    return code


def first_line(run_dir: Path) -> str:
    """What a log starts with, as it has only times below: date, attempt, directory, command."""
    version = json.loads((run_dir / VERSION_FILE).read_text())
    attempt = next_attempt(run_dir / FILE_NAME)
    day = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return f"{day} | attempt {attempt} in {run_dir.absolute()} | {shlex.join(version['argv'])}"


def _prepare(config: Config, rank: int, world_size: int) -> Board:
    """Rank 0 checks and makes the run directory; its verdict is everybody's.  Returns where heartbeats are written."""
    verdict: list[UserError | Path | None] = [None]
    if rank == 0:
        try:
            if PREFLIGHT_DONE not in os.environ:
                preflight.check(config, world_size)
                prepare_run_directory(config)
            verdict = [heartbeat.new_folder(config.run_directory)]
        except UserError as error:
            verdict = [error]
    dist.broadcast_object_list(verdict, src=0)
    (found,) = verdict
    if isinstance(found, UserError):
        raise found
    assert found is not None
    return Board(found)
