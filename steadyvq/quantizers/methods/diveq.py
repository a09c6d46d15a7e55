# SPDX-License-Identifier: Apache-2.0
"""DiVeQ: quantization as a step of the right length in the right direction; latent and code both get its gradient.

    z_q = z + |e_q - z| sg[v / |v|],   v = e_q - z + sqrt(variance) n,   n ~ N(0, I)       in training
    z_q = e_q                                                                              in evaluation
    variance = 5e-3; no loss on latents or codes

The length is differentiated, the direction is not: with g the gradient at z_q and u the direction, the code receives
(g . u) (e_q - z) / |e_q - z| and the latent g less that. Codes that are not selected need replacement.

Source: DiVeQ, arXiv 2509.26469; variance as in a public implementation.
In training z_q is not exactly the code, by definition: it lies at the same distance from z, turned by the noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steadyvq.quantizers import noise
from steadyvq.quantizers.base import Assignment, Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.estimators import ESTIMATORS
from steadyvq.quantizers.registry import register


def step(a: Assignment, direction: Tensor) -> Tensor:
    """z + |e_q - z| direction / |direction|, without gradient through the direction (N, d)."""
    error = a.selected - a.z
    # The norm has no gradient at 0, where the latent is the code.
    apart = (error.detach() != 0).any(-1, keepdim=True)
    length = torch.where(apart, torch.where(apart, error, 1.0).norm(dim=-1, keepdim=True), 0.0)
    return a.z + length * torch.nn.functional.normalize(direction.detach(), dim=-1, eps=1e-30)


@dataclass
class DiVeQ:
    """The carrier of the module docstring, which is also the value in training.

    Attributes:
        variance: Of the noise per element; the direction is exact where it is 0.
    """

    variance: float = 5e-3
    own_value = True
    needs_update = True

    def __call__(self, a: Assignment) -> Tensor:
        """The step from z in the noisy direction of the code."""
        direction = a.selected - a.z
        if a.noise is not None:
            direction = direction + self.variance**0.5 * a.noise.normal(a.z.shape[1], noise.ESTIMATOR, a.z.dtype)
        return step(a, direction)


ESTIMATORS["diveq"] = DiVeQ()

PARTS: dict[str, Any] = {
    "codebook": "free",
    "init": "normal",
    "estimator": "diveq",
    "maintenance": {"replace": {}},
}


@register(
    "diveq",
    paper="DiVeQ, arXiv 2509.26469",
    summary="a noisy step of exact length; no loss on latents or codes",
    cost="N K d; stores K",
)
def diveq(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """DiVeQ with replacement of dead codes."""
    return compose(num_codes, dim, PARTS, overrides)
