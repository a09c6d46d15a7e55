# SPDX-License-Identifier: Apache-2.0
"""The registry: `@register` on `(num_codes, dim, **overrides) -> Quantizer` makes a method buildable by name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from steadyvq.quantizers.base import Quantizer
from steadyvq.quantizers.names import look_up

Builder = Callable[..., Quantizer]
Status = Literal["published", "reconstructed", "variant"]


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: What `build_quantizer` takes.
        build: `(num_codes, dim, **overrides) -> Quantizer`.
        paper: Where its equations come from.
        summary: One line for tables.
        cost: Operations of a training forward, big-O in N latents, K codes of dimension d, without encoder and decoder; then
            what the layer stores beyond its one table of codes. Not needed by what is not listed.
        listed: Whether it is a method of its own (what `bake()` returns is none).
        status: `published` (as the paper or its official code has it), `reconstructed` (the public text does not fix every
            choice), or `variant` (ours, or a published idea in another form).
        example: A small (num_codes, dim) that suits the method, for tests and first looks.
    """

    name: str
    build: Builder
    paper: str
    summary: str
    cost: str = ""
    listed: bool = True
    status: Status = "published"
    example: tuple[int, int] = (24, 6)


_METHODS: dict[str, Method] = {}

# The folder has the name of the function below. Imported here, before `steadyvq.quantizers` takes that function in; a first
# import later on would put the folder in its place.
_PACKAGE = importlib.import_module("steadyvq.quantizers.methods")


def register(
    name: str,
    *,
    paper: str,
    summary: str,
    cost: str = "",
    listed: bool = True,
    status: Status = "published",
    example: tuple[int, int] = (24, 6),
) -> Callable[[Builder], Builder]:
    """Registers a builder under a name; the arguments are the attributes of `Method`."""

    def add(build: Builder) -> Builder:
        if name in _METHODS:
            raise ValueError(f"a method named {name!r} is registered already")
        if listed and not cost:
            raise ValueError(f"method {name!r} has no cost: say what its forward takes, such as cost='N K d; stores K'")
        _METHODS[name] = Method(name, build, paper, summary, cost, listed, status, example)
        return build

    return add


@cache
def load_methods() -> None:
    """Imports every file of `methods/`, so that adding a method is adding a file."""
    for module in pkgutil.iter_modules(_PACKAGE.__path__):
        importlib.import_module(f"{_PACKAGE.__name__}.{module.name}")


def methods() -> dict[str, Method]:
    """All methods by name, sorted."""
    return {name: method for name, method in _registered().items() if method.listed}


def _registered() -> dict[str, Method]:
    load_methods()
    return dict(sorted(_METHODS.items()))


def list_quantizers() -> list[str]:
    """Names that `build_quantizer` takes."""
    return list(methods())


def build_quantizer(name: str, *, num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Builds a quantizer.

    Args:
        name: A registered method (`list_quantizers()`), or `path/to/file.py:function` or `package.module:function` for
            your own: a function `(num_codes, dim, **overrides) -> Quantizer`.
        num_codes: K, the number of codes.
        dim: d, the size of the latents along the feature axis.
        **overrides: `channel_axis` (default -1, the last; 1 for images, audio, video), `seed`, and the parts of the
            method: `losses={"commitment": 0.25, "codebook": 1.0}`, `temperature`, `maintenance`, `init`, ... (see
            docs/methods.md).

    Raises:
        ValueError: Unknown names or values that cannot work, with the nearest known name.
    """
    build = _builder(name)
    try:
        quantizer = build(num_codes, dim, **overrides)
    except ValueError:
        raise
    except Exception as error:
        if ":" not in name:
            raise
        given = ", ".join(overrides) or "no overrides"
        raise ValueError(
            f"quantizer {name!r}: calling it with num_codes, dim and {given} failed with {type(error).__name__}: {error}"
        ) from error
    if not isinstance(quantizer, Quantizer):
        raise ValueError(f"{name} returned a {type(quantizer).__name__}, but it must return a steadyvq.Quantizer")
    quantizer.spec = _spec(name, num_codes, dim, {**overrides, **quantizer.spec_changes})
    return quantizer


def _builder(name: str) -> Builder:
    """The builder that a name means; the error for an unknown one lists the methods alone."""
    if ":" in name:
        return _own(name)
    return (_registered().get(name) or look_up("quantizer", name, methods())).build


def accepts(name: str, option: str) -> bool:
    """Whether a method takes an override of that name."""
    build = _builder(name)
    parameters = inspect.signature(build).parameters
    return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _spec(name: str, num_codes: int, dim: int, overrides: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments as plain data, or None where an override is an object."""
    spec = {"name": name, "num_codes": num_codes, "dim": dim, **overrides}
    try:
        json.dumps(spec)
    except TypeError:
        return None
    return spec


def _own(name: str) -> Builder:
    """The function that `file.py:function` or `package.module:function` names."""
    where, _, function = name.rpartition(":")
    try:
        module = _load_file(Path(where).expanduser()) if where.endswith(".py") else importlib.import_module(where)
    except FileNotFoundError as error:
        raise ValueError(f"quantizer {name!r}: there is no file {where}; give path/to/file.py:function") from error
    except Exception as error:
        raise ValueError(
            f"quantizer {name!r}: importing {where} failed with {type(error).__name__}: {error}"
        ) from error
    functions = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    builder: Builder = look_up(f"function in {where}", function, functions)
    return builder


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"steadyvq_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look a class's module up by name.
    sys.modules[spec.name] = module
    # A look at the user's file leaves nothing beside it.
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module
