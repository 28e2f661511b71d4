"""The data cursor: where a run stands in its stream, free of ranks and workers, and what the stream was made of."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from megaroute.common.errors import DataError
from megaroute.common.files import sha256_file
from megaroute.config.data import DataConfig
from megaroute.data.lanes import LaneState
from megaroute.data.manifest import load_manifest

FORMAT = 1
KEYS = {
    "manifest": "data.train",
    "tokenizer": "data.tokenizer",
    "sequence_length": "data.sequence_length",
    "lanes": "data.lanes",
    "seed": "data.seed",
}


def data_identity(data: DataConfig) -> dict[str, Any]:
    """What the training stream is a function of: manifest and tokenizer checksums, sequence length, lanes, seed.

    Raises DataError when the manifest or the tokenizer cannot be read.
    """
    try:
        tokenizer = sha256_file(data.tokenizer)
    except OSError as error:
        raise DataError(f"data.tokenizer: {data.tokenizer} cannot be read ({error.strerror}); give its path") from error
    return {
        "manifest": load_manifest(data.train).fingerprint,
        "tokenizer": tokenizer,
        "sequence_length": data.sequence_length,
        "lanes": data.lanes,
        "seed": data.seed,
    }


@dataclass(frozen=True)
class Cursor:
    """Position after `samples` consumed rows."""

    samples: NonNegativeInt
    """Rows consumed by all replicas together: the next row is g = samples."""
    identity: dict[str, Any]
    """`data_identity` of the run that wrote the cursor."""
    lanes: dict[int, LaneState]
    """State of each lane after its last consumed row; lanes that have made none are absent."""
    format: int = FORMAT
    """Version of this record."""

    def to_json(self) -> dict[str, Any]:
        """The cursor as values that JSON can hold."""
        record = asdict(self)
        return {**record, "lanes": {str(lane): state for lane, state in sorted(record["lanes"].items())}}

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
            cursor = TypeAdapter(Cursor).validate_python(dict(value))
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"]))
            raise DataError(f"the data cursor is damaged at {place}; resume from an older checkpoint") from error
        if set(cursor.identity) != set(KEYS) or not isinstance(cursor.identity["lanes"], int):
            raise DataError("the data cursor is damaged at identity; resume from an older checkpoint")
        _check_rows_made(cursor)
        return cursor

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise DataError, naming the key, unless a stream with `identity` goes on exactly where this one stopped."""
        for field, key in KEYS.items():
            saved, now = self.identity.get(field), identity[field]
            if saved != now:
                raise DataError(
                    f"{key}: the checkpoint's data cursor was written for {_short(saved)}, this run has {_short(now)}; "
                    f"rows would repeat or skip text: use {_short(saved)}, or start afresh with checkpoint.resume=false"
                )


def merge_parts(parts: Iterable[Mapping[str, Any]], samples: int, identity: Mapping[str, Any]) -> Cursor:
    """The cursor of all replicas after `samples` rows, from each replica's `Stream.cursor_part()`.

    Raises DataError when the parts do not fit each other or `samples`: a cursor that lies is worse than none.
    """
    lanes: dict[int, LaneState] = {}
    for part in parts:
        for name, state in part["lanes"].items():
            if int(name) in lanes:
                raise DataError(f"two replicas claim lane {name} of the data stream; each must give its own part once")
            lanes[int(name)] = LaneState(**state)
    cursor = Cursor(samples, dict(identity), lanes)
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


def _short(value: Any) -> str:
    """Checksums by their first 12 digits."""
    return f"sha256 {value[:12]}" if isinstance(value, str) and len(value) == 64 else str(value)
