"""Alarms come once, for what a person should look at, and are called off."""

import re
from pathlib import Path

import pytest

from megaroute.config.load import load_config
from megaroute.config.root import Config
from megaroute.training.guards import LoadGuard, TrainingDiverged, check_nonfinite

REPOSITORY = Path(__file__).resolve().parents[3]
UNITS = 3
FINE = (0.5,) * UNITS
NOTHING = (0.0,) * UNITS


def guard(tiny, *overrides):
    return LoadGuard(tiny("routing.alarm.window=4", *overrides))


def told(guard, densities, start=8):
    """(step, unit, kind) of what steps with these densities of the first unit give; the others are on target."""
    found = []
    for step, density in enumerate(densities, start=start):
        found += [(step, *_short(n)) for n in guard.check(step, (density, 0.5, 0.5), NOTHING)]
    return found


def _short(notice):
    return notice.values["unit"], "recovered" if notice.recovered else notice.values["alarm"]


def test_nothing_is_said_before_the_window_is_full(tiny):
    assert told(guard(tiny), [0.0] * 3) == []
    assert told(guard(tiny), [0.0] * 4) == [(11, "1", "low")]


def test_the_start_is_no_news_and_does_not_count(tiny):
    assert told(guard(tiny), [0.0] * 7, start=0) == []
    assert told(guard(tiny), [0.0] * 8, start=0) == [(7, "1", "low")]
    assert told(guard(tiny), [0.0] * 4 + [0.5] * 20, start=0) == []


def test_the_start_of_a_shipped_configuration_raises_nothing():
    """Densities as a run of pretrain_configs/rivals/skip.yaml has had them: low for 50 steps, on target by 100."""
    config = load_config(REPOSITORY / "pretrain_configs" / "rivals" / "skip.yaml", ["routing.density=0.25"])
    watched, units = LoadGuard(config), len(config.units)
    for step in range(150):
        density = 0.55 if step < 3 else 0.12 if step < 50 else min(0.13 + 0.003 * (step - 50), 0.25)
        assert watched.check(step, (density,) * units, (0.0,) * units) == [], step


def test_an_alarm_comes_once_until_the_unit_has_recovered(tiny):
    low, fine = [0.0] * 10, [0.5] * 8
    assert told(guard(tiny), low) == [(11, "1", "low")]
    found = told(guard(tiny), low + fine + low)
    assert [kind for _, _, kind in found] == ["low", "recovered", "drift", "low"]
    # 3 or 4 of the 4 steps of the window must be on target: (0 + 0.5 + 0.5 + 0.5) / 4 is too low.
    assert found[1] == (21, "1", "recovered")


def test_half_a_recovery_is_no_news(tiny):
    assert told(guard(tiny), [0.0] * 4 + [0.2] * 20) == [(11, "1", "low")]


@pytest.mark.parametrize(
    "density, kind", [(0.005, "low"), (0.02, "drift"), (0.39, "drift"), (0.41, ""), (0.61, "drift"), (0.995, "high")]
)
def test_the_mean_of_the_window_decides(tiny, density, kind):
    swinging = [density - 0.004, density + 0.004] * 2
    assert [k for _, _, k in told(guard(tiny), swinging)] == ([kind] if kind else [])


def test_collapse_is_none_where_the_target_lies_there(tiny):
    assert told(guard(tiny, "routing.density=1.0"), [1.0] * 6) == [(11, "2", "drift"), (11, "3", "drift")]
    few = guard(tiny, "routing.density=0.005")
    density = (0.005, 0.005, 0.3)
    assert [n.values["unit"] for step in range(8, 12) for n in few.check(step, density, NOTHING)] == ["3"]


def test_an_annealed_target_is_followed(tiny):
    anneal = ["routing.density_anneal.start=1.0", "routing.density_anneal.steps=20"]
    config: Config = tiny(*anneal)
    watched = guard(tiny, *anneal)
    on_target = [target for step in range(30) for target in [config.routing.targets(4, step)]]
    assert [a for step, density in enumerate(on_target) for a in watched.check(step, density, NOTHING)] == []
    stuck = guard(tiny, *anneal)
    first = next(step for step in range(30) if stuck.check(step, (0.95,) * UNITS, NOTHING))
    # The mean of the last 4 targets, 1 - 0.025 * (step - 1.5), is then more than 0.1 lower.
    assert first == 8


@pytest.mark.parametrize("router", ["highway", "random_ltd", "random", "mod"])
def test_an_imposed_density_is_not_watched(tiny, router):
    assert told(guard(tiny, f"routing.router={router}"), [0.0] * 8) == []


def test_experts_and_forced_decisions_are_not_watched(tiny):
    assert told(guard(tiny, "routing.router=moe", "routing.unit=mlp"), [0.0] * 8) == []
    assert told(guard(tiny, "routing.force=keep_none"), [0.0] * 8) == []
    assert guard(tiny, "routing.router=dense").check(0, (), ()) == []


def test_the_message_says_what_why_and_what_to_do(tiny):
    watched = guard(tiny, "routing.unit=separate")
    density = (0.5, 0.001, 0.5, 0.5, 0.5, 0.5)
    (alarm,) = [a for step in range(10, 15) for a in watched.check(step, density, (0.0,) * 6)]
    assert alarm.values == {
        "unit": "1 mlp",
        "topic": "density",
        "alarm": "low",
        "density": pytest.approx(0.001),
        "dropped": 0.0,
        "target": 0.5,
    }
    start = "layer 1 mlp: router wants and executes 0.1 % of 50.0 % (mean of 4 steps): "
    assert alarm.message.startswith(start)
    assert {"routing.budget.weight", "routing.controller.gain", "routing.lr_factor"} <= keys_of(alarm.message)


def keys_of(message):
    """The keys that a message names; each must exist."""
    keys = re.findall(r"routing\.[a-z_.]+[a-z]", message)
    for key in keys:
        section = Config.model_fields["routing"].annotation
        for name in key.split(".")[1:]:
            assert name in section.model_fields, key
            section = section.model_fields[name].annotation
    return set(keys)


def test_under_a_capacity_wanted_and_executed_are_told_apart(tiny):
    watched = guard(tiny, "routing.dispatch.mode=capacity")
    density, dropped = (0.65, 0.5, 0.5), (0.1, 0.0, 0.0)
    (alarm,) = [a for step in range(8, 12) for a in watched.check(step, density, dropped)]
    said = "layer 1: router wants 65.0 % of 50.0 %, capacity lets it execute 58.5 %"
    assert alarm.message.startswith(said) and "asked for" not in alarm.message


@pytest.mark.parametrize(
    "overrides, key",
    [
        (["routing.dispatch.mode=capacity"], "routing.capacity.factor"),
        (["routing.router=random", "routing.dispatch.mode=capacity"], "routing.capacity.factor"),
        (["routing.router=moe", "routing.unit=mlp"], "routing.moe.capacity_factor"),
    ],
)
def test_overflow_is_an_alarm_for_every_router(tiny, overrides, key):
    watched = guard(tiny, *overrides)
    found = [n for step in range(8, 30) for n in watched.check(step, FINE, (0.25 if step < 15 else 0.0, 0.15, 0.0))]
    assert [_short(n)[1] for n in found] == ["overflow", "recovered"]
    assert "layer 1" in found[0].message and "25.0 %" in found[0].message
    assert {key, "routing.alarm.overflow"} <= keys_of(found[0].message)
    assert "18.8 %" in found[1].message  # three of four steps


@pytest.mark.parametrize("router", ["gumbel", "early_exit", "mod"])
def test_a_collapse_in_validation_is_an_alarm(tiny, router):
    watched = guard(tiny, f"routing.router={router}")
    assert watched.check_validation(6, (0.0, 0.5, 0.5)) == []  # too early to tell
    low, high = watched.check_validation(19, (0.002, 0.4, 0.999))
    assert (_short(low), _short(high)) == (("1", "validation_low"), ("3", "validation_high"))
    assert "layer 1: validation executes 0.2 % of 50.0 %" in low.message
    assert watched.check_validation(29, (0.002, 0.4, 0.999)) == []
    ended = watched.check_validation(39, (0.2, 0.4, 0.6))
    assert [_short(n) for n in ended] == [("1", "recovered"), ("3", "recovered")]
    assert "validation executes 20.0 % of 50.0 % again" in ended[0].message
    keys_of(low.message)


def test_routers_that_decide_in_training_only_may_execute_everything_in_validation(tiny):
    assert guard(tiny, "routing.router=random_ltd").check_validation(19, (1.0,) * UNITS) == []


def test_too_many_bad_steps_end_the_run():
    check_nonfinite(3, allowed=3)
    with pytest.raises(TrainingDiverged, match="4 steps in a row .*train.max_nonfinite=3"):
        check_nonfinite(4, allowed=3)
