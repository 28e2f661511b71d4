"""A step with a loss or gradient that is not finite changes nothing; other steps do what they say."""

import pytest
import torch

from megaroute.training import forward
from megaroute.training.evaluate import validate


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture
def parts(start, tiny):
    return start(tiny("routing.controller.gain=0.1"))


def nan_gradient(_, losses_BS):
    return losses_BS.mean() * float("nan"), {"losses": losses_BS.detach()}


def infinite_loss(_, losses_BS):
    return losses_BS.mean(), {"losses": losses_BS.detach() / 0.0}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", [nan_gradient, infinite_loss])
@pytest.mark.parametrize("clip", [0, 1])
def test_nonfinite_step_is_skipped_and_leaves_everything_bit_for_bit(
    monkeypatch, start, advance, snapshot, tiny, loss, precision, clip
):
    config = tiny("routing.controller.gain=0.1", f"train.precision={precision}", f"optim.clip_grad={clip}")
    parts = start(config)
    advance(parts, 1)
    before = snapshot(parts)
    with monkeypatch.context() as patch:
        patch.setattr(forward, "_mean_loss", loss)
        results = advance(parts, 2)
    assert [result.skipped for result in results] == [True, True]
    assert parts.state.nonfinite == 2
    assert differing(before, snapshot(parts)) == []
    (result,) = advance(parts, 1)
    assert not result.skipped and parts.state.nonfinite == 0
    after = snapshot(parts)
    assert all(value.isfinite().all() for value in after.values())
    assert len(differing(before, after)) > 0.9 * len(before)


def test_one_bad_weight_is_enough_and_its_cure_as_well(advance, snapshot, parts):
    weight = parts.chunks[0].decoder.layers[2].mlp.linear_fc2.weight
    kept = weight.detach().clone()
    before = snapshot(parts)
    weight.data[0, 0] = float("inf")
    (result,) = advance(parts, 1)
    assert result.skipped and not result.totals.finite
    weight.data.copy_(kept)
    assert differing(before, snapshot(parts)) == []
    assert not advance(parts, 1)[0].skipped


def test_step_reports_what_it_did(advance, parts):
    (result,) = advance(parts, 1)
    totals = result.totals
    assert result.rows == 8 and totals.tokens == 8 * 32
    assert totals.loss == pytest.approx(5.77, abs=0.3)  # ln 320 for a model that knows nothing
    assert len(totals.kept) == len(totals.rows) == len(totals.pairs) == 3
    records = [micro.info.routing.records for micro in result.micros]
    for index, unit in enumerate(parts.config.units):
        assert totals.kept[index] == sum(int(micro[unit.key].keep_SB.sum()) for micro in records)
        assert parts.routers[unit].state.density.item() == pytest.approx(totals.density[index])
    assert result.budget_loss == pytest.approx(0.1 * sum((d - 0.5) ** 2 for d in totals.density))
    assert 0 < result.executed_flops < result.dense_flops
    assert sum(result.flops.parts.values()) == result.executed_flops
    assert result.load.ranks == 1.0 and result.load.stages == (8 * 32 + sum(totals.rows),)


def test_wish_to_stop_comes_back_from_the_reduction(parts):
    from megaroute.training.step import run_step

    assert run_step(parts, stop=True).totals.stop
    parts.state.advance(8, 32, skipped=False)
    assert not run_step(parts, stop=False).totals.stop


def test_training_learns(start, advance, tiny):
    losses = [result.totals.loss for result in advance(start(tiny("train.steps=20")), 20)]
    assert losses[-1] < losses[0] - 1.0


def test_validation_is_repeatable_and_changes_nothing(advance, snapshot, parts):
    advance(parts, 1)
    before = snapshot(parts)
    first = validate(parts)
    assert validate(parts) == first
    assert differing(before, snapshot(parts)) == []
    assert first.rows == 64
    assert first.loss == pytest.approx(5.7, abs=0.3)
    # Nats per token to bits per byte: the text decides how many bytes a token has, between 1 and the longest piece.
    assert 0 < first.bits_per_byte < first.loss / 0.693


def test_validation_between_does_not_change_the_run(start, advance, tiny):
    parts = start(tiny())
    plain = [result.totals.loss for result in advance(parts, 3)]
    parts = start(tiny())
    with_validation = []
    for _ in range(3):
        with_validation += [result.totals.loss for result in advance(parts, 1)]
        validate(parts)
    assert with_validation == plain
