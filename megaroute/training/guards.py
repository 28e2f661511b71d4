"""When a run had better end, and when a person had better look at it."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from megaroute.common.errors import MegarouteError
from megaroute.config.root import Config
from megaroute.config.routing_checks import LEARNED_BINARY
from megaroute.config.units import Unit
from megaroute.metrics.formats import percent


class TrainingDiverged(MegarouteError):
    """Loss or gradient stayed non-finite."""


def check_nonfinite(consecutive: int, allowed: int) -> None:
    """Raise TrainingDiverged when more than `allowed` steps in a row were skipped; all ranks count alike."""
    if consecutive > allowed:
        raise TrainingDiverged(
            f"{consecutive} steps in a row had a non-finite loss or gradient (train.max_nonfinite={allowed}), so "
            "nothing is learned any more; go back to an earlier checkpoint with a lower optim.lr or optim.clip_grad"
        )


@dataclass(frozen=True)
class Alarm:
    """Something to tell a person, once."""

    message: str
    values: dict[str, Any] = field(default_factory=dict)


class LoadGuard:
    """Watches the mean density of each unit over the last routing.alarm.window steps.

    Raises an alarm when a unit collapses, or drifts away from its target, and again only after it has recovered.
    Routers whose density is imposed, not learned, are not watched.
    """

    def __init__(self, config: Config) -> None:
        routing = config.routing
        self._config, self._alarm = config, routing.alarm
        self._watches = routing.router in LEARNED_BINARY and routing.force is None
        self._seen: deque[tuple[tuple[float, ...], tuple[float, ...]]] = deque(maxlen=routing.alarm.window)
        self._raised: dict[Unit, set[str]] = {unit: set() for unit in config.units}

    def check(self, step: int, density: tuple[float, ...]) -> list[Alarm]:
        """The alarms that a step raises.

        Args:
            step: the step that was done, from 0.
            density: share of tokens executed in it, per unit.
        """
        self._seen.append((density, self._config.routing.targets(self._config.model.num_layers, step)))
        if not self._watches or len(self._seen) < self._alarm.window:
            return []
        densities, targets = (_means(each) for each in zip(*self._seen, strict=True))
        alarms = []
        for unit, mean, target in zip(self._config.units, densities, targets, strict=True):
            kind = self._kind(mean, target)
            if not kind:
                self._raised[unit].clear()
            elif kind not in self._raised[unit]:
                alarms.append(self._describe(unit, kind, mean, target, step + 1))
                self._raised[unit] |= {kind, "drift"}  # half a recovery from a collapse is no news
        return alarms

    def _kind(self, density: float, target: float) -> str:
        if density < self._alarm.low < target:
            return "low"
        if density > self._alarm.high > target:
            return "high"
        return "drift" if abs(density - target) > self._alarm.drift else ""

    def _describe(self, unit: Unit, kind: str, density: float, target: float, step: int) -> Alarm:
        limit = getattr(self._alarm, kind)
        where = f"layer {unit.layer}" if unit.part == "layer" else f"{unit.part} of layer {unit.layer}"
        message = (
            f"{where} executed {percent(density)} of the tokens, mean of the {self._alarm.window} steps up to {step}; "
            f"its target is {percent(target)} and routing.alarm.{kind} {limit:g}: {CAUSES[kind]}"
        )
        values = {"unit": unit.label, "alarm": kind, "density": density, "target": target, "limit": limit}
        return Alarm(message, values)


HOLD = "raise routing.budget.weight or routing.controller.gain, or lower routing.lr_factor"
STEADY = (
    "a density that stays away wants larger routing.budget.weight or routing.controller.gain, one that swings smaller"
)
CAUSES = {
    "low": f"the router has collapsed and the unit learns from next to nothing; {HOLD}",
    "high": f"the router has collapsed and the unit saves next to nothing; {HOLD}",
    "drift": f"the compute spent is not what was asked for; {STEADY}",
}
"""Why each kind of alarm matters, and what to do."""


def _means(rows: tuple[tuple[float, ...], ...]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]
