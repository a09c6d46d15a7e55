# SPDX-License-Identifier: Apache-2.0
"""Gumbel-VQ: in training a code is drawn from a softmax over all codes, and the draw is differentiated as a softmax.

    l_ij = -|z_i - e_j|^2,   q_i = argmax_j (l_ij + g_ij), g Gumbel noise       training; argmax_j l_ij in evaluation
    y_i = onehot(q_i) + p_i - sg[p_i],   p_i = softmax((l_i + g_i) / tau),   z_q = y E, of the value e_q
    L = 5e-4 mean_i KL(softmax(l_i) | uniform),   KL = log K - H

tau is annealed from 1 to 1/16 along a cosine over 150,000 updates.

Source: Jang et al. 2017 (arXiv 1611.01144) and Maddison et al. 2017 (arXiv 1611.00712) for the estimator; the weight of the
KL term as in the quantizer of taming-transformers (arXiv 2012.09841), the schedule as in DALL-E (arXiv 2102.12092).
A variant: those predict l by a layer of K channels that shares nothing with the codes; here l is the distance to the codes,
so that encode, decode and nearest codes agree, and no layer of size d x K is needed (`score: dot` with `assign` as below
takes z . e). Noise comes from (seed, updates, position), never from a generator.

    assign={"gumbel": {"score": "dot"}}, estimator={"gumbel": {"score": "dot"}}, losses={"prior": {"score": "dot"}}
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steadyvq import kernels
from steadyvq.kernels import attach_gradient, soft
from steadyvq.quantizers import noise
from steadyvq.quantizers.assign import ASSIGNMENTS, Setting
from steadyvq.quantizers.base import Assignment, Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.estimators import ESTIMATORS
from steadyvq.quantizers.losses import LOSSES
from steadyvq.quantizers.registry import register


def _draws(source: noise.Noise, fraction: float) -> soft.Gumbel:
    """The noise that assignment and estimator of one forward share."""
    return soft.Gumbel(source.stream(noise.ASSIGNMENT), source.rows, fraction)


@dataclass
class GumbelDraw:
    """argmax_j (l_ij + g_ij) in training, argmax_j l_ij in evaluation.

    Attributes:
        score: l, `l2` or `dot`.
        fraction: Share of the latents that are drawn; the others take the best code.
    """

    score: Literal["l2", "dot"] = "l2"
    fraction: float = 1.0
    informed = True
    needs_update = True

    @property
    def evaluates_as(self) -> str:
        """The assignment in evaluation."""
        return self.score

    def __call__(self, z: Tensor, table: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
        """Indices and squared distances."""
        indices, distance = ASSIGNMENTS[self.score](z, table)
        if not setting.training:
            return indices, distance
        gumbel = _draws(setting.noise, self.fraction)
        drawn = kernels.soft.gumbel_argmax(z, table, gumbel, score=self.score)
        # A broken latent has no scores to draw from, and is not counted.
        indices = torch.where(gumbel.perturbed() & distance.isfinite(), drawn, indices)
        return indices, torch.where(distance.isfinite(), (z - table[indices]).square().sum(-1), distance)


@dataclass
class GumbelEstimator:
    """The carrier y E: the selected code directly, latents and all codes through the perturbed softmax.

    Attributes:
        score: l, as that of the assignment.
        fraction: As that of the assignment.
    """

    score: Literal["l2", "dot"] = "l2"
    fraction: float = 1.0
    needs_update = True

    def __call__(self, a: Assignment) -> Tensor:
        """The carrier of the gradient."""
        gumbel = None if a.noise is None else _draws(a.noise, self.fraction)
        soft_part = soft.one_hot_carrier(a.z, a.table, temperature=a.temperature, score=self.score, gumbel=gumbel)
        return a.selected + soft_part


@dataclass
class UniformPrior:
    """mean_i KL(softmax(l_i) | uniform) = log K - mean_i H(softmax(l_i)).

    Attributes:
        weight: 5e-4 in taming-transformers.
        score: l, as that of the assignment.
    """

    weight: float = 5e-4
    score: Literal["l2", "dot"] = "l2"

    def __call__(self, a: Assignment) -> Tensor:
        """The loss (0-d)."""
        one = torch.ones_like(a.temperature)
        entropy, mass = soft.entropies(a.z, a.table, temperature=one, row_weight=a.row_weight, score=self.score)
        value = a.mean(math.log(a.table.shape[0]) - entropy)
        grads = soft.entropy_gradient(
            a.z,
            a.table,
            temperature=one,
            log_mean=torch.zeros_like(mass),
            sample=-1.0,
            row_weight=a.row_weight,
            score=self.score,
        )
        for tensor, grad in zip((a.z, a.table), grads, strict=True):
            value = attach_gradient(value, tensor, grad / a.num_valid.clamp_min(1))
        return value


ASSIGNMENTS["gumbel"] = GumbelDraw()
ESTIMATORS["gumbel"] = GumbelEstimator()
LOSSES["prior"] = UniformPrior

PARTS: dict[str, Any] = {
    "codebook": "free",
    "init": "normal",
    "assign": "gumbel",
    "estimator": "gumbel",
    "losses": {"prior": {"weight": 5e-4}},
    "temperature": 1.0,
    "maintenance": {"anneal": {"shape": "cosine", "floor": 0.0625, "period": 150_000}},
}


@register(
    "gumbel",
    paper="VQGAN, arXiv 2012.09841 (Gumbel)",
    summary="codes are drawn in training and differentiated as a softmax",
    cost="N K d",
    status="variant",
)
def gumbel(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Gumbel-softmax quantization over the distances to the codes."""
    return compose(num_codes, dim, PARTS, overrides)
