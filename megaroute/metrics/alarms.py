"""The alarms of a run: when each began, and when it ended."""

from collections.abc import Iterable
from dataclasses import dataclass

from megaroute.metrics.history import History
from megaroute.metrics.records import EventRecord


@dataclass(frozen=True)
class Alarm:
    """One alarm, from its beginning to its end."""

    message: str
    step: int
    until: int | None
    """Step of its end; None when it has not ended, or of an alarm about one step."""
    recovered: bool
    attempt: int
    lasting: bool
    """Whether its end would have been told."""

    @property
    def when(self) -> str:
        """`Step 50`, `Step 50 to 74, recovered`, `From step 50 on`, `Step 50 to 89, when attempt 1 ended`."""
        if not self.lasting:
            return f"Step {self.step:,}"
        if self.until is None:
            return f"From step {self.step:,} on"
        ended = "recovered" if self.recovered else f"when attempt {self.attempt} ended"
        return f"Step {self.step:,} to {self.until:,}, {ended}"


def alarms(history: History) -> list[Alarm]:
    """Every alarm, in the order in which they were raised."""
    events = history.events
    raised = [(place, event) for place, event in enumerate(events) if event.kind == "alarm"]
    return [_alarm(history, event, events[place + 1 :]) for place, event in raised]


def count(history: History) -> str:
    """`0`, or `3, of which 2 recovered`."""
    found = alarms(history)
    recovered = sum(alarm.recovered for alarm in found)
    return f"{len(found)}, of which {recovered} recovered" if recovered else str(len(found))


def _alarm(history: History, event: EventRecord, later: Iterable[EventRecord]) -> Alarm:
    end = next((e.step for e in later if e.kind == "recovered" and _subject(e) == _subject(event)), None)
    lasting, until = "topic" in event.values, end
    if lasting and end is None and event.attempt != history.attempts[-1]:
        steps = history.of_attempt(event.attempt)
        until = steps[-1].step if steps else event.step
    return Alarm(event.message, event.step, until, end is not None, event.attempt, lasting)


def _subject(event: EventRecord) -> tuple[object, ...]:
    return event.attempt, event.values.get("unit"), event.values.get("topic")
