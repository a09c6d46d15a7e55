# SPDX-License-Identifier: Apache-2.0
"""What `bake()` returns, so that it can be saved and read again: a frozen table, nothing to train. No method of its own."""

from __future__ import annotations

from typing import Any

from steadyvq.quantizers.base import Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.registry import register


@register("baked", paper="", summary="a frozen table, written by bake()", listed=False)
def baked(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """A plain look-up; its table comes from the saved weights."""
    return compose(num_codes, dim, {"codebook": "frozen", "init": "normal"}, overrides)
