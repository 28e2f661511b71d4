import pytest

from megaroute.config.units import Unit, executed_layers


def test_executed_layers_count_a_branch_as_half_a_layer():
    layers = [Unit(layer, "layer") for layer in (1, 2, 3, 4)]
    assert executed_layers(5, layers, [0.5, 0.25, 0.25, 0.0]) == pytest.approx(2)
    branches = [Unit(layer, part) for layer in (1, 2, 3, 4) for part in ("attention", "mlp")]
    assert executed_layers(5, branches, [0.5, 0.0] * 4) == pytest.approx(1 + 4 * 0.25)
    assert executed_layers(4, [Unit(layer, "mlp") for layer in range(4)], [0.0] * 4) == 2
    assert executed_layers(5, [], []) == 5
