# SPDX-License-Identifier: Apache-2.0
"""Dense pulls on the codebook with fixed weights, in blocks: kernel rule, neural gas, transport of displacements.

A loss 1/2 sum_ij w_ij |z_i - e_j|^2 with stop-gradient weights has the gradient sum_i w_ij (e_j - z_i) by e_j, so the
column sums of w and of w z are all that is needed of the N x K weights.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steadyvq.kernels.rounding import working_dtype
from steadyvq.kernels.soft import rows_per_block
from steadyvq.kernels.statistics import softmax_rows

# Weights exp(-rank / tau) below e^-30 are zero: what float32 loses anyway.
_RANKS = 30.0


class Pull(NamedTuple):
    """Reductions of weights w_ij, with D_ij the squared distance and r_i the row weight.

    Attributes:
        row_cost: (N,) sum_j w_ij D_ij.
        gradient: (K, d) sum_i r_i w_ij (e_j - z_i).
        mass: (K,) sum_i r_i w_ij.
    """

    row_cost: Tensor
    gradient: Tensor
    mass: Tensor


@torch.library.custom_op("steadyvq::pull", mutates_args=())
def _pull(
    z: Tensor, table: Tensor, indices: Tensor, temperature: Tensor, row_weight: Tensor, strength: float, ranks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        dtype = working_dtype(z, table)
        centre = table.to(dtype).mean(0)
        z, codes, row = z.to(dtype) - centre, table.to(dtype) - centre, row_weight.to(dtype)
        norms = codes.square().sum(1)
        cost, mass, sums = torch.zeros_like(row), torch.zeros_like(norms), codes.new_zeros(codes.shape[::-1])
        step = rows_per_block(codes)
        for top in range(0, z.shape[0], step):
            block = slice(top, top + step)
            distance = torch.addmm(norms, z[block], codes.t(), alpha=-2.0)
            distance.add_(z[block].square().sum(1, keepdim=True)).clamp_(min=0.0)
            if ranks:
                weight = _by_rank(distance, temperature)
            else:
                parts = softmax_rows(-distance / temperature)
                weight = parts.weight.mul_((strength / parts.total).unsqueeze(1)).clamp_(max=1.0)
                weight.scatter_(1, indices[block].unsqueeze(1), 1.0)
            cost[block] = (weight * distance).sum(1)
            weight.mul_(row[block].unsqueeze(1))
            mass.add_(weight.sum(0))
            sums.addmm_(z[block].t(), weight)
    return cost, mass.unsqueeze(1) * codes - sums.t(), mass


@_pull.register_fake
def _(
    z: Tensor, table: Tensor, indices: Tensor, temperature: Tensor, row_weight: Tensor, strength: float, ranks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = working_dtype(z, table)
    return (
        z.new_empty(z.shape[0], dtype=dtype),
        torch.empty_like(table, dtype=dtype),
        table.new_empty(table.shape[0], dtype=dtype),
    )


def _by_rank(distance: Tensor, temperature: Tensor) -> Tensor:
    """exp(-k / tau) for the code that is the k-th nearest of its latent, k = 0 for the nearest."""
    count = min(distance.shape[1], int(_RANKS * float(temperature)) + 2)
    order = distance.topk(count, dim=1, largest=False, sorted=True).indices
    weight = (-torch.arange(count, device=distance.device, dtype=distance.dtype) / temperature).exp()
    return torch.zeros_like(distance).scatter_(1, order, weight.expand_as(order))


def pull(
    z: Tensor,
    table: Tensor,
    indices: Tensor,
    *,
    rule: Literal["kernel", "ranks"],
    temperature: Tensor,
    strength: float = 1.0,
    row_weight: Tensor | None = None,
) -> Pull:
    """Reductions of the weights of one rule; nothing here carries a gradient.

    "kernel": w_ij = 1 for the winner j = `indices[i]`, else min(1, strength softmax_j(-D_ij / tau)), the softmax over all
    codes. "ranks": w_ij = exp(-k / tau) where code j is the k-th nearest of latent i (Martinetz et al. 1993).

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        indices: (N,) int64 winners ("kernel" only).
        rule: the weights.
        temperature: tau (0-d), in units of D or of ranks.
        strength: factor of the softmax.
        row_weight: (N,) r, or None for ones.
    """
    row = torch.ones_like(z[:, 0]) if row_weight is None else row_weight
    out = _pull(z.detach(), table.detach(), indices, temperature.detach(), row, float(strength), rule == "ranks")
    return Pull(*out)


@torch.library.custom_op("steadyvq::kernel_average", mutates_args=())
def _kernel_average(
    queries: Tensor, keys: Tensor, values: Tensor, temperature: Tensor, present: Tensor, normalise: bool
) -> Tensor:
    with torch.no_grad(), torch.autocast(keys.device.type, enabled=False):
        centre = keys.mean(0)
        queries, keys = queries - centre, keys - centre
        norms = torch.where(present, keys.square().sum(1), torch.inf)
        out = torch.zeros_like(queries[:, :1] * values[:1])
        step = rows_per_block(keys)
        for top in range(0, queries.shape[0], step):
            block = slice(top, top + step)
            score = torch.addmm(norms, queries[block], keys.t(), alpha=-2.0)
            score.add_(queries[block].square().sum(1, keepdim=True)).clamp_(min=0.0).neg_().div_(temperature)
            # Without any key present there is nothing to average.
            weight = score.softmax(1).nan_to_num_(0.0) if normalise else score.exp_()
            out[block] = weight @ values
    return out


@_kernel_average.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, temperature: Tensor, present: Tensor, normalise: bool) -> Tensor:
    return queries.new_empty(queries.shape[0], values.shape[1])


def kernel_average(
    queries: Tensor, keys: Tensor, values: Tensor, *, temperature: Tensor, present: Tensor, normalise: bool = True
) -> Tensor:
    """sum_j k_ij v_j over present keys, k_ij = exp(-|q_i - k_j|^2 / tau), with `normalise` divided by sum_j k_ij.

    Args:
        queries: (Q, d).
        keys: (S, d).
        values: (S, m).
        temperature: tau (0-d).
        present: (S,) bool, which keys count.
        normalise: weights of a query sum to 1.

    Returns:
        (Q, m), zeros where no key is present; no gradient.
    """
    out: Tensor = _kernel_average(
        queries.detach(), keys.detach(), values.detach(), temperature.detach(), present, normalise
    )
    return out
