# SPDX-License-Identifier: Apache-2.0
"""OptVQ: in training latents are assigned by optimal transport, so that every code gets its share of the batch.

    l_ij = -epsilon (|z_i - e_j| - mean) / std,   mean and std over all pairs of the batch            epsilon = 10
    Q = Sinkhorn(exp(l)): 5 iterations to equal mass of all codes and equal mass of all latents,   q_i = argmax_j Q_ij
    E = C W^T + b with C frozen,   L = mean (sg[e_q] - z)^2 + 0.25 mean (e_q - sg[z])^2,   straight-through

Source: Zhang et al., "Preventing Local Pitfalls in Vector Quantization via Optimal Transport", arXiv 2412.15195; values as in
its code.
Differs from the source: in evaluation a latent gets its nearest code. The official code solves the transport problem at
inference too, where the token of a latent depends on the other images of its batch. The N x K plan is never held: one number
per code is kept between iterations, and each iteration is one pass over the data (seven passes in all). Its code trains the
base behind the linear map as well; here it is frozen (`codebook: linear`). Its heads are several quantizers over parts of
the features.
Sums of the iterations are over all processes, so several of them assign as one would with the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steadyvq import kernels
from steadyvq.kernels.sinkhorn import sinkhorn
from steadyvq.quantizers.assign import ASSIGNMENTS, Setting
from steadyvq.quantizers.base import Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.registry import register


@dataclass
class Sinkhorn:
    """Balanced assignment in training, the nearest code in evaluation.

    Attributes:
        epsilon: Sharpness, in standard deviations of the distance.
        iterations: Of Sinkhorn's algorithm.
    """

    epsilon: float = 10.0
    iterations: int = 5
    informed = True
    batch_coupled = True
    evaluates_as = "l2"

    def __call__(self, z: Tensor, table: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
        """Indices and squared distances."""
        indices, distance = kernels.nearest(z, table)
        if not setting.training:
            return indices, distance
        # A broken latent takes part in no balance.
        whole = distance.isfinite()
        row = whole.to(z.dtype) if setting.row_weight is None else whole * setting.row_weight
        balanced = sinkhorn(
            z.where(whole[:, None], 0.0),
            table,
            epsilon=self.epsilon,
            iterations=self.iterations,
            row_weight=row,
            reduce=setting.reduce,
        )
        indices = balanced.where(whole, indices)
        return indices, (z - table[indices]).square().sum(-1).where(whole, distance)


ASSIGNMENTS["sinkhorn"] = Sinkhorn()

PARTS: dict[str, Any] = {
    "codebook": "linear",
    "init": "normal",
    "assign": "sinkhorn",
    "losses": {"commitment": 1.0, "codebook": 0.25},
}


@register(
    "optvq",
    paper="OptVQ, arXiv 2412.15195",
    summary="balanced assignment by Sinkhorn's iterations in training",
    cost="N K d + K d^2; stores d^2",
    status="variant",
)
def optvq(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """OptVQ with one head."""
    return compose(num_codes, dim, PARTS, overrides)
