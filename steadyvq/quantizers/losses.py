# SPDX-License-Identifier: Apache-2.0
"""Losses of a quantizer: small dataclasses with a weight and `__call__(Assignment) -> scalar`, unweighted.

Both sides of the quantisation error have a weight of their own, never one "beta": official codes disagree on which term
it multiplies. Every mean is over valid latents and, as in the official codes, over the d features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from steadyvq import kernels
from steadyvq.quantizers.base import Assignment


class Loss(Protocol):
    """A weighted term of a quantizer's loss. A weight of 0 means that it is not evaluated.

    A loss that is no mean over latents has `batch_coupled = True`: accumulated micro-batches then differ from one batch.
    """

    weight: float

    def __call__(self, assignment: Assignment) -> Tensor:
        """The unweighted loss (0-d)."""


@dataclass
class Commitment:
    """C = mean (sg[e_q] - z)^2: pulls the encoder to the codes. The gradient reaches the latents alone.

    Source: van den Oord et al. 2017 (arXiv 1711.00937), equation 3, third term.
    """

    weight: float = 0.25

    def __call__(self, a: Assignment) -> Tensor:
        """The commitment loss (0-d)."""
        return a.mean((a.selected.detach() - a.z).square().mean(-1))


@dataclass
class CodebookLoss:
    """E = mean (e_q - sg[z])^2: pulls the selected codes to their latents. The gradient reaches those codes alone.

    Source: van den Oord et al. 2017 (arXiv 1711.00937), equation 3, second term.
    """

    weight: float = 1.0

    def __call__(self, a: Assignment) -> Tensor:
        """The codebook loss (0-d)."""
        return a.mean((a.selected - a.z.detach()).square().mean(-1))


@dataclass
class NonStationary:
    """L_NS = 1/(N d) sum_i sum_{j != q_i} sg[softmax_j(-D_ij / tau)] D_ij: losers follow the latents too.

    The softmax runs over all codes, then the winner is left out. Weights are stop-gradient, so the gradient of a code
    is 2/(N d) sum_i w_ij (e_j - z_i).

    Source: NSVQ, arXiv 2606.11363, the non-stationary embedding loss.
    Differs from the source: the paper leaves open whether D is the squared distance and whether z is detached. We read
    both as yes (it is called an embedding loss, and the authors' earlier code squares); `squared` and `detach_latents`
    switch each.

    Attributes:
        weight: alpha; 0.1 in the paper.
        per_code: Rescales the loser weights of each code to the pull of at most one hit. As the paper has it, the
            gradient of an unused code shrinks with its soft mass and at K = 65,536 falls below Adam's epsilon.
        prior: Soft mass at which a code receives half of that pull (`per_code` only).
        squared: D = |z - e|^2; otherwise D = |z - e|, in the softmax as well.
        detach_latents: No gradient to the encoder.
    """

    weight: float = 0.1
    per_code: bool = False
    prior: float = 1e-2
    squared: bool = True
    detach_latents: bool = True

    @property
    def batch_coupled(self) -> bool:
        """Whether the pull of a code depends on all latents of the batch at once."""
        return self.per_code

    def __call__(self, a: Assignment) -> Tensor:
        """The non-stationary loss (0-d); notes winner mass, effective losers and the largest (unweighted) gradient."""
        out = kernels.non_stationary(
            a.z,
            a.table,
            a.indices.clamp_min(0),
            temperature=a.temperature,
            row_weight=a.row_weight,
            denominator=a.num_valid,
            per_code=self.per_code,
            reduce=a.reduce,
            prior=self.prior,
            squared=self.squared,
            detach_latents=self.detach_latents,
        )
        a.stats["winner_mass"] = a.mean(out.winner_mass)
        a.stats["effective_losers"] = a.mean(out.effective_losers.clamp_min(1).log()).exp()
        a.stats["ns_grad_max"] = out.grad_max
        return out.loss


LOSSES: dict[str, Callable[..., Any]] = {
    "commitment": Commitment,
    "codebook": CodebookLoss,
    "ns": NonStationary,
}
