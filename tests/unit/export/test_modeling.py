"""The model that is served computes what the trained one does, in any way that a text can be fed to it."""

import pytest
import torch
from layers import config_of

from megaroute.export.architecture import check_exportable

BATCH, LENGTH = 3, 20
ROUTED = {"first_dense": 1, "init_logit_std": 2.0}
CASES = {
    "layer": ({}, ROUTED),
    "attention": ({}, {**ROUTED, "unit": "attention"}),
    "mlp": ({}, {**ROUTED, "unit": "mlp"}),
    "separate": ({}, {**ROUTED, "unit": "separate"}),
    "every second, last dense": ({"activation": "geglu"}, {"every": 2, "last_dense": 1, "init_logit_std": 2.0}),
    "probability": ({"num_kv_heads": 4}, {**ROUTED, "gate": "probability", "temperature": 0.7}),
    "one key-value head, tied": ({"num_kv_heads": 1, "tie_embeddings": True, "head_dim": 8}, ROUTED),
    "biases and normed heads": ({"qkv_bias": True, "qk_norm": True}, ROUTED),
    "gelu": ({"activation": "gelu", "rope_base": 500, "norm_eps": 1e-3}, ROUTED),
    "dense": ({}, {"router": "dense"}),
    "early_exit": ({}, {**ROUTED, "router": "early_exit"}),
    "mod": ({}, {**ROUTED, "router": "mod", "unit": "separate"}),
    "highway": ({}, {**ROUTED, "router": "highway"}),
    "random": ({}, {**ROUTED, "router": "random", "densities": (0.7, 0.3)}),
    "random_ltd": ({}, {**ROUTED, "router": "random_ltd"}),
    "within documents": ({}, ROUTED),
}


@pytest.fixture(params=CASES)
def pair(request, twins):
    model, routing = CASES[request.param]
    config = config_of(model, num_layers=3, **routing)
    if request.param == "within documents":
        data = config.data.model_copy(update={"attend_across_documents": False})
        config = config.model_copy(update={"data": data})
    check_exportable(config)
    return twins(config)


@pytest.fixture
def ids():
    drawn = torch.randint(2, 64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    drawn[0, 0] = drawn[1, 7] = drawn[2, 12] = drawn[2, 13] = 1  # ends of documents
    return drawn


def assert_same(out, logits, executed):
    torch.testing.assert_close(out.logits, logits, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(out.executed, executed, strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def in_parts(model, ids, lengths):
    """Outputs of the cached forward passes over parts of `ids`, put together."""
    cache, logits, executed = None, [], []
    for part in ids.split(lengths, 1):
        out = model(part, cache=cache)
        cache = out.cache
        logits.append(out.logits)
        executed.append(torch.stack(out.executed) if out.executed else torch.zeros(0, *part.shape, dtype=torch.bool))
    return torch.cat(logits, 1), list(torch.cat(executed, 2))


def test_serves_what_was_trained(pair, ids):
    logits, executed = pair.read(ids)
    with torch.no_grad():
        out = pair.served(ids)
    if pair.config.routing.router == "random_ltd":
        executed = []  # it executes every token, and has no routers left
    assert_same(out, logits, executed)


@pytest.mark.parametrize("lengths", [[1] * LENGTH, [8, 1, 6, 5]], ids=["token by token", "chunks"])
def test_cached_passes_are_the_full_one(pair, ids, lengths):
    with torch.no_grad():
        full = pair.served(ids)
    logits, executed = in_parts(pair.served, ids, lengths)
    torch.testing.assert_close(logits, full.logits, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(executed, full.executed, strict=True))


def test_padding_on_the_left_changes_nothing(pair, ids):
    lengths = [LENGTH, 9, 14]
    mask = torch.arange(LENGTH) >= LENGTH - torch.tensor(lengths)[:, None]
    padded = torch.ones_like(ids)
    padded[mask] = torch.cat([row[:length] for row, length in zip(ids, lengths, strict=True)])
    with torch.no_grad():
        out = pair.served(padded, attention_mask=mask.long())
        steps = pair.served(padded[:, :16], attention_mask=mask[:, :16].long())
        last = pair.served(padded[:, 16:], attention_mask=mask.long(), cache=steps.cache)
        for row, length in enumerate(lengths):
            alone = pair.served(ids[row : row + 1, :length])
            torch.testing.assert_close(out.logits[row, -length:], alone.logits[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(last.logits[row], alone.logits[0, -4:], rtol=1e-5, atol=1e-5)
            for ours, theirs in zip(out.executed, alone.executed, strict=True):
                assert torch.equal(ours[row, -length:], theirs[0])
                assert not ours[row, :-length].any()


def test_skipped_tokens_cost_no_query_and_no_mlp(twins, ids):
    served = twins(config_of(num_layers=3, **ROUTED)).served
    rows = {}
    for name, module in served.named_modules():
        if name.endswith(("q_proj", "k_proj", "down_proj")):
            module.register_forward_hook(
                lambda _, args, out, name=name: rows.__setitem__(name, out.numel() // out.shape[-1])
            )
    with torch.no_grad():
        executed = served(ids).executed
    for layer, kept in zip((1, 2), executed, strict=True):
        count = int(kept.sum())
        assert 0 < count < ids.numel()
        assert rows[f"model.layers.{layer}.self_attn.q_proj"] == rows[f"model.layers.{layer}.mlp.down_proj"] == count
        assert rows[f"model.layers.{layer}.self_attn.k_proj"] == ids.numel()


def test_loss_is_that_of_the_next_token(twins, ids):
    served = twins(config_of(num_layers=2, **ROUTED)).served
    with torch.no_grad():
        out = served(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
