"""The optimizer that training uses."""

import pytest
import torch


def inner(parts) -> torch.optim.Optimizer:
    (part,) = getattr(parts.optimizer, "chained_optimizers", [parts.optimizer])
    return part.optimizer


def test_every_weight_has_its_state_before_the_first_step(start, tiny):
    optimizer = inner(start(tiny()))
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert len(params) == len(optimizer.state) > 20
    counts = [optimizer.state[param]["step"] for param in params]
    assert len({count.data_ptr() for count in counts}) == len(params)
    assert all(not value.any() for param in params for value in optimizer.state[param].values())


def test_matrices_decay_and_norms_do_not(start, tiny):
    parts = start(tiny("optim.weight_decay=0.3"))
    decayed = {group["weight_decay"] for group in inner(parts).param_groups}
    assert decayed == {0.0, 0.3}
    for group in inner(parts).param_groups:
        sizes = {param.numel() for param in group["params"]}
        assert (sizes == {32}) == (group["weight_decay"] == 0.0)  # norms have one weight per channel


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_gradients_and_master_weights_are_float32_in_any_precision(start, tiny, precision, dtype):
    parts = start(tiny(f"train.precision={precision}"))
    assert {param.dtype for param in parts.chunks[0].parameters()} == {dtype}
    assert {param.main_grad.dtype for param in parts.chunks[0].parameters()} == {torch.float32}
    masters = [param for group in inner(parts).param_groups for param in group["params"]]
    assert {param.dtype for param in masters} == {torch.float32}


def test_a_step_is_that_of_torch_adamw(start, advance, tiny):
    parts = start(tiny("optim.clip_grad=0", "optim.weight_decay=0", "optim.decay=constant"))
    before = {name: param.detach().clone() for name, param in parts.chunks[0].named_parameters()}
    advance(parts, 1)
    for name, param in parts.chunks[0].named_parameters():
        grad = param.main_grad
        # AdamW's first step, with bias correction, is lr * g / (|g| + eps).
        expected = before[name] - 1e-2 * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(param.detach(), expected, msg=lambda text, name=name: f"{name}: {text}")
