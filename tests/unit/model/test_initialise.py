"""Initial weights: a function of seed and name, with the spread that the configuration asks for."""

import math

import pytest
import torch

from megaroute.model.build import routers
from megaroute.model.initialise import initialise

WIDE = ["model.hidden_size=256", "model.ffn_hidden_size=256", "model.vocab_size=512"]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in a if torch.equal(a[name], b[name])]


def test_weights_do_not_depend_on_what_was_drawn_before(build, tiny):
    config = tiny()
    model = build(config)
    first = weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    initialise(model, config)
    assert same(first, weights(model)) == list(first)
    assert torch.equal(torch.get_rng_state(), state), "the process's own generator was used"


def test_a_weight_is_the_same_in_a_model_with_more_layers(build, tiny):
    # So it does not matter in which order layers are filled, or which layers a stage holds.
    small, large = weights(build(tiny())), weights(build(tiny("model.num_layers=8")))
    shared = same(small, large)
    scaled = [name for name in small if name.endswith(("linear_proj.weight", "linear_fc2.weight"))]
    assert sorted(shared) == sorted(set(small) - set(scaled))
    for name in scaled:  # projections into the residual stream shrink with depth
        torch.testing.assert_close(small[name] / math.sqrt(2.0), large[name])


def test_no_two_matrices_are_alike(build, tiny):
    model = build(tiny("model.ffn_hidden_size=32"))
    found = weights(model)
    matrices = [matrix.flatten()[:32] for matrix in found.values() if matrix.dim() > 1]
    gate, up = found["decoder.layers.0.mlp.linear_fc1.weight"].chunk(2)
    assert not torch.equal(gate, up)
    assert len({tuple(matrix.tolist()) for matrix in matrices}) == len(matrices)


def test_another_seed_changes_every_matrix_and_no_norm(build, tiny):
    one, two = weights(build(tiny())), weights(build(tiny("train.seed=5")))
    norms = [name for name in one if "norm" in name]
    assert same(one, two) == norms
    assert all((one[name] == 1).all() for name in norms)


def test_matrices_have_the_standard_deviation_of_their_kind(build, tiny):
    config = tiny(*WIDE, "model.init_std=0.03", "routing.init_logit_std=1.5")
    into_residual = 0.03 / math.sqrt(2 * config.model.num_layers)
    for name, matrix in weights(build(config)).items():
        if "norm" in name:
            continue
        std = 0.03
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std = into_residual
        if name.endswith("router.weight"):
            std = 1.5 / math.sqrt(2 * 256)
        # Standard errors: of the standard deviation std / sqrt(2 n), of the mean std / sqrt(n).
        assert matrix.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * matrix.numel())), name
        assert abs(matrix.mean().item()) < 5 * std / math.sqrt(matrix.numel()), name


def test_router_logits_spread_as_asked(build, tiny):
    model = build(tiny(*WIDE, "routing.init_logit_std=1.5"))
    h_SBH = torch.randn(2000, 1, 256, generator=torch.Generator().manual_seed(0))
    found = list(routers([model]).values())
    assert len(found) == 3
    for router in found:
        logits = router.logits(h_SBH)
        # Of one draw of 256 weight differences: 1 / sqrt(2 * 256) = 4.4 % standard error; tokens add 1.6 %.
        assert logits.std().item() == pytest.approx(1.5, rel=0.2)
        assert abs((logits > 0).float().mean().item() - 0.5) < 0.05
