"""Slices of flattened tensors as rectangles, and what Megatron-core's own gathering says they hold."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaroute.checkpoint.pieces import leaves, optimizer_state, rectangles
from megaroute.checkpoint.state import _metadata, _model_state
from megaroute.checkpoint.writer import plan


@given(st.lists(st.integers(1, 5), max_size=4).map(tuple), st.data())
def test_rectangles_cover_a_slice_in_its_order(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    numbers = torch.arange(numel).view(shape)
    found = []
    for offset, size in rectangles(shape, start, stop):
        assert len(offset) == len(size) == len(shape)
        part = numbers
        for axis, (begin, length) in enumerate(zip(offset, size, strict=True)):
            part = part.narrow(axis, begin, length)
        found += part.flatten().tolist()
    assert found == list(range(start, stop))


@pytest.mark.parametrize(
    "start, stop, expected",
    [
        (0, 12, [((0, 0), (3, 4))]),
        (4, 8, [((1, 0), (1, 4))]),
        (5, 7, [((1, 1), (1, 2))]),
        (2, 11, [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 3))]),
        (2, 6, [((0, 2), (1, 2)), ((1, 0), (1, 2))]),
        (7, 7, []),
    ],
)
def test_a_slice_of_a_matrix_is_at_most_three_rectangles(start, stop, expected):
    assert list(rectangles((3, 4), start, stop)) == expected


@pytest.mark.parametrize("mlp", ["model.activation=gelu", "model.activation=swiglu"])
def test_state_is_what_megatron_core_gathers(start, advance, tiny, mlp):
    parts = start(tiny(mlp))
    advance(parts, 2)
    model = _model_state(parts.chunks, parts.groups.data_group)
    metadata = _metadata(parts.groups.data_group)
    gathered = {"optimizer": parts.optimizer.sharded_state_dict(dict(model), metadata=metadata)}
    theirs = {(item.key, item.offset): item.data for item in plan(gathered).items}
    ours: dict[tuple, torch.Tensor] = {}
    state = optimizer_state(parts.optimizer, model)
    for piece in leaves(state["param_state"]):
        # In one process every slice is a whole matrix, or one of the two of a gated MLP.
        assert ours.setdefault((piece.key, tuple(piece.global_offset)), piece.data) is piece.data
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[place], theirs[place]) for place in ours)
    assert any(value.abs().sum() > 0 for (key, _), value in ours.items() if "exp_avg" in key)
