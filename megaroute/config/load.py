"""YAML files and dotted overrides -> `Config`, and back."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megaroute.common.errors import ConfigError
from megaroute.config.problems import Layer, describe, refuse_unknown_keys
from megaroute.config.root import Config


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses a key given twice, and reads 1e-4 as the number it is in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a configuration file, its parent if it says `extends`, and `a.b=value` overrides on top.

    Mappings merge; lists and scalars replace.  A value on the command line is read as YAML, so nothing after `=` is
    null.  Raises ConfigError when a file cannot be read, a key is unknown, missing or given twice, or a value does not
    fit.  Rules across sections and for a given number of processes are in `megaroute.config.checks`.
    """
    path = Path(path)
    return _validated([*_file_layers(path), *(_override_layer(text) for text in overrides)], path)


def make_config(tree: Mapping[str, Any], origin: Path, overrides: Iterable[str] = ()) -> Config:
    """The same from a tree of keys that comes from elsewhere; errors say that it comes from `origin`."""
    return _validated([Layer(f"from {origin}", tree), *(_override_layer(text) for text in overrides)], origin)


def _validated(layers: list[Layer], path: Path) -> Config:
    merged: dict[str, Any] = {}
    for layer in layers:
        refuse_unknown_keys(layer)
        merged = _merge(merged, layer.tree)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(describe(error, layers, path)) from None


def dump_config(config: Config) -> str:
    """The configuration as YAML with every key, which loads back to an equal `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for editors.

    Nothing is marked as required: whether a key is missing shows only once a file is merged with what it extends.
    """
    schema = Config.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        part.pop("required", None)
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Another configuration file, relative to this one, whose keys this one adds to or replaces.",
    }
    return schema


def _file_layers(path: Path) -> list[Layer]:
    tree = _read(path)
    parent = tree.pop("extends", None)
    if parent is None:
        return [Layer(f"in {path}", tree)]
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends is {parent!r}, must be one path to a file, relative to this one")
    parent_path = path.parent / parent
    parent_tree = _read(parent_path, wanted_by=path)
    if "extends" in parent_tree:
        raise ConfigError(
            f"{path} extends {parent_path}, which itself extends {parent_tree['extends']}; only one level is allowed, "
            "so that a run can be read from two files. Extend the last one and repeat what differs"
        )
    return [Layer(f"in {parent_path}", parent_tree), Layer(f"in {path}", tree)]


def _read(path: Path, wanted_by: Path | None = None) -> dict[str, Any]:
    wanted = f" (extended by {wanted_by})" if wanted_by else ""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"configuration file {path}{wanted} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path}{wanted} is not valid YAML: {_one_line(error)}") from None
    if tree is None:
        raise ConfigError(f"configuration file {path}{wanted} is empty; it needs at least run, model, data and train")
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration file {path}{wanted} holds a {type(tree).__name__}, must be a mapping of keys")
    return tree


def _override_layer(text: str) -> Layer:
    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{text!r} on the command line is not an override; write section.key=value")
    try:
        value = yaml.load(raw, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key} on the command line: {raw!r} is not a YAML value: {_one_line(error)}") from None
    for part in reversed(parts):
        value = {part: value}
    return Layer("on the command line", value)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} at line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())
