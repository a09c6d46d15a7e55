# SPDX-License-Identifier: Apache-2.0
"""Dataclasses from YAML, strictly: unknown keys and wrong types are refused with the place and the nearest name."""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from steadyvq.quantizers.names import look_up

T = TypeVar("T")


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; a ValueError of one line names the place of a syntax error."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{where} is not valid YAML{line}: {getattr(error, 'problem', error)}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): give a YAML recipe") from error
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, but a recipe is a mapping of keys to values")
    return value


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Builds a dataclass from plain data, checking names and types all the way down.

    Args:
        cls: A dataclass whose fields are numbers, strings, literals, tuples, mappings, dataclasses or optional ones.
        data: A mapping.
        where: Dotted path for messages.

    Raises:
        ValueError: An unknown key, a missing key or a value of the wrong type.
    """
    value: T = _convert(cls, data, where)
    return value


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        return _union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} is {value!r}, but it must be one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        return _tuple(args[0], value, where)
    if origin is dict or origin is Mapping:
        if not isinstance(value, dict):
            raise _wrong(where, value, "a mapping")
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 (no dot) as text.
        try:
            return float(value)
        except ValueError:
            raise _wrong(where, value, "a number") from None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {float: "a number", int: "an integer", str: "text", bool: "true or false"}
        raise _wrong(where, value, names.get(kind, kind.__name__))
    return value


def _union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    kinds = [kind for kind in args if kind is not type(None)]
    for kind in kinds[:-1]:
        try:
            return _convert(kind, value, where)
        except ValueError:
            continue
    return _convert(kinds[-1], value, where)


def _tuple(kind: Any, value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(where, value, "a list")
    return tuple(_convert(kind, item, f"{where}[{i}]") for i, item in enumerate(value))


type_hints = cache(get_type_hints)
"""Evaluating annotations is most of the time of reading a configuration."""


def _dataclass(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where or "the configuration", value, "a mapping")
    hints = type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    built = {}
    for key, item in value.items():
        look_up(f"key in {where}" if where else "key", str(key), known)
        built[key] = _convert(hints[key], item, f"{where}.{key}" if where else key)
    for name, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in built:
            raise ValueError(f"{f'{where}.{name}' if where else name} is missing: add it to the configuration")
    return cls(**built)


def _wrong(where: str, value: Any, needed: str) -> ValueError:
    return ValueError(f"{where} is {value!r}, but it needs {needed}")


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `override`; mappings are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """`["optim.lr=1e-3", "data.crop_size=64"]` as a nested mapping; values are YAML."""
    nested: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set got {pair!r}, but it needs key=value, for example --set optim.lr=1e-3")
        value: Any = parse_yaml(text, f"the value of {key}")
        for part in reversed(key.strip().split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return nested
