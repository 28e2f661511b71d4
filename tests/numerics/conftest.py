import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))


@pytest.fixture(autouse=True)
def _one_process(one_process: None) -> None:
    """Every test here builds layers, which need Megatron-core's groups."""
    from megaroute.parallel import groups
    from megaroute.parallel.dims import ParallelDims

    groups.bring_up(ParallelDims(1, 1, 1), seed=1)
