# SPDX-License-Identifier: Apache-2.0
"""NS-VQ, the kernel rule of its repository: every code is attracted by the latents, by a softmax of its distance to them.

    p_ij = sg[softmax_j(-D_ij / tau)], over all K codes
    w_ij = 1 if j = q_i, else min(1, lambda K p_ij)                                     lambda = 0.01
    L_kernel = 1/(N d) sum_ij w_ij |sg[z_i] - e_j|^2,   L = L_kernel + 0.25 mean (sg[e_q] - z)^2
    tau = max(1e-8, 0.5^epoch)
    z_q = z + a e_q, of the value e_q,   a = 2 alpha / (N d), N of all processes          alpha = 1

The factor K makes a uniform p give the weight lambda. As tau falls, p goes to the winner alone, and what is left is VQ: the
kernel acts in the first epochs.

Source: "Beyond Stationarity", arXiv 2602.18896, as its repository has it for CelebA-HQ (`models/vq_vae.py`, the branch with
mem_flag; the ImageNet class cannot run). Not to be confused with NSVQ, arXiv 2606.11363 (`nsvq`), by some of the same authors.
Differs from the source: epochs are periods of 1,700 updates (CelebA-HQ at batch size 16 has about as many), set by
`maintenance={"anneal": {"period": ...}}`; evaluation reports the same loss as training, where the official code falls back
to the plain codebook term. The abstract describes a rule that moves codes with the selected codes: `nsvq_transport`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steadyvq.kernels import attach_gradient
from steadyvq.kernels.pulls import pull
from steadyvq.quantizers.base import Assignment, Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.estimators import ESTIMATORS
from steadyvq.quantizers.losses import LOSSES
from steadyvq.quantizers.registry import register


@dataclass
class KernelRule:
    """L_kernel of the module docstring; the gradient reaches the codes alone, all of them.

    Attributes:
        weight: Of the loss.
        strength: lambda.
    """

    weight: float = 1.0
    strength: float = 0.01

    def __call__(self, a: Assignment) -> Tensor:
        """The kernel loss (0-d)."""
        out = pull(
            a.z,
            a.table,
            a.indices.clamp_min(0),
            rule="kernel",
            temperature=a.temperature,
            strength=self.strength * a.table.shape[0],
            row_weight=a.row_weight,
        )
        dim = a.z.shape[1]
        value = a.mean(out.row_cost) / dim
        return attach_gradient(value, a.table, out.gradient * (2 / (a.num_valid.clamp_min(1) * dim)))


@dataclass
class KernelEstimator:
    """Straight-through, and the selected code receives the gradient of z_q scaled by a = 2 alpha / (N d).

    Attributes:
        alpha: 1 in the official configuration; a is about 1e-6, so that it hardly matters.
    """

    alpha: float = 1.0

    def __call__(self, a: Assignment) -> Tensor:
        """The carrier of the gradient."""
        latents = a.reduce(a.num_valid).clamp_min(1)
        return a.z + a.selected * (2 * self.alpha / (latents * a.z.shape[1]))


LOSSES["kernel"] = KernelRule
ESTIMATORS["kernel"] = KernelEstimator()

PARTS: dict[str, Any] = {
    "codebook": "free",
    "init": "uniform",
    "losses": {"commitment": 0.25, "kernel": {"weight": 1.0, "strength": 0.01}},
    "estimator": "kernel",
    "temperature": 1.0,
    "maintenance": {"anneal": {"shape": "exponential", "rate": 0.5, "floor": 1e-8, "period": 1700, "stairs": True}},
}


@register(
    "nsvq_kernel",
    paper="Beyond Stationarity, arXiv 2602.18896 (code)",
    summary="all codes are attracted by the latents through an annealed softmax kernel",
    cost="N K d",
)
def nsvq_kernel(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """NS-VQ as its repository has it."""
    return compose(num_codes, dim, PARTS, overrides)
