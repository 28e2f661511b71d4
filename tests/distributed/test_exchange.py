"""Exchange between real ranks: results and gradients are those without, and all ranks compute equally many rows."""

from pathlib import Path

import pytest
from ranks import run_ranks

from megaroute.routing.exchange import mean_rows

WORKER = Path(__file__).resolve().parents[1] / "support" / "exchange_worker.py"
# Rows of every rank, for each MLP of a stack.
COUNTS = {
    2: {
        "uneven": [[9, 3]],
        "one rank has none": [[7, 0], [0, 4]],
        "equal": [[4, 4]],
        "nobody has any": [[0, 0], [3, 2]],
    },
    3: {"uneven": [[10, 3, 5], [1, 2, 9]], "one rank has none": [[0, 11, 2]]},
    4: {"uneven": [[20, 1, 0, 7], [3, 3, 3, 4]], "one rank has all": [[0, 0, 13, 0]]},
}
# In float64 nothing but the order of sums differs; in bfloat16 it is the transport that is asked about.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 5e-2}


@pytest.mark.parametrize("world_size", COUNTS)
def test_results_and_gradients_are_those_without_exchange(world_size, tmp_path):
    cases = {
        f"{name}, {dtype}, recompute {recompute}": {"counts": counts, "dtype": dtype, "recompute": recompute}
        for name, counts in COUNTS[world_size].items()
        for dtype, recompute in (("float64", False), ("float64", True), ("float32", False), ("bfloat16", False))
    }
    results = run_ranks(WORKER, world_size, {"cases": list(cases.values())}, tmp_path, timeout_s=120)
    for rank, result in enumerate(results):
        for (name, case), found in zip(cases.items(), result, strict=True):
            for tensor, error in found["errors"].items():
                assert error <= TOLERANCE[case["dtype"]], f"{name}, rank {rank}: {tensor}"
            means = [mean_rows(counts) for counts in case["counts"]]
            again = means[::-1] if case["recompute"] else []
            assert found["rows_computed"] == means + again, f"{name}, rank {rank}"
