# SPDX-License-Identifier: Apache-2.0
"""Device code of sums by code (see `segments`). Loaded only where Triton is."""

import triton
import triton.language as tl


@triton.jit
def add_segments(
    order_ptr,
    starts_ptr,
    values_ptr,
    weight_ptr,
    sums_ptr,
    mass_ptr,
    D: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds the rows of one code up, in their order; OUT columns of them."""
    code = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1) * OUT + tl.arange(0, OUT)
    begin, end = tl.load(starts_ptr + code), tl.load(starts_ptr + code + 1)
    sums = tl.zeros([OUT], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for left in range(begin, end, ROWS):
        position = left + tl.arange(0, ROWS)
        there = position < end
        row = tl.load(order_ptr + position, mask=there, other=0)
        weight = tl.load(weight_ptr + row, mask=there, other=0.0)
        # A row of no weight may hold anything.
        kept = there & (weight != 0.0)
        values = tl.load(
            values_ptr + row[:, None] * D + out[None, :], mask=kept[:, None] & (out < D)[None, :], other=0.0
        )
        sums += tl.sum(values.to(tl.float32) * weight[:, None], axis=0)
        mass += weight
    tl.store(sums_ptr + code * D + out, sums, mask=out < D)
    tl.store(mass_ptr + code + tl.arange(0, 1), tl.sum(mass, axis=0), mask=tl.program_id(1) + tl.arange(0, 1) == 0)
