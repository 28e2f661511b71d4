import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    """What one test compiles must not use up the number of compilations that torch allows to the next."""
    from megaroute.model.flex_attention import compiled

    torch._dynamo.reset()
    compiled.cache_clear()
    yield
