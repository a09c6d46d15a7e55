# SPDX-License-Identifier: Apache-2.0
"""NS-VQ, the rule in the words of its abstract: the drift of the encoder is carried to non-selected codes by a kernel.

    g_j = 2/(N d) sum_{i: q_i = j} (e_j - z_i)                  gradient of the codebook loss at a selected code
    g_k = beta sum_{j selected} k_kj g_j / sum_j k_kj           gradient at a code that nobody selected
    k_kj = exp(-|e_k - e_j|^2 / tau)
    L = mean (e_q - sg[z])^2 + 0.25 mean (sg[e_q] - z)^2 + L_transport,   tau = max(1e-8, 0.5^period)

Where the latents of a region move, its selected codes follow them, and its losers move along by the same displacement; the
arrangement of the losers is kept, while in `nsvq_kernel` all of them are drawn to the latents themselves.

Source: "Beyond Stationarity", arXiv 2602.18896, whose abstract has "propagates encoder drift to non-selected codes through
a kernel-based rule". Its repository does something else (`nsvq_kernel`).
Reconstructed: that k is a Gaussian of the distance between codes, that its sum is divided out (`normalise`; otherwise losers
far from every selected code stay), the strength beta = 1, and tau with the schedule of the repository.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steadyvq.kernels import attach_gradient
from steadyvq.kernels.pulls import kernel_average
from steadyvq.quantizers.base import Assignment, Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.losses import LOSSES
from steadyvq.quantizers.registry import register


@dataclass
class Transport:
    """L_transport = 1/2 sum_k |e_k - sg[e_k - g_k]|^2 over the losers, whose gradient is g_k.

    Which codes are selected is a question to the whole batch: a code that another process selects is no loser.

    Attributes:
        weight: beta.
        normalise: Divides by the sum of the kernel; otherwise it is a plain sum.
    """

    weight: float = 1.0
    normalise: bool = True
    batch_coupled = True

    def __call__(self, a: Assignment) -> Tensor:
        """The transport loss (0-d)."""
        row = torch.ones_like(a.distance) if a.row_weight is None else a.row_weight
        indices = a.indices.clamp_min(0)
        hits = torch.zeros_like(a.table[:, 0]).index_add(0, indices, row)
        sums = torch.zeros_like(a.table).index_add(0, indices, a.z.detach() * row[:, None])
        table = a.table.detach()
        grad = (hits[:, None] * table - sums) * (2 / (a.num_valid.clamp_min(1) * table.shape[1]))
        selected = a.reduce(hits.detach()) > 0
        moved = kernel_average(
            table, table, grad, temperature=a.temperature, present=selected, normalise=self.normalise
        )
        moved = torch.where(selected[:, None], 0.0, moved)
        return attach_gradient(moved.square().sum() / 2, a.table, moved)


LOSSES["transport"] = Transport

PARTS: dict[str, Any] = {
    "codebook": "free",
    "init": "uniform",
    "losses": {"commitment": 0.25, "codebook": 1.0, "transport": {"weight": 1.0}},
    "temperature": 1.0,
    "maintenance": {"anneal": {"shape": "exponential", "rate": 0.5, "floor": 1e-8, "period": 1700, "stairs": True}},
}


@register(
    "nsvq_transport",
    paper="Beyond Stationarity, arXiv 2602.18896 (abstract)",
    summary="losers move along with the selected codes near them",
    cost="N K d + K^2 d",
    status="reconstructed",
)
def nsvq_transport(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """NS-VQ as the words of its abstract read."""
    return compose(num_codes, dim, PARTS, overrides)
