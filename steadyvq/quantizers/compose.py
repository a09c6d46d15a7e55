# SPDX-License-Identifier: Apache-2.0
"""From a plain description to a `VectorQuantizer`, so that a cross of two methods is configuration and no code.

    compose(1024, 64, {"codebook": "linear", "losses": {"commitment": 0.25, "codebook": 1.0, "ns": 0.1}})

is SimVQ with the non-stationary loss. A preset is such a description; overrides are merged into it.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steadyvq.quantizers.assign import ASSIGNMENTS
from steadyvq.quantizers.base import unit
from steadyvq.quantizers.codebooks import CODEBOOKS, INITS, Codebook
from steadyvq.quantizers.estimators import ESTIMATORS
from steadyvq.quantizers.losses import LOSSES, Loss
from steadyvq.quantizers.maintenance import MAINTENANCE, Maintenance
from steadyvq.quantizers.names import look_up
from steadyvq.quantizers.registry import load_methods
from steadyvq.quantizers.vector import VectorQuantizer

Description = Mapping[str, Any]

DEFAULTS: dict[str, Any] = {
    "codebook": "free",
    "init": "uniform",
    "losses": {},
    "maintenance": {},
    "assign": "l2",
    "estimator": "straight_through",
    "temperature": 0.35,
    "channel_axis": -1,
    "seed": 0,
    "unit_sphere": False,
}


def compose(num_codes: int, dim: int, preset: Description, overrides: Description | None = None) -> VectorQuantizer:
    """Builds the vector quantizer that a preset and its overrides describe.

    Args:
        num_codes: K.
        dim: d.
        preset: The method's parts, by the keys of `DEFAULTS`.
        overrides: Replaces keys of the preset. In `losses` and `maintenance` each entry is merged by itself: a number
            is a weight (losses), a mapping sets fields, None leaves the part out. `temperature` is a number or
            `{"effective_losers": n}`, which calibrates it. A built part (Codebook, Loss, Maintenance) stands for
            itself; a codebook may also be `{name: settings}` or a function `(rows, generator) -> Codebook`. `assign` and
            `estimator` are names, or `{name: {field: value}}` where they have settings.

    Raises:
        ValueError: Unknown names, wrong values, or parts that cannot work together.
    """
    # Parts that one method alone has are registered by its file.
    load_methods()
    given = {**DEFAULTS, **preset}
    for key, value in (overrides or {}).items():
        look_up("option", key, DEFAULTS)
        given[key] = _merge(given[key], value) if key in ("losses", "maintenance") else value
    _check_size(num_codes, dim)
    _check_options(given)
    generator = torch.Generator().manual_seed(given["seed"])
    codes = given["codebook"]
    if not isinstance(codes, Codebook):
        rows = look_up("init", given["init"], INITS)(num_codes, dim, generator)
        codes = _codebook(codes, unit(rows) if given["unit_sphere"] else rows, generator)
    losses = build_losses(given["losses"])
    maintenance = {
        name: _maintenance(name, value, num_codes, dim)
        for name, value in given["maintenance"].items()
        if value is not None and value is not False
    }
    temperature = given["temperature"]
    if isinstance(temperature, Mapping):
        options = dict(temperature)
        temperature = options.pop("start", DEFAULTS["temperature"])
        _check_number("temperature.start", temperature)
        maintenance["temperature"] = _maintenance("temperature", options, num_codes, dim)
    return VectorQuantizer(
        codes,
        losses=losses,
        maintenance=maintenance,
        assign=_function("assignment", given["assign"], ASSIGNMENTS),
        estimator=_function("estimator", given["estimator"], ESTIMATORS),
        temperature=temperature,
        channel_axis=given["channel_axis"],
        seed=given["seed"],
        unit_sphere=given["unit_sphere"],
    )


def _check_size(num_codes: int, dim: int) -> None:
    for name, value in (("num_codes", num_codes), ("dim", dim)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}, but a quantizer needs a positive integer")


def _check_options(given: Description) -> None:
    """Types of the options that are no parts."""
    for name in ("channel_axis", "seed"):
        if not isinstance(given[name], int) or isinstance(given[name], bool):
            raise ValueError(f"{name} is {given[name]!r}, but it needs an integer")
    if not isinstance(given["init"], str):
        raise ValueError(f"init is {given['init']!r}, but it needs a name")
    for name in ("assign", "estimator"):
        value = given[name]
        if not (isinstance(value, str) or callable(value) or (isinstance(value, Mapping) and len(value) == 1)):
            raise ValueError(f"{name} is {value!r}, but it needs a name, or {{name: settings}} with one name")
    codes = given["codebook"]
    if not isinstance(codes, str) and not callable(codes) and not (isinstance(codes, Mapping) and len(codes) == 1):
        raise ValueError(f"codebook is {codes!r}, but it needs a name, {{name: settings}} or a Codebook")
    if not isinstance(given["temperature"], Mapping):
        _check_number("temperature", given["temperature"])


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, but it needs a number, or {{'effective_losers': n}} to be calibrated")


def _merge(preset: Mapping[str, Any], override: Any) -> dict[str, Any]:
    if not isinstance(override, Mapping):
        raise ValueError(
            f"got {override!r} where a mapping from part names to settings is needed, such as {{'ns': 0.1}}"
        )
    merged = dict(preset)
    for name, value in override.items():
        old = merged.get(name)
        if isinstance(value, Mapping):
            base = old if isinstance(old, Mapping) else {} if old is None or isinstance(old, bool) else {"weight": old}
            value = {**base, **value}
        elif isinstance(old, Mapping) and isinstance(value, int | float) and not isinstance(value, bool):
            value = {**old, "weight": value}
        merged[name] = value
    return merged


def _function(kind: str, value: Any, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """An assignment or estimator from its name, from `{name: settings}`, or itself."""
    if not isinstance(value, Mapping):
        found: Callable[..., Any] = look_up(kind, value, known) if isinstance(value, str) else value
        return found
    ((name, options),) = value.items()
    part = look_up(kind, name, known)
    if not isinstance(options, Mapping) or (options and not dataclasses.is_dataclass(part)):
        raise ValueError(f"{kind} {name!r} was given {options!r}, but it has no such settings: give its name alone")
    made: Callable[..., Any] = _call(f"{kind} {name!r}", type(part), dict(options)) if options else part
    return made


def _codebook(value: Any, rows: Tensor, generator: torch.Generator) -> Codebook:
    """A codebook from its name, from `{name: settings}`, or from a function."""
    (name, options) = next(iter(value.items())) if isinstance(value, Mapping) else (value, {})
    make = name if callable(name) else look_up("codebook", name, CODEBOOKS)
    codes: Codebook = _call(f"codebook {name!r}", partial(make, rows, generator), dict(options))
    return codes


def build_losses(
    described: Description, overrides: Any = None, known: Mapping[str, Callable[..., Any]] = LOSSES
) -> dict[str, Loss]:
    """The losses that a mapping from names to settings describes, as in `compose`.

    Args:
        described: The method's own.
        overrides: Merged into them.
        known: Constructors by name.

    Raises:
        ValueError: Unknown names or wrong values.
    """
    merged = described if overrides is None else _merge(described, overrides)
    return {name: _loss(name, value, known) for name, value in merged.items() if value is not None}


def _loss(name: str, value: Any, known: Mapping[str, Callable[..., Any]]) -> Loss:
    if callable(value) and hasattr(value, "weight"):
        return value  # type: ignore[no-any-return]
    options = dict(value) if isinstance(value, Mapping) else {"weight": value}
    loss: Loss = _call(f"loss {name!r}", look_up("loss", name, known), options)
    return loss


def _maintenance(name: str, value: Any, num_codes: int, dim: int) -> Maintenance:
    if isinstance(value, Maintenance):
        return value
    make = look_up("maintenance", name, MAINTENANCE)
    if value is not True and not isinstance(value, Mapping):
        raise ValueError(f"maintenance {name!r} is {value!r}, but it needs a mapping of settings, true or null")
    part: Maintenance = _call(
        f"maintenance {name!r}", partial(make, num_codes, dim), {} if value is True else dict(value)
    )
    return part


def _call(what: str, make: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Calls a constructor with options from a file, checking names and kinds of values first."""
    known = inspect.signature(make).parameters
    for key, value in options.items():
        default = look_up(f"setting of {what}", key, known).default
        kinds: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
        if isinstance(default, bool) != isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(f"{key} of {what} is {value!r}, but it needs a value like {default!r}")
    return make(**options)
