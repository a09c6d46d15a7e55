# SPDX-License-Identifier: Apache-2.0
"""Sums of rows by code on a graphics card, always added up in the order of the rows.

The rows are sorted by code, so that every code's are one range; `searchsorted` finds all ranges at a fixed shape, and one
program adds up one of them. There are no atomics, so the same inputs give the same bits. A code that has nearly all rows is one
long loop: at N = 32,768 that is 1,024 short turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steadyvq.kernels.triton.tiles import block_of

_ROWS = 32


def sums_by_code(indices: Tensor, values: Tensor, weight: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """(mass (K,), sums (K, d)) in float32 of weighted rows; see `steadyvq.kernels.sums_by_code`."""
    from steadyvq.kernels.triton import device_segments as device

    mass = torch.zeros(num_codes, device=values.device)
    sums = torch.zeros(num_codes, values.shape[1], device=values.device)
    if not indices.shape[0]:
        return mass, sums
    ordered, order = torch.sort(indices, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_codes + 1, device=indices.device))
    width = block_of(values.shape[1], 128)
    device.add_segments[(num_codes, -(-values.shape[1] // width))](
        order,
        starts,
        values.contiguous(),
        weight.float().contiguous(),
        sums,
        mass,
        D=values.shape[1],
        OUT=width,
        ROWS=_ROWS,
        num_warps=4,
    )
    return mass, sums
