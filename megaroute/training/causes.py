"""What an alarm says: how far a unit is from where it should be, what that means, and which key to turn."""

from megaroute.config.routers import AlarmConfig
from megaroute.config.routing import RoutingConfig
from megaroute.config.units import Unit
from megaroute.metrics.formats import percent, unit_name

_HOLD = "raise routing.budget.weight or routing.controller.gain"
_DENSITY = {
    "": "",
    "low": f"it has collapsed and learns from next to nothing; {_HOLD}, or lower routing.lr_factor",
    "high": f"it has collapsed and saves next to nothing; {_HOLD}, or lower routing.lr_factor",
    "drift": f"{_HOLD}; if it swings, lower the gain",
}
_VALIDATION = {"": "", "low": "without noise it is never executed", "high": "without noise it saves nothing"}
RECOVERED = {
    "density": "router wants {density} of {target} again",
    "overflow": "{dropped} of what its router wants finds no capacity now",
    "validation": "validation executes {density} of {target} again",
}
"""What is said at the end of an alarm, by its topic."""


def density(alarm: AlarmConfig, unit: Unit, kind: str, wanted: float, dropped: float, target: float) -> str:
    """A unit's router chooses too few or too many tokens; means over the window."""
    executed = wanted * (1.0 - dropped)
    if percent(executed) == percent(wanted):
        what = f"router wants and executes {percent(wanted)} of {percent(target)}"
    else:
        what = f"router wants {percent(wanted)} of {percent(target)}, capacity lets it execute {percent(executed)}"
    return f"{unit_name(unit.label)}: {what} (mean of {alarm.window} steps): {_DENSITY[kind]}"


def overflow(routing: RoutingConfig, unit: Unit, dropped: float) -> str:
    """A unit's capacity drops much of what its router wants."""
    choices, key = "tokens", "routing.capacity.factor, or hold the density with routing.budget.weight"
    if routing.router == "moe":
        choices, key = "choices of experts", "routing.moe.capacity_factor or routing.moe.balance_weight"
    return (
        f"{unit_name(unit.label)}: {percent(dropped)} of the {choices} find no capacity (mean of "
        f"{routing.alarm.window} steps; routing.alarm.overflow {routing.alarm.overflow:g}): raise {key}"
    )


def validation(routing: RoutingConfig, unit: Unit, kind: str, share: float, target: float) -> str:
    """A unit's router collapses where it decides alone."""
    if routing.router == "mod":
        why = "the predictor, which stands in for the top of the row, has not learned it; train longer"
    else:
        why = f"{_VALIDATION[kind]}; raise routing.init_logit_std, or let the noise fade with routing.noise_anneal"
    return f"{unit_name(unit.label)}: validation executes {percent(share)} of {percent(target)}: {why}"
