# SPDX-License-Identifier: Apache-2.0
"""Estimators: where the gradient of z_q goes, since argmin has none.

An estimator names a *carrier* g (N, d). The value of z_q is exactly the selected code, e.detach() + (g - g.detach());
its backward is that of g. An estimator with `own_value = True` is one whose training value differs from the code by
definition: then z_q is the carrier itself in training, and the code in evaluation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steadyvq.quantizers.base import Assignment


def straight_through(assignment: Assignment) -> Tensor:
    """The gradient of z_q is handed to z unchanged (Bengio et al. 2013; van den Oord et al. 2017)."""
    return assignment.z


def direct(assignment: Assignment) -> Tensor:
    """The gradient of z_q goes to the selected code: exact, for use when the encoder is frozen and needs none."""
    return assignment.selected


def rotation(assignment: Assignment) -> Tensor:
    """The gradient of z_q is rotated and rescaled to z as z was to the code.

        g = sg[lambda R] z,   R = I - 2 w w^T + 2 q u^T,   lambda = |e| / |z|
        u = z / |z|,   q = e / |e|,   w = (u + q) / |u + q|

    R is the rotation that takes u to q in the plane of both (a reflection where they are opposite, as w is 0 there), so
    the angle between the gradient and the code is that between the gradient at z and z. Where z or e is zero there is
    no angle, and the gradient is handed over unchanged.

    Source: Fifty et al., arXiv 2410.06424, section 4. All of R and lambda is constant, as in the paper's formula.
    """
    z, code = assignment.z, assignment.selected.detach()
    u, z_norm = _direction(z.detach())
    q, code_norm = _direction(code)
    w, _ = _direction(u + q)
    rotated = z - 2 * (z * w).sum(-1, keepdim=True) * w + 2 * (z * u).sum(-1, keepdim=True) * q
    turns = (z_norm > 0) & (code_norm > 0)
    return torch.where(turns, code_norm / torch.where(turns, z_norm, 1.0) * rotated, z)


def _direction(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and lengths of rows; the direction of zero is zero."""
    norm = rows.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, rows / torch.where(norm > 0, norm, 1.0), 0.0), norm


class Unquantized:
    """z_q is z itself in training: encoder and decoder learn as an autoencoder, codes nothing from the reconstruction.

    For the first stage of a run, which a codebook does not hold back, and to begin from a converged autoencoder.
    """

    own_value = True

    def __call__(self, assignment: Assignment) -> Tensor:
        """The latents (N, d)."""
        return assignment.z


ESTIMATORS: dict[str, Callable[[Assignment], Tensor]] = {
    "straight_through": straight_through,
    "direct": direct,
    "rotation": rotation,
    "unquantized": Unquantized(),
}
