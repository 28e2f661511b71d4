import os
import signal
import subprocess
import sys
import time

import pytest

from megaroute.training.signals import STOP_SIGNALS, StopRequest


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_sets_the_request_and_does_nothing_else(number):
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        wait_for(lambda: stop.requested)


def test_a_signal_that_is_still_waiting_at_the_end_is_not_deadly():
    script = """
import os, signal, time
from megaroute.training.signals import StopRequest
for _ in range(300):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        while not stop.requested:
            pass
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_handlers_and_mask_return_also_after_an_error():
    def now():
        return [signal.getsignal(number) for number in STOP_SIGNALS], signal.pthread_sigmask(signal.SIG_BLOCK, ())

    before = now()
    with pytest.raises(RuntimeError), StopRequest():
        assert now() != before
        raise RuntimeError
    assert now() == before


def test_another_run_starts_without_the_request_of_the_one_before():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: stop.requested)
    with StopRequest() as stop:
        assert not stop.requested


def test_a_process_that_starts_meanwhile_survives_a_warning_to_the_whole_group():
    code = "import time; print('ready', flush=True); time.sleep(60)"  # knows nothing of signals, as other libraries'
    with StopRequest() as stop:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        for pid in (child.pid, os.getpid()):
            os.kill(pid, signal.SIGUSR1)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
        child.terminate()
        child.communicate()
        assert child.returncode == -signal.SIGTERM, "what asks it to end still does"
        wait_for(lambda: stop.requested)


def test_at_the_end_of_the_process_signals_do_not_change_its_exit_code():
    script = """
import atexit, os, signal, sys
from megaroute.training.signals import STOP_SIGNALS, StopRequest
stop = StopRequest(joined=False)
stop.listen()
for number in STOP_SIGNALS:
    atexit.register(os.kill, os.getpid(), number)
stop.ignore()
sys.exit(75)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 75


@pytest.mark.parametrize("number, code", [(signal.SIGUSR1, 7), (signal.SIGTERM, 75), (signal.SIGINT, 75)])
def test_before_the_ranks_have_met_a_signal_that_ends_does_so_and_the_warning_is_kept(number, code):
    script = f"""
import os, sys, time
from megaroute.training.signals import StopRequest
stop = StopRequest(joined=False)
stop.listen()
os.kill(os.getpid(), {int(number)})
deadline = time.monotonic() + 20
while not stop.requested and time.monotonic() < deadline:
    time.sleep(0.01)
sys.exit(7 if stop.requested else 1)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == code
