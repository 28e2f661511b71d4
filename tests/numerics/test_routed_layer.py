"""The routed layer against plainer truths: masked dispatch, Megatron-core's own dense layer, the identity."""

from typing import Any

import pytest
import torch
from torch import Tensor

SEQ, BATCH = 48, 3
SHAPES = {
    "multi-head": {"num_attention_heads": 4},
    "grouped-query": {"num_attention_heads": 4, "num_kv_heads": 2},
    "paper-like": {"num_attention_heads": 2, "head_dim": 64, "ffn_hidden_size": 512, "activation": "geglu"},
    "plain gelu": {"num_attention_heads": 4, "activation": "gelu"},
    "biases": {"num_attention_heads": 4, "num_kv_heads": 2, "qkv_bias": True},
    "normed heads": {"num_attention_heads": 4, "num_kv_heads": 2, "qk_norm": True},
}


def config_of(shape: dict[str, Any], **routing: Any) -> Any:
    from megaroute.config.root import Config

    model = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 96, "vocab_size": 64} | shape
    return Config.model_validate(
        {
            "run": {"name": "layer", "device": "cpu"},
            "model": model,
            "routing": routing,
            "data": {"train": "none", "tokenizer": "none", "sequence_length": SEQ},
            "train": {"steps": 1, "global_batch": BATCH, "micro_batch": BATCH},
        }
    )


def layer_of(shape: dict[str, Any], **routing: Any) -> torch.nn.Module:
    """The only layer of a one-layer model with weights that depend on the seed alone."""
    from megaroute.model.build import build_chunks
    from megaroute.parallel.dims import ParallelDims
    from megaroute.platform import device

    (model,) = build_chunks(config_of(shape, **routing), ParallelDims(1, 1, 1), 0, device.resolve("cpu"))
    return model.decoder.layers[0]


def angles(layer: torch.nn.Module) -> Tensor:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    width = layer.config.kv_channels
    return RotaryEmbedding(kv_channels=width, rotary_percent=1.0, use_cpu_initialization=True)(SEQ)


def run(layer: torch.nn.Module, x: Tensor, replay: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Output, gradients of the input and of every weight under a fixed upstream gradient, and the routing context."""
    from megaroute.model.microbatch import micro_batch
    from megaroute.routing.context import RoutingContext

    routing = RoutingContext(seed=5, step=7, samples_B=torch.arange(BATCH), budget_scale=1.0)
    if replay is not None:
        routing.replay = {0: replay}
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y, _ = layer(x, None, rotary_pos_emb=angles(layer), packed_seq_params=micro_batch(SEQ, routing))
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y)
    (y * upstream).sum().backward()
    grads = {name: param.grad.clone() for name, param in layer.named_parameters()}
    assert x.grad is not None
    return y.detach(), {"input": x.grad, **grads}, routing


@pytest.fixture
def x() -> Tensor:
    return torch.randn(SEQ, BATCH, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("training", [True, False], ids=["noisy", "greedy"])
def test_exact_equals_masked_in_output_and_every_gradient(shape, training, x):
    results = []
    for mode in ("exact", "masked"):
        layer = layer_of(shape, dispatch={"mode": mode}, budget={"weight": 0.5})
        results.append(run(layer.train(training), x))
    (y, grads, routing), (y_masked, grads_masked, routing_masked) = results
    keep = routing.records[0].keep_SB
    assert 0.2 < keep.float().mean() < 0.8
    assert torch.equal(keep, routing_masked.records[0].keep_SB)
    assert torch.allclose(y, y_masked, atol=2e-6)
    assert grads.keys() == grads_masked.keys()
    for name in grads:
        scale = grads_masked[name].abs().max()
        assert scale > 0, f"{name} gets no gradient: the comparison would say nothing"
        assert torch.allclose(grads[name], grads_masked[name], atol=2e-6 * max(float(scale), 1.0)), name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_keep_all_equals_the_dense_layer_of_megatron_core(shape, x):
    routed = layer_of(shape, force="keep_all")
    dense = layer_of(shape, router="dense")
    copy_weights(routed, dense)
    y, grads, _ = run(routed, x)
    y_dense, grads_dense, _ = run(dense, x)
    assert torch.allclose(y, y_dense, atol=2e-6)
    assert torch.allclose(grads["input"], grads_dense["input"], atol=1e-5)
    for name in ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "self_attention.linear_proj.weight"):
        assert torch.allclose(grads[name], grads_dense[name], atol=1e-4), name
    assert torch.equal(grads["units.layer.router.weight"], torch.zeros_like(grads["units.layer.router.weight"]))


def copy_weights(routed: torch.nn.Module, dense: torch.nn.Module) -> None:
    """Routed layer -> dense layer; Megatron-core interleaves Q, K and V by key-value head in one matrix."""
    state = routed.state_dict()
    width, groups = routed.config.kv_channels, routed.config.num_query_groups
    q = state["self_attention.linear_q.weight"].view(groups, -1, 64)
    k, v = state["self_attention.linear_kv.weight"].view(groups, 2 * width, 64).split(width, 1)
    fused = torch.cat((q, k, v), 1).flatten(0, 1)
    shared = {name: value for name, value in state.items() if name in dense.state_dict() and value is not None}
    dense.load_state_dict({**shared, "self_attention.linear_qkv.weight": fused}, strict=False)


@pytest.mark.parametrize("mode", ["exact", "masked"])
def test_keep_none_is_the_identity_bit_for_bit_and_every_weight_has_a_gradient(mode, x):
    layer = layer_of(SHAPES["grouped-query"], force="keep_none", dispatch={"mode": mode})
    y, grads, _ = run(layer, x)
    assert torch.equal(y, x)
    for name, grad in grads.items():
        if name != "input":
            assert torch.equal(grad, torch.zeros_like(grad)), name
    assert torch.equal(grads["input"], torch.linspace(-1, 1, x.numel()).view_as(x))


def test_skipped_tokens_pass_untouched_and_are_attended_to(x):
    layer = layer_of(SHAPES["grouped-query"])
    keep = torch.zeros(SEQ, BATCH, dtype=torch.bool)
    keep[-1] = True
    y, _, _ = run(layer, x, replay=keep)
    assert torch.equal(y[:-1], x[:-1])
    changed = x.clone()
    changed[0] += 1.0  # skipped, but its key and value count
    y_changed, _, _ = run(layer, changed, replay=keep)
    assert (y_changed[-1] - y[-1]).abs().max() > 1e-4


def test_decisions_and_outputs_are_causal(x):
    layer = layer_of(SHAPES["multi-head"])
    y, _, routing = run(layer, x)
    changed = x.clone()
    changed[SEQ // 2 :] += 1.0
    y_changed, _, routing_changed = run(layer, changed)
    half = slice(0, SEQ // 2)
    assert torch.equal(routing.records[0].keep_SB[half], routing_changed.records[0].keep_SB[half])
    assert torch.allclose(y[half], y_changed[half], atol=1e-6)


def test_each_sample_is_computed_as_if_it_were_alone(x):
    layer = layer_of(SHAPES["grouped-query"])
    keep = torch.rand(SEQ, BATCH, generator=torch.Generator().manual_seed(1)) < 0.4
    keep[:, 1] = False
    together, _, _ = run(layer, x, replay=keep)
    for sample in range(BATCH):
        mine = slice(sample, sample + 1)
        repeated = x[:, mine].expand(-1, BATCH, -1).contiguous()
        alone, _, _ = run(layer, repeated, replay=keep[:, mine].expand(-1, BATCH).contiguous())
        assert torch.allclose(alone[:, mine], together[:, mine], atol=2e-6)


def test_replay_repeats_a_recorded_plan(x):
    layer = layer_of(SHAPES["multi-head"])
    y, _, routing = run(layer, x)
    again, _, _ = run(layer, x, replay=routing.records[0].keep_SB)
    assert torch.equal(y, again)


def test_executed_rows_are_those_of_the_decisions(x):
    layer = layer_of(SHAPES["multi-head"])
    _, _, routing = run(layer, x)
    record = routing.records[0]
    assert record.rows == int(record.keep_SB.sum())


def test_router_learns_from_executed_tokens_only(x):
    layer = layer_of(SHAPES["multi-head"], budget={"weight": 0.0})
    none = torch.zeros(SEQ, BATCH, dtype=torch.bool)
    _, grads, _ = run(layer, x, replay=none)
    assert torch.equal(grads["units.layer.router.weight"], torch.zeros_like(grads["units.layer.router.weight"]))
    _, grads, _ = run(layer, x)
    assert grads["units.layer.router.weight"].abs().max() > 0
