# SPDX-License-Identifier: Apache-2.0
"""HyperVQ: a token is the hyperplane of hyperbolic space that a latent lies farthest beyond, its code the hyperplane's point.

    x = exp_0(z) = tanh(sqrt(c) |z|) z^ / sqrt(c)                          z^ = z / |z|, Poincare ball of curvature -c
    v_j(x) = 2/sqrt(c) |a_j| asinh(lambda <sqrt(c) x, a^_j> cosh(2 sqrt(c) r_j) - (lambda - 1) sinh(2 sqrt(c) r_j)),
             lambda = 2 / (1 - c |x|^2)
    q = argmax_j v_j,   p_j = exp_0(r_j a^_j),   z_q = log_0(p_j) = r_j a^_j
    y = onehot(q) + w - sg[w],   w = softmax(v / tau),   z_q = y E, of the value e_q
    L = mean (e_q - sg[z])^2 + 0.25 mean (sg[e_q] - z)^2

With s = 2 sqrt(c) |z| and t = 2 sqrt(c) r the argument of asinh is sinh(s) <z^, a^> cosh(t) - cosh(s) sinh(t): x never needs to
be computed, nor clipped to the inside of the ball. See `steadyvq.kernels.hyperbolic`.

Source: Goswami et al., arXiv 2403.13015 (TMLR 2025), from public notes on the paper; there is no official code. v_j is the
hyperbolic logistic regression of Hyperbolic Neural Networks++ (Shimizu et al., arXiv 2006.08210).
Reconstructed, and ours: all |a_j| are 1 and r_j >= 0, where the paper trains a_j and r_j freely. So a code is r_j a^_j, and
latent and table alone make the choice: asinh is monotonous, so q is the largest tanh(s) <z^, a^_j> cosh(t_j) - sinh(t_j), an
exact inner-product search, and tau = 1 stands for 1 / |a_j|. Also ours: c = 1, the softmax as the estimator, the terms
commitment and codebook (0.25 and 1), the start N(0, 1/d).

What to know: tokens are not nearest codes. Of two codes in one direction the nearer to the origin always wins, as its
hyperplane is nearer, and where 2 sqrt(c) r is large and radii differ much the shortest codes win everything: r_j is a
threshold as well as a length. A latent at 0 gets the shortest code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steadyvq import kernels
from steadyvq.kernels import hyperbolic
from steadyvq.quantizers.assign import ASSIGNMENTS
from steadyvq.quantizers.base import Assignment, Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.estimators import ESTIMATORS
from steadyvq.quantizers.registry import register


@dataclass
class FarthestBeyond:
    """argmax_j v_j, the lowest index on equality.

    Attributes:
        curvature: c.
    """

    curvature: float = 1.0

    def __call__(self, z: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and squared distances."""
        queries, keys = hyperbolic.search_coordinates(z, table, self.curvature)
        indices, _ = kernels.nearest(queries, keys, metric="dot")
        return indices, (z - table[indices]).square().sum(-1)


@dataclass
class HyperbolicEstimator:
    """The carrier y E: the selected code directly, latents and all codes through the softmax.

    Attributes:
        curvature: c, as that of the assignment.
    """

    curvature: float = 1.0

    def __call__(self, a: Assignment) -> Tensor:
        """The carrier of the gradient."""
        return a.selected + hyperbolic.one_hot_carrier(
            a.z, a.table, temperature=a.temperature, curvature=self.curvature
        )


ASSIGNMENTS["hyperbolic"] = FarthestBeyond()
ESTIMATORS["hyperbolic"] = HyperbolicEstimator()

PARTS: dict[str, Any] = {
    "codebook": "free",
    "init": "normal",
    "losses": {"commitment": 0.25, "codebook": 1.0},
    "temperature": 1.0,
}


@register(
    "hypervq",
    paper="HyperVQ, arXiv 2403.13015",
    summary="tokens are hyperplanes of hyperbolic space, codes their points",
    cost="N K d",
    status="reconstructed",
)
def hypervq(num_codes: int, dim: int, *, curvature: float = 1.0, **overrides: Any) -> Quantizer:
    """HyperVQ with hyperplanes of unit normals; `curvature` is c, of choice and gradient alike."""
    number = isinstance(curvature, int | float) and not isinstance(curvature, bool)
    if not number or not 0 < curvature < math.inf:
        raise ValueError(
            f"curvature is {curvature!r}, but a hyperbolic space of curvature -c needs a positive number c"
        )
    part = {"hyperbolic": {"curvature": float(curvature)}}
    return compose(num_codes, dim, {**PARTS, "assign": part, "estimator": part}, overrides)
