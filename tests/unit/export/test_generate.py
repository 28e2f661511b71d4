"""transformers' own `generate` on an exported model: whatever the batch, each text is continued as if alone."""

import pytest
import torch
from layers import config_of

LENGTHS = (18, 7, 12)
NEW = 8


@pytest.fixture
def model(twins):
    return twins(config_of(num_layers=3, first_dense=1, init_logit_std=2.0)).served


@pytest.fixture
def texts():
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(2, 64, (1, length), generator=draw) for length in LENGTHS]


def batch_of(texts):
    """Texts padded on the left, and their mask."""
    longest = max(LENGTHS)
    ids = [torch.nn.functional.pad(text, (longest - text.shape[1], 0), value=1) for text in texts]
    mask = [torch.arange(longest)[None] >= longest - text.shape[1] for text in texts]
    return torch.cat(ids), torch.cat(mask).long()


def continuation(model, ids, mask=None, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1, "eos_token_id": None, **options}
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()


@torch.no_grad()
def argmax_of_full_passes(model, text):
    ids = text
    for _ in range(NEW):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)), 1)
    return ids[0, text.shape[1] :].tolist()


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 5}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["plain", "chunked prefill", "static cache", "no cache"],
)
def test_greedy_is_the_argmax_of_full_passes(model, texts, options):
    expected = [argmax_of_full_passes(model, text) for text in texts]
    assert continuation(model, *batch_of(texts), **options) == expected


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "length_penalty": 0.5}])
def test_beams_of_a_batch_are_those_of_each_text(model, texts, options):
    alone = [continuation(model, text, torch.ones_like(text), **options)[0] for text in texts]
    assert continuation(model, *batch_of(texts), **options) == alone


def test_sampling_draws_from_the_model(model, texts):
    text = texts[0]
    with torch.no_grad():
        shares = model(text).logits[0, -1].div(0.5).softmax(-1)
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 0.5, "top_k": 0, "max_new_tokens": 1, "num_return_sequences": 3000}
    drawn = torch.tensor(continuation(model, text, torch.ones_like(text), **options))[:, 0]
    # Standard error of a share of 3000 draws is at most 0.01.
    torch.testing.assert_close(torch.bincount(drawn, minlength=64) / 3000, shares, atol=0.05, rtol=0)
