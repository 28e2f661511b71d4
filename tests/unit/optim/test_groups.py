"""Routers have a learning rate and a weight decay of their own."""

import pytest
import torch

ROUTED = ("routing.lr_factor=5", "routing.weight_decay=false", "optim.weight_decay=0.3", "optim.clip_grad=0")


def groups(parts) -> list[dict]:
    return parts.optimizer.param_groups


def weights(parts) -> dict:
    return {name: param.detach().clone() for name, param in parts.chunks[0].named_parameters()}


@pytest.mark.parametrize(
    "router, count",
    [("gumbel", 3), ("early_exit", 3), ("highway", 3), ("mod", 6), ("moe", 3), ("random", 0), ("dense", 0)],
)
def test_weights_of_routers_are_a_group_of_their_own(start, tiny, router, count):
    parts = start(tiny(f"routing.router={router}", *(["routing.unit=mlp"] if router == "moe" else [])))
    named = {name for name, _ in parts.chunks[0].named_parameters() if ".router." in name}
    assert len(named) == count
    found = [group for group in groups(parts) if group["is_decoupled_lr"]]
    assert sum(len(group["params"]) for group in found) == count
    total = sum(len(group["params"]) for group in groups(parts))
    assert total == len(weights(parts))


def test_factor_holds_through_warm_up_and_decay(start, tiny):
    plan = ("optim.lr=0.02", "optim.min_lr=0.004", "optim.warmup_steps=2", "train.steps=10", "optim.decay=cosine")
    parts = start(tiny(*ROUTED, *plan))
    for step in range(1, 12):
        rate = parts.schedule.set(step)
        for group in groups(parts):
            factor = 5 if group["is_decoupled_lr"] else 1
            assert group["lr"] == pytest.approx(factor * rate)
    assert rate == pytest.approx(0.004)


def test_a_step_moves_routers_by_their_own_rate_and_without_decay(start, advance, tiny):
    parts = start(tiny(*ROUTED, "optim.decay=constant", "optim.warmup_steps=0", "optim.lr=0.01"))
    before = weights(parts)
    advance(parts, 1)
    for name, param in parts.chunks[0].named_parameters():
        router = ".router." in name
        lr = 0.05 if router else 0.01
        decay = 0.0 if router or param.dim() == 1 else 0.3
        grad = param.main_grad
        # AdamW's first step, with bias correction, is lr * g / (|g| + eps).
        expected = before[name] * (1 - lr * decay) - lr * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(param.detach(), expected, msg=lambda text, name=name: f"{name}: {text}")


def test_resumed_run_goes_on_with_the_same_bits(start, advance, save, snapshot, tiny):
    whole = start(tiny(*ROUTED))
    advance(whole, 2)
    save(whole)
    advance(whole, 2)
    resumed = start(tiny(*ROUTED))
    assert resumed.resumed_from == 2
    advance(resumed, 2)
    expected, found = snapshot(whole), snapshot(resumed)
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)


def test_resumed_run_takes_rates_and_decay_from_its_configuration(start, advance, save, tiny):
    first = start(tiny(*ROUTED, "optim.lr=0.01"))
    advance(first, 1)
    save(first)
    changed = ("routing.lr_factor=2", "routing.weight_decay=true", "optim.weight_decay=0.1", "optim.lr=0.02")
    resumed = start(tiny(*changed, "optim.decay=constant", "optim.warmup_steps=0"))
    assert resumed.resumed_from == 1
    assert resumed.schedule.set(2) == pytest.approx(0.02)
    for group in groups(resumed):
        norms = {param.numel() for param in group["params"]} == {32}
        assert group["lr"] == pytest.approx(0.04 if group["is_decoupled_lr"] else 0.02)
        assert group["weight_decay"] == pytest.approx(0.0 if norms else 0.1)
