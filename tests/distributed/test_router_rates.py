"""Rates of the routers under ZeRO stage 1 and pipeline stages, one of which has no router."""

import pytest
from training import Ranks, numbers, write_config

STEPS = 4
RATES = ["routing.first_dense=2", "routing.lr_factor=8", "routing.weight_decay=false", "optim.weight_decay=0.5"]
LAYOUT = ["parallel.pipeline=2"]


@pytest.fixture(scope="module")
def losses(corpus, tmp_path_factory):
    """Steps of three runs in one process and of two on pipeline 2 x data 2, one of them resumed in the middle."""
    folder = tmp_path_factory.mktemp("rates")
    ranks = Ranks(write_config(folder, corpus), folder)

    def run(name, *overrides):
        return {name: [*RATES, f"run.directory={folder}/{name}", *overrides]}

    plain = run("plain", "routing.lr_factor=1") | run("decayed", "routing.weight_decay=true")
    found = ranks.train(1, run("one process") | plain, STEPS)
    found |= ranks.train(4, run("four", *LAYOUT), STEPS)
    ranks.train(4, run("half", *LAYOUT), STEPS // 2, save=["half"])
    found["resumed"] = ranks.train(4, run("half", *LAYOUT), STEPS // 2)["half"]
    return {name: numbers(steps) for name, steps in found.items()}


def values(steps):
    return [step["loss"] for step in steps]


def test_rates_of_the_routers_change_the_run(losses):
    for other in ("plain", "decayed"):
        assert values(losses[other])[-1] != pytest.approx(values(losses["one process"])[-1], rel=1e-6)


def test_sharded_run_is_the_run_of_one_process(losses):
    assert values(losses["four"]) == pytest.approx(values(losses["one process"]), rel=1e-6)


def test_sharded_run_resumes_with_the_same_bits(losses):
    assert losses["resumed"] == losses["four"][STEPS // 2 :]
