# SPDX-License-Identifier: Apache-2.0
"""Balanced assignment by Sinkhorn's iterations, in blocks: the plan is a function of one number per code.

    Q_ij ~ exp(l_ij + u_i + v_j),   l_ij = -epsilon (D_ij - mean D) / std D,   D the distance, not squared
    v_j <- -log sum_i exp(l_ij + u_i)   (every code gets the same mass)
    u_i <- -log sum_j exp(l_ij + v_j)   (every latent has the same mass)

u follows from v within a block of latents, so only v is kept between two iterations, and memory is a block plus K numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steadyvq.kernels.soft import rows_per_block

_TINY = 1e-300


def _distance(z: Tensor, table: Tensor) -> Tensor:
    square = torch.addmm(table.square().sum(1), z, table.t(), alpha=-2.0)
    return square.add_(z.square().sum(1, keepdim=True)).clamp_(min=0.0).sqrt_()


@torch.library.custom_op("steadyvq::distance_moments", mutates_args=())
def _moments(z: Tensor, table: Tensor, row_weight: Tensor) -> Tensor:
    """(3,) float64: number of pairs, sum of the distances, sum of their squares."""
    out = torch.zeros(3, dtype=torch.float64, device=z.device)
    step = rows_per_block(table)
    for top in range(0, z.shape[0], step):
        distance = _distance(z[top : top + step], table).double()
        row = row_weight[top : top + step].double()
        sums = torch.stack([row.sum() * table.shape[0], row @ distance.sum(1), row @ distance.square().sum(1)])
        out += sums
    return out


@_moments.register_fake
def _(z: Tensor, table: Tensor, row_weight: Tensor) -> Tensor:
    return z.new_empty(3, dtype=torch.float64)


@torch.library.custom_op("steadyvq::sinkhorn_columns", mutates_args=())
def _columns(
    z: Tensor, table: Tensor, row_weight: Tensor, mean: Tensor, scale: Tensor, potential: Tensor, rows: bool
) -> Tensor:
    """(K,) float64: log sum_i r_i exp(l_ij + u_i), u = 0 unless `rows`."""
    highest = torch.full((table.shape[0],), -torch.inf, dtype=torch.float64, device=z.device)
    total = torch.zeros_like(highest)
    step = rows_per_block(table)
    for top in range(0, z.shape[0], step):
        logits = (mean - _distance(z[top : top + step], table).double()) * scale
        if rows:
            logits -= torch.logsumexp(logits + potential, 1, keepdim=True)
        logits.masked_fill_(row_weight[top : top + step].unsqueeze(1) == 0, -torch.inf)
        risen = torch.maximum(highest, logits.amax(0))
        anchor = torch.where(risen.isfinite(), risen, 0.0)
        total = total * (highest - anchor).exp() + (logits - anchor).exp().sum(0)
        highest = risen
    return torch.where(highest.isfinite(), highest + total.log(), -torch.inf)


@_columns.register_fake
def _(
    z: Tensor, table: Tensor, row_weight: Tensor, mean: Tensor, scale: Tensor, potential: Tensor, rows: bool
) -> Tensor:
    return z.new_empty(table.shape[0], dtype=torch.float64)


@torch.library.custom_op("steadyvq::sinkhorn_argmax", mutates_args=())
def _argmax(z: Tensor, table: Tensor, scale: Tensor, potential: Tensor) -> Tensor:
    out = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
    step = rows_per_block(table)
    for top in range(0, z.shape[0], step):
        distance = _distance(z[top : top + step], table).double()
        out[top : top + step] = (potential - distance * scale).argmax(1)
    return out


@_argmax.register_fake
def _(z: Tensor, table: Tensor, scale: Tensor, potential: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], dtype=torch.int64)


@torch.no_grad()
def sinkhorn(
    z: Tensor,
    table: Tensor,
    *,
    epsilon: float,
    iterations: int,
    row_weight: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """(N,) int64: the code with the largest entry of each latent's row of the balanced plan.

    One pass over the data for the moments, one for each iteration, one for the choice.

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        epsilon: sharpness, in standard deviations of the distance.
        iterations: of Sinkhorn's algorithm, codes first.
        row_weight: (N,) 1 or 0 for absent latents; None for ones.
        reduce: sums a tensor over processes.
    """
    centre = table.mean(0)
    z, table = z - centre, table - centre
    row = torch.ones_like(z[:, 0]) if row_weight is None else row_weight
    count, first, second = reduce(_moments(z, table, row))
    mean = first / count.clamp_min(1)
    variance = (second - first * mean) / (count - 1).clamp_min(1)
    scale = epsilon / variance.clamp_min(1e-24).sqrt()
    potential = torch.zeros(table.shape[0], dtype=torch.float64, device=z.device)
    for step in range(iterations):
        columns = _columns(z, table, row, mean, scale, potential, step > 0)
        # The old potential brings the sums of all processes to a scale where they can be added.
        shared = reduce((columns + potential).exp()).clamp_min(_TINY).log() - potential
        potential = -shared
    out: Tensor = _argmax(z, table, scale, potential)
    return out
