# SPDX-License-Identifier: Apache-2.0
"""Device code of the reductions of the softmax over codes (see `softmax`).

Loaded only where Triton is, by the functions of `softmax` and `fused`.
"""

import triton
import triton.language as tl

# Weights below e^-60 of the largest are zero, as everywhere else.
LOWEST = tl.constexpr(-60.0)


@triton.jit
def _products(
    z_ptr, e_ptr, row, column, rows, codes, D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    CODES: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z . e of a tile (ROWS, CODES)."""
    out = tl.zeros([ROWS, CODES], tl.float32)
    for left in range(0, PADDED, BLOCK):
        k = left + tl.arange(0, BLOCK)
        inside = k < D
        z = tl.load(z_ptr + row[:, None] * D + k[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        e = tl.load(
            e_ptr + column[None, :] * D + k[:, None], mask=(column < codes)[None, :] & inside[:, None], other=0.0
        )
        out += tl.dot(z, e, input_precision=PRECISION)
    return out


@triton.jit
def _logits(product, square, norm, tau, SQUARED: tl.constexpr):
    """-D / tau, for squared distances less the term |z|^2 / tau, which is that of its row."""
    if SQUARED:
        return (2.0 * product - norm[None, :]) / tau
    return -tl.sqrt(tl.maximum(square[:, None] + norm[None, :] - 2.0 * product, 0.0)) / tau


@triton.jit
def reduce_rows(
    z_ptr, e_ptr, squares_ptr, norms_ptr, winner_ptr, present_ptr, tau_ptr,
    shift_ptr, lse_ptr, winner_mass_ptr, loser_mass_ptr, cost_ptr, rows, codes,
    D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr,
    LOSERS: tl.constexpr, SQUARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All sums over codes of a block of latents, in one pass over the codes.

    The largest logit seen so far is the origin; sums are brought to a new one as it comes. `shift` is the logarithm of the sum
    of the exponentials of `_logits`.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    square = tl.load(squares_ptr + row, mask=there, other=0.0)
    winner = tl.load(winner_ptr + row, mask=there, other=0)
    tau = tl.load(tau_ptr)
    largest = tl.full([ROWS], -1e38, tl.float32)
    top, rest, moment = (tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32))
    for left in range(0, codes, CODES):
        column = left + tl.arange(0, CODES).to(tl.int64)
        real = column < codes
        norm = tl.load(norms_ptr + column, mask=real, other=0.0)
        product = _products(z_ptr, e_ptr, row, column, rows, codes, D, PADDED, ROWS, CODES, BLOCK, PRECISION)
        logit = tl.where(real[None, :], _logits(product, square, norm, tau, SQUARED), -1e38)
        above = tl.maximum(largest, tl.max(logit, axis=1))
        change = largest - above
        fade = tl.exp(tl.maximum(change, -200.0))
        kept = rest if LOSERS else rest + top
        moment = fade * (moment + tl.maximum(change, -200.0) * kept)
        shifted = logit - above[:, None]
        weight = tl.where((shifted > LOWEST) & real[None, :], tl.exp(tl.maximum(shifted, LOWEST)), 0.0)
        won = column[None, :] == winner[:, None]
        others = tl.where(won, 0.0, weight)
        top = fade * top + tl.sum(weight - others, axis=1)
        rest = fade * rest + tl.sum(others, axis=1)
        moment += tl.sum((others if LOSERS else weight) * tl.maximum(shifted, LOWEST), axis=1)
        largest = above
    total = top + rest
    shift = tl.log(total) + largest
    kept = rest if LOSERS else total
    if SQUARED:
        lse = shift - square / tau
        cost = kept * tl.maximum(square - tau * largest, 0.0) - tau * moment
    else:
        lse = shift
        cost = -tau * (kept * largest + moment)
    present = tl.load(present_ptr + row, mask=there, other=0) != 0
    tl.store(shift_ptr + row, shift, mask=there)
    tl.store(lse_ptr + row, tl.where(present, lse, 0.0), mask=there)
    tl.store(winner_mass_ptr + row, tl.where(present, top / total, 0.0), mask=there)
    tl.store(loser_mass_ptr + row, tl.where(present, rest / total, 0.0), mask=there)
    tl.store(cost_ptr + row, tl.where(present, tl.maximum(cost / total, 0.0), 0.0), mask=there)


@triton.jit
def _weights(
    z_ptr, e_ptr, squares_ptr, norms_ptr, winner_ptr, shift_ptr, row, column, rows, codes, tau,
    D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr,
    LOSERS: tl.constexpr, SQUARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(w, v, D) of a tile, computed again."""
    square = tl.load(squares_ptr + row, mask=row < rows, other=0.0)
    winner = tl.load(winner_ptr + row, mask=row < rows, other=-1)
    shift = tl.load(shift_ptr + row, mask=row < rows, other=0.0)
    norm = tl.load(norms_ptr + column, mask=column < codes, other=0.0)
    product = _products(z_ptr, e_ptr, row, column, rows, codes, D, PADDED, ROWS, CODES, BLOCK, PRECISION)
    logit = _logits(product, square, norm, tau, SQUARED)
    shifted = logit - shift[:, None]
    real = (row < rows)[:, None] & (column < codes)[None, :] & (shifted > LOWEST)
    if LOSERS:
        real = real & (column[None, :] != winner[:, None])
    weight = tl.where(real, tl.exp(tl.minimum(tl.maximum(shifted, LOWEST), 1.0)), 0.0)
    if SQUARED:
        distance = tl.maximum(square[:, None] - tau * logit, 0.0)
        gradient = weight
    else:
        distance = -tau * logit
        gradient = tl.where(distance > 0.0, 0.5 * weight / tl.where(distance > 0.0, distance, 1.0), 0.0)
    return weight, gradient, distance


@triton.jit
def reduce_columns(
    z_ptr, e_ptr, squares_ptr, norms_ptr, winner_ptr, shift_ptr, row_ptr, tau_ptr,
    mass_ptr, gradient_ptr, cost_ptr, sums_ptr, rows, codes,
    D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr,
    OUT: tl.constexpr, LOSERS: tl.constexpr, SQUARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All sums over latents of a block of codes, and OUT columns of the sums of latents, with weights computed again.

    A program owns its sums, so they are added in the order of the latents, without atomics.
    """
    column = tl.program_id(0).to(tl.int64) * CODES + tl.arange(0, CODES)
    out = tl.program_id(1) * OUT + tl.arange(0, OUT)
    tau = tl.load(tau_ptr)
    mass, pulled, cost = (tl.zeros([CODES], tl.float32), tl.zeros([CODES], tl.float32), tl.zeros([CODES], tl.float32))
    sums = tl.zeros([CODES, OUT], tl.float32)
    for top in range(0, rows, ROWS):
        row = top + tl.arange(0, ROWS).to(tl.int64)
        share = tl.load(row_ptr + row, mask=row < rows, other=0.0)
        weight, gradient, distance = _weights(
            z_ptr, e_ptr, squares_ptr, norms_ptr, winner_ptr, shift_ptr, row, column, rows, codes, tau,
            D, PADDED, ROWS, CODES, BLOCK, LOSERS, SQUARED, PRECISION,
        )  # fmt: skip
        weight = weight * share[:, None]
        gradient = gradient * share[:, None]
        mass += tl.sum(weight, axis=0)
        pulled += tl.sum(gradient, axis=0)
        cost += tl.sum(weight * distance, axis=0)
        z = tl.load(z_ptr + row[:, None] * D + out[None, :], mask=(row < rows)[:, None] & (out < D)[None, :], other=0.0)
        sums += tl.dot(tl.trans(gradient), z, input_precision=PRECISION)
    first = column < tl.where(tl.program_id(1) == 0, codes, 0)
    tl.store(mass_ptr + column, mass, mask=first)
    tl.store(gradient_ptr + column, pulled, mask=first)
    tl.store(cost_ptr + column, cost, mask=first)
    tl.store(sums_ptr + column[:, None] * D + out[None, :], sums, mask=(column < codes)[:, None] & (out < D)[None, :])


@triton.jit
def pull_rows(
    z_ptr, e_ptr, squares_ptr, norms_ptr, winner_ptr, shift_ptr, present_ptr, factor_ptr, tau_ptr,
    mass_ptr, sums_ptr, rows, codes,
    D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr,
    OUT: tl.constexpr, LOSERS: tl.constexpr, SQUARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_j v_ij a_j and OUT columns of sum_j v_ij a_j e_j for a block of latents."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    out = tl.program_id(1) * OUT + tl.arange(0, OUT)
    tau = tl.load(tau_ptr)
    mass = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, OUT], tl.float32)
    for left in range(0, codes, CODES):
        column = left + tl.arange(0, CODES).to(tl.int64)
        _, gradient, _ = _weights(
            z_ptr, e_ptr, squares_ptr, norms_ptr, winner_ptr, shift_ptr, row, column, rows, codes, tau,
            D, PADDED, ROWS, CODES, BLOCK, LOSERS, SQUARED, PRECISION,
        )  # fmt: skip
        gradient = gradient * tl.load(factor_ptr + column, mask=column < codes, other=0.0)[None, :]
        mass += tl.sum(gradient, axis=1)
        e = tl.load(
            e_ptr + column[:, None] * D + out[None, :], mask=(column < codes)[:, None] & (out < D)[None, :], other=0.0
        )
        sums += tl.dot(gradient, e, input_precision=PRECISION)
    there = row < rows
    present = tl.load(present_ptr + row, mask=there, other=0) != 0
    tl.store(mass_ptr + row, tl.where(present, mass, 0.0), mask=row < tl.where(tl.program_id(1) == 0, rows, 0))
    inside = there[:, None] & (out < D)[None, :]
    tl.store(sums_ptr + row[:, None] * D + out[None, :], tl.where(present[:, None], sums, 0.0), mask=inside)


@triton.jit
def screen_and_reduce(
    z_ptr, e_ptr, norms_ptr, slack_ptr, alpha_ptr, minima_ptr, shift_ptr, rows, codes, bundles,
    D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Lower bounds of the scores of bundles of codes, as the screen of the search gives, and the log of the sum of exp(-alpha
    score), from one pass over the codes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    slack = tl.load(slack_ptr + row, mask=there, other=0.0)
    alpha = tl.load(alpha_ptr)
    largest = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for left in range(0, codes, CODES):
        column = left + tl.arange(0, CODES).to(tl.int64)
        norm = tl.load(norms_ptr + column, mask=column < codes, other=2.0**126)
        product = _products(z_ptr, e_ptr, row, column, rows, codes, D, PADDED, ROWS, CODES, BLOCK, PRECISION)
        score = norm[None, :] - 2.0 * product
        bound = tl.min(tl.reshape(score - slack[:, None], [ROWS, CODES // LANES, LANES]), axis=1)
        lane = left // CODES * LANES + tl.arange(0, LANES)
        tl.store(minima_ptr + row[:, None] * bundles + lane[None, :], bound, mask=there[:, None])
        logit = tl.maximum(-alpha * tl.minimum(score, 1e30), -1e38)
        above = tl.maximum(largest, tl.max(logit, axis=1))
        shifted = logit - above[:, None]
        weight = tl.where(shifted > LOWEST, tl.exp(tl.maximum(shifted, LOWEST)), 0.0)
        total = tl.exp(tl.maximum(largest - above, -200.0)) * total + tl.sum(weight, axis=1)
        largest = above
    tl.store(shift_ptr + row, tl.log(total) + largest, mask=there)
