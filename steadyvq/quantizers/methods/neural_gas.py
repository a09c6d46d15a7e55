# SPDX-License-Identifier: Apache-2.0
"""Neural gas: every code is drawn to a latent by its rank among the codes near it, whatever the distances are.

    k_ij = number of codes nearer to z_i than e_j,   h_ij = exp(-k_ij / lambda)
    L_gas = 1/(N d) sum_ij h_ij |sg[z_i] - e_j|^2,   L = L_gas + 0.25 mean (sg[e_q] - z)^2
    lambda = max(0.01, 10 * 0.001^(t / 40,000)),   t updates

The winner has rank 0 and weight 1, so that L_gas becomes the codebook loss as lambda falls. Ranks know no scale: the rule is
the same for latents of any size.

Source: Martinetz, Berkovich and Schulten 1993, "Neural-gas" network for vector quantization and its application to
time-series prediction (Martinetz and Schulten 1991), with its lambda from 10 to 0.01 over 40,000 steps.
Differs from the source: its steps are single data points with a learning rate that falls from 0.5 to 0.005; here it is a loss
on batches for any optimiser, whose schedule is the user's. `temperature` is lambda, in ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steadyvq.kernels import attach_gradient
from steadyvq.kernels.pulls import pull
from steadyvq.quantizers.base import Assignment, Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.losses import LOSSES
from steadyvq.quantizers.registry import register


@dataclass
class NeuralGas:
    """L_gas of the module docstring; the gradient reaches the codes alone, all of them.

    Attributes:
        weight: Of the loss.
    """

    weight: float = 1.0

    def __call__(self, a: Assignment) -> Tensor:
        """The loss (0-d)."""
        indices = a.indices.clamp_min(0)
        out = pull(a.z, a.table, indices, rule="ranks", temperature=a.temperature, row_weight=a.row_weight)
        dim = a.z.shape[1]
        grad = out.gradient * (2 / (a.num_valid.clamp_min(1) * dim))
        return attach_gradient(a.mean(out.row_cost) / dim, a.table, grad)


LOSSES["gas"] = NeuralGas

PARTS: dict[str, Any] = {
    "codebook": "free",
    "init": "normal",
    "losses": {"commitment": 0.25, "gas": 1.0},
    "temperature": 10.0,
    "maintenance": {"anneal": {"shape": "exponential", "rate": 1e-3, "floor": 0.01, "period": 40_000}},
}


@register(
    "neural_gas",
    paper="Neural gas (Martinetz et al. 1993)",
    summary="all codes are drawn by their rank, annealed",
    cost="N K d + N r log r for r = 30 lambda ranks",
)
def neural_gas(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Neural gas as the loss of a codebook."""
    return compose(num_codes, dim, PARTS, overrides)
