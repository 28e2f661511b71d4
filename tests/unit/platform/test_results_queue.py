import subprocess
import sys
import time

import psutil
import pytest
import torch

SCRIPT = """
import time
from megaroute.platform import megatron_cpu
megatron_cpu.install()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the port does nothing where CUDA is available")
def test_the_checkpoint_writers_manager_dies_with_its_rank():
    rank = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    try:
        assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
        (manager,) = psutil.Process(rank.pid).children()
    finally:
        rank.kill()
        rank.wait()
    deadline = time.monotonic() + 10
    while manager.is_running() and manager.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not manager.is_running() or manager.status() == psutil.STATUS_ZOMBIE
