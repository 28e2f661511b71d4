"""A layer of fixed capacity against the exact one, against a plain choice of who overflows, and without data at all."""

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SEQ, BATCH, HIDDEN = 48, 3, 64
UNITS = ("layer", "attention", "mlp", "separate")
MODEL = {"num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 4, "num_kv_heads": 2}


def layer_of(factor: float | None, unit: str = "layer", scope: str = "unit", **routing: Any) -> nn.Module:
    """The only layer of a model, of density 0.5 and this capacity factor; exact when it is None."""
    from megaroute.config.root import Config
    from megaroute.model.build import build_chunks
    from megaroute.parallel.dims import ParallelDims
    from megaroute.platform import device

    dispatch = {"mode": "exact"} if factor is None else {"mode": "capacity"}
    capacity = {} if factor is None else {"factor": factor, "scope": scope}
    config = Config.model_validate(
        {
            "run": {"name": "layer", "device": "cpu"},
            "model": {**MODEL, "ffn_hidden_size": 96, "vocab_size": 64},
            "routing": {"unit": unit, "dispatch": dispatch, "capacity": capacity, "budget": {"weight": 0.5}, **routing},
            "data": {"train": "none", "tokenizer": "none", "sequence_length": SEQ},
            "train": {"steps": 1, "global_batch": BATCH, "micro_batch": BATCH},
        }
    )
    (model,) = build_chunks(config, ParallelDims(1, 1, 1), 0, device.resolve("cpu"))
    return model.decoder.layers[0]


@dataclass
class Run:
    output: Tensor
    gradients: dict[str, Tensor]
    context: Any

    def records(self) -> list[Any]:
        return [record for _, record in sorted(self.context.records.items())]


def run(layer: nn.Module, x: Tensor, context: Any = None, replay: dict[int, Tensor] | None = None) -> Run:
    """Forward and backward pass under a fixed upstream gradient, on the device of `x`."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megaroute.model.microbatch import micro_batch
    from megaroute.routing.context import RoutingContext

    width = layer.config.kv_channels
    angles = RotaryEmbedding(kv_channels=width, rotary_percent=1.0, use_cpu_initialization=True)(SEQ).to(x.device)
    samples_B = torch.arange(x.shape[1], device=x.device)
    context = context or RoutingContext(seed=5, step=7, samples_B=samples_B, budget_scale=1.0, replay=replay or {})
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y, _ = layer(x, None, rotary_pos_emb=angles, packed_seq_params=micro_batch(SEQ, context))
    (y * torch.linspace(-1, 1, y.numel(), device=x.device).view_as(y)).sum().backward()
    gradients = {name: weight.grad for name, weight in layer.named_parameters()}
    assert x.grad is not None and None not in gradients.values()
    return Run(y.detach(), {"input": x.grad, **gradients}, context)


def assert_same(got: Run, expected: Run, only: tuple[str, ...] = ("",)) -> None:
    assert torch.allclose(got.output, expected.output, atol=2e-6)
    for name, gradient in expected.gradients.items():
        if name.startswith(only):
            scale = max(float(gradient.abs().max()), 1.0)
            assert gradient.any(), f"{name} gets no gradient: the comparison would say nothing"
            assert torch.allclose(got.gradients[name], gradient, atol=2e-6 * scale), name


@pytest.fixture
def x() -> Tensor:
    return torch.randn(SEQ, BATCH, HIDDEN, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("factor", "rows"), [(1.25, 32), (2.0, 48)], ids=["filler", "every row"])
def test_equals_the_exact_layer_when_capacity_suffices(unit, factor, rows, x):
    exact, limited = run(layer_of(None, unit), x), run(layer_of(factor, unit), x)
    for record, same in zip(limited.records(), exact.records(), strict=True):
        assert torch.equal(record.keep_SB, same.keep_SB)
        assert record.rows == rows * BATCH and record.overflow == 0
        assert 0.3 < record.keep_SB.float().mean() < 0.7
    assert_same(limited, exact)


@pytest.mark.parametrize("unit", UNITS)
def test_equals_the_exact_layer_when_the_pool_suffices(unit, x):
    exact, limited = run(layer_of(None, unit), x), run(layer_of(2.0, unit, "stage"), x)
    for record in limited.records():
        kept = int(record.keep_SB.sum())
        assert kept <= record.rows < kept + 16 and record.rows % 16 == 0
    assert_same(limited, exact)


def highest(margin_S: Tensor, keep_S: Tensor, rows: int) -> list[bool]:
    kept = [s for s in range(len(keep_S)) if keep_S[s]]
    stays = set(sorted(kept, key=lambda s: -float(margin_S[s]))[:rows])
    return [s in stays for s in range(len(keep_S))]


@pytest.mark.parametrize("unit", ["layer", "mlp"])
def test_tokens_over_capacity_have_the_lowest_margins_and_pass_untouched(unit, x):
    (wanted,) = run(layer_of(None, unit), x).records()
    limited = run(layer_of(0.6, unit), x)
    (record,) = limited.records()
    for b in range(BATCH):
        assert record.keep_SB[:, b].tolist() == highest(wanted.margin_SB[:, b], wanted.keep_SB[:, b], 16)
    assert record.rows == 16 * BATCH
    assert record.overflow == wanted.keep_SB.sum() - record.keep_SB.sum() > 0
    passed = x if unit != "mlp" else after_attention(unit, x)
    assert torch.equal(limited.output[~record.keep_SB], passed[~record.keep_SB])
    assert not torch.equal(limited.output[record.keep_SB], passed[record.keep_SB])


def after_attention(unit: str, x: Tensor) -> Tensor:
    """The input of an MLP unit: what comes out when it keeps no token."""
    return run(layer_of(None, unit), x, replay={1: torch.zeros(SEQ, BATCH, dtype=torch.bool)}).output


def test_an_overflowing_layer_is_the_exact_layer_of_the_tokens_that_stayed(x):
    limited = run(layer_of(0.6), x)
    (record,) = limited.records()
    exact = run(layer_of(None), x, replay={0: record.keep_SB})
    # A recorded plan teaches the router nothing, and the norm in front of it is shared with it.
    assert_same(limited, exact, only=("mlp.", "self_attention."))


@pytest.mark.parametrize("scope, factor, unit", [("unit", 0.6, "layer"), ("stage", 1.0, "separate")])
def test_a_sample_overflows_as_if_it_were_alone(x, scope, factor, unit):
    from megaroute.routing.context import RoutingContext

    layer = layer_of(factor, unit, scope, density=0.3)
    together = run(layer, x).records()
    for b in range(BATCH):
        context = RoutingContext(seed=5, step=7, samples_B=torch.tensor([b]), budget_scale=1.0)
        for alone, record in zip(run(layer, x[:, b : b + 1], context).records(), together, strict=True):
            assert torch.equal(alone.keep_SB, record.keep_SB[:, b : b + 1])
    assert all(record.overflow > 0 for record in together)


def test_a_recomputation_keeps_who_stayed_and_counts_nothing_twice(x):
    for scope, factor in (("unit", 0.6), ("stage", 1.0)):
        layer = layer_of(factor, "separate", scope)
        first = run(layer, x)
        records, unused_B = dict(first.context.records), first.context.pool.unused_B
        again = run(layer, x, first.context)
        assert again.context.records == records and again.context.pool.unused_B is unused_B
        assert torch.equal(first.output, again.output)


def test_a_pooled_unit_uses_what_an_earlier_one_left_and_no_more(x):
    # Of 48 tokens of a sample, density 0.5 and factor 1 give each unit 32 rows; they are taken in sixteens.
    all_kept = torch.ones(SEQ, BATCH, dtype=torch.bool)
    layer = layer_of(1.0, "separate", "stage")
    for kept, left in ((10, 16), (20, 0)):
        few = torch.zeros(SEQ, BATCH, dtype=torch.bool)
        few[:kept] = True
        attention, mlp = run(layer, x, replay={0: few, 1: all_kept}).records()
        assert attention.rows == -(-BATCH * kept // 16) * 16 and attention.overflow == 0
        assert mlp.rows == BATCH * (32 + left) and mlp.overflow == BATCH * (SEQ - 32 - left)
        attention, mlp = run(layer, x, replay={0: all_kept, 1: few}).records()
        assert attention.rows == BATCH * 32 and attention.overflow == BATCH * (SEQ - 32) and mlp.overflow == 0


def test_a_pool_drops_the_lowest_margins_of_each_sample(x):
    # Margins are those that the exact layer records; one unit alone has its share, 16 of 48 tokens.
    (wanted,) = run(layer_of(None, density=0.3, init_logit_std=3.0), x).records()
    (record,) = run(layer_of(1.0, scope="stage", density=0.3, init_logit_std=3.0), x).records()
    for b in range(BATCH):
        stayed = highest(wanted.margin_SB[:, b], wanted.keep_SB[:, b], 16)
        assert record.keep_SB[:, b].tolist() == stayed and wanted.keep_SB[:, b].sum() > 16


@pytest.mark.parametrize("unit", UNITS)
def test_inference_drops_nothing(unit, x):
    exact, limited = run(layer_of(None, unit).eval(), x), run(layer_of(0.3, unit).eval(), x)
    for record, same in zip(limited.records(), exact.records(), strict=True):
        assert torch.equal(record.keep_SB, same.keep_SB) and record.keep_SB.sum() > 3 * 16
    assert torch.equal(limited.output, exact.output)


@pytest.mark.parametrize("unit", UNITS)
def test_nothing_is_read_back_to_the_host(unit, x):
    # Tensors on the meta device have shapes and no data: whoever reads a value, or asks for a shape that depends on
    # values, fails.  Any device other than a CPU takes the same path through the layer; the kernel of attention alone
    # is another, as the one of accelerators does not take float64, which is why float64 is used here.
    result = run(layer_of(1.25, unit).to("meta", torch.float64), x.to("meta", torch.float64))
    assert result.output.is_meta and result.output.shape == x.shape
    assert all(record.rows == 32 * BATCH for record in result.records())
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        run(layer_of(None, unit).to("meta", torch.float64), x.to("meta", torch.float64))


def test_router_plan_and_dispatch_compile_to_one_graph(x):
    from megaroute.routing.context import RoutingContext

    unit = layer_of(1.25, "mlp").units["mlp"]

    def through(x_SBH: Tensor, context: Any) -> Tensor:
        return unit(x_SBH, x_SBH * 0.5, lambda x_RH, h, plan: x_RH + x_RH.tanh(), context)

    results = []
    torch._dynamo.reset()
    for function in (through, torch.compile(through, fullgraph=True, backend="aot_eager")):
        context = RoutingContext(seed=5, step=7, samples_B=torch.arange(BATCH), budget_scale=1.0)
        unit.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        y = function(leaf, context)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, unit.router.weight.grad, context.records[1].keep_SB))
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("unit", UNITS)
def test_a_whole_layer_compiles_to_one_graph(unit, x):
    expected = run(layer_of(1.25, unit), x)
    torch._dynamo.reset()
    layer = layer_of(1.25, unit)
    layer.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(ignore_logging_functions={warnings.warn}):  # which Megatron-core's linears call
        got = run(layer, x)
    assert_same(got, expected)
    for record, same in zip(got.records(), expected.records(), strict=True):
        assert torch.equal(record.keep_SB, same.keep_SB) and record.rows == same.rows
