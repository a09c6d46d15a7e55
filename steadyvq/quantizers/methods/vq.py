# SPDX-License-Identifier: Apache-2.0
"""VQ: the plain codebook of VQ-VAE and VQGAN.

    q_i = argmin_j |z_i - e_j|^2,   z_q = e_q with the straight-through estimator
    L = mean (e_q - sg[z])^2 + 0.25 mean (sg[e_q] - z)^2

Only selected codes receive a gradient. A code that loses its latents while the encoder moves on never comes back.

Source: van den Oord et al. 2017, arXiv 1711.00937, equation 3; start U(-1/K, 1/K) as in VQGAN, arXiv 2012.09841.
Differs from the source: the released VQGAN code puts 0.25 on the codebook term and 1 on the commitment by default; here
both weights are written out, as in the paper.
"""

from __future__ import annotations

from typing import Any

from steadyvq.quantizers.base import Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.registry import register

PARTS: dict[str, Any] = {"codebook": "free", "init": "uniform", "losses": {"commitment": 0.25, "codebook": 1.0}}


@register(
    "vq",
    paper="VQ-VAE, arXiv 1711.00937",
    summary="plain codebook; only selected codes learn, the rest dies",
    cost="N K d",
)
def vq(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Plain vector quantization."""
    return compose(num_codes, dim, PARTS, overrides)
