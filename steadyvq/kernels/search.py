# SPDX-License-Identifier: Apache-2.0
"""What every exact search does around its distances: broken latents and codes, and tables of many equal rows."""

from collections.abc import Callable

import torch
from torch import Tensor

Search = Callable[[Tensor, Tensor, Tensor, bool, int | None], tuple[Tensor, Tensor] | None]
"""(z (N, d), codes (K, d), ids (K,), dot, patience) -> ids (N,) of the nearest codes and float64 scores (N,).

All entries are finite. None as soon as more than `patience` pairs were scored in float64.
"""


def over_finite(search: Search, z: Tensor, table: Tensor, dot: bool) -> tuple[Tensor, Tensor]:
    """Searches the finite codes for the finite latents; same contract as `reference.nearest`.

    Args:
        search: finds the nearest of finite codes.
        z: (N, d) latents.
        table: (K, d) codes.
        dot: largest inner product in place of smallest distance.

    Returns:
        indices: (N,) int64.
        score: (N,) float64 squared distance.
    """
    if z.shape[0] == 0:
        return z.new_zeros(0, dtype=torch.int64), z.new_zeros(0, dtype=torch.float64)
    valid, usable = _finite_rows(z), _finite_rows(table)
    latents = z if valid is None else torch.where(valid.unsqueeze(1), z, 0.0)
    ids, codes = torch.arange(table.shape[0], device=z.device), table
    if usable is not None:
        ids, codes = ids[usable], table[usable]
    if codes.shape[0] == 0:
        indices, score = ids.new_zeros(z.shape[0]), z.new_full((z.shape[0],), torch.inf, dtype=torch.float64)
    else:
        indices, score = _patiently(search, latents, codes, ids, dot)
    if valid is None:
        return indices, score
    return indices.masked_fill(~valid, 0), score.masked_fill(~valid, torch.nan)


def _finite_rows(tensor: Tensor) -> Tensor | None:
    """(rows,) whether every entry is finite; None if all are, as usual, which the extremes tell in one cheap pass."""
    if bool(torch.stack(tensor.aminmax()).isfinite().all()):
        return None
    return tensor.isfinite().all(1)


def _patiently(search: Search, z: Tensor, codes: Tensor, ids: Tensor, dot: bool) -> tuple[Tensor, Tensor]:
    """Search; start again without duplicate codes if far too many candidates turn up, as equal codes always tie."""
    found = search(z, codes, ids, dot, 16 * z.shape[0] + 4096)
    if found is None:
        distinct: Tensor
        distinct, inverse = torch.unique(codes, dim=0, return_inverse=True)
        first = ids.amax().repeat(distinct.shape[0]).scatter_reduce_(0, inverse, ids, "amin")
        # `unique` sorts the rows; ties go to the lowest id again once the rows are back in the order of their ids.
        first, order = first.sort()
        found = search(z, distinct[order], first, dot, None)
        assert found is not None
    return found
