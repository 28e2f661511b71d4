import os
import signal

import pytest

from megaroute.training.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_sets_the_request_and_does_nothing_else(number):
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.requested


def test_handlers_return_also_after_an_error():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(RuntimeError), StopRequest():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_another_run_starts_without_the_request_of_the_one_before():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
