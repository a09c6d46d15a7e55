# SPDX-License-Identifier: Apache-2.0
"""IBQ: index backpropagation. The one-hot choice passes its gradient to every code through a softmax over all of them.

    l_ij = z_i . e_j,   p_i = softmax(l_i),   q_i = argmax_j l_ij          (not the nearest code)
    y_i = onehot(q_i) + p_i - sg[p_i],   z_q = y E, of the value e_q
    L = mean (z_q - z)^2 + mean (sg[e_q] - z)^2 + 0.25 mean (e_q - sg[z])^2
        + 0.05 [ mean_i H(p'_i) - H(mean_i p'_i) ],   p' = softmax(l / 0.01)

Nothing is detached in the first term. The entropy term wants each latent to be sure and the batch to use all codes.

Source: Shi et al., arXiv 2412.02692; weights as in its configuration files, temperature 1.
Differs from the source: nothing of size N x K is held (the official code holds eight such matrices): the backward computes
the softmax again in blocks, once for the decoder's gradient and once for that of the first term. The mean of the entropy
term is over the latents of all processes. `l2_normalize` and `cosine_similarity` of the official class do nothing and are
left out. `assign="l2", estimator={"index": {"score": "l2"}}` and `losses={"index": {"score": "l2"}, "entropy": {"score":
"l2"}}` put -|z_i - e_j|^2 in the place of the inner product, so that tokens are nearest codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steadyvq.kernels import attach_gradient, soft
from steadyvq.quantizers.base import Assignment, Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.estimators import ESTIMATORS
from steadyvq.quantizers.losses import LOSSES
from steadyvq.quantizers.registry import register


@dataclass
class IndexBackpropagation:
    """The carrier y E: the selected code directly, latents and all codes through the softmax.

    Attributes:
        score: l, `dot` or `l2`.
    """

    score: Literal["dot", "l2"] = "dot"

    def __call__(self, a: Assignment) -> Tensor:
        """The carrier of the gradient."""
        return a.selected + soft.one_hot_carrier(a.z, a.table, temperature=a.temperature, score=self.score)


@dataclass
class IndexLoss:
    """mean (z_q - z)^2 with the gradient of z_q through the softmax and that of z.

    Attributes:
        weight: 1 in the official code.
        score: l, as that of the estimator.
    """

    weight: float = 1.0
    score: Literal["dot", "l2"] = "dot"

    def __call__(self, a: Assignment) -> Tensor:
        """The loss (0-d)."""
        return a.mean((IndexBackpropagation(self.score)(a) - a.z).square().mean(-1))


@dataclass
class SoftmaxEntropy:
    """sample mean_i H(p_i) - batch H(mean_i p_i), p = softmax(l / tau): sure latents, evenly used codes.

    The second mean is over the latents of all processes. Its gradient is known in closed form from the statistics of all
    of them, so that the mean of the gradients of several processes is the gradient of the whole batch.

    Attributes:
        weight: 0.05 in the official code.
        temperature: tau.
        sample: Factor of the entropy of single latents.
        batch: Factor of the entropy of the mean.
        score: l, as that of the estimator.
    """

    weight: float = 0.05
    temperature: float = 0.01
    sample: float = 1.0
    batch: float = 1.0
    score: Literal["dot", "l2"] = "dot"
    batch_coupled = True

    def __call__(self, a: Assignment) -> Tensor:
        """The entropy loss (0-d)."""
        tau = torch.full_like(a.temperature, self.temperature)
        entropy, mass = soft.entropies(a.z, a.table, temperature=tau, row_weight=a.row_weight, score=self.score)
        mean = a.reduce(mass) / a.reduce(a.num_valid).clamp_min(1)
        # A code without any mass has no term in H and pulls nobody.
        log_mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        value = self.sample * a.mean(entropy) + self.batch * (mean * log_mean).sum()
        grads = soft.entropy_gradient(
            a.z,
            a.table,
            temperature=tau,
            log_mean=log_mean,
            sample=self.sample,
            batch=-self.batch,
            row_weight=a.row_weight,
            score=self.score,
        )
        for tensor, grad in zip((a.z, a.table), grads, strict=True):
            value = attach_gradient(value, tensor, grad / a.num_valid.clamp_min(1))
        return value


ESTIMATORS["index"] = IndexBackpropagation()
LOSSES["index"] = IndexLoss
LOSSES["entropy"] = SoftmaxEntropy

PARTS: dict[str, Any] = {
    "codebook": "free",
    "init": "unit_normal",
    "assign": "dot",
    "estimator": "index",
    "temperature": 1.0,
    "losses": {"index": 1.0, "commitment": 1.0, "codebook": 0.25, "entropy": {"weight": 0.05, "temperature": 0.01}},
}


@register(
    "ibq",
    paper="IBQ, arXiv 2412.02692",
    summary="inner-product argmax; its softmax sends gradients to every code",
    cost="N K d",
)
def ibq(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Index backpropagation quantization."""
    return compose(num_codes, dim, PARTS, overrides)
