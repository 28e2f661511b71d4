"""Alarms come once, for what a person should look at."""

import re

import pytest

from megaroute.config.root import Config
from megaroute.training.guards import LoadGuard, TrainingDiverged, check_nonfinite

UNITS = 3


def guard(tiny, *overrides):
    return LoadGuard(tiny("routing.alarm.window=4", *overrides))


def alarms(guard, densities, start=0):
    """(step, unit, kind) of the alarms of steps with these densities of the first unit; the others are on target."""
    found = []
    for step, density in enumerate(densities, start=start):
        found += [(step, a.values["unit"], a.values["alarm"]) for a in guard.check(step, (density, 0.5, 0.5))]
    return found


def test_nothing_is_said_before_the_window_is_full(tiny):
    assert alarms(guard(tiny), [0.0] * 3) == []
    assert alarms(guard(tiny), [0.0] * 4) == [(3, "1", "low")]


def test_an_alarm_comes_once_until_the_unit_has_recovered(tiny):
    low, fine = [0.0] * 10, [0.5] * 8
    assert alarms(guard(tiny), low) == [(3, "1", "low")]
    found = alarms(guard(tiny), low + fine + low)
    assert [kind for _, _, kind in found] == ["low", "drift", "low"]
    assert found[1][0] >= 18


def test_half_a_recovery_is_no_news(tiny):
    assert alarms(guard(tiny), [0.0] * 4 + [0.2] * 20) == [(3, "1", "low")]


@pytest.mark.parametrize(
    "density, kind", [(0.005, "low"), (0.02, "drift"), (0.39, "drift"), (0.41, ""), (0.61, "drift"), (0.995, "high")]
)
def test_the_mean_of_the_window_decides(tiny, density, kind):
    swinging = [density - 0.004, density + 0.004] * 2
    assert [k for _, _, k in alarms(guard(tiny), swinging)] == ([kind] if kind else [])


def test_collapse_is_none_where_the_target_lies_there(tiny):
    assert alarms(guard(tiny, "routing.density=1.0"), [1.0] * 6) == [(3, "2", "drift"), (3, "3", "drift")]
    few = guard(tiny, "routing.density=0.005")
    assert [a.values["unit"] for step in range(4) for a in few.check(step, (0.005, 0.005, 0.3))] == ["3"]


def test_an_annealed_target_is_followed(tiny):
    anneal = ["routing.density_anneal.start=1.0", "routing.density_anneal.steps=20"]
    config: Config = tiny(*anneal)
    watched = guard(tiny, *anneal)
    on_target = [target for step in range(30) for target in [config.routing.targets(4, step)]]
    assert [a for step, density in enumerate(on_target) for a in watched.check(step, density)] == []
    stuck = guard(tiny, *anneal)
    first = next(step for step in range(30) if stuck.check(step, (0.98,) * UNITS))
    # The mean of the last 4 targets, 1 - 0.025 * (step - 1.5), is then more than 0.1 lower.
    assert first == 7


@pytest.mark.parametrize("router", ["highway", "random_ltd", "random", "mod"])
def test_an_imposed_density_is_not_watched(tiny, router):
    assert alarms(guard(tiny, f"routing.router={router}"), [0.0] * 8) == []


def test_experts_and_forced_decisions_are_not_watched(tiny):
    assert alarms(guard(tiny, "routing.router=moe", "routing.unit=mlp"), [0.0] * 8) == []
    assert alarms(guard(tiny, "routing.force=keep_none"), [0.0] * 8) == []
    assert guard(tiny, "routing.router=dense").check(0, ()) == []


def test_the_message_says_what_why_and_what_to_do(tiny):
    watched = guard(tiny, "routing.unit=separate")
    density = (0.5, 0.001, 0.5, 0.5, 0.5, 0.5)
    (alarm,) = [a for step in range(10, 15) for a in watched.check(step, density)]
    assert alarm.values == {
        "unit": "1 mlp",
        "alarm": "low",
        "density": pytest.approx(0.001),
        "target": 0.5,
        "limit": 0.01,
    }
    assert "mlp of layer 1 executed 0.1 % of the tokens, mean of the 4 steps up to 14" in alarm.message
    assert "target is 50.0 %" in alarm.message and "routing.alarm.low 0.01" in alarm.message
    keys = re.findall(r"routing\.[a-z_.]+[a-z]", alarm.message)
    assert {"routing.budget.weight", "routing.controller.gain", "routing.lr_factor"} <= set(keys)
    for key in keys:
        section = Config.model_fields["routing"].annotation
        for name in key.split(".")[1:]:
            assert name in section.model_fields, key
            section = section.model_fields[name].annotation


def test_too_many_bad_steps_end_the_run():
    check_nonfinite(3, allowed=3)
    with pytest.raises(TrainingDiverged, match="4 steps in a row .*train.max_nonfinite=3"):
        check_nonfinite(4, allowed=3)
