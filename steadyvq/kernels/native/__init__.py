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
_BUNDLES = ((65536, 8), (math.inf, 16))
# Latents whose minima are kept at a time, in tiles; a few MB at K = 65,536.
_TILES_PER_BLOCK = 32
# Powers of two that bring inputs to a common scale: one float32 factor, and sums of codes do not overflow before it. Inputs
# whose largest entry is above 2^100 or below 2^-60 go to `streaming`.
_EXPONENTS = range(-60, 101)


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
    if screened and bfloat16 is None and looked.float32 > start * _worth(*codes.shape):
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
    packed, norms, starts = _pack_codes(kernel, codes, scale, centre, bfloat16)
    latents, tiles, lengths = _pack_latents(kernel, z, scale, centre, bfloat16)
    slack = slack_of(lengths, norms[:count].amax().sqrt(), d, 0.0, 2.0**-24)
    if dot:
        norms[:count] = starts[:count] = 0.0
    tensors = (z, codes, latents, tiles, packed, norms, starts, centre, slack)
    problem = _Problem(rows, d, count, norms.shape[0] // _GROUP, _bundle(count), *(t.data_ptr() for t in tensors))
    problem.scale, problem.bfloat16, problem.dot = scale, int(bfloat16), int(dot)
    return _Prepared(problem, tensors)


def _worth(num_codes: int, dim: int) -> float:
    """How many codes a latent may look at again before float32 products would have been quicker.

    In cycles of a unit of 16 lanes: K d / 16 for products in float32, K (d + 2) / 32 in bfloat16, 15 + d / 4 for each code.
    """
    saved = num_codes * (dim - 2) / 32
    return 2 * _bundle(num_codes) + saved / (15 + dim / 4)


def _bundle(num_codes: int) -> int:
    return next(bundle for most, bundle in _BUNDLES if num_codes <= most)


def _pack_codes(
    kernel: Library, codes: Tensor, scale: float, centre: Tensor, bfloat16: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in groups, their squared lengths, and where the sums of their scores begin."""
    count, d = codes.shape
    bundle = _bundle(count)
    groups = -(-count // (_GROUP * bundle)) * bundle
    width = _width(kernel, d, bfloat16)
    packed = torch.empty(groups * width * _GROUP, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    norms = torch.empty(groups * _GROUP)
    starts = torch.empty_like(norms) if bfloat16 else norms
    given = (_at(codes), ctypes.c_int64(count), ctypes.c_int64(d), ctypes.c_float(scale), _at(centre))

    def work(begin: int, end: int) -> None:
        limits = ctypes.c_int64(begin), ctypes.c_int64(end)
        if bfloat16:
            kappa = ctypes.c_float(screen_of(d).kappa)
            kernel.call("pack_bfloat16", *given, kappa, *limits, _at(packed), _at(norms), _at(starts))
        else:
            kernel.call("pack_float32", *given, *limits, _at(packed), _at(norms))

    _in_threads(work, groups)
    return packed, norms, starts


def _pack_latents(
    kernel: Library, z: Tensor, scale: float, centre: Tensor, bfloat16: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents scaled and centred, the same in tiles, and their lengths."""
    rows, d = z.shape
    count = -(-rows // kernel.rows)
    width = _width(kernel, d, bfloat16)
    latents, squares = torch.empty(count * kernel.rows, d), torch.empty(count * kernel.rows)
    tiles = torch.empty(count * kernel.rows * width, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    given = (_at(z), ctypes.c_int64(rows), ctypes.c_int64(d), ctypes.c_float(scale), _at(centre))
    outputs = (ctypes.c_int32(bfloat16), _at(latents), _at(tiles), _at(squares))
    lam = ctypes.c_float(screen_of(d).lam)

    def work(begin: int, end: int) -> None:
        kernel.call("pack_latents", *given, lam, ctypes.c_int64(begin), ctypes.c_int64(end), *outputs)

    _in_threads(work, count)
    return latents, tiles, squares.sqrt_()


def _width(kernel: Library, dim: int, bfloat16: bool) -> int:
    """Columns of the product."""
    return kernel.call("bfloat16_width", ctypes.c_int64(dim)) if bfloat16 else dim


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _run(kernel: Library, prepared: _Prepared, first: int, last: int, indices: Tensor, score: Tensor) -> _Looked:
    """Searches for rows [first, last), in as many threads as torch has; `first` is a multiple of a tile."""
    tiles = -(-(last - first) // kernel.rows)
    block = ctypes.c_int64(_TILES_PER_BLOCK * kernel.rows)
    parts: list[Tensor] = []

    def work(begin: int, end: int) -> None:
        looked = torch.zeros(2, dtype=torch.int64)
        limits = (min(last, first + place * kernel.rows) for place in (begin, end))
        problem, outputs = ctypes.byref(prepared.problem), (_at(indices), _at(score), _at(looked))
        if kernel.call("search", problem, *map(ctypes.c_int64, limits), block, *outputs):
            raise MemoryError("no memory for the minima of a block of latents: search with fewer codes or threads")
        parts.append(looked)

    _in_threads(work, tiles)
    single, double = torch.stack(parts).sum(0).tolist()
    return _Looked(single, double)


def _in_threads(work: Callable[[int, int], None], count: int) -> None:
    """Cuts [0, count) into one range for every thread of torch."""
    threads = max(1, min(torch.get_num_threads(), count))
    share = -(-count // threads)
    limits = [(min(count, number * share), min(count, (number + 1) * share)) for number in range(threads)]
    if threads == 1:
        work(*limits[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, *limit) for limit in limits]:
            done.result()


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
    assert logits.is_contiguous()
    kernel, (rows, codes), winner = library(), logits.shape, winner.contiguous()
    outputs = torch.empty(4, rows)

    def work(begin: int, end: int) -> None:
        part = slice(begin, end)
        size = ctypes.c_int64(end - begin), ctypes.c_int64(codes)
        places = (_at(output[part]) for output in outputs)
        kernel.call("softmax_rows", _at(logits[part]), *size, _at(winner[part]), ctypes.c_int32(losers), *places)

    _in_threads(work, rows)
    largest, top, rest, cost = outputs
    return largest, top, rest, cost
