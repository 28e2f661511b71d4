"""Units at the ends: everything kept is Megatron-core's dense layer, nothing kept is a layer without that branch."""

import pytest
import torch
from layers import HIDDEN, assert_close, config_of, input_of, layer_of, run, upstream_of
from torch import Tensor

UNITS = {"layer": ["layer"], "attention": ["attention"], "mlp": ["mlp"], "separate": ["attention", "mlp"]}
OUTPUTS = {"attention": "self_attention.linear_proj.weight", "mlp": "mlp.linear_fc2.weight"}


def as_dense(routed: torch.nn.Module, dense: torch.nn.Module, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the routed layer under the dense one's names; there one matrix has Q, K and V, group by group."""
    width, groups = routed.config.kv_channels, routed.config.num_query_groups
    q = named["self_attention.linear_q.weight"].view(groups, -1, HIDDEN)
    k, v = named["self_attention.linear_kv.weight"].view(groups, 2 * width, HIDDEN).split(width, 1)
    fused = {"self_attention.linear_qkv.weight": torch.cat((q, k, v), 1).flatten(0, 1)}
    return {name: {**named, **fused}[name] for name, _ in dense.named_parameters()}


@pytest.mark.parametrize("mode", ["exact", "masked", "capacity"])
@pytest.mark.parametrize("unit", UNITS)
def test_keep_all_is_the_dense_layer_of_megatron_core(unit, mode):
    capacity = {"factor": 2.0}
    routed = layer_of(config_of(unit=unit, force="keep_all", dispatch={"mode": mode}, capacity=capacity))
    dense = layer_of(config_of(router="dense"))
    dense.load_state_dict(as_dense(routed, dense, dict(routed.named_parameters())), strict=False)
    ours, theirs = run(routed, input_of()), run(dense, input_of())
    assert_close({"output": ours.y}, {"output": theirs.y}, 1e-6)
    mapped = as_dense(routed, dense, ours.gradients)
    assert_close({"input": ours.gradients["input"], **mapped}, theirs.gradients, 1e-5)
    for part in UNITS[unit]:
        gradient = ours.gradients[f"units.{part}.router.weight"]
        assert torch.equal(gradient, torch.zeros_like(gradient)), "an imposed decision taught the router"


@pytest.mark.parametrize("mode", ["exact", "masked", "capacity"])
@pytest.mark.parametrize("unit", UNITS)
def test_keep_none_leaves_the_branch_out_bit_for_bit(unit, mode):
    layer = layer_of(config_of(unit=unit, force="keep_none", dispatch={"mode": mode}))
    found = run(layer, input_of())
    without = layer_of(config_of(unit=unit, force="keep_all"))
    skipped = OUTPUTS if unit in ("layer", "separate") else {unit: OUTPUTS[unit]}
    with torch.no_grad():
        for name in skipped.values():
            without.get_parameter(name).zero_()
    expected = run(without, input_of())
    assert torch.equal(found.y, expected.y)
    torch.testing.assert_close(found.gradients["input"], expected.gradients["input"], rtol=1e-6, atol=1e-6)
    for branch in skipped:
        inner = {"attention": "self_attention.", "mlp": "mlp."}[branch]
        for name, gradient in found.gradients.items():
            if name.startswith(inner):
                assert torch.equal(gradient, torch.zeros_like(gradient)), name
    if len(skipped) == 2:
        assert torch.equal(found.y, input_of())
        assert torch.equal(found.gradients["input"], upstream_of(found.y))


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_that_is_kept_by_nobody_teaches_its_router_nothing(unit):
    layer = layer_of(config_of(unit=unit, budget={"weight": 0.0}))
    keys = [layer.units[part].unit.key for part in UNITS[unit]]
    nothing = torch.zeros(input_of().shape[:2], dtype=torch.bool)
    replayed = run(layer, input_of(), replay=dict.fromkeys(keys, nothing))
    # A bias that no logit overcomes makes the router itself keep nothing.
    for part in UNITS[unit]:
        layer.units[part].router.state.bias.fill_(-100.0)
    decided = run(layer, input_of())
    for found in (replayed, decided):
        assert not any(record.keep_SB.any() for record in found.routing.records.values())
        for part in UNITS[unit]:
            gradient = found.gradients[f"units.{part}.router.weight"]
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("estimator", ["st_gumbel", "st_sigmoid"])
@pytest.mark.parametrize("unit", UNITS)
def test_executed_tokens_teach_the_router_and_skipped_ones_do_not(unit, estimator):
    layer = layer_of(config_of(unit=unit, estimator=estimator, budget={"weight": 0.0}))
    records = run(layer, input_of()).routing.records
    for part in UNITS[unit]:
        keep = records[layer.units[part].unit.key].keep_SB
        assert 0.2 < keep.float().mean() < 0.8
        name = f"units.{part}.router.weight"
        skipped, executed = (run(layer, input_of(), only_SB=only).gradients[name] for only in (~keep, keep))
        assert torch.equal(skipped, torch.zeros_like(skipped))
        assert executed.abs().max() > 0


@pytest.mark.parametrize("unit", UNITS)
def test_rows_and_pairs_are_counted_for_each_unit(unit):
    layer = layer_of(config_of(unit=unit))
    records = run(layer, input_of()).routing.records
    assert list(records) == [layer.units[part].unit.key for part in UNITS[unit]]
    for part in UNITS[unit]:
        record = records[layer.units[part].unit.key]
        assert record.rows == int(record.keep_SB.sum())
        needed = int(record.keep_SB.int().mul(torch.arange(1, len(record.keep_SB) + 1)[:, None]).sum())
        if part == "mlp":
            assert record.attention_pairs == 0
        else:
            assert int(record.attention_pairs) >= needed
