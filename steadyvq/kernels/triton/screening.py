# SPDX-License-Identifier: Apache-2.0
"""Exact search on a graphics card: lower bounds from the tensor cores, then float64 for what they leave open.

Two kernels, and no value of a tensor is ever asked for by the host:

1. `screen` multiplies packed bfloat16 rows. Six more columns (`pack`) make every score a lower bound of the exact one, by item
   7 of `rounding`. Only the minimum of each bundle of codes is written: N K / 16 or N K / 32 numbers, in blocks of latents
   that keep them below 64 MB.
2. `settle` has one program per latent. It scores the bundle with the lowest bound in float64, in the order of summation that
   is part of the contract, then every bundle whose bound is not above what has been found. The number of those is a loop
   inside the program and no shape of anything, so a launch is the same whatever the data, and can be captured in a CUDA
   graph. In the worst case, codes that bfloat16 cannot tell apart, it is all of them, which costs the float64 search and
   gives the same result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steadyvq.kernels.rounding import screen_shares
from steadyvq.kernels.triton.tiles import LANES, Tiles, block_of, capability_of, fitted, interpreted

# Numbers that one block of latents may write: 64 MB of float32.
_MINIMA = 1 << 24
_EXPONENT = 40
_PACK_ROWS = 16


class Found(NamedTuple):
    """What a search returns.

    Attributes:
        indices: (N,) int64.
        score: (N,) float64.
        counts: (K,) int32 latents per code; empty if not asked for.
        sums: (K, d) float32 sums of the latents of each code; empty if not asked for.
    """

    indices: Tensor
    score: Tensor
    counts: Tensor
    sums: Tensor


class Packed(NamedTuple):
    """Rows made ready for the screen.

    Attributes:
        rows: (n', width) bfloat16, n' a multiple of the tile.
        squares: (n,) float64 squared lengths, scaled and centred.
        finite: (n,) int8.
    """

    rows: Tensor
    squares: Tensor
    finite: Tensor


class Frame(NamedTuple):
    """What both inputs are brought to: times a power of two, less the mean of the codes.

    Attributes:
        scale: 0-d float64.
        centre: (d,) float64, in scaled units.
    """

    scale: Tensor
    centre: Tensor


def nothing_found(z: Tensor, table: Tensor, count: bool = False, total: bool = False) -> Found:
    """Room for the results of a search."""
    return Found(
        z.new_empty(z.shape[0], dtype=torch.int64),
        z.new_empty(z.shape[0], dtype=torch.float64),
        z.new_zeros(table.shape[0] if count else 0, dtype=torch.int32),
        z.new_zeros(table.shape[0] if total else 0, z.shape[1], dtype=torch.float32),
    )


def frame_of(z: Tensor, table: Tensor, dot: bool, exponent: int = _EXPONENT) -> Frame:
    """The frame that brings the largest finite entry to [2^(exponent - 1), 2^exponent), without asking the device for it."""
    largest = torch.stack([t.nan_to_num(0.0, 0.0, 0.0).abs().amax().double() for t in (z, table)]).amax()
    power = exponent - torch.frexp(largest).exponent
    # A power of two from its bits: `exp2` may round.
    scale = ((power.to(torch.int64) + 1023) << 52).view(torch.float64)
    centre = table.nan_to_num(0.0, 0.0, 0.0).mean(0, dtype=torch.float64) * scale
    return Frame(scale, torch.zeros_like(centre) if dot else centre)


def width_of(dim: int, products: int) -> tuple[int, int, int]:
    """(block, padded d, columns) of packed rows of d entries."""
    block = block_of(dim, 128 if dim <= 128 and products == 1 else 64)
    padded = -(-dim // block) * block
    return block, padded, products * padded + 16


def packed(rows: Tensor, frame: Frame, multiple: int, *, codes: bool, dot: bool, products: int) -> Packed:
    """Packs latents or codes (n, d), padded to a multiple of the tile by rows that are never chosen."""
    from steadyvq.kernels.triton import device_search as device

    count, dim = rows.shape
    block, padded, width = width_of(dim, products)
    total = -(-count // multiple) * multiple
    out = rows.new_empty(total, width, dtype=torch.bfloat16)
    squares, finite = rows.new_empty(count, dtype=torch.float64), rows.new_empty(count, dtype=torch.int8)
    kappa, lam = screen_shares(width)
    device.pack[(total // _PACK_ROWS,)](
        rows,
        out,
        squares,
        finite,
        frame.scale,
        frame.centre,
        count,
        kappa,
        lam,
        D=dim,
        PADDED=padded,
        WIDTH=width,
        PRODUCTS=products,
        CODES=codes,
        DOT=dot,
        ROWS=_PACK_ROWS,
        BLOCK=block,
        enable_fp_fusion=False,
    )
    return Packed(out, squares, finite)


def lower_bounds(latents: Tensor, codes: Tensor, dim: int, products: int, tiles: Tiles) -> Tensor:
    """(n', bundles) float32 minima of packed latents over bundles of packed codes."""
    from steadyvq.kernels.triton import device_search as device

    block, padded, width = width_of(dim, products)
    tiles = fitted(tiles, capability_of(latents.device), block, products * padded)
    count, across = latents.shape[0] // tiles.rows, codes.shape[0] // tiles.codes
    # About a thousand programs keep a card busy; beyond that, longer ones read the latents fewer times.
    each = max(1, -(-across * count // 1024))
    minima = latents.new_empty(latents.shape[0], across * LANES, dtype=torch.float32)
    device.screen[(count, -(-across // each))](
        latents,
        codes,
        minima,
        across,
        each,
        minima.shape[1],
        MAIN=products * padded,
        WIDTH=width,
        ROWS=tiles.rows,
        CODES=tiles.codes,
        BLOCK=block,
        LANES=LANES,
        WIDEN=interpreted(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return minima


class Settling(NamedTuple):
    """What is the same for all blocks of latents when their candidates are settled.

    Attributes:
        table: (K, d) codes as they were given.
        usable: (K,) int8 codes that are finite.
        longest: 0-d float64, the largest length of a code, scaled and centred.
        frame: Of both inputs.
        dot: Whether inner products are compared.
        codes: Codes per tile of the screen.
    """

    table: Tensor
    usable: Tensor
    longest: Tensor
    frame: Frame
    dot: bool
    codes: int

    def run(
        self, z: Tensor, latents: Packed, rows: slice, minima: Tensor, found: Found, counted: Tensor | None = None
    ) -> None:
        """Finds the codes of a block of latents from its minima; writes to `found`."""
        from steadyvq.kernels.triton import device_search as device

        dim = z.shape[1]
        levels = (dim - 1).bit_length()
        members = self.codes // LANES
        bundles = minima.shape[1]
        device.settle[(rows.stop - rows.start,)](
            z[rows],
            self.table,
            minima,
            self.usable,
            latents.finite[rows],
            latents.squares[rows],
            self.longest,
            self.frame.scale,
            found.counts if counted is None else counted[rows],
            found.indices[rows],
            found.score[rows],
            found.counts,
            found.sums,
            self.table.shape[0],
            bundles,
            D=dim,
            LEVELS=levels,
            TILE=self.codes,
            LANES=LANES,
            CHUNK=min(1024, block_of(bundles, 1024)),
            TOGETHER=max(1, min(members, 2048 >> levels)),
            DOT=self.dot,
            MASKED=counted is not None,
            COUNT=found.counts.numel() > 0,
            SUM=found.sums.numel() > 0,
            num_warps=4 if levels <= 8 else 8,
            enable_fp_fusion=False,
        )


def find(
    z: Tensor,
    table: Tensor,
    *,
    dot: bool,
    products: int,
    tiles: Tiles,
    counted: Tensor | None = None,
    count: bool = False,
    total: bool = False,
    block_rows: int | None = None,
) -> Found:
    """The search. N >= 1, and both inputs are float32 or shorter, contiguous, on one device.

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        dot: Largest inner product in place of smallest distance.
        products: 1 screens rounded entries; 3 splits them in two, which leaves fewer candidates at three times the price.
        tiles: Of the screen.
        counted: (N,) bool, which latents count; None for all that are finite.
        count: Count the latents of every code in the same pass.
        total: Add them up too, with float atomics: the last bits vary.
        block_rows: Latents per block, a multiple of the tile (None: what keeps their minima below 64 MB).
    """
    frame = frame_of(z, table, dot)
    codes = packed(table, frame, tiles.codes, codes=True, dot=dot, products=products)
    latents = packed(z, frame, tiles.rows, codes=False, dot=dot, products=products)
    bundles = codes.rows.shape[0] // tiles.codes * LANES
    block = block_rows or max(tiles.rows, _MINIMA // bundles // tiles.rows * tiles.rows)
    found = nothing_found(z, table, count, total)
    settling = Settling(table, codes.finite, codes.squares.amax().sqrt(), frame, dot, tiles.codes)
    given = None if counted is None else counted.to(torch.int8)
    for top in range(0, z.shape[0], block):
        part = latents.rows[top : top + block]
        minima = lower_bounds(part, codes.rows, z.shape[1], products, tiles)
        settling.run(z, latents, slice(top, min(top + block, z.shape[0])), minima, found, given)
    return found
