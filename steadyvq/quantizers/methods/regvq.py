# SPDX-License-Identifier: Apache-2.0
"""Reg-VQ: regularised vector quantization. Part of the tokens is drawn, and the use of the codes is held to a prior.

    40 % of the positions:  q_i = argmax_j (l_ij + g_ij), g Gumbel noise       the others: q_i = argmax_j l_ij
    y_i = onehot(q_i) + p_i - sg[p_i],   p_i = softmax((l_i + g_i) / tau) (g = 0 at the others),   z_q = y E
    L_prior = KL(m | uniform) = sum_j m_j log(K m_j),   m = mean_i onehot(q_i), with the gradient of mean_i softmax(l_i)

The best code of every position misses what a sampler of tokens will produce; a draw everywhere disturbs the decoder: hence a
random mask of both.

Source: Zhang et al., arXiv 2303.06424, from public notes on the paper; there is no official code.
Reconstructed: l_ij = -|z_i - e_j|^2 where the paper predicts K channels, tau = 1, the weight 5e-4 of the prior and the terms
commitment and codebook (0.25 and 1).
Left out: its probabilistic contrastive loss. It compares patches of VGG features of image and reconstruction, so that it is a
loss of the task and not of a quantizer. The public text fixes neither its temperature nor its weight, and as written there,
-log(w_i x_i / (w_i x_i + ...)) with w_i the squared distance of the drawn to the best code, it is infinite wherever the best
code was taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steadyvq.kernels import attach_gradient, soft
from steadyvq.quantizers.base import Assignment, Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.losses import LOSSES
from steadyvq.quantizers.registry import register


@dataclass
class UsagePrior:
    """KL(m | uniform) of the hard use m of the whole batch, whose gradient is that of the mean softmax.

        d/dl_ij = p_ij / N (log m_j - sum_k p_ik log m_k)

    Attributes:
        weight: Of the loss.
        score: l, `l2` or `dot`.
        floor: Hits that a code without any is taken to have in the logarithm, which has no value at 0.
    """

    weight: float = 5e-4
    score: Literal["l2", "dot"] = "l2"
    floor: float = 0.1
    batch_coupled = True

    def __call__(self, a: Assignment) -> Tensor:
        """The loss (0-d)."""
        row = torch.ones_like(a.distance) if a.row_weight is None else a.row_weight
        hits = a.reduce(torch.zeros_like(a.table[:, 0].detach()).index_add(0, a.indices.clamp_min(0), row))
        total = a.reduce(a.num_valid).clamp_min(1)
        log_use = (hits.clamp_min(self.floor) / total).log()
        use = hits / total
        value = (use * (log_use + torch.ones_like(use).sum().log())).sum()
        grads = soft.entropy_gradient(
            a.z,
            a.table,
            temperature=torch.ones_like(a.temperature),
            log_mean=log_use,
            batch=-1.0,
            row_weight=a.row_weight,
            score=self.score,
        )
        for tensor, grad in zip((a.z, a.table), grads, strict=True):
            value = attach_gradient(value, tensor, grad / a.num_valid.clamp_min(1))
        return value


LOSSES["usage_prior"] = UsagePrior

PARTS: dict[str, Any] = {
    "codebook": "free",
    "init": "normal",
    "assign": {"gumbel": {"fraction": 0.4}},
    "estimator": {"gumbel": {"fraction": 0.4}},
    "losses": {"commitment": 0.25, "codebook": 1.0, "usage_prior": {"weight": 5e-4}},
    "temperature": 1.0,
}


@register(
    "regvq",
    paper="Reg-VQ, arXiv 2303.06424",
    summary="a random part of the tokens is drawn; a prior holds the use of codes even",
    cost="N K d",
    status="reconstructed",
)
def regvq(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Regularised vector quantization without its contrastive loss."""
    return compose(num_codes, dim, PARTS, overrides)
