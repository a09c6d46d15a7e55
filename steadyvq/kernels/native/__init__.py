# SPDX-License-Identifier: Apache-2.0
"""What torch's operators cannot fuse, in C for CPUs: an exact search whose scores never leave the registers, and softmax rows.

A tile of scores is reduced to minima of bundles of 16 codes (`search.c`) while it is being computed, in bfloat16 where the
processor multiplies those, else in float32. The bundles that may hold the nearest code, by the proven bounds of `rounding`, are
looked at again in float32, and what is left in float64, with the bits of `reference`. So the result is that of every other
backend, and no N x K array, not even a tile of one, is written to memory.

float64 inputs, more than 4,096 dimensions and entries near the ends of float32 go to `streaming`.
"""

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from steadyvq.kernels import streaming
from steadyvq.kernels.native.build import Library, library
from steadyvq.kernels.rounding import exponent_of, screen_of, slack_of, working_dtype
from steadyvq.kernels.search import over_finite

__all__ = ["LEAST_WORK", "MOST_DIMENSIONS", "library", "nearest", "softmax_rows"]

LEAST_WORK = 1 << 18
"""Multiplications below which compiling a kernel does not pay: everything takes less than a millisecond."""

MOST_DIMENSIONS = 4096
"""Lengths are summed in float32; `rounding.screen_of` allows for this many terms."""

_GROUP = 16
# Groups per bundle: wide bundles make few minima but many codes to look at again. (up to K, bundle); multiples of a panel.
_BUNDLES = ((4096, 8), (math.inf, 16))
# Latents whose minima are kept at a time, in tiles; a few MB at K = 65,536.
_TILES_PER_BLOCK = 32
# Powers of two that bring inputs to a common scale: one float32 factor, and sums of codes do not overflow before it. Inputs
# whose largest entry is above 2^100 or below 2^-60 go to `streaming`.
_EXPONENTS = range(-60, 101)
# bfloat16 is given up where a latent has to look at more than this share of the codes again, which costs what it saves.
_TOO_MANY = 1 / 64


class _Problem(ctypes.Structure):
    """`Problem` of search.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "d", "codes", "groups", "bundle")),
        *(
            (name, ctypes.c_void_p)
            for name in ("z", "table", "latents", "tiles", "packed", "norms", "centre", "screen")
        ),
        ("slack", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("bfloat16", ctypes.c_int32),
        ("dot", ctypes.c_int32),
    )


class _Prepared(NamedTuple):
    """One problem and the tensors that it points to."""

    problem: _Problem
    tensors: tuple[Tensor, ...]


class _Looked(NamedTuple):
    """Pairs of a run that were scored again."""

    float32: int
    float64: int


def nearest(z: Tensor, table: Tensor, *, dot: bool = False, bfloat16: bool | None = None) -> tuple[Tensor, Tensor]:
    """Exact nearest code of every latent; same contract as `reference.nearest`.

    Args:
        z: (N, d) latents on the CPU.
        table: (K, d) codes.
        dot: largest inner product in place of smallest distance.
        bfloat16: whether to screen in bfloat16 (None: where the processor does, as long as it pays).

    Returns:
        indices: (N,) int64.
        score: (N,) float64 squared distance.

    Raises:
        ValueError: there is no compiled kernel, or no bfloat16 on this processor.
    """
    if working_dtype(z, table) == torch.float64 or z.shape[1] > MOST_DIMENSIONS:
        return streaming.nearest(z, table, dot=dot)
    found = library()
    if found.functions is None:
        raise ValueError(f"the native kernel is not there ({found.reason}): use the backend 'streaming' or 'auto'")
    if bfloat16 and not found.bfloat16:
        raise ValueError("this processor has no bfloat16 products (AVX512-BF16): leave the choice to the kernel")
    return over_finite(partial(_search, bfloat16=bfloat16), z, table, dot)


def _search(
    z: Tensor, codes: Tensor, ids: Tensor, dot: bool, patience: int | None, *, bfloat16: bool | None
) -> tuple[Tensor, Tensor] | None:
    """See `search.Search`. The first block of latents shows what the bounds are worth on this data."""
    kernel = library()
    exponent = exponent_of(z, codes)
    if exponent not in _EXPONENTS:
        return streaming.tiled_search(z, codes, ids, dot, patience, rows=None, columns=None)
    z, codes = z.float().contiguous(), codes.float().contiguous()
    indices = torch.empty(z.shape[0], dtype=torch.int64)
    score = torch.empty(z.shape[0], dtype=torch.float64)
    screened = kernel.bfloat16 if bfloat16 is None else bfloat16
    prepared = _prepare(kernel, z, codes, exponent, dot, screened)
    block = _TILES_PER_BLOCK * kernel.rows
    start = min(block, z.shape[0])
    looked = _run(kernel, prepared, 0, start, indices, score)
    if (
        screened
        and bfloat16 is None
        and looked.float32 > _TOO_MANY * start * codes.shape[0] + 4 * _bundle(codes.shape[0]) * start
    ):
        prepared = _prepare(kernel, z, codes, exponent, dot, False)
        looked = _run(kernel, prepared, 0, start, indices, score)
    if patience is not None and looked.float64 * z.shape[0] > patience * start:
        return None
    _run(kernel, prepared, start, z.shape[0], indices, score)
    return ids[indices], score


def _prepare(kernel: Library, z: Tensor, codes: Tensor, exponent: int, dot: bool, bfloat16: bool) -> _Prepared:
    """Packs latents and codes as search.c reads them, and bounds their errors."""
    (rows, d), count = z.shape, codes.shape[0]
    scale = 2.0**exponent
    centre = torch.zeros(d) if dot else codes.mean(0) * scale
    packed, norms, longest, lost = _pack_codes(kernel, codes, scale, centre, bfloat16)
    latents, tiles, lengths, rounding = _pack_latents(kernel, z, scale, centre, bfloat16)
    slack = slack_of(lengths, longest, d, 0.0, 2.0**-24)
    screen = screen_of(lengths, rounding, longest, lost, d) if bfloat16 else slack
    if dot:
        norms[:count] = 0.0
    tensors = (z, codes, latents, tiles, packed, norms, centre, screen, slack)
    problem = _Problem(rows, d, count, norms.shape[0] // _GROUP, _bundle(count), *(t.data_ptr() for t in tensors))
    problem.scale, problem.bfloat16, problem.dot = scale, int(bfloat16), int(dot)
    return _Prepared(problem, tensors)


def _bundle(num_codes: int) -> int:
    return next(bundle for most, bundle in _BUNDLES if num_codes <= most)


def _pack_codes(
    kernel: Library, codes: Tensor, scale: float, centre: Tensor, bfloat16: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes in groups, their squared norms, and the largest length of a code and of what one lost by rounding (0-d)."""
    assert kernel.functions is not None
    count, d = codes.shape
    bundle = _bundle(count)
    groups = -(-count // (_GROUP * bundle)) * bundle
    norms = torch.empty(groups * _GROUP)
    width, dtype = (d + d % 2, torch.bfloat16) if bfloat16 else (d, torch.float32)
    packed = torch.empty(groups * width * _GROUP, dtype=dtype)
    outputs = [packed, norms, *([torch.empty_like(norms)] if bfloat16 else [])]
    pack = kernel.functions.pack_bfloat16 if bfloat16 else kernel.functions.pack_float32
    threads = max(1, min(torch.get_num_threads(), groups // bundle))
    share = -(-groups // threads)

    def work(number: int) -> int:
        begin = min(groups, number * share)
        places = (ctypes.c_void_p(t.data_ptr()) for t in outputs)
        limits = (ctypes.c_int64(begin), ctypes.c_int64(min(groups, begin + share)))
        table, where = ctypes.c_void_p(codes.data_ptr()), ctypes.c_void_p(centre.data_ptr())
        pack(table, ctypes.c_int64(count), ctypes.c_int64(d), ctypes.c_float(scale), where, *limits, *places)
        return 0

    _in_threads(work, threads)
    longest, lost = (t[:count].amax().sqrt() for t in (norms, outputs[-1]))
    return packed, norms, longest, lost


def _pack_latents(
    kernel: Library, z: Tensor, scale: float, centre: Tensor, bfloat16: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents scaled and centred, the same in tiles, and the lengths of each and of what it lost by rounding."""
    assert kernel.functions is not None
    functions, (rows, d) = kernel.functions, z.shape
    count = -(-rows // kernel.rows)
    latents = torch.empty(count * kernel.rows, d)
    width, dtype = (d + d % 2, torch.bfloat16) if bfloat16 else (d, torch.float32)
    tiles = torch.empty(count * kernel.rows * width, dtype=dtype)
    squares, errors = torch.empty(2, count * kernel.rows)
    threads = max(1, min(torch.get_num_threads(), count))
    share = -(-count // threads)

    def work(number: int) -> int:
        begin = min(count, number * share)
        sizes = (ctypes.c_int64(rows), ctypes.c_int64(d), ctypes.c_float(scale), ctypes.c_void_p(centre.data_ptr()))
        limits = (ctypes.c_int64(begin), ctypes.c_int64(min(count, begin + share)), ctypes.c_int32(bfloat16))
        outputs = (ctypes.c_void_p(t.data_ptr()) for t in (latents, tiles, squares, errors))
        functions.pack_latents(ctypes.c_void_p(z.data_ptr()), *sizes, *limits, *outputs)
        return 0

    _in_threads(work, threads)
    return latents, tiles, squares.sqrt_(), errors.sqrt_()


def _run(kernel: Library, prepared: _Prepared, first: int, last: int, indices: Tensor, score: Tensor) -> _Looked:
    """Searches for rows [first, last), in as many threads as torch has."""
    functions, block = kernel.functions, _TILES_PER_BLOCK * kernel.rows
    assert functions is not None
    threads = max(1, min(torch.get_num_threads(), -(-(last - first) // block)))
    share = -(-(last - first) // (threads * kernel.rows)) * kernel.rows
    looked = torch.zeros(threads, 2, dtype=torch.int64)

    def work(number: int) -> int:
        begin = min(last, first + number * share)
        arguments = (begin, min(last, begin + share), block)
        outputs = (ctypes.c_void_p(t.data_ptr()) for t in (indices, score, looked[number]))
        return int(functions.search(ctypes.byref(prepared.problem), *map(ctypes.c_int64, arguments), *outputs))

    if any(_in_threads(work, threads)):
        raise MemoryError("no memory for the minima of a block of latents: search with fewer codes or threads")
    single, double = looked.sum(0).tolist()
    return _Looked(single, double)


def _in_threads(work: Callable[[int], int], threads: int) -> list[int]:
    if threads == 1:
        return [work(0)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(threads)))


def softmax_rows(logits: Tensor, winner: Tensor, losers: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turns a block of logits into the weights exp(l - m) in place, m the largest of each row, and adds them up.

    Weights below e^-60 are zero, and so is the winner's with `losers`.

    Args:
        logits: (R, K) float32, contiguous, at least one column.
        winner: (R,) int64.
        losers: zero the winner's weight.

    Returns:
        largest: (R,) m.
        top: (R,) weight of the winner.
        rest: (R,) sum of all other weights.
        cost: (R,) sum of w (l - m) over the weights that are left.
    """
    functions = library().functions
    assert functions is not None
    assert logits.is_contiguous()
    (rows, codes), winner = logits.shape, winner.contiguous()
    outputs = torch.empty(4, rows)
    threads = max(1, min(torch.get_num_threads(), rows))
    share = -(-rows // threads)

    def work(number: int) -> int:
        part = slice(min(rows, number * share), min(rows, (number + 1) * share))
        count = (ctypes.c_int64(part.stop - part.start), ctypes.c_int64(codes))
        places = (ctypes.c_void_p(t[part].data_ptr()) for t in outputs)
        given = (ctypes.c_void_p(t[part].data_ptr()) for t in (logits, winner))
        functions.softmax_rows(next(given), *count, next(given), ctypes.c_int32(losers), *places)
        return 0

    _in_threads(work, threads)
    largest, top, rest, cost = outputs
    return largest, top, rest, cost
