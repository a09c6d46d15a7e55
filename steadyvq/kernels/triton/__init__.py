# SPDX-License-Identifier: Apache-2.0
"""Kernels for graphics cards in Triton, under the contract of `steadyvq.kernels`. Triton is loaded when one is launched.

`screening` finds nearest codes (with counts and sums of latents in the same pass), `fused` does so together with the
log-sum-exp, `softmax` reduces the weights over codes and latents, `segments` adds rows up by code. None of them asks the
device for a value, so a step can be captured in a CUDA graph. All but the float atomics of one option add up in a fixed order.

With TRITON_INTERPRET=1 in the environment Triton runs them on a CPU, slowly, which is what their tests do.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from steadyvq.kernels import reference
from steadyvq.kernels.rounding import working_dtype
from steadyvq.kernels.triton import fused, segments, softmax
from steadyvq.kernels.triton.screening import Found, find, nothing_found
from steadyvq.kernels.triton.tiles import Tiles, capability_of, interpreted, search_tiles

__all__ = [
    "MOST_DIMENSIONS",
    "Found",
    "failed",
    "interpreted",
    "nearest",
    "nearest_and_normaliser",
    "search",
    "soft_statistics",
    "sums_by_code",
    "unusable",
]

MOST_DIMENSIONS = 1024
"""A row of float64 terms has to fit the registers of a program."""

_LEAST_CAPABILITY = (8, 0)


@cache
def installed() -> bool:
    """Whether there is Triton."""
    return find_spec("triton") is not None


def unusable(device: str = "cuda", dtype: torch.dtype = torch.float32, dim: int = 1) -> str:
    """Why these kernels cannot be used on a type of device; empty if they can.

    Args:
        device: Type of the device.
        dtype: float64, or anything shorter.
        dim: d.
    """
    if not installed():
        return "Triton is not installed"
    if os.environ.get("STEADYVQ_TRITON") == "0":
        return "Triton is switched off by STEADYVQ_TRITON=0"
    if dtype == torch.float64:
        return "the Triton kernels are for float32 or shorter, and these are float64"
    if dim > MOST_DIMENSIONS:
        return f"the Triton kernels hold up to {MOST_DIMENSIONS} dimensions"
    if interpreted():
        return ""
    if device != "cuda" or torch.version.cuda is None:
        return f"the Triton kernels are for NVIDIA cards, and this is {device}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        return f"the card's compute capability is {capability[0]}.{capability[1]}, and bfloat16 products need 8.0"
    return ""


def nearest(
    z: Tensor, table: Tensor, *, dot: bool = False, products: int | None = None, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Exact nearest code of every latent; same contract as `reference.nearest`.

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        dot: Largest inner product in place of smallest distance.
        products: 1 or 3 (see `screening.find`); None: 3 up to 32 dimensions.
        tiles: Of the screen, chosen from the card if None.
    """
    return search(z, table, dot=dot, products=products, tiles=tiles)[:2]


def search(
    z: Tensor,
    table: Tensor,
    *,
    dot: bool = False,
    products: int | None = None,
    tiles: Tiles | None = None,
    counted: Tensor | None = None,
    count: bool = False,
    total: bool = False,
) -> Found:
    """`nearest`, with the counts and sums of latents by code in the same pass; see `screening.find`.

    Raises:
        ValueError: The kernels cannot be used here.
    """
    check(z, table)
    if products is None:
        # Tensor cores take 16 columns at a time, so that few dimensions cost next to nothing; their codes lie close together.
        products = 3 if z.shape[1] <= 32 else 1
    if products not in (1, 3):
        raise ValueError(f"products is {products}, but the screen takes 1 or 3 of them")
    if z.shape[0] == 0:
        return nothing_found(z, table, count, total)
    tiles = tiles or search_tiles(capability_of(z.device), table.shape[0])
    return find(
        z.contiguous(),
        table.contiguous(),
        dot=dot,
        products=products,
        tiles=tiles,
        counted=counted,
        count=count,
        total=total,
    )


def soft_statistics(
    z: Tensor,
    table: Tensor,
    indices: Tensor,
    temperature: Tensor | float,
    row_weight: Tensor | None = None,
    column_weight: Tensor | None = None,
    *,
    losers: bool = True,
    squared: bool = True,
    want_row_sum: bool = False,
) -> tuple[Tensor, ...]:
    """Same contract as `reference.soft_statistics`; see `softmax`.

    Raises:
        ValueError: The kernels cannot be used here.
    """
    check(z, table)
    return softmax.soft_statistics(
        z,
        table,
        indices,
        temperature,
        row_weight,
        column_weight,
        losers=losers,
        squared=squared,
        want_row_sum=want_row_sum,
    )


def nearest_and_normaliser(z: Tensor, table: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `fused.nearest_and_normaliser`.

    Raises:
        ValueError: The kernels cannot be used here.
    """
    check(z, table)
    if z.shape[0] == 0:
        indices, score, *_ = nothing_found(z, table)
        return indices, score, score.float()
    return fused.nearest_and_normaliser(z.contiguous(), table.contiguous(), temperature)


def sums_by_code(indices: Tensor, values: Tensor, weight: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """See `segments.sums_by_code`.

    Raises:
        ValueError: The kernels cannot be used here.
    """
    check(values, values)
    return segments.sums_by_code(indices, values, weight, num_codes)


def failed(device: torch.device) -> str:
    """What is wrong with the kernels on a card, by a small problem that is computed once in a process; empty if nothing.

    A card, driver or version of Triton that these kernels were never run on must not give wrong codes in silence.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return ""
    return _failed(device)


@cache
def _failed(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    z, table = (torch.randn(rows, 40, generator=generator).to(device) for rows in (150, 500))
    try:
        indices, score = reference.nearest(z, table)
        found = search(z, table)
        sums = soft_statistics(z, table, indices, 5.0)
        exact = reference.soft_statistics(z, table, indices, 5.0)
        close = all(torch.allclose(a.double(), b, rtol=1e-3, atol=1e-4) for a, b in zip(sums, exact, strict=True))
        same = torch.equal(found.indices, indices) and torch.equal(found.score, score)
        reason = "" if same and close else "a small problem came out wrong"
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if reason:
        warnings.warn(
            f"the Triton kernels do not work on {device} ({reason}): torch operators are used instead, which are slower",
            UserWarning,
            stacklevel=2,
        )
    return reason


def check(z: Tensor, table: Tensor) -> None:
    """Raises ValueError where the kernels cannot be used."""
    reason = unusable(z.device.type, working_dtype(z, table), z.shape[1])
    if reason:
        raise ValueError(f"{reason}: use the backend 'streaming' or 'auto'")
