"""The data cursor: where a run stands in its stream, free of ranks and workers, and what the stream was made of."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from megaroute.common.errors import DataError
from megaroute.data.identity import KEYS, adapted, difference, refuse
from megaroute.data.ledger import Ledger
from megaroute.data.rows import LaneState

FORMAT = 2


@dataclass(frozen=True)
class Change:
    """Something that the stream is a function of, changed on purpose between two rows."""

    samples: NonNegativeInt
    """Rows made before it."""
    field: str
    """Field of the identity."""
    before: Any
    """Its value before."""
    after: Any
    """Its value after."""


@dataclass(frozen=True)
class Cursor:
    """Position after `samples` consumed rows."""

    samples: NonNegativeInt
    """Rows consumed by all replicas together: the next row is g = samples."""
    identity: Mapping[str, Any]
    """`data_identity` of the run that wrote the cursor."""
    lanes: Mapping[int, LaneState]
    """State of each lane after its last consumed row; lanes that have made none are absent."""
    digest: NonNegativeInt = 0
    """Checksum of all consumed rows, see `Ledger`."""
    tokens: Mapping[str, NonNegativeInt] = field(default_factory=dict)
    """Tokens consumed, by source."""
    skipped: NonNegativeInt = 0
    """Slices given up for damage."""
    changes: tuple[Change, ...] = ()
    """What data.allow_change let through, in order."""
    format: int = FORMAT
    """Version of this record."""

    def to_json(self) -> dict[str, Any]:
        """The cursor as values that JSON can hold."""
        lanes = {str(lane): asdict(state) for lane, state in sorted(self.lanes.items())}
        plain = {name: getattr(self, name) for name in ("format", "samples", "identity", "tokens", "skipped")}
        digest = Ledger(self.digest).text  # as text, since other readers of JSON keep 53 bits of a number
        return {**plain, "digest": digest, "changes": [asdict(change) for change in self.changes], "lanes": lanes}

    @staticmethod
    def from_json(value: Any) -> "Cursor":
        """A cursor from what `to_json` gave.  Raises DataError when it is not one, or of another format."""
        if not isinstance(value, Mapping) or value.get("format") != FORMAT:
            found = value.get("format") if isinstance(value, Mapping) else type(value).__name__
            raise DataError(
                f"the data cursor has format {found!r}, this version reads format {FORMAT}; "
                f"resume with the version that wrote it, or start afresh with checkpoint.resume=false"
            )
        try:
            cursor = TypeAdapter(Cursor).validate_python({**value, "digest": int(value.get("digest", ""), 16)})
        except (ValidationError, TypeError, ValueError) as error:
            invalid = error.errors()[0]["loc"] if isinstance(error, ValidationError) else ("digest",)
            raise _damaged(".".join(map(str, invalid))) from error
        if set(cursor.identity) != set(KEYS) or not isinstance(cursor.identity["lanes"], int):
            raise _damaged("identity")
        _check_rows_made(cursor)
        return cursor

    def continued(self, identity: Mapping[str, Any], allowed: Sequence[str] = ()) -> "Cursor":
        """The cursor from which a stream with `identity` goes on: this one, if it goes on exactly where this stopped.

        Differences that data.allow_change names are recorded.  Raises DataError, naming the key, for any other.
        """
        found = difference(self.identity, identity)
        for name, (key, saved, now) in found.items():
            if name not in allowed or name == "lanes":
                raise refuse(name, key, saved, now)
        if not found:
            return self
        changes = [Change(self.samples, name, self.identity[name], identity[name]) for name in found]
        lanes = {lane: adapted(state, found, self.identity, identity) for lane, state in self.lanes.items()}
        return replace(self, identity=identity, lanes=lanes, changes=(*self.changes, *changes))


def merge_parts(
    parts: Iterable[Mapping[str, Any]],
    samples: int,
    identity: Mapping[str, Any],
    ledger: Ledger | None = None,
    changes: tuple[Change, ...] = (),
) -> Cursor:
    """The cursor of all replicas after `samples` rows, from each replica's `Stream.cursor_part()`.

    Raises DataError when the parts do not fit each other or `samples`: a cursor that lies is worse than none.
    """
    lanes: dict[int, Any] = {}
    for part in parts:
        for name, state in part["lanes"].items():
            if int(name) in lanes:
                raise DataError(f"two replicas claim lane {name} of the data stream; each must give its own part once")
            lanes[int(name)] = state
    states = TypeAdapter(dict[int, LaneState]).validate_python(lanes)
    ledger = ledger or Ledger()
    cursor = Cursor(samples, dict(identity), states, ledger.digest, dict(ledger.tokens), ledger.skipped, changes)
    _check_rows_made(cursor)
    return cursor


def _check_rows_made(cursor: Cursor) -> None:
    """Row g belongs to lane g % V, so the number of samples fixes how many rows each lane has made."""
    count = cursor.identity["lanes"]
    for lane in range(count):
        expected = -(-(cursor.samples - lane) // count) if cursor.samples > lane else 0
        made = cursor.lanes[lane].made if lane in cursor.lanes else 0
        if made != expected:
            raise DataError(
                f"the data cursor says that lane {lane} has made {made} rows, but after {cursor.samples} samples in "
                f"{count} lanes it has made {expected}, so text would repeat or be lost: resume from an older one"
            )


def _damaged(place: str) -> DataError:
    return DataError(f"the data cursor is damaged at {place}; resume from an older checkpoint")
