"""Checksums of tensors that stay where they are, and who is compared with whom."""

import pytest
import torch

from megaroute.parallel.dims import ParallelDims
from megaroute.training import desync
from megaroute.training.desync import DECISIONS, SHARDED, SHARED, TIED, alike, checksum

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_every_bit_and_every_place_counts(dtype, monkeypatch):
    monkeypatch.setattr(desync, "_PIECE", 16)
    tensor = (torch.randn(5, 8, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    whole = int(checksum(tensor))
    words = tensor.view(-1).view(WORDS[tensor.element_size()])
    for place in range(tensor.numel()):
        for bit in range(1 if dtype == torch.bool else 8 * tensor.element_size()):
            flip = (torch.tensor(1, dtype=torch.int64) << bit).to(words.dtype)
            words[place] ^= flip
            assert int(checksum(tensor)) != whole, (place, bit)
            words[place] ^= flip
    assert int(checksum(tensor.clone())) == whole


def test_order_sign_of_zero_and_layout_in_memory():
    x = torch.arange(40.0).view(5, 8)
    assert checksum(x) != checksum(x.flip(0))
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(x.t().contiguous().t()) == checksum(x)
    assert checksum(torch.tensor(3.0)) != 0 and checksum(torch.empty(0)) == 0


def test_who_must_hold_the_same():
    dims = ParallelDims(tensor=2, data=2, pipeline=2)
    assert alike(dims, SHARDED) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert alike(dims, SHARED) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert alike(dims, DECISIONS) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert alike(dims, TIED) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert alike(ParallelDims(tensor=1, data=1, pipeline=3), TIED) == [[0, 2]]
