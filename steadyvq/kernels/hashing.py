# SPDX-License-Identifier: Apache-2.0
"""Random numbers as a pure function of a key and a position: a hash of integers, no generator and no state.

The hash is the finaliser of splitmix64 (Steele, Lea and Flood 2014) on int64 tensors, whose arithmetic wraps in the same
way on every device. A number depends on (key, row, column) alone: not on the batch it is computed in, nor on the block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_COLUMN = 0xD1342543DE82EF95 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def mix(x: Tensor) -> Tensor:
    """A bijection of 64 bits that scatters them: any two inputs give unrelated outputs."""
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros; that of int64 repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def combine(key: Tensor, value: Tensor | int) -> Tensor:
    """A new key from a key and one more number."""
    # The product is taken by tensors, which wrap; that of two Python integers would not fit.
    return mix(mix(key + _GOLDEN) + torch.full_like(key, _GOLDEN) * value)


def uniform(key: Tensor, rows: Tensor, columns: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers in (0, 1), both ends excluded, shape (rows, columns), one for every pair of positions.

    Args:
        key: 0-d int64.
        rows: (N,) int64 positions.
        columns: (C,) int64 positions.
        dtype: float32 holds the leading 23 of the 52 bits of float64.
    """
    bits = mix(mix(key + rows * _GOLDEN).unsqueeze(1) + columns * _COLUMN)
    # One half more than the integer part keeps 0 and 1 out; a bit less than the mantissa keeps the sum exact.
    digits = 52 if dtype == torch.float64 else 23
    return (_shift(bits, 64 - digits).to(dtype) + 0.5) * 2.0**-digits


def gumbel(key: Tensor, rows: Tensor, columns: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard Gumbel numbers (rows, columns): argmax_j (l_j + g_j) is a draw from softmax(l)."""
    return -(-uniform(key, rows, columns).log()).log().to(dtype)


def normal(key: Tensor, rows: Tensor, columns: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers (rows, columns), by the transform of Box and Muller."""
    radius = (-2 * uniform(key, rows, 2 * columns).log()).sqrt()
    return (radius * (2 * math.pi * uniform(key, rows, 2 * columns + 1)).cos()).to(dtype)
