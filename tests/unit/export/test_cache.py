"""The cache that grows in place holds what transformers' own holds, whatever is done to it."""

import copy

import pytest
import torch
from layers import config_of
from transformers import DynamicCache

from megaroute.export.hf.cache_megaroute import GrowingLayer, grow_in_place


def states(seed, tokens, batch=2):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, tokens, 4, generator=draw) for _ in range(2)]


def filled(layers=1, steps=(5, 1, 200, 1)):
    ours, theirs = DynamicCache(), DynamicCache()
    grow_in_place(ours)
    for number, tokens in enumerate(steps):
        for layer in range(layers):
            k, v = states(100 * number + layer, tokens)
            for cache in (ours, theirs):
                cache.update(k, v, layer)
    return ours, theirs


def assert_alike(ours, theirs):
    assert ours.get_seq_length() == theirs.get_seq_length()
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)


def test_updates_append():
    ours, theirs = filled(layers=2)
    assert all(type(layer) is GrowingLayer for layer in ours.layers)
    assert_alike(ours, theirs)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.crop(-3),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.reset(),
    ],
    ids=["reorder", "crop", "repeat", "select", "reset"],
)
def test_it_goes_on_after_a_change(change):
    ours, theirs = filled()
    for cache in (ours, theirs):
        change(cache)
    batch = theirs.layers[0].keys.shape[0] if theirs.get_seq_length() else 2
    for number, tokens in enumerate((1, 2, 1)):
        k, v = states(number, tokens, batch)
        for cache in (ours, theirs):
            cache.update(k, v, 0)
        assert_alike(ours, theirs)


def test_a_copy_and_its_original_part():
    ours, theirs = filled()
    other, expected = copy.deepcopy(ours), copy.deepcopy(theirs)
    for cache, seed in ((ours, 1), (theirs, 1), (other, 2), (expected, 2)):
        cache.update(*states(seed, 1), 0)
    assert_alike(ours, theirs)
    assert_alike(other, expected)


def test_a_step_copies_no_key_that_is_there():
    ours, _ = filled(steps=(5,))
    before = ours.layers[0].keys
    ours.update(*states(1, 1), 0)
    assert ours.layers[0].keys.data_ptr() == before.data_ptr() and before.shape[2] == 5


def test_only_a_fresh_cache_of_the_default_kind_is_changed():
    _, filled_already = filled()
    grow_in_place(filled_already)
    assert type(filled_already.layers[0]) is not GrowingLayer
    grow_in_place(None)


def test_generate_uses_it(twins):
    model = twins(config_of(num_layers=3, first_dense=1, init_logit_std=2.0)).served
    ids = torch.randint(2, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=1, eos_token_id=None, **options)
    cache = out.cache if hasattr(out, "cache") else out.past_key_values
    assert [type(layer) for layer in cache.layers] == [GrowingLayer] * 3
