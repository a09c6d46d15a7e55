# SPDX-License-Identifier: Apache-2.0
"""Contrast of every code's nearest latents with its farthest ones, in blocks of codes.

    L_j = - log( exp(s+_j / tau) / (exp(s+_j / tau) + sum_{i in F_j} exp(s_ij / tau)) )
    s_ij = z_i . e_j ("dot")  or  -|z_i - e_j|^2 ("l2"),   s+_j the mean of the n largest s_ij,   F_j the m smallest

L_j needs the scores of one code with all latents and nothing of other codes, so a block of codes is finished, gradient
included, before the next one starts. A term of s that is the same for all latents of a code changes nothing; |e|^2 is left
out of it. Shapes: N latents, K codes, d dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steadyvq.kernels import attach_gradient
from steadyvq.kernels.rounding import working_dtype
from steadyvq.kernels.soft import Score, rows_per_block


@torch.library.custom_op("steadyvq::contrast", mutates_args=())
def _contrast(
    z: Tensor, table: Tensor, row_weight: Tensor, temperature: float, negatives: float, dot: bool
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        dtype = working_dtype(z, table)
        z, codes = z[row_weight > 0].to(dtype), table.to(dtype)
        values, grad = torch.zeros_like(codes[:, 0]), torch.zeros_like(codes)
        if z.shape[0] == 0:
            return values, grad
        if not dot:
            centre = z.mean(0)
            z, codes = z - centre, codes - centre
        alpha, bias = (1.0, torch.zeros_like(z[:, 0])) if dot else (2.0, -z.square().sum(1))
        near, far = max(1, z.shape[0] // codes.shape[0]), int(z.shape[0] * negatives)
        step = rows_per_block(z)
        for top in range(0, codes.shape[0], step):
            block = slice(top, top + step)
            scores = torch.addmm(bias, codes[block], z.t(), alpha=alpha)
            values[block], pull = _block(scores, near, far, temperature)
            # The rows of the pull sum to 0, so that the code itself falls out of the gradient of -|z - e|^2.
            grad[block] = alpha * (pull @ z)
    return values, grad


@_contrast.register_fake
def _(
    z: Tensor, table: Tensor, row_weight: Tensor, temperature: float, negatives: float, dot: bool
) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(z, table)
    return table.new_empty(table.shape[0], dtype=dtype), torch.empty_like(table, dtype=dtype)


def _block(scores: Tensor, near: int, far: int, temperature: float) -> tuple[Tensor, Tensor]:
    """L of a block of codes (R,) and its gradient by their scores (R, N)."""
    best, nearest = scores.topk(near, dim=1, sorted=False)
    worst, farthest = scores.topk(far, dim=1, largest=False, sorted=False)
    far_logits = worst.div_(temperature)
    # 1 - p of the near ones is the sum of the far ones' p: taken from them, it keeps its digits however small it is.
    gap = far_logits.logsumexp(1) - best.mean(1).div_(temperature)
    mass = gap.sigmoid().div_(temperature).unsqueeze(1)
    pull = torch.zeros_like(scores).scatter_add_(1, farthest, far_logits.softmax(1).mul_(mass))
    pull.scatter_add_(1, nearest, (-mass / near).expand(-1, near))
    return torch.nn.functional.softplus(gap), pull


def contrast(
    z: Tensor,
    table: Tensor,
    *,
    temperature: float,
    negatives: float = 0.5,
    row_weight: Tensor | None = None,
    score: Score = "l2",
) -> Tensor:
    """The mean of L_j over codes (0-d), with a gradient to the table; the latents get none.

    n = max(1, N // K) and m = floor(`negatives` N).

    Args:
        z: (N, d) latents.
        table: (K, d) codes; the gradient goes here.
        temperature: tau.
        negatives: share of the latents that are the far ones of a code.
        row_weight: (N,) rows of weight 0 are absent, or None.
        score: "dot" or "l2"; normalise both inputs and take "dot" for the cosine.
    """
    row = torch.ones_like(z[:, 0]) if row_weight is None else row_weight
    values, grad = _contrast(z.detach(), table.detach(), row.detach(), temperature, negatives, score == "dot")
    return attach_gradient(values.mean(), table, grad / table.shape[0])
