# SPDX-License-Identifier: Apache-2.0
"""A placebo for the non-stationary loss: the same weights, handed to other latents.

If NS keeps codes alive because each loser is pulled to the latents *near it*, then pulling it as hard to latents that
have nothing to do with it must do worse. Used by the collapse experiment; not a method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steadyvq.quantizers import Assignment, Quantizer, compose
from steadyvq.quantizers.methods import nsvq


@dataclass
class ShuffledNonStationary:
    """L = 1/(N d) sum_i sum_{j != q_i} sg[w_{s(i) j}] |e_j - sg[z_i]|^2 with s a shift by half of the batch.

    Dense (N x K): for small experiments.
    """

    weight: float = 0.1

    def __call__(self, a: Assignment) -> Tensor:
        """The placebo loss (0-d)."""
        distance = torch.cdist(a.z.detach(), a.table).square()
        with torch.no_grad():
            losers = torch.softmax(-distance / a.temperature, 1).scatter(1, a.indices[:, None], 0.0)
            shuffled = losers.roll(losers.shape[0] // 2, 0)
        return (shuffled * distance).sum() / (a.num_valid * a.z.shape[1])


def placebo(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """NSVQ without replacement whose non-stationary loss has shuffled weights."""
    losses = {"commitment": 0.25, "codebook": 1.0, "ns": ShuffledNonStationary()}
    return compose(num_codes, dim, {**nsvq.PARTS, "losses": losses, "maintenance": {}}, overrides)
