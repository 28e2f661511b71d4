"""What a stream is a function of, and what happens to a run when some of it is changed on purpose."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from megaroute.common.errors import DataError
from megaroute.common.files import sha256_file
from megaroute.config.data import ONLY_SOURCE, DataConfig
from megaroute.data.manifest import load_manifest
from megaroute.data.packing import packing_identity
from megaroute.data.rows import LaneState, Position

KEYS = {
    "manifest": "data.train",
    "mixture": "data.train",
    "tokenizer": "data.tokenizer",
    "sequence_length": "data.sequence_length",
    "lanes": "data.lanes",
    "seed": "data.seed",
    "packing": "data.packing",
}
"""Fields of an identity, and the setting that decides each."""


def data_identity(data: DataConfig) -> dict[str, Any]:
    """What the training stream is a function of; two runs with the same one read the same rows.

    Raises DataError when a manifest or the tokenizer cannot be read.
    """
    try:
        tokenizer = sha256_file(data.tokenizer)
    except OSError as error:
        raise DataError(f"data.tokenizer: {data.tokenizer} cannot be read ({error.strerror}); give its path") from error
    folders = zip(data.sources.items(), data.folders.items(), strict=False)  # data.valid is the last folder
    manifests = {name: load_manifest(source.path, key, data.remote).fingerprint for (name, source), (key, _) in folders}
    return identity_of(data, manifests, tokenizer)


def identity_of(data: DataConfig, manifests: Mapping[str, str], tokenizer: str) -> dict[str, Any]:
    """The same, from the checksums of the manifests by source and of the tokenizer."""
    total = sum(source.weight for source in data.sources.values())
    return {
        "manifest": dict(manifests),
        "mixture": {name: source.weight / total for name, source in data.sources.items()},
        "tokenizer": tokenizer,
        "sequence_length": data.sequence_length,
        "lanes": data.lanes,
        "seed": data.seed,
        "packing": packing_identity(data),
    }


def difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, Any, Any]]:
    """{field: (dotted key, saved value, present value)} of the fields that differ, in the order of KEYS."""
    found = {}
    for field, key in KEYS.items():
        a, b = saved.get(field), now[field]
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            key, a, b = _first_part(key, a, b)
        found[field] = (key, a, b)
    both = saved["manifest"].keys() & now["manifest"].keys()
    if "mixture" in found and all(saved["manifest"][name] == now["manifest"][name] for name in both):
        found.pop("manifest", None)  # sources that came or went are one change, and the mixture names it
    return found


def _first_part(key: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, Any, Any]:
    name = next(name for name in sorted({*a, *b}) if a.get(name) != b.get(name))
    return (key if name == ONLY_SOURCE else f"{key}.{name}"), a.get(name), b.get(name)


def refuse(field: str, key: str, saved: Any, now: Any) -> DataError:
    """The refusal of a difference that was not allowed."""
    allowed = "" if field == "lanes" else f", allow it with data.allow_change=[{field}] and have it recorded"
    return DataError(
        f"{key}: the checkpoint's data cursor was written for {_short(field, saved)}, this run has "
        f"{_short(field, now)}; rows would repeat or skip text: use {_short(field, saved)}{allowed}, or start afresh "
        f"with checkpoint.resume=false"
    )


def adapted(state: LaneState, changed: Iterable[str], saved: Mapping[str, Any], now: Mapping[str, Any]) -> LaneState:
    """The state from which a lane goes on after `changed` fields of the identity.

    Another manifest or seed starts the source, or all of them, from the beginning in the new order; another tokenizer
    gives up the rest of the documents at hand; another mixture holds its shares from here on.
    """
    changed, names = set(changed), now["mixture"]
    restarted = {name for name in names if saved["manifest"].get(name) != now["manifest"][name] or "seed" in changed}
    sources, opened = {}, state.open
    for name in names:
        at = state.sources.get(name, Position())
        taken = 0 if "mixture" in changed else at.taken
        sources[name] = Position(taken=taken) if name in restarted else at._replace(taken=taken)
    opened = (
        () if "tokenizer" in changed else tuple(o for o in opened if o.source in names and o.source not in restarted)
    )
    return replace(state, sources=sources, open=opened)


def _short(field: str, value: Any) -> str:
    """Checksums by their first 12 digits, weights in words."""
    if isinstance(value, str) and len(value) == 64:
        return f"sha256 {value[:12]}"
    if field == "mixture":
        return "no such source" if value is None else f"a share of {value:g}"
    return "no such source" if value is None else str(value)
