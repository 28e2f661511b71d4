"""When a run had better end, and when a person had better look at it."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megaroute.common.errors import MegarouteError
from megaroute.config.root import Config
from megaroute.config.routing_checks import LEARNED_BINARY
from megaroute.config.units import Unit
from megaroute.metrics.formats import percent, unit_name
from megaroute.training import causes

DECIDES_AT_INFERENCE = (*LEARNED_BINARY, "mod")
"""Routers whose density at inference is another matter than that of training."""


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
class Notice:
    """Something to tell a person, once: an alarm, or the end of one."""

    message: str
    values: dict[str, Any] = field(default_factory=dict)
    recovered: bool = False


class LoadGuard:
    """Watches what the routers want, what capacity drops, and what validation executes, as routing.alarm says.

    An alarm is raised once, and again only after it has ended, which is told too.  Densities that are imposed, not
    learned, are not watched, overflow is for every router.
    """

    def __init__(self, config: Config) -> None:
        routing = config.routing
        self._config, self._alarm = config, routing.alarm
        self._watches = routing.router in LEARNED_BINARY and routing.force is None
        self._watches_validation = routing.router in DECIDES_AT_INFERENCE and routing.force is None
        self._seen: deque[tuple[Sequence[float], ...]] = deque(maxlen=routing.alarm.window)
        self._raised: dict[tuple[Unit, str], set[str]] = {}
        """Kinds of alarm of a unit and a topic since it was last in order."""

    def check(self, step: int, wanted: Sequence[float], dropped: Sequence[float]) -> list[Notice]:
        """What a step gives to tell.

        Args:
            step: the step that was done, from 0.
            wanted: share of tokens that each unit's router chose in it, whatever the capacity.
            dropped: share of these that found no capacity, of a mixture of experts the share of the choices.
        """
        self._seen.append((wanted, dropped, self._targets(step)))
        if self._warming_up(step + 1) or len(self._seen) < self._alarm.window or self._config.routing.force is not None:
            return []
        means = (_means(rows) for rows in zip(*self._seen, strict=True))
        notices = []
        for unit, want, drop, target in zip(self._config.units, *means, strict=True):
            kind = self._kind(want, target) if self._watches else ""
            told = causes.density(self._alarm, unit, kind, want, drop, target)
            notices += self._turn(unit, "density", kind, told, {"density": want, "dropped": drop, "target": target})
            kind = "overflow" if drop > self._alarm.overflow else ""
            told = causes.overflow(self._config.routing, unit, drop)
            notices += self._turn(unit, "overflow", kind, told, {"dropped": drop})
        return notices

    def check_validation(self, step: int, density: Sequence[float]) -> list[Notice]:
        """What a validation after `step`, from 0, gives to tell: routers that collapse where they decide alone.

        Args:
            step: the step that was done last, from 0.
            density: share of tokens that each unit executed in it.
        """
        if self._warming_up(step + 1) or not self._watches_validation:
            return []
        notices = []
        for unit, share, target in zip(self._config.units, density, self._targets(step), strict=True):
            kind = self._collapse(share, target)
            told = causes.validation(self._config.routing, unit, kind, share, target)
            values = {"density": share, "target": target}
            notices += self._turn(unit, "validation", f"validation_{kind}" if kind else "", told, values)
        return notices

    def _targets(self, step: int) -> tuple[float, ...]:
        return self._config.routing.targets(self._config.model.num_layers, step)

    def _warming_up(self, steps: int) -> bool:
        return steps < 2 * self._alarm.window

    def _collapse(self, density: float, target: float) -> str:
        if density < self._alarm.low < target:
            return "low"
        return "high" if density > self._alarm.high > target else ""

    def _kind(self, density: float, target: float) -> str:
        return self._collapse(density, target) or ("drift" if abs(density - target) > self._alarm.drift else "")

    def _turn(self, unit: Unit, topic: str, kind: str, message: str, values: dict[str, Any]) -> list[Notice]:
        """The alarm that begins, or the end of those that were raised."""
        raised = self._raised.get((unit, topic), set())
        values = {"unit": unit.label, "topic": topic, **values}
        if not kind:
            self._raised.pop((unit, topic), None)
            told = f"{unit_name(unit.label)}: {causes.RECOVERED[topic].format(**_texts(values))}"
            return [Notice(told, values, recovered=True)] if raised else []
        # Half a recovery from a collapse is no news.
        self._raised[unit, topic] = raised | {kind, "drift"}
        return [] if kind in raised else [Notice(message, {**values, "alarm": kind})]


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {key: percent(value) for key, value in values.items() if isinstance(value, float)}


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]
