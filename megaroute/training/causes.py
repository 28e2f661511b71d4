"""What an alarm says: how far a unit is from where it should be, what that means, and which key to turn."""

from megaroute.config.routers import AlarmConfig
from megaroute.config.routing import RoutingConfig
from megaroute.config.units import Unit
from megaroute.metrics.formats import percent, unit_name

_HOLD = "raise routing.budget.weight or routing.controller.gain, or lower routing.lr_factor"
_DENSITY = {
    "": "",
    "low": f"the router has collapsed and the unit learns from next to nothing; {_HOLD}",
    "high": f"the router has collapsed and the unit saves next to nothing; {_HOLD}",
    "drift": (
        "a steady gap wants larger routing.budget.weight or routing.controller.gain, one that swings a smaller gain"
    ),
}
_VALIDATION = {
    "": "",
    "low": "where no noise helps the unit is never executed",
    "high": "where no noise helps the unit saves nothing",
}
RECOVERED = {
    "density": "router wants {density} of the tokens again, target {target}",
    "overflow": "{dropped} of what its router wants finds no capacity, less than before",
    "validation": "executes {density} in validation again, target {target}",
}
"""What is said at the end of an alarm, by its topic."""


def density(alarm: AlarmConfig, unit: Unit, kind: str, wanted: float, dropped: float, target: float) -> str:
    """A unit's router chooses too few or too many tokens; means over the window."""
    executed = wanted * (1.0 - dropped)
    if percent(executed) == percent(wanted):
        what = f"router wants and executes {percent(wanted)} of the tokens"
    else:
        what = f"router wants {percent(wanted)} of the tokens, capacity lets it execute {percent(executed)}"
    mean = f"target {percent(target)}, mean of {alarm.window} steps"
    return f"{unit_name(unit.label)}: {what}, {mean}: {_DENSITY[kind]}"


def overflow(routing: RoutingConfig, unit: Unit, dropped: float) -> str:
    """A unit's capacity drops much of what its router wants."""
    choices, key = "tokens", "routing.capacity.factor, or hold the density with routing.budget.weight"
    if routing.router == "moe":
        choices, key = "choices of experts", "routing.moe.capacity_factor or routing.moe.balance_weight"
    return (
        f"{unit_name(unit.label)}: {percent(dropped)} of the {choices} find no capacity, more than "
        f"routing.alarm.overflow {routing.alarm.overflow:g}, mean of {routing.alarm.window} steps: raise {key}"
    )


def validation(routing: RoutingConfig, unit: Unit, kind: str, share: float, target: float) -> str:
    """A unit's router collapses where it decides alone."""
    if routing.router == "mod":
        why = "the predictor, which stands in for the top of the row, has not learned it; train longer"
    else:
        why = f"{_VALIDATION[kind]}; raise routing.init_logit_std, or let the noise fade with routing.noise_anneal"
    return (
        f"{unit_name(unit.label)}: validation executes {percent(share)} of the tokens, target {percent(target)}: {why}"
    )
