"""What benchmarks share: a clock that suits the device, where a figure was measured, and how it is printed."""

import datetime
import gc
import os
import platform as host
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import megatron.core
import torch

import megaroute
from megaroute.platform.device import Platform


def milliseconds(run: Callable[[], None], platform: Platform) -> float:
    """Time of one call: of the processor on a CPU, of the device between two events elsewhere.

    With one thread processor time is the time on a clock without the turns of other processes.
    """
    if platform.on_cpu:
        began = time.process_time()
        run()
        return 1e3 * (time.process_time() - began)
    first, last = (torch.Event(platform.device, enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection, which would fall on whoever has its turn."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def medians(turns: Sequence[Sequence[float]]) -> list[float]:
    """The median of each column."""
    return [statistics.median(column) for column in zip(*turns, strict=True)]


def environment(platform: Platform) -> dict[str, Any]:
    """Where and when: what a figure needs beside it."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": cpu_name() if platform.on_cpu else platform.name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "megaroute": megaroute.__version__,
        "python": host.python_version(),
        "torch": torch.__version__,
        "megatron-core": megatron.core.__version__,
    }


def cpu_name() -> str:
    """The processor as the kernel names it, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, host.machine())


def as_table(rows: list[dict[str, Any]]) -> str:
    """Rows for people: numbers and words in columns; what is the same everywhere, and what is nested, above them."""
    flat = [key for key in rows[0] if not isinstance(rows[0][key], dict | list)]
    same = [key for key in flat if len(rows) > 1 and all(row.get(key) == rows[0][key] for row in rows)]
    columns = [key for key in flat if key not in same]
    nested = {key: value for key, value in rows[0].items() if isinstance(value, dict)}
    above = [f"{key}: {_cell(rows[0][key])}" for key in same]
    lines = [", ".join(above)] if above else []
    lines += [
        f"{key}: " + ", ".join(f"{name} {_cell(n)}" for name, n in found.items()) for key, found in nested.items()
    ]
    cells = [columns, *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines += ["", *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
    return "-" if value is None else str(value)
