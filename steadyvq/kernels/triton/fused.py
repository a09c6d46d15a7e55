# SPDX-License-Identifier: Apache-2.0
"""Search and log-sum-exp of the softmax over codes in one pass over the codes, on a graphics card.

Float32 scores serve both: less the proven slack of `rounding.slack_of` they are lower bounds for the search, whose candidates
are settled in float64 as always, and their exponentials are added up while they are in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steadyvq.kernels.rounding import slack_of
from steadyvq.kernels.triton.screening import Frame, Packed, Settling, frame_of, nothing_found
from steadyvq.kernels.triton.tiles import LANES, Tiles, block_of, capability_of, softmax_tiles

# Three TF32 products leave about 2^-21 of the operands; their sums are cut as those of all tensor cores.
_OPERAND, _ACCUMULATE = 2.0**-20, 4 * 2.0**-24
_MINIMA = 1 << 24
_NEVER = 2.0**126


def nearest_and_normaliser(
    z: Tensor, table: Tensor, temperature: Tensor, *, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(indices, float64 score, float32 log sum_j exp(-|z - e_j|^2 / tau)) of every latent; the last is nan where it is broken.

    Args:
        z: (N, d) latents, N >= 1, float32 or shorter, contiguous.
        table: (K, d) codes, likewise; broken ones have no weight.
        temperature: tau > 0 (0-d).
        tiles: Chosen from the card if None.
    """
    from steadyvq.kernels.triton import device_softmax as device

    tiles = tiles or softmax_tiles(capability_of(z.device))
    # Entries near 1: squared scales must leave the temperature within float32.
    frame = frame_of(z, table, False, exponent=0)
    latents, packed = _scaled(z, frame)
    codes, packed_codes = _scaled(table, frame)
    norms = torch.where(packed_codes.finite != 0, packed_codes.squares.float(), _NEVER)
    longest = packed_codes.squares.amax().sqrt()
    dim = z.shape[1]
    slack = slack_of(packed.squares.sqrt().float(), longest.float(), dim, _OPERAND, _ACCUMULATE)
    alpha = 1.0 / (temperature.double() * frame.scale.square())
    block = block_of(dim, 32)
    bundles = -(-table.shape[0] // tiles.codes) * LANES
    step = max(tiles.rows, _MINIMA // bundles // tiles.rows * tiles.rows)
    found, shift = nothing_found(z, table), torch.empty_like(slack)
    settling = Settling(table, packed_codes.finite, longest, frame, False, tiles.codes)
    for top in range(0, z.shape[0], step):
        rows = slice(top, min(top + step, z.shape[0]))
        count = rows.stop - rows.start
        minima = slack.new_empty(count, bundles)
        device.screen_and_reduce[(-(-count // tiles.rows),)](
            latents[rows],
            codes,
            norms,
            slack[rows],
            alpha.float(),
            minima,
            shift[rows],
            count,
            table.shape[0],
            bundles,
            D=dim,
            PADDED=-(-dim // block) * block,
            ROWS=tiles.rows,
            CODES=tiles.codes,
            BLOCK=block,
            LANES=LANES,
            PRECISION="tf32x3",
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        settling.run(z, packed, rows, minima, found)
    normaliser = (shift.double() - packed.squares * alpha).float()
    return found.indices, found.score, normaliser.masked_fill(packed.finite == 0, torch.nan)


def _scaled(rows: Tensor, frame: Frame) -> tuple[Tensor, Packed]:
    """Rows scaled and centred in float32, and what the search must know of them; broken rows are zero."""
    finite = rows.isfinite().all(1)
    exact = rows.double().mul_(frame.scale).sub_(frame.centre)
    exact = torch.where(finite.unsqueeze(1), exact, 0.0)
    single = exact.float()
    return single, Packed(single, torch.linalg.vecdot(exact, exact), finite.to(torch.int8))
