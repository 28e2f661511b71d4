"""A run on this machine: start DeepSpeed's launcher, pass requests to stop on to the ranks, leave nobody behind.

    supervisor (megaroute launch)
      deepspeed.launcher.runner      own session: a Ctrl-C in the terminal reaches the supervisor only
        deepspeed.launcher.launch    kills its children when signalled, so it is not what we signal
          rank 0 .. rank N-1         save and stop at a step boundary when signalled

Four ways for a run to end early, and who sees to it: a rank fails (launch ends the others), the user or SLURM asks (the
supervisor asks the ranks, and kills the session after the grace time), runner or launch dies (the same), the supervisor
dies (each rank watches it, see `follow_supervisor`).
"""

import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from megaroute.common.log import get_logger
from megaroute.launch.command import Launch

GRACE_S = 8.0
"""Seconds that ranks get to save and stop."""
SUPERVISOR = "MEGAROUTE_SUPERVISOR"
"""Environment variable that tells a rank the supervisor's process id."""

_POLL_S = 0.1
_SAME_REQUEST_S = 0.5
_TIDY_S = 3.0
_KILL_S = 10.0
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

log = get_logger(__name__)


class _Requests:
    """Signals the supervisor got: the first asks to stop, another one asks to stop at once."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.impatient = False
        self._since = 0.0

    def note(self, number: int, _frame: object) -> None:
        if self.first is None:
            self.first, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > _SAME_REQUEST_S:
            # timeout(1) signals the process and then its group: that is one request, not two.
            self.impatient = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the forwarded signals for the time of the block; one that is ignored (nohup) stays so."""
        wanted = [
            number for number in _FORWARDED if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        ]
        previous = {number: signal.signal(number, self.note) for number in wanted}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def run(launch: Launch, grace_s: float = GRACE_S) -> int:
    """Run the command to its end and return its exit status; no process of the run is left when this returns.

    A SIGINT, SIGTERM or SIGHUP asks every rank to stop (as SIGTERM, which unlike SIGINT ends a rank that is still
    importing without a traceback); what still runs `grace_s` seconds later, or at a second signal, is killed.  The
    status is that of the first rank that failed, 128 + n if it was killed by signal n, 130 after SIGINT, and 1 if
    DeepSpeed's launcher died under the ranks.
    """
    requests = _Requests()
    with requests.listening():
        environment = {**launch.environment(), SUPERVISOR: str(os.getpid())}
        launcher = subprocess.Popen(launch.argv, env=environment, start_new_session=True)
        try:
            orphaned = _watch(launcher, requests, grace_s)
        finally:
            end_session(launcher)
    return _exit_status(launcher.returncode, requests.first, orphaned)


def follow_supervisor(grace_s: float = GRACE_S) -> None:
    """In a rank, first thing: be known to the supervisor of a local run, and stop when it is gone as if it had asked.

    The rank becomes the leader of a process group, which tells it from the helpers it starts (they must not be asked to
    stop, they write its checkpoint).  Linux can signal a process when its parent dies (PR_SET_PDEATHSIG), but the
    supervisor is not a rank's parent and the setting does not pass through DeepSpeed's launcher, so a thread looks once
    a second.  Does nothing where no supervisor is.
    """
    supervisor = os.environ.get(SUPERVISOR)
    if supervisor is not None:
        os.setpgid(0, 0)
        threading.Thread(target=_follow, args=(int(supervisor), grace_s), daemon=True).start()


def _ranks(session: int) -> list[psutil.Process]:
    """The ranks of a run that have come to `follow_supervisor`, whoever their parent is now."""
    ranks = []
    for process in members(session):
        with suppress(OSError):
            if process.pid != session and os.getpgid(process.pid) == process.pid:
                ranks.append(process)
    return ranks


def _watch(launcher: subprocess.Popen[bytes], requests: _Requests, grace_s: float) -> bool:
    """Wait for the end of the ranks, or end them; True if the launcher ended while ranks were running."""
    deadline, orphaned = math.inf, False
    while time.monotonic() < deadline and not requests.impatient:
        ended = launcher.poll() is not None
        if ended or requests.first is not None:
            ranks = _ranks(launcher.pid)
            if ended and not ranks:
                return orphaned
            if not ranks and deadline == math.inf:
                break  # so early that there is nothing to save
            if deadline == math.inf:
                orphaned = ended
                _ask_to_stop(ranks, "DeepSpeed's launcher died" if orphaned else "asked to stop", grace_s)
                deadline = time.monotonic() + grace_s
        time.sleep(_POLL_S)
    ranks = _ranks(launcher.pid)
    if ranks:
        log.warning("%d ranks had not stopped and were killed; resuming starts at the newest checkpoint", len(ranks))
    if ranks or requests.impatient or deadline == math.inf:
        _kill(members(launcher.pid))
    return orphaned


def _ask_to_stop(ranks: list[psutil.Process], why: str, grace_s: float) -> None:
    log.warning("%s: the ranks may save and stop, what still runs in %g s is killed", why, grace_s)
    for process in ranks:
        with suppress(psutil.Error):
            process.terminate()


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def end_session(launcher: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the run, after a moment for the launcher and for helpers of ranks that ended in order."""
    kill_from = time.monotonic() + _TIDY_S
    while left := members(launcher.pid):
        now = time.monotonic()
        if now >= kill_from + _KILL_S:
            log.error("processes %s of the run cannot be killed", [process.pid for process in left])
            return
        if now >= kill_from:
            _kill(left)
        launcher.poll()
        time.sleep(_POLL_S)
    launcher.wait()


def members(session: int) -> list[psutil.Process]:
    """Living processes of a session, whoever their parent is now."""
    found = []
    for pid in psutil.pids():
        with suppress(psutil.Error, OSError):
            if os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(psutil.Process(pid))
    return found


def _exit_status(code: int, request: int | None, orphaned: bool) -> int:
    if request == signal.SIGINT:
        return 128 + signal.SIGINT
    if code < 0:
        return 128 + (request or -code)
    if code >= 256 - signal.NSIG:
        number = 256 - code  # how a launcher that exits with a rank's negative status shows the signal
        log.error("a rank was killed by signal %d%s", number, " (out of memory?)" if number == signal.SIGKILL else "")
        return 128 + number
    return code or int(orphaned)


def _follow(supervisor: int, grace_s: float) -> None:
    while _alive(supervisor):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os.killpg(0, signal.SIGKILL)  # with its helpers


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
