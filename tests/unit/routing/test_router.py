import torch

from megaroute.routing.router import BinaryRouter, initial_std


def test_logit_is_execute_minus_skip():
    router = BinaryRouter(8)
    torch.nn.init.normal_(router.weight)
    h = torch.randn(5, 3, 8)
    skip, execute = (h @ router.weight.T).unbind(-1)
    assert torch.allclose(router(h), execute - skip, atol=1e-6)
    router.state.bias.fill_(0.25)
    assert torch.allclose(router(h), execute - skip + 0.25, atol=1e-6)


def test_logits_are_float32_in_a_model_of_lower_precision():
    router = BinaryRouter(8, torch.bfloat16)
    torch.nn.init.normal_(router.weight)
    h = torch.randn(5, 3, 8).bfloat16()
    skip, execute = (h.float() @ router.weight.float().T).unbind(-1)
    assert router(h).dtype == torch.float32
    assert torch.allclose(router(h), execute - skip, atol=1e-6)


def test_initial_logits_have_the_asked_spread_whatever_the_width():
    generator = torch.Generator().manual_seed(0)
    for hidden in (64, 1024):
        router = BinaryRouter(hidden)
        std = initial_std(1.5, hidden)
        spreads = []
        for _ in range(20):
            torch.nn.init.normal_(router.weight, std=std, generator=generator)
            spreads.append(router(torch.randn(500, 1, hidden, generator=generator)).std().item())
        assert abs(sum(spreads) / len(spreads) - 1.5) < 0.15


def test_state_keeps_float32_when_the_model_is_cast():
    router = BinaryRouter(8)
    router.update(density=0.123456789, target=0.5, gain=0.1)
    density, bias = router.state.density.clone(), router.state.bias.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.state.density.dtype == torch.float32
    assert torch.equal(router.state.density, density) and torch.equal(router.state.bias, bias)


def test_update_remembers_the_density_and_corrects_the_bias():
    router = BinaryRouter(8)
    router.update(density=0.75, target=0.5, gain=0.2)
    assert router.state.density.item() == 0.75
    assert abs(router.state.bias.item() + 0.05) < 1e-7
