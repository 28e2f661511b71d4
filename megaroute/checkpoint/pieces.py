"""Optimizer state for saving: what this rank holds of it, as rectangles of the weights it belongs to.

ZeRO gives every replica a slice of the flattened gradient buffer, which cuts weights anywhere.  Such a slice of a
matrix is at most three rectangles: the rest of a row, whole rows, the start of a row.  Each rank can then write what it
holds, and any layout can load it.  (Megatron-core's own way to a layout-free checkpoint first gathers the whole state
on every replica, and copies it several times.)
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer

SHARDING = "fully_reshardable"
"""Megatron-core's name for optimizer state in the shape of the weights; its loader for it reads ours."""
_STATES = ("param", "exp_avg", "exp_avg_sq")


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, size) of rectangles that cover elements `start` to `stop` of a flattened tensor, in their order."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        yield (first, *zeros), (last - first, *shape[1:])
    yield from _in_row(shape, last, last * row, stop)


def _in_row(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    begin = row * math.prod(shape[1:])
    for offset, size in rectangles(shape[1:], start - begin, stop - begin):
        yield (row, *offset), (1, *size)


def optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any]) -> Any:
    """The optimizer's state dict for saving, in the form that its `load_state_dict` takes after loading.

    `model` is the sharded state dict of the weights, of all chunks.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    weights = {id(value.data): value for value in leaves(model)}
    if len(parts) > 1:
        optimizer._synchronize_steps()
    states = {index: _state_of(part, weights) for index, part in enumerate(parts)}
    return states[0] if len(parts) == 1 else states


def leaves(value: Any) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    """Sharded tensors of a state dict, however deep."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, ShardedTensor | ShardedTensorFactory):
        yield value


def _state_of(part: Any, weights: dict[int, Any]) -> dict[str, Any]:
    found: list[ShardedTensor] = []
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    held = part._get_main_param_and_optimizer_states(parameter)
                    for whole in _built(weights[id(parameter)]):
                        found += _pieces(whole, parameter, held, ranges["param"].start, ranges["param"].end)
    return {**part.state_dict(), "param_state": found, "param_state_sharding_type": SHARDING}


def _built(weight: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """A gated MLP keeps two matrices in one weight; a checkpoint keeps them apart."""
    return [weight] if isinstance(weight, ShardedTensor) else list(leaves(weight.build()))


def _pieces(
    whole: ShardedTensor, parameter: torch.Tensor, held: dict[str, torch.Tensor], start: int, stop: int
) -> Iterator[ShardedTensor]:
    """Of `whole`, a contiguous part of `parameter`, what lies within elements `start` to `stop` that are `held`."""
    assert whole.data is not None and whole.data.is_contiguous() and whole.prepend_axis_num == 0
    begin = whole.data.storage_offset() - parameter.storage_offset()
    low, high = max(start, begin), min(stop, begin + whole.data.numel())
    at = low - start
    for offset, size in rectangles(tuple(whole.local_shape), low - begin, high - begin):
        count = math.prod(size)
        for name in _STATES:
            yield replace(
                whole,
                key=f"optimizer.state.{name}.{whole.key}",
                data=held[name].detach().view(-1)[at : at + count].view(size),
                dtype=held[name].dtype,
                local_shape=size,
                global_offset=tuple(a + b for a, b in zip(whole.global_offset, offset, strict=True)),
                axis_fragmentations=None,
                replica_id=_sole_replica(whole.replica_id),
            )
        at += count


def _sole_replica(replica: Any) -> Any:
    """Among tensor ranks and stages the weight's, among data-parallel ranks the only one: no other holds this slice."""
    return (*replica[:-1], 0) if isinstance(replica, tuple) else 0
