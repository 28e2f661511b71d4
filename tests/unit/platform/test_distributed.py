import threading
import time

import pytest

from megaroute.platform import distributed


def write_thread(tasks, thread_id: int, name: str, state: str):
    folder = tasks / str(thread_id)
    folder.mkdir(exist_ok=True)
    (folder / "stat.new").write_text(f"{thread_id} ({name}) {state} 1 1 1 0 -1\n")
    (folder / "stat.new").rename(folder / "stat")


def test_a_process_waits_for_gloo_threads_that_still_run(tmp_path):
    write_thread(tmp_path, 7, "pt_gloo_runloop", "R")
    write_thread(tmp_path, 8, "pt_gloo_runloop", "S")
    rests = threading.Timer(0.2, write_thread, (tmp_path, 7, "pt_gloo_runloop", "S"))
    start = time.monotonic()
    rests.start()
    distributed.let_go(tmp_path, timeout_s=20)
    assert 0.15 < time.monotonic() - start < 10
    rests.join()


@pytest.mark.parametrize("name", ["python (R) R", "gloo_tcp_loop"])
def test_other_threads_may_run_on(name, tmp_path):
    write_thread(tmp_path, 7, name, "R")
    start = time.monotonic()
    distributed.let_go(tmp_path, timeout_s=20)
    assert time.monotonic() - start < 10


def test_a_gloo_thread_that_never_rests_does_not_hold_the_process(tmp_path):
    write_thread(tmp_path, 7, "pt_gloo_runloop", "R")
    start = time.monotonic()
    distributed.let_go(tmp_path, timeout_s=0.1)
    assert 0.1 <= time.monotonic() - start < 10
