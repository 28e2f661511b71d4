"""Freed memory stays with the process: counted in pages that the system has to map anew."""

import subprocess
import sys

import pytest

PROBE = """
import resource, sys
import torch
from megaroute.platform.memory import keep_freed_memory

if sys.argv[1] == "keep":
    print(keep_freed_memory())
sizes = [2**23] * 4  # of floats: blocks of 32 MiB are beyond what the C library keeps by itself
for _ in range(16):  # until each block has found its place: 2 to 5 turns, as the addresses of the process fall
    tensors = [torch.ones(size) for size in sizes]
    del tensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    tensors = [torch.ones(size) for size in sizes]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(setting: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROBE, setting], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_memory_of_the_same_sizes_comes_without_new_pages():
    kept, pages = run("keep")
    if kept != "True":
        pytest.skip("this C library has no such setting")
    (without,) = run("leave")
    assert int(pages) < 100
    assert int(without) > 10 * int(pages)
