# SPDX-License-Identifier: Apache-2.0
"""Assignments: which code a latent gets. A function `(z, table) -> (indices, squared distance)`, without gradient."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from steadyvq import kernels


def l2(z: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest code in Euclidean distance; the lowest index on exact equality."""
    return kernels.nearest(z, table)


ASSIGNMENTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {"l2": l2}
