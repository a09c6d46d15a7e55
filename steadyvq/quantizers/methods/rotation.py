# SPDX-License-Identifier: Apache-2.0
"""Rotation trick: the gradient at the code is rotated and rescaled to the latent as the latent was to the code.

    q_i = argmin_j |z_i - e_j|^2,   z_q = sg[lambda R] z, whose value is e_q
    R = I - 2 w w^T + 2 q u^T,   u = z / |z|,   q = e_q / |e_q|,   w = (u + q) / |u + q|,   lambda = |e_q| / |z|
    L = mean (e_q - sg[z])^2 + 0.25 mean (sg[e_q] - z)^2

The straight-through estimator gives every latent of a cell the gradient at the code, wherever in the cell it lies. Here the
gradient of z is lambda R^T g: its angle to the latent is the angle of g to the code.

Source: Fifty et al., arXiv 2410.06424, section 4. Only the estimator is new, so every method takes it:
`build_quantizer("ema", ..., estimator="rotation")` is the VQ-VAE of the paper's Table 1.
Differs from the source: the value is the code to the last bit (the official main code adds 1e-6 to its norms); a zero latent
or code hands the gradient over unchanged. The official code for Tables 3 and 4 differentiates through z / |z|, which removes
the radial part of the gradient; this is the paper's formula, with R and lambda constant.
"""

from __future__ import annotations

from typing import Any

from steadyvq.quantizers.base import Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.registry import register

PARTS: dict[str, Any] = {
    "codebook": "free",
    "init": "uniform",
    "losses": {"commitment": 0.25, "codebook": 1.0},
    "estimator": "rotation",
}


@register(
    "rotation",
    paper="Rotation trick, arXiv 2410.06424",
    summary="VQ whose gradient is rotated from code to latent",
    cost="N K d",
)
def rotation(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Plain vector quantization with the rotation trick."""
    return compose(num_codes, dim, PARTS, overrides)
