# SPDX-License-Identifier: Apache-2.0
"""What `bake()` returns, so that it can be saved and read again: a frozen table or grid, nothing to train. No method."""

from __future__ import annotations

from typing import Any

from steadyvq.quantizers.base import Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.registry import register
from steadyvq.quantizers.scalar import Grid, Order, ScalarQuantizer


@register("baked", paper="", summary="a frozen table, written by bake()", listed=False)
def baked(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """A plain look-up; its table comes from the saved weights."""
    return compose(num_codes, dim, {"codebook": "frozen", "init": "normal"}, overrides)


@register("baked_grid", paper="", summary="a fixed grid, written by bake()", listed=False)
def baked_grid(
    num_codes: int,
    dim: int,
    *,
    levels: list[int],
    order: Order = "little",
    rounds_up: bool = False,
    channel_axis: int = -1,
) -> Quantizer:
    """A plain grid; its thresholds and values come from the saved weights."""
    grid = Grid([[0.0] * (n - 1) for n in levels], [[0.0] * n for n in levels], rounds_up, order)
    return ScalarQuantizer(grid, channel_axis=channel_axis, saved=True)
