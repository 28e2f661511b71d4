"""Copies of a checkpoint's tensors off the device, beside what it computes."""

import threading

import pytest
import torch

from megaroute.checkpoint.staging import Staging
from megaroute.checkpoint.writer import Item, Share
from megaroute.platform import device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device.resolve().on_cpu, reason="needs an accelerator"),
]


def test_copies_have_what_was_there_when_the_save_began_and_a_later_update_does_not_reach_them():
    where = device.resolve().device
    weight, counter = torch.randn(2048, 2048, device=where), torch.zeros(8, device=where)
    expected, staging = weight.cpu(), Staging()
    items = [Item("weight", (0, 0), (2048, 2048), weight), Item("counter", (0,), (8,), counter)]
    for _ in range(2):  # the second into the buffers of the first
        copy, made = staging.copy(Share(items, {}), [weight]), []
        thread = threading.Thread(target=lambda copy=copy, made=made: made.append(copy.make()))
        thread.start()
        counter += 1  # does not last, and is copied at once
        for _ in range(20):
            weight @ weight  # the device is busy
        copy.wait()
        weight += 1
        thread.join()
        first, second = (item.data for item in made[0].items)
        assert first.is_pinned() and torch.equal(first, expected) and torch.equal(second, counter.cpu() - 1)
        expected = weight.cpu()
