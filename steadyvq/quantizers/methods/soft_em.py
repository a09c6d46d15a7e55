# SPDX-License-Identifier: Apache-2.0
"""Soft EM: codes are moving averages of all latents, weighted by the posterior of a mixture of Gaussians.

    p_ij = softmax_j(-|z_i - e_j|^2 / tau)                                                       tau = 1
    n_j <- g n_j + (1 - g) sum_i p_ij,   m_j <- g m_j + (1 - g) sum_i p_ij z_i,   e_j = m_j / n~_j
    L = 0.25 mean (sg[e_q] - z)^2,   z_q = e_q of the nearest code, straight-through

Every code moves, the more the nearer; with tau towards 0 it is `ema`.

Source: Roy et al. 2018, arXiv 1805.11063, section 3.2.
A variant: the paper estimates p by m draws per latent and gives the decoder the mean of the m drawn codes. Here the sums over
p are exact (m without bound), in one streamed pass, and the decoder is given the nearest code, as in evaluation.
"""

from __future__ import annotations

from typing import Any

import torch

from steadyvq import kernels
from steadyvq.quantizers.base import Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.maintenance import EMA, MAINTENANCE, UpdateBatch
from steadyvq.quantizers.registry import register


class SoftEMA(EMA):
    """`EMA` with the expected hits and sums of the posterior in the place of those of the nearest codes.

    The posterior is that of the forward, under its codes and its temperature.
    """

    def forward(self, batch: UpdateBatch) -> dict[str, float]:
        """Averages the latents of this step into all codes."""
        mass, sums = torch.zeros_like(self.counts), torch.zeros_like(self.sums)
        for a in batch.assignments:
            soft = kernels.soft_statistics(
                a.z,
                a.table,
                a.indices.clamp_min(0),
                temperature=batch.temperature,
                row_weight=a.counted.to(a.z.dtype),
                rule="all",
            )
            mass += soft.column_mass.to(mass)
            sums += soft.column_sum.to(sums)
        return self._average(batch, batch.reduce(mass), batch.reduce(sums))


MAINTENANCE["soft_ema"] = SoftEMA

PARTS: dict[str, Any] = {
    "codebook": "frozen",
    "init": "normal",
    "losses": {"commitment": 0.25},
    "temperature": 1.0,
    "maintenance": {"soft_ema": {"decay": 0.99}},
}


@register(
    "soft_em",
    paper="Roy et al. 2018, arXiv 1805.11063",
    summary="codes are moving averages weighted by a soft posterior",
    cost="N K d; stores K d",
    status="variant",
)
def soft_em(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Vector quantization trained by soft expectation maximisation."""
    return compose(num_codes, dim, PARTS, overrides)
