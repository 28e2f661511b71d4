"""Every router and unit trains: no step that is not finite, a falling loss, and densities near what they mean to be."""

import pytest

STEPS = 30
RIVALS = {
    "gumbel": ["routing.controller.gain=0.1"],
    "attention": ["routing.unit=attention"],
    "mlp": ["routing.unit=mlp"],
    "separate": ["routing.unit=separate"],
    "st_sigmoid": ["routing.estimator=st_sigmoid"],
    "probability": ["routing.gate=probability"],
    "gradient of all": ["routing.gradient=all", "routing.dispatch.mode=masked"],
    "soft budget": ["routing.budget={density: soft, estimator: microbatch}"],
    "annealed": ["routing.density_anneal={start: 1.0, steps: 10}", "routing.temperature_anneal={start: 2, steps: 10}"],
    "capacity": ["routing.dispatch.mode=capacity"],
    "pooled capacity": ["routing.dispatch.mode=capacity", "routing.capacity={factor: 1.0, scope: stage}"],
    "random": ["routing.router=random"],
    "highway": ["routing.router=highway"],
    "mod": ["routing.router=mod"],
    "early_exit": ["routing.router=early_exit", "routing.densities=[0.8, 0.6, 0.4]"],
    "random_ltd": ["routing.router=random_ltd"],
    "moe": ["routing.router=moe", "routing.unit=mlp"],
    "moe top-2": ["routing.router=moe", "routing.unit=mlp", "routing.moe.top_k=2"],
    "dense": ["routing.router=dense"],
}
EXPECTED = {"highway": 1.0, "random": 0.5, "mod": 0.5, "random_ltd": 0.5, "moe": None, "moe top-2": None}
"""Densities that do not have to be learned."""


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_trains(start, advance, tiny, name):
    config = tiny(f"train.steps={STEPS}", "optim.lr=5e-3", *RIVALS[name])
    results = advance(start(config), STEPS)
    assert not any(result.skipped for result in results)
    losses = [result.totals.loss for result in results]
    assert losses[0] == pytest.approx(5.77, abs=0.4)  # ln 320: nothing is known yet
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5
    densities = [result.totals.density for result in results]
    assert all(len(step) == len(config.units) for step in densities)
    expected = EXPECTED.get(name)
    if expected is not None:  # 256 tokens a step
        assert all(density == pytest.approx(expected, abs=0.2) for step in densities for density in step)
