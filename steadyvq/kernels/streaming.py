# SPDX-License-Identifier: Apache-2.0
"""Exact search in tiles: memory is a tile plus the outputs, whatever N x K is. Runs on any device with float64.

A tile of scores in working precision is reduced to minima of bundles of codes; what lies within the proven slack (`rounding`)
of the smallest is scored again in float64.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from steadyvq.kernels.reference import negative_product, squared_distance
from steadyvq.kernels.rounding import exponent_of, roundoff, scaled, slack_of, working_dtype
from steadyvq.kernels.search import over_finite

# Tile widths are multiples of the first of these numbers. A tile of C columns is first reduced to bundles of g: columns
# s, s + C/g, s + 2C/g, ... share one entry.
_GROUPS = (32, 16, 8, 4, 2)
# A pair of float64 vectors is re-scored in chunks of at most this many entries (a few MB).
_CHUNK = 1 << 18


def nearest(
    z: Tensor, table: Tensor, *, dot: bool = False, block_rows: int | None = None, block_codes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Exact nearest code of every latent; same contract as `reference.nearest`.

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        dot: largest inner product in place of smallest distance.
        block_rows: latents per tile, chosen from the size if None.
        block_codes: codes per tile, chosen from the size if None.

    Returns:
        indices: (N,) int64.
        score: (N,) float64 squared distance.
    """
    return over_finite(partial(tiled_search, rows=block_rows, columns=block_codes), z, table, dot)


def tiled_search(
    z: Tensor, codes: Tensor, ids: Tensor, dot: bool, patience: int | None, *, rows: int | None, columns: int | None
) -> tuple[Tensor, Tensor] | None:
    """(indices, float64 score) over tiles; None as soon as more than `patience` candidates were re-scored."""
    rows, columns = _tile_shape(z, codes.shape[0], rows, columns)
    # Short bundles do not pay: a reduction over a middle axis is fast only if enough entries lie side by side.
    group = next((g for g in _GROUPS if columns % g == 0 and columns // g >= 32), 1)
    latents, table, norms, slack = _prepare(z, codes, group, dot)
    exact = negative_product if dot else squared_distance
    best = z.new_full((z.shape[0],), torch.inf, dtype=torch.float64)
    indices = ids.new_full((z.shape[0],), int(ids.max()))
    scratch = latents.new_empty(rows * columns)
    seen = 0
    for top in range(0, z.shape[0], rows):
        block = slice(top, min(top + rows, z.shape[0]))
        lowest = torch.full_like(slack[block], torch.inf)
        for left in range(0, table.shape[0], columns):
            tile = slice(left, min(left + columns, table.shape[0]))
            shape = (block.stop - block.start, tile.stop - tile.start)
            scores = scratch[: shape[0] * shape[1]].view(shape)
            torch.addmm(norms[tile], latents[block], table[tile].t(), alpha=-2.0, out=scores)
            row, column = _candidates(scores, lowest, slack[block], group)
            seen += row.shape[0]
            if patience is not None and seen > patience:
                return None
            _rescore(exact, z[block], codes, ids, row, column + left, best[block], indices[block])
    return indices, best


def _tile_shape(z: Tensor, num_codes: int, rows: int | None, columns: int | None) -> tuple[int, int]:
    """Latents and codes per tile: a few MB on a CPU, so that a tile is still in cache when it is reduced."""
    area = 1 << (20 if z.device.type == "cpu" else 24)
    padded = -(-num_codes // _GROUPS[0]) * _GROUPS[0]
    rows = rows or min(z.shape[0], 1024 if padded >= 1024 else area // padded)
    columns = columns or min(padded, max(_GROUPS[0], area // rows // _GROUPS[0] * _GROUPS[0]))
    return rows, columns


def _prepare(z: Tensor, codes: Tensor, group: int, dot: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled, centred latents (N, d), codes (K', d) and squared norms (K'), and the slack (N,) of the search.

    K' is K rounded up to a multiple of `group` by codes at distance infinity.
    """
    dtype = working_dtype(z, codes)
    exponent = exponent_of(z, codes)
    table = scaled(codes, exponent, -codes.shape[0] % group, dtype)
    latents = scaled(z, exponent, 0, dtype)
    inside = table[: codes.shape[0]]
    if not dot:
        centre = inside.mean(0)
        inside.sub_(centre)
        latents.sub_(centre)
    norms = torch.linalg.vector_norm(table, dim=1).square_()
    lengths = torch.linalg.vector_norm(latents, dim=1)
    slack = slack_of(lengths, norms.amax().sqrt(), z.shape[1], *roundoff(dtype))
    if dot:
        norms.zero_()
    norms[codes.shape[0] :] = torch.inf
    return latents, table, norms, slack


def _candidates(scores: Tensor, lowest: Tensor, slack: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(row, column) of every entry of a tile within the slack of its row's running minimum, which is updated in place.

    The tile is reduced once, to minima of `group` columns each; only groups that qualify are looked into.
    """
    shape = (scores.shape[0], group, scores.shape[1] // group)
    grouped = scores.view(shape)
    minima = grouped.amin(1)
    torch.minimum(lowest, minima.amin(1), out=lowest)
    limit = lowest + slack
    row, bundle = (minima <= limit.unsqueeze(1)).nonzero(as_tuple=True)
    pick, member = (grouped[row, :, bundle] <= limit[row].unsqueeze(1)).nonzero(as_tuple=True)
    return row[pick], member * shape[2] + bundle[pick]


def _rescore(
    exact: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    codes: Tensor,
    ids: Tensor,
    row: Tensor,
    column: Tensor,
    best: Tensor,
    indices: Tensor,
) -> None:
    """Fold candidate pairs into the running (score, lowest index) of every row, in place, in chunks."""
    size = max(1, _CHUNK // z.shape[1])
    for r, c in zip(torch.split(row, size), torch.split(column, size), strict=True):
        score = exact(z[r], codes[c])
        improved = best.scatter_reduce(0, r, score, "amin")
        indices.masked_fill_(improved < best, torch.iinfo(torch.int64).max)
        best.copy_(improved)
        # Pairs that do not reach the best score send an index that can never be the lowest.
        code = torch.where(score == improved[r], ids[c], torch.iinfo(torch.int64).max)
        indices.scatter_reduce_(0, r, code, "amin")
