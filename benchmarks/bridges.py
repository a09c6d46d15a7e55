# SPDX-License-Identifier: Apache-2.0
"""Variants of VQBridge for `steadyvq compare`: which patch, registers and start does a small budget like?

    B=benchmarks/bridges.py
    steadyvq compare --methods fvq,$B:patch_1,$B:patch_1_registers,$B:normal_base,$B:from_the_base,simvq --out runs/bridges

An independent user of the method reported patch 1 with registers as decisive; the paper has patch 4 or 8 and no registers.
"""

from typing import Any

from steadyvq import Quantizer, build_quantizer


def patch_1(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Every code is a token of its own."""
    return build_quantizer("fvq", num_codes=num_codes, dim=dim, **{"patch": 1, **overrides})


def patch_1_registers(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Every code is a token of its own, beside 16 registers."""
    return build_quantizer("fvq", num_codes=num_codes, dim=dim, **{"patch": 1, "registers": 16, **overrides})


def normal_base(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """A base large enough for the layer norm, in the place of U(-1/K, 1/K)."""
    return build_quantizer("fvq", num_codes=num_codes, dim=dim, **{"init": "normal", **overrides})


def from_the_base(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Codes start as the base: E = base + bridge(base)."""
    options = {"start": "residual", "init": "normal"}
    return build_quantizer("fvq", num_codes=num_codes, dim=dim, **{**options, **overrides})
