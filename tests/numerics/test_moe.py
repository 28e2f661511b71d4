"""The layer of experts against plainer truths: Megatron-core's dense layer, and a loop over tokens."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

SEQ, BATCH, HIDDEN = 24, 3, 64
ACTIVATIONS = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu}


def layer_of(activation: str = "swiglu", recompute: str = "none", router: str = "moe", **moe: Any) -> torch.nn.Module:
    """The only layer of a one-layer model with weights that depend on the seed alone."""
    from megaroute.config.root import Config
    from megaroute.model.build import build_chunks
    from megaroute.parallel.dims import ParallelDims
    from megaroute.platform import device

    model = {"num_layers": 1, "hidden_size": HIDDEN, "ffn_hidden_size": 96, "vocab_size": 64}
    config = Config.model_validate(
        {
            "run": {"name": "layer", "device": "cpu"},
            "model": {**model, "num_attention_heads": 4, "num_kv_heads": 2, "activation": activation},
            "routing": {"router": router, "unit": "mlp", "moe": moe},
            "data": {"train": "none", "tokenizer": "none", "sequence_length": SEQ},
            "train": {"steps": 1, "global_batch": BATCH, "micro_batch": BATCH, "recompute": recompute},
        }
    )
    (chunk,) = build_chunks(config, ParallelDims(1, 1, 1), 0, device.resolve("cpu"))
    return chunk.decoder.layers[0]


def input_of(seed: int = 3) -> Tensor:
    return torch.randn(SEQ, BATCH, HIDDEN, generator=torch.Generator().manual_seed(seed))


def run(layer: torch.nn.Module, x: Tensor, batch: int = BATCH) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Output, gradients of the input and of every weight under a fixed upstream gradient, and the records."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megaroute.model.microbatch import micro_batch
    from megaroute.routing.context import RoutingContext

    width = layer.config.kv_channels
    angles = RotaryEmbedding(kv_channels=width, rotary_percent=1.0, use_cpu_initialization=True)(SEQ)
    routing = RoutingContext(samples_B=torch.arange(batch), budget_scale=1.0)
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y, _ = layer(x, None, rotary_pos_emb=angles, packed_seq_params=micro_batch(SEQ, routing))
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert x.grad is not None
    return y.detach(), {"input": x.grad, **weight_gradients(layer)}, routing.records


def weight_gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    gradients = {name: weight.grad for name, weight in module.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, f"without a gradient: {missing}"
    return {name: gradient.clone() for name, gradient in gradients.items()}


def reference(mlp: torch.nn.Module, h_SBH: Tensor, activation: str, balance_scale: float) -> tuple[Tensor, Tensor, int]:
    """Output, balance loss and choices without room of `mlp`, token by token.

    Every choice and limit is made anew, in Python, from the probabilities.
    """
    moe, act = mlp.moe, ACTIVATIONS[activation]
    p_SBE = (h_SBH @ mlp.router.weight.T).softmax(-1)
    value = p_SBE.tolist()
    chosen = {
        (s, b): sorted(range(moe.experts), key=lambda e: -value[s][b][e])[: moe.top_k]
        for s in range(h_SBH.shape[0])
        for b in range(h_SBH.shape[1])
    }
    room = min(math.ceil(moe.capacity_factor * moe.top_k * h_SBH.shape[0] / moe.experts), h_SBH.shape[0])
    kept = set()
    for b in range(h_SBH.shape[1]):
        for e in range(moe.experts):
            wanting = [s for s in range(h_SBH.shape[0]) if e in chosen[s, b]]
            kept |= {(s, b, e) for s in sorted(wanting, key=lambda s: -value[s][b][e])[:room]}
    out = [[torch.zeros(HIDDEN) for _ in range(h_SBH.shape[1])] for _ in range(h_SBH.shape[0])]
    for s, b, e in kept:
        total = sum(p_SBE[s, b, other] for other in chosen[s, b]) if moe.top_k > 1 else 1.0
        one, two = (getattr(mlp.experts[e], name).weight for name in ("linear_fc1", "linear_fc2"))
        inner = one @ h_SBH[s, b]
        if activation == "gelu":
            inner = act(inner)
        else:
            left, right = inner.chunk(2)
            inner = act(left) * right
        out[s][b] = out[s][b] + p_SBE[s, b, e] / total * (two @ inner)
    overflow = moe.top_k * len(chosen) - len(kept)
    balance = balance_scale * moe.balance_weight * imbalance(mlp, p_SBE, chosen)
    return torch.stack([torch.stack(row) for row in out]), balance, overflow


def imbalance(mlp: torch.nn.Module, p_SBE: Tensor, chosen: dict[tuple[int, int], list[int]]) -> Tensor:
    """E * sum over experts of share * mean probability: with the remembered shares, or sample by sample."""
    experts, (seq, batch, _) = mlp.moe.experts, p_SBE.shape
    if mlp.moe.balance_estimator == "global":
        return experts * (mlp.router.state.share_E * p_SBE.mean((0, 1))).sum()
    total = torch.zeros(())
    for b in range(batch):
        for e in range(experts):
            share = sum(e in chosen[s, b] for s in range(seq)) / (seq * mlp.moe.top_k)
            total = total + share * p_SBE[:, b, e].mean()
    return experts * total / batch


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("capacity_factor", "estimator"), [(0.7, "sample"), (4.0, "global")])
def test_output_and_every_gradient_equal_a_loop_over_tokens(activation, top_k, capacity_factor, estimator):
    from megaroute.routing.context import RoutingContext

    moe = {"capacity_factor": capacity_factor, "balance_estimator": estimator, "balance_weight": 0.3}
    mlp = layer_of(activation, top_k=top_k, **moe).mlp
    mlp.router.update(torch.tensor([5, 3, 1, 1]))
    h, upstream = input_of(), input_of(seed=4)
    mine, theirs = h.clone().requires_grad_(), h.clone().requires_grad_()

    context = RoutingContext(budget_scale=8.0)
    out = mlp(mine, context, key=1)
    (out * upstream).sum().backward()
    gradients = weight_gradients(mlp)

    mlp.zero_grad(set_to_none=True)
    expected, balance, overflow = reference(mlp, theirs, activation, balance_scale=8.0)
    ((expected * upstream).sum() + balance).backward()

    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    for name, gradient in weight_gradients(mlp).items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    record = context.records[1]
    assert int(record.overflow) == overflow
    assert record.rows == top_k * SEQ * BATCH - overflow
    assert int(record.counts_E.sum()) == top_k * SEQ * BATCH
    assert (overflow > 0) == (capacity_factor < 1), "the case does not test what it says"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_expert_is_the_dense_layer_of_megatron_core(activation):
    experts = layer_of(activation, experts=1)
    dense = layer_of(activation, router="dense")
    state = {name.replace("mlp.experts.0.", "mlp."): value for name, value in experts.state_dict().items()}
    del state["mlp.router.weight"], state["mlp.router.state.share_E"]
    dense.load_state_dict(state)
    x = input_of()
    y, gradients, records = run(experts, x)
    y_dense, gradients_dense, _ = run(dense, x)
    torch.testing.assert_close(y, y_dense, atol=1e-6, rtol=0)
    assert torch.equal(gradients.pop("mlp.router.weight"), torch.zeros(1, HIDDEN))
    for name, expected in gradients_dense.items():
        found = gradients[name.replace("mlp.", "mlp.experts.0.")]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert records[1].rows == SEQ * BATCH


@pytest.mark.parametrize("top_k", [1, 2])
def test_an_expert_that_nobody_chooses_has_a_gradient_of_zero(top_k):
    layer = layer_of(experts=3, top_k=top_k, capacity_factor=3.0, balance_weight=0.0)
    with torch.no_grad():
        layer.mlp.router.weight.zero_()  # all alike: the first experts win every tie
    _, gradients, records = run(layer, input_of())
    assert records[1].counts_E.tolist() == [SEQ * BATCH] * top_k + [0] * (3 - top_k)
    for name in ("linear_fc1", "linear_fc2"):
        assert gradients[f"mlp.experts.0.{name}.weight"].abs().max() > 0
        assert torch.equal(
            gradients[f"mlp.experts.2.{name}.weight"], torch.zeros_like(gradients[f"mlp.experts.2.{name}.weight"])
        )


def test_a_token_without_room_gets_nothing_from_the_experts():
    from megaroute.routing.context import RoutingContext

    mlp = layer_of(capacity_factor=0.5).mlp
    context = RoutingContext()
    out = mlp(input_of(), context, key=1)
    record = context.records[1]
    assert torch.equal(out[~record.keep_SB], torch.zeros_like(out[~record.keep_SB]))
    assert (out[record.keep_SB].abs().amax(-1) > 0).all()
    assert int((~record.keep_SB).sum()) == int(record.overflow) > 0


def test_each_sample_is_computed_as_if_it_were_alone():
    layer, x = layer_of(capacity_factor=0.8), input_of()
    together, _, _ = run(layer, x)
    for b in range(BATCH):
        alone, _, _ = run(layer, x[:, b : b + 1], batch=1)
        torch.testing.assert_close(alone, together[:, b : b + 1], atol=1e-6, rtol=0)


def test_inference_has_no_limit_and_is_causal():
    layer, x = layer_of(capacity_factor=0.3).eval(), input_of()
    changed = torch.cat((x[: SEQ // 2], input_of(seed=9)[SEQ // 2 :]))
    y, _, records = run(layer, x)
    y_changed, _, _ = run(layer, changed)
    assert int(records[1].overflow) == 0
    assert records[1].rows == SEQ * BATCH
    torch.testing.assert_close(y[: SEQ // 2], y_changed[: SEQ // 2], atol=1e-6, rtol=0)
    assert (y[SEQ // 2 :] - y_changed[SEQ // 2 :]).abs().max() > 1e-2


def test_training_with_a_limit_looks_at_later_tokens():
    layer, x = layer_of(capacity_factor=0.3), input_of()
    changed = torch.cat((x[: SEQ // 2], input_of(seed=9)[SEQ // 2 :]))
    y, _, _ = run(layer, x)
    y_changed, _, _ = run(layer, changed)
    assert (y[: SEQ // 2] - y_changed[: SEQ // 2]).abs().max() > 1e-4


def test_recomputation_of_the_mlp_changes_nothing():
    x = input_of()
    y, gradients, records = run(layer_of(capacity_factor=0.8, top_k=2), x)
    y_again, gradients_again, records_again = run(layer_of(capacity_factor=0.8, top_k=2, recompute="selective"), x)
    torch.testing.assert_close(y, y_again, atol=1e-6, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, atol=1e-6, rtol=1e-5)
    assert records[1].rows == records_again[1].rows
    assert torch.equal(records[1].counts_E, records_again[1].counts_E)


def test_a_recomputation_repeats_the_choice_of_its_forward_pass():
    from megaroute.routing.context import RoutingContext

    mlp = layer_of().mlp
    context = RoutingContext()
    mlp(input_of(), context, key=1)
    record = context.records[1]
    out = mlp(input_of(seed=9), context, key=1)  # other probabilities, as rounding could make them
    assert context.records[1] is record
    assert torch.equal(out.abs().amax(-1) > 0, record.keep_SB)


def test_experts_start_with_weights_of_their_own():
    weights = [expert.linear_fc1.weight for expert in layer_of().mlp.experts]
    pairs = [(a, b) for a in range(4) for b in range(a)]
    assert all((weights[a] - weights[b]).abs().max() > 1e-3 for a, b in pairs)


def test_experts_have_the_active_width_of_the_dense_mlp_unless_told_otherwise():
    shapes = {1: 96, 2: 48}
    for top_k, width in shapes.items():
        assert layer_of(top_k=top_k).mlp.experts[0].linear_fc2.weight.shape == (HIDDEN, width)
    expert = layer_of(top_k=2, ffn_hidden_size=32).mlp.experts[3]
    assert expert.linear_fc1.weight.shape == (64, HIDDEN)
    assert expert.linear_fc2.weight.shape == (HIDDEN, 32)


def test_lower_precision_keeps_scores_in_float32_and_the_result_in_its_own():
    from megaroute.routing.context import RoutingContext

    mlp = layer_of(top_k=2).mlp
    expected = mlp(input_of().bfloat16().float(), RoutingContext(), key=1)
    context = RoutingContext()
    out = mlp.bfloat16()(input_of().bfloat16(), context, key=1)
    assert out.dtype == torch.bfloat16
    assert context.records[1].probability_E.dtype == torch.float32
    close = (out.float() - expected).abs() < 0.05 * expected.abs().max()
    assert close.float().mean() > 0.97  # rounded weights may choose another expert for a token on the edge
