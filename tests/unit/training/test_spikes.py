"""Loss and gradient norm that stand out."""

import random

import pytest

from megaroute.config.training import SpikeConfig
from megaroute.training.spikes import judge
from megaroute.training.state import GuardState

WINDOW = 16


def found(values, **settings):
    """Indices of the losses that are spikes."""
    config, memory = SpikeConfig(window=WINDOW, **settings), GuardState()
    return [index for index, value in enumerate(values) if judge(config, memory, value, 1.0)]


def noisy(count, level=3.0, spread=0.05):
    draw = random.Random(1)
    return [draw.gauss(level, spread) for _ in range(count)]


def test_a_loss_far_above_those_before_is_a_spike_and_a_low_one_is_not():
    values = noisy(60)
    values[40], values[50] = 4.5, 1.0
    assert found(values) == [40]


def test_nothing_is_said_before_the_window_is_full():
    values = noisy(40)
    values[WINDOW - 1] = values[WINDOW + 4] = 9.0
    assert found(values) == [WINDOW + 4]


def test_a_falling_loss_and_one_that_stands_still_are_fine():
    assert found([6.0 - 0.02 * step for step in range(200)]) == []
    assert found([3.0] * 40 + [3.01] * 3) == []


def test_a_spike_does_not_hide_the_next_and_a_new_level_becomes_normal():
    values = noisy(40)
    values[30] = values[33] = 6.0
    assert found(values) == [30, 33]
    risen = found(noisy(40) + noisy(40, level=6.0))
    assert risen[0] == 40 and len(risen) <= WINDOW, risen


def test_gradient_norm_is_watched_on_its_own():
    config, memory = SpikeConfig(window=WINDOW, loss=None, grad_norm=8.0), GuardState()
    norms = [*noisy(20, 1.0), 30.0]
    spikes = [judge(config, memory, 100.0 * step, norm) for step, norm in enumerate(norms)]
    assert not any(spikes[:-1])
    (spike,) = spikes[-1]
    assert (spike.name, spike.value) == ("grad_norm", 30.0) and spike.deviations > 8
    assert spike.text.startswith("grad norm 30 is") and "above the median 1" in spike.text
    assert memory.losses == [] and len(memory.grad_norms) == WINDOW


def test_memory_from_a_checkpoint_decides_as_the_one_it_was_written_from():
    import json
    from dataclasses import asdict

    values = noisy(30)
    config, memory = SpikeConfig(window=WINDOW), GuardState()
    for value in values:
        judge(config, memory, value, 1.0)
    copy = GuardState(**json.loads(json.dumps(asdict(memory))))
    assert copy == memory
    assert judge(config, copy, 3.9, 1.0) == judge(config, memory, 3.9, 1.0) != ()


@pytest.mark.parametrize("key", ["loss=0", "window=4", "action=stop"])
def test_settings_that_make_no_sense_are_refused(tiny, key):
    from megaroute.common.errors import ConfigError

    with pytest.raises(ConfigError, match=r"train\.spike"):
        tiny(f"train.spike.{key}")
