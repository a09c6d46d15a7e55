# SPDX-License-Identifier: Apache-2.0
"""Device code of the exact search: packing, screening on the tensor cores, settling in float64 (see `screening`).

Loaded only where Triton is, by the functions of `screening` and `fused`.
"""

import triton
import triton.language as tl

# A lower bound that no code has: of padding, and of codes that are not finite.
NEVER = tl.constexpr(2.0**126)
# More than `up` loses when it cuts to eight bits: what is to be rounded up is enlarged by this first.
ENLARGED = tl.constexpr(1.0 + 2.0**-6)


@triton.jit
def _bfloat16(value):
    return value.to(tl.float32).to(tl.bfloat16)


@triton.jit
def _value(rounded):
    return rounded.to(tl.float32).to(tl.float64)


@triton.jit
def _scaled(raw_ptr, row, there, column, inside, factor, centre_ptr, STRIDE: tl.constexpr):
    """A block of raw rows (R, B) as float64, and the same scaled and centred."""
    keep = there[:, None] & inside[None, :]
    raw = tl.load(raw_ptr + row[:, None] * STRIDE + column[None, :], mask=keep, other=0.0).to(tl.float64)
    centre = tl.load(centre_ptr + column, mask=inside, other=0.0)
    return raw, tl.where(keep, raw * factor - centre[None, :], 0.0)


@triton.jit
def pack(
    raw_ptr,
    packed_ptr,
    squares_ptr,
    finite_ptr,
    factor_ptr,
    centre_ptr,
    rows,
    kappa,
    lam,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    PRODUCTS: tl.constexpr,
    CODES: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows as the screen multiplies them: rounded entries, then six columns that make every score a lower bound.

    Also squared lengths (float64, scaled and centred) and whether a row is finite (int8).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    factor = tl.load(factor_ptr)
    finite = there
    for left in tl.static_range(0, PADDED, BLOCK):
        column = left + tl.arange(0, BLOCK)
        raw, _ = _scaled(raw_ptr, row, there, column, column < D, factor, centre_ptr, D)
        # A comparison with nan is false.
        finite = finite & (tl.min((tl.abs(raw) < float("inf")).to(tl.int32), axis=1) > 0)
    square = tl.zeros([ROWS], tl.float64)
    kept, lost, low = square, square, square
    for left in tl.static_range(0, PADDED, BLOCK):
        column = left + tl.arange(0, BLOCK)
        _, x = _scaled(raw_ptr, row, finite, column, column < D, factor, centre_ptr, D)
        first = _bfloat16(x)
        second = _bfloat16(x - _value(first))
        near, rest = _value(first), x - _value(first)
        if PRODUCTS == 3:
            low += tl.sum(_value(second) * _value(second), axis=1)
            near, rest = near + _value(second), rest - _value(second)
        square += tl.sum(x * x, axis=1)
        kept += tl.sum(near * near, axis=1)
        lost += tl.sum(rest * rest, axis=1)
        place = packed_ptr + row[:, None] * WIDTH + column[None, :]
        if CODES:
            tl.store(place, first)
            if PRODUCTS == 3:
                tl.store(place + PADDED, second)
                tl.store(place + 2 * PADDED, first)
        else:
            # A power of two: nothing is rounded again.
            tl.store(place, (first.to(tl.float32) * -2.0).to(tl.bfloat16))
            if PRODUCTS == 3:
                tl.store(place + PADDED, (first.to(tl.float32) * -2.0).to(tl.bfloat16))
                tl.store(place + 2 * PADDED, (second.to(tl.float32) * -2.0).to(tl.bfloat16))
    length = tl.sqrt(square)
    tl.store(squares_ptr + row, square, mask=there)
    tl.store(finite_ptr + row, finite.to(tl.int8), mask=there)
    column = tl.arange(0, 16)[None, :]
    if CODES:
        norm = square * 0.0 if DOT else square * (1.0 - kappa)
        norm = tl.where(finite, norm, NEVER)
        one = _bfloat16(norm)
        two = _bfloat16(norm - _value(one))
        three = _bfloat16(norm - _value(one) - _value(two))
        bound = -length[:, None] * ENLARGED
        tail = tl.where(column == 0, _value(one)[:, None], 0.0)
        tail = tl.where(column == 1, _value(two)[:, None], tail)
        tail = tl.where(column == 2, _value(three)[:, None], tail)
        tail = tl.where(column == 3, bound, tail)
        tail = tl.where(column == 4, -tl.sqrt(lost)[:, None] * ENLARGED, tail)
        tail = tl.where(column == 5, -tl.sqrt(low)[:, None] * ENLARGED, tail)
    else:
        error = 2.0 * ENLARGED * (tl.sqrt(lost) + (lam + 2.0**-50) * length)
        tail = tl.where(column < 3, 1.0 + square[:, None] * 0.0, 0.0)
        tail = tl.where(column == 3, error[:, None], tail)
        tail = tl.where(column == 4, 2.0 * ENLARGED * tl.sqrt(kept)[:, None], tail)
        tail = tl.where(column == 5, 2.0 * ENLARGED * tl.sqrt(low)[:, None], tail)
    tl.store(packed_ptr + row[:, None] * WIDTH + PRODUCTS * PADDED + column, _bfloat16(tail))


@triton.jit
def _product(left, right, WIDEN: tl.constexpr):
    """A block of the packed product. Triton's interpreter multiplies the bits of bfloat16 numbers: it gets float32 ones."""
    if WIDEN:
        return tl.dot(left.to(tl.float32), right.to(tl.float32))
    return tl.dot(left, right)


@triton.jit
def screen(
    latents_ptr,
    codes_ptr,
    minima_ptr,
    tiles,
    tiles_each,
    bundles,
    MAIN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Minima of the scores of bundles of codes: LANES bundles per tile, one of every LANES-th code each.

    Scores never leave the registers, and a bundle's codes lie so that one thread holds most of them. Latents of one block
    stay in shared memory while the codes stream past; wider ones are read again for every tile.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * tiles_each
    tail = tl.arange(0, 16)
    main = tl.arange(0, BLOCK)
    latents = latents_ptr + row[:, None] * WIDTH
    bounds = tl.load(latents + MAIN + tail[None, :])
    whole = tl.load(latents + main[None, :])
    for tile in range(first, tl.minimum(first + tiles_each, tiles)):
        codes = codes_ptr + (tl.arange(0, CODES).to(tl.int64) + tile * CODES)[None, :] * WIDTH
        scores = _product(bounds, tl.load(codes + MAIN + tail[:, None]), WIDEN)
        if MAIN == BLOCK:
            scores += _product(whole, tl.load(codes + main[:, None]), WIDEN)
        else:
            for left in range(0, MAIN, BLOCK):
                part = tl.load(latents + left + main[None, :])
                scores += _product(part, tl.load(codes + left + main[:, None]), WIDEN)
        lowest = tl.min(tl.reshape(scores, [ROWS, CODES // LANES, LANES]), axis=1)
        tl.store(minima_ptr + row[:, None] * bundles + tile * LANES + tl.arange(0, LANES)[None, :], lowest)


@triton.jit
def _places(D: tl.constexpr, LEVELS: tl.constexpr):
    """Where the terms of a sum lie so that halving a power of two adds them in the order of `reference._folded`.

    (places (2^LEVELS,), which of them hold a term).
    """
    position = tl.arange(0, 1 << LEVELS)
    place = position * 0
    inside = position >= 0
    for level in tl.static_range(LEVELS):
        here = (D + (1 << (LEVELS - level)) - 1) >> (LEVELS - level)
        above = (D + (1 << (LEVELS - level - 1)) - 1) >> (LEVELS - level - 1)
        place += ((position >> level) & 1) * here
        inside = inside & (place < above)
    return tl.where(inside, place, 0), inside


@triton.jit
def _visit(
    bundle, z, place, inside, table_ptr, finite_ptr, codes, best, index,
    D: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, TOGETHER: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """(best float64 score, lowest index) after the codes of a bundle."""
    first = bundle // LANES * TILE + bundle % LANES
    for member in range(0, TILE // LANES, TOGETHER):
        code = first + (member + tl.arange(0, TOGETHER)) * LANES
        there = code < codes
        usable = tl.load(finite_ptr + code, mask=there, other=0) != 0
        e = tl.load(
            table_ptr + code.to(tl.int64)[:, None] * D + place[None, :],
            mask=usable[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float64)
        if DOT:
            terms = z[None, :] * e
        else:
            terms = (z[None, :] - e) * (z[None, :] - e)
        for level in tl.static_range(LEVELS):
            terms = tl.sum(tl.reshape(terms, [TOGETHER, 2, 1 << (LEVELS - level - 1)]), axis=1)
        score = tl.reshape(terms, [TOGETHER])
        if DOT:
            score = -score
        score = tl.where(usable, score, float("inf"))
        lowest = tl.min(score, axis=0)
        which = tl.min(tl.where(score == lowest, code, codes), axis=0)
        better = (lowest < best) | ((lowest == best) & (which < index))
        index = tl.where(better, which, index)
        best = tl.where(better, lowest, best)
    return best, index


@triton.jit
def _limit(best, square, length, longest, scale, D: tl.constexpr, DOT: tl.constexpr):
    """The largest lower bound that a code as good as the best one can have."""
    reached = best * scale * scale
    slack = (D + 8) * 2.0**-50 * (square + length * longest + tl.abs(reached))
    slack += 2.0**-118 * (D + 16) * (4.0 + length + longest)
    if DOT:
        return 2.0 * reached + slack
    return reached - square + slack


@triton.jit
def _both(mask, scalar):
    """A mask where a scalar condition holds; the interpreter's `&` of the two is no mask."""
    return tl.where(mask, scalar.to(tl.int32), 0) > 0


@triton.jit
def settle(
    z_ptr,
    table_ptr,
    minima_ptr,
    usable_ptr,
    present_ptr,
    squares_ptr,
    longest_ptr,
    scale_ptr,
    counted_ptr,
    index_ptr,
    score_ptr,
    counts_ptr,
    sums_ptr,
    codes,
    bundles,
    D: tl.constexpr,
    LEVELS: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    TOGETHER: tl.constexpr,
    DOT: tl.constexpr,
    MASKED: tl.constexpr,
    COUNT: tl.constexpr,
    SUM: tl.constexpr,
):
    """The exact nearest code of one latent: its best bundle first, then every bundle whose lower bound is not above.

    How many bundles that are is known to this program alone; nothing outside depends on it.
    """
    row = tl.program_id(0).to(tl.int64)
    place, inside = _places(D, LEVELS)
    present = tl.load(present_ptr + row) != 0
    z = tl.load(z_ptr + row * D + place, mask=_both(inside, present), other=0.0).to(tl.float64)
    square, longest, scale = tl.load(squares_ptr + row), tl.load(longest_ptr), tl.load(scale_ptr)
    length = tl.sqrt(square)
    minima = minima_ptr + row * bundles
    lowest = (square * 0.0).to(tl.float32) + NEVER
    start = tl.program_id(0) * 0
    for left in range(0, bundles, CHUNK):
        slot = left + tl.arange(0, CHUNK)
        bound = tl.load(minima + slot, mask=slot < bundles, other=NEVER)
        value = tl.min(bound, axis=0)
        here = tl.min(tl.where(bound == value, slot, bundles), axis=0)
        start = tl.where(value < lowest, here, start)
        lowest = tl.minimum(value, lowest)
    best = square * 0.0 + float("inf")
    index = tl.program_id(0) * 0
    best, index = _visit(
        start, z, place, inside, table_ptr, usable_ptr, codes, best, index, D, LEVELS, TILE, LANES, TOGETHER, DOT
    )
    limit = _limit(best, square, length, longest, scale, D, DOT)
    for left in range(0, bundles, CHUNK):
        slot = left + tl.arange(0, CHUNK)
        bound = tl.load(minima + slot, mask=slot < bundles, other=NEVER)
        bound = tl.where(slot == start, NEVER, bound)
        value = tl.min(bound, axis=0)
        while present & (value.to(tl.float64) <= limit) & (value < 0.5 * NEVER):
            here = tl.min(tl.where(bound == value, slot, bundles), axis=0)
            best, index = _visit(
                here, z, place, inside, table_ptr, usable_ptr, codes, best, index, D, LEVELS, TILE, LANES, TOGETHER, DOT
            )
            limit = _limit(best, square, length, longest, scale, D, DOT)
            bound = tl.where(slot == here, NEVER, bound)
            value = tl.min(bound, axis=0)
    index = tl.where(present, index, 0)
    tl.store(index_ptr + row, index.to(tl.int64))
    tl.store(score_ptr + row, tl.where(present, best, float("nan")))
    if COUNT:
        counted = present
        if MASKED:
            counted = counted & (tl.load(counted_ptr + row) != 0)
        tl.atomic_add(counts_ptr + index, 1, mask=counted, sem="relaxed")
        if SUM:
            tl.atomic_add(
                sums_ptr + index.to(tl.int64) * D + place, z.to(tl.float32), mask=_both(inside, counted), sem="relaxed"
            )
