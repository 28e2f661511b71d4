"""A key-value cache that grows in place.  transformers' own copies all keys and values in every step."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

SPARE = 64
"""Tokens for which there is room beyond those cached, at least; an eighth of them where that is more."""


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer at the front of larger tensors: a step writes its own and leaves the others.

    What transformers does to `keys` and `values` themselves, such as reordering beams, costs a copy at the next update.
    """

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[B, G, T, D] new keys and values -> [B, G, L, D], all of them, views of what the next update extends."""
        if torch.is_grad_enabled() and key_states.requires_grad:  # a backward pass wants what would be written over
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = extended(self.keys, key_states)
        self.values = extended(self.values, value_states)
        return self.keys, self.values


def extended(seen: Tensor, new: Tensor) -> Tensor:
    """`seen` [B, G, L, D], or empty, and behind it `new` [B, G, T, D]; in place where `seen` has room behind it."""
    past = seen.shape[-2] if seen.numel() else 0
    length = past + new.shape[-2]
    buffer = seen._base if seen._base is not None else seen
    fits = buffer.dim() == 4 and buffer.shape[-2] >= length and past > 0
    if not fits or buffer.shape[:2] != seen.shape[:2] or buffer.data_ptr() != seen.data_ptr():
        buffer = new.new_empty(*new.shape[:2], length + max(SPARE, length // 8), new.shape[-1])
        if past:
            buffer[:, :, :past] = seen
    buffer[:, :, past:length] = new
    return buffer[:, :, :length]


def grow_in_place(cache: Any) -> None:
    """Give a cache of transformers' default kind, still empty, layers that grow in place; leave any other alone."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return
    if all(type(layer) is DynamicLayer and not layer.is_initialized for layer in cache.layers):
        cache.layers = [GrowingLayer() for _ in cache.layers]
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = GrowingLayer
