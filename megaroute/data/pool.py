"""Parts of a job, one after another or on several cores; every result is the same."""

import multiprocessing
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megaroute.common.errors import MegarouteError
from megaroute.common.processes import die_with_parent
from megaroute.data.parts import Job, Marker, write_part
from megaroute.data.plan import Part
from megaroute.data.progress import PartsProgress

TICK_S = 0.5
REPORT_BYTES = 2**20

_reports: Any = None  # in a worker: the queue to its parent


def write_parts(
    job: Job,
    parts: Sequence[tuple[int, Part]],
    workers: int,
    progress: PartsProgress,
    stopped: Callable[[], bool],
    finished: Callable[[int, Marker], object],
) -> None:
    """Write numbered parts with up to `workers` processes; `finished` is called with each; ends early if `stopped()`.

    Raises the first error of a part, after the parts at hand are finished.  Raises MegarouteError when a process dies.
    """
    if min(workers, len(parts)) < 2:
        for number, part in parts:
            if stopped():
                return
            finished(number, write_part(job, number, part, progress.add))
            progress.part_done()
        return
    # Not forked: a fork of a process with MPI or threads may hang.
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    with ProcessPoolExecutor(min(workers, len(parts)), context, _start_worker, (reports, os.getpid())) as pool:
        pending = {pool.submit(_work, job, number, part): number for number, part in parts}
        try:
            while pending:
                _finish(pending, progress, finished)
                _drain(reports, progress)
                if stopped():
                    return
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finish(
    pending: dict[Future[Marker], int], progress: PartsProgress, finished: Callable[[int, Marker], object]
) -> None:
    for future in wait(pending, timeout=TICK_S, return_when=FIRST_COMPLETED).done:
        number = pending.pop(future)
        try:
            marker = future.result()
        except BrokenProcessPool as error:
            raise MegarouteError(
                "a process of --workers died, perhaps for want of memory, so its part is not finished; run the same "
                "command again with fewer --workers: finished parts are kept"
            ) from error
        finished(number, marker)
        progress.part_done()


def _drain(reports: Any, progress: PartsProgress) -> None:
    while True:
        try:
            progress.add(reports.get_nowait())
        except queue.Empty:
            return


def _start_worker(reports: Any, parent: int) -> None:
    die_with_parent(parent)  # an orphan would write into the next try's shards
    global _reports
    _reports = reports


def _work(job: Job, number: int, part: Part) -> Marker:
    total = 0

    def report(text_bytes: int) -> None:
        nonlocal total
        total += text_bytes
        if total >= REPORT_BYTES:
            _reports.put(total)
            total = 0

    marker = write_part(job, number, part, report)
    _reports.put(total)
    return marker
