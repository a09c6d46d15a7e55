# SPDX-License-Identifier: Apache-2.0
"""Assignments: which code a latent gets. A function `(z, table) -> (indices, squared distance)`, without gradient.

An assignment with `informed = True` is also given the `Setting` of the forward: whether it trains, its noise, its mask.
One that does something else in training names what it does in evaluation as `evaluates_as`; `bake()` keeps that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steadyvq import kernels
from steadyvq.quantizers.base import Reduce, unit
from steadyvq.quantizers.noise import Noise


@dataclass
class Setting:
    """What an assignment may know besides latents and codes.

    Attributes:
        training: Whether this is a training forward.
        temperature: tau of soft assignments (0-d).
        noise: Random numbers by the position of a latent.
        row_weight: 1 for a valid latent, 0 for a masked one (N,); None if nothing is masked.
        reduce: Sums a tensor over the processes of a run.
    """

    training: bool
    temperature: Tensor
    noise: Noise
    row_weight: Tensor | None
    reduce: Reduce


def l2(z: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest code in Euclidean distance; the lowest index on exact equality."""
    return kernels.nearest(z, table)


def dot(z: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The code with the largest inner product; the lowest index on exact equality."""
    indices, _ = kernels.nearest(z, table, metric="dot")
    return indices, (z - table[indices]).square().sum(-1)


def cosine(z: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The code of the most similar direction; the lowest index on exact equality. Codes keep their lengths."""
    indices, _ = kernels.nearest(unit(z), unit(table))
    return indices, (table[indices] - z).square().sum(-1)


ASSIGNMENTS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"l2": l2, "dot": dot, "cosine": cosine}


def evaluated(assign: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """What an assignment is in evaluation."""
    name: str | None = getattr(assign, "evaluates_as", None)
    found: Callable[..., tuple[Tensor, Tensor]] = assign if name is None else ASSIGNMENTS[name]
    return found


def described(assign: Any) -> str | dict[str, Any] | None:
    """An assignment as plain data, as `compose` takes it; None for a function of somebody's own."""
    registered: dict[str, Any] = dict(ASSIGNMENTS)
    for name, known in registered.items():
        if known is assign:
            return name
        if dataclasses.is_dataclass(known) and type(known) is type(assign):
            return {name: {field.name: getattr(assign, field.name) for field in dataclasses.fields(known)}}
    return None
