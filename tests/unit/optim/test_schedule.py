"""Learning rates and batch sizes by step."""

import math

import pytest
import torch

from megaroute.optim.schedule import Schedule, batch_size


@pytest.fixture
def schedule(tiny):
    """`schedule("optim.decay=..")`: (schedule of 20 steps after 4 of warm-up to 0.1, optimizer)."""

    def schedule(*overrides):
        config = tiny("train.steps=20", "optim.lr=0.1", "optim.min_lr=0.01", "optim.warmup_steps=4", *overrides)
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        return Schedule(config, optimizer), optimizer

    return schedule


def rates(schedule, steps) -> list[float]:
    return [schedule.set(step) for step in steps]


def cosine(share: float) -> float:
    return 0.01 + 0.09 * 0.5 * (1 + math.cos(math.pi * share))


SHAPES = {
    "cosine": lambda step: cosine((step - 4) / 16),
    "inverse_square_root": lambda step: max(0.01, 0.1 * math.sqrt(4 / step)),
    "constant": lambda _: 0.1,
}


@pytest.mark.parametrize("decay", SHAPES)
def test_linear_warm_up_to_the_peak_then_decay(schedule, decay):
    ours, _ = schedule(f"optim.decay={decay}")
    assert rates(ours, range(1, 5)) == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates(ours, range(5, 21)) == pytest.approx([SHAPES[decay](step) for step in range(5, 21)])


def test_decay_steps_end_at_the_lowest_rate_and_stay_there(schedule):
    ours, _ = schedule("optim.decay_steps=12")
    assert rates(ours, [8, 12, 20]) == pytest.approx([cosine(0.5), 0.01, 0.01])


def test_first_step_without_warm_up_is_not_at_rate_0(schedule):
    ours, _ = schedule("optim.warmup_steps=0")
    assert ours.set(1) == pytest.approx(cosine(1 / 20))


def test_rate_depends_on_the_step_alone_and_reaches_the_optimizer(schedule):
    ours, optimizer = schedule()
    for step in (17, 3, 9):
        fresh, _ = schedule()
        assert ours.set(step) == fresh.set(step) == optimizer.param_groups[0]["lr"]


def test_weight_decay_is_not_scheduled(schedule):
    ours, optimizer = schedule("optim.weight_decay=0.3")
    for step in (1, 10, 20):
        ours.set(step)
        assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_constant_batch(tiny):
    ours = batch_size(tiny("train.global_batch=16", "train.micro_batch=2"), data_parallel=4)
    for consumed in (0, 1000):
        ours.update(consumed, consistency_check=True)
        assert ours.get() == 2


def test_batch_grows_in_equal_parts_of_the_rampup(tiny, capsys):
    rampup = ["train.rampup.start=4", "train.rampup.increment=4", "train.rampup.samples=60"]
    ours = batch_size(tiny("train.global_batch=16", "train.micro_batch=2", *rampup), data_parallel=2)
    found = []
    consumed = 0
    while not found or found[-1] < 16:
        ours.update(consumed, consistency_check=True)
        found.append(ours.get() * 2 * 2)
        consumed += found[-1]
    # Three increments, each after another 20 samples: 5 steps of 4, 3 of 8 (from sample 20 to 44), ..
    assert found == [4] * 5 + [8] * 3 + [12] * 2 + [16]
    assert capsys.readouterr().out == ""
