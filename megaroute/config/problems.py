"""What is wrong with a configuration, in a sentence that names the dotted key, where it was given, and the way out."""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megaroute.common.errors import ConfigError
from megaroute.config.root import Config
from megaroute.config.section import Section

_EXPECTED = {
    "string_type": "a string; put it in quotes if it looks like a number",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "path_type": "a path",
    "model_type": "a mapping of keys",
}
"""What to say for pydantic's kinds of error whose own words are for programmers."""


@dataclass(frozen=True)
class Layer:
    """One source of keys ("in FILE" or "on the command line") and the nested mapping it gives."""

    source: str
    tree: Mapping[str, Any]


def refuse_unknown_keys(layer: Layer) -> None:
    """Raise ConfigError, with a line for each key of `layer` that no section knows and the nearest key that exists."""
    lines = [
        f"{'.'.join(path)} ({layer.source}) is not a configuration key; {_suggest(section, path)}"
        for section, path in _unknown(Config, layer.tree, ())
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def describe(error: ValidationError, layers: Sequence[Layer], path: Path) -> str:
    """A line with a sentence for each key that pydantic found wrong."""
    found: dict[str, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        found.setdefault(".".join(_field_path(details["loc"])), []).append(details)
    return "\n".join(_sentence(dotted, problems, layers, path) for dotted, problems in found.items())


def _sentence(dotted: str, problems: list[ErrorDetails], layers: Sequence[Layer], path: Path) -> str:
    if problems[0]["type"] == "missing":
        return f"{dotted} is missing in {path} and has no default; set it there or on the command line"
    source = _source(dotted, layers) or f"in {path}"
    if problems[0]["type"] == "value_error":
        return f"{dotted} ({source}): {problems[0]['ctx']['error']}"
    expected = " or ".join(dict.fromkeys(_expected(problem) for problem in problems))
    given = "empty" if problems[0]["input"] is None else repr(problems[0]["input"])
    return f"{dotted} is {given} ({source}), must be {expected}"


def _expected(problem: ErrorDetails) -> str:
    words = problem["msg"].removeprefix("Input should be ")
    return _EXPECTED.get(problem["type"], words)


def _source(dotted: str, layers: Sequence[Layer]) -> str | None:
    """The last layer that gives this key; for an item of a list, or a key left at its default, what is above it."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        for layer in reversed(layers):
            if _gives(layer.tree, parts[:length]):
                return layer.source
    return None


def _gives(tree: Mapping[str, Any], path: Sequence[str]) -> bool:
    node: Any = tree
    for part in path:
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def _field_path(location: Sequence[str | int]) -> list[str]:
    """A location in pydantic's error without the names it adds for the branches of a union; list indices stay."""
    section: type[Section] | None = Config
    named: type[Section] | None = None  # class of the sections that have names of the user's choice
    path: list[str] = []
    for part in location:
        if section is not None and part in section.model_fields:
            named, section = _named_section(section, str(part)), _subsection(section, str(part))
            path.append(str(part))
        elif isinstance(part, int):
            path.append(str(part))
        elif named is not None and part not in _FORMS:
            section, named = named, None
            path.append(str(part))
    return path


def _unknown(
    section: type[Section], tree: Mapping[str, Any], above: tuple[str, ...]
) -> Iterator[tuple[type[Section], tuple[str, ...]]]:
    for key, value in tree.items():
        path = (*above, str(key))
        if key not in section.model_fields:
            yield section, path
            continue
        inner, named = _subsection(section, key), _named_section(section, key)
        if not isinstance(value, Mapping):
            continue
        if named is None:
            yield from _unknown(inner or _Leaf, value, path)
            continue
        for name, part in value.items():
            if isinstance(part, Mapping):
                yield from _unknown(named, part, (*path, str(name)))


class _Leaf(Section):
    """Stands for a key that has a plain value: any key under it is unknown."""


def _subsection(section: type[Section], key: str) -> type[Section] | None:
    """The section class of a field, also of an optional one; None for a plain value."""
    annotation = section.model_fields[key].annotation
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    for choice in typing.get_args(annotation) if union else (annotation,):
        if isinstance(choice, type) and issubclass(choice, Section):
            return choice
    return None


_FORMS = ("folder", "mixture")
"""Tags of the forms of data.train, which pydantic puts into the location of an error."""


def _named_section(section: type[Section], key: str) -> type[Section] | None:
    """The section class of the values of a field that takes sections by name; None for any other field."""
    waiting: list[Any] = [section.model_fields[key].annotation]
    while waiting:
        annotation = waiting.pop()
        arguments = typing.get_args(annotation)
        if typing.get_origin(annotation) is dict and issubclass(arguments[1], Section):
            return typing.cast(type[Section], arguments[1])
        waiting += arguments if not isinstance(annotation, type) else ()
    return None


def _dotted_keys(section: type[Section] = Config, above: str = "") -> Iterator[str]:
    for key in section.model_fields:
        inner = _subsection(section, key)
        yield f"{above}{key}"
        if inner is not None:
            yield from _dotted_keys(inner, f"{above}{key}.")


def _suggest(section: type[Section], path: tuple[str, ...]) -> str:
    last, above = path[-1], ".".join(path[:-1])
    if section is _Leaf:
        return f"{above} takes a plain value, nothing under it"
    everywhere: dict[str, list[str]] = {}
    for dotted in _dotted_keys():
        everywhere.setdefault(dotted.rpartition(".")[2], []).append(dotted)
    near = difflib.get_close_matches(last, section.model_fields, n=1)
    if last in everywhere:
        return f"did you mean {' or '.join(everywhere[last])}?"
    if near:
        return f"did you mean {'.'.join((*path[:-1], near[0]))}?"
    far = difflib.get_close_matches(last, everywhere, n=1)
    if far:
        return f"did you mean {' or '.join(everywhere[far[0]])}?"
    return f"{above or 'the top level'} has: {', '.join(section.model_fields)}"
