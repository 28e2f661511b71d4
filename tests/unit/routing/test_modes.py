import pytest
import torch

from megaroute.routing.modes import forced_decisions


@pytest.mark.parametrize("density", [0.125, 1 / 3, 0.5, 0.9, 1.0])
def test_fixed_ratio_keeps_the_density_in_every_stretch(density):
    keep = forced_decisions("fixed_ratio", torch.arange(1024), 2, density)
    assert keep.shape == (1024, 2)
    for start in range(0, 1024, 128):
        assert abs(keep[start : start + 128].sum() / 2 - 128 * density) <= 1


def test_keep_all_and_keep_none():
    positions = torch.arange(5)
    assert forced_decisions("keep_all", positions, 3, 0.5).all()
    assert not forced_decisions("keep_none", positions, 3, 0.5).any()


def test_a_slice_of_the_positions_gets_its_slice_of_the_decisions():
    whole = forced_decisions("fixed_ratio", torch.arange(64), 2, 0.3)
    assert torch.equal(forced_decisions("fixed_ratio", torch.arange(40, 64), 2, 0.3), whole[40:])


def test_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="keep_some"):
        forced_decisions("keep_some", torch.arange(5), 3, 0.5)
