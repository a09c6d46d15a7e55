# SPDX-License-Identifier: Apache-2.0
"""EMA VQ: codes are moving averages of their latents; no gradient reaches the codebook.

    n_j <- g n_j + (1 - g) hits_j,   m_j <- g m_j + (1 - g) sum of its latents,   e_j = m_j / n_j (Laplace-smoothed)
    L = 0.25 mean (sg[e_q] - z)^2

Source: van den Oord et al. 2017, arXiv 1711.00937, appendix A.1; g = 0.99 as in VQ-VAE-2.
Differs from the source: counts start at 1 (see `maintenance.EMA`). With `maintenance={"replace": {}}` and k-means
initialisation it is the strongest plain rival.
"""

from __future__ import annotations

from typing import Any

from steadyvq.quantizers.base import Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.registry import register

PARTS: dict[str, Any] = {
    "codebook": "frozen",
    "init": "normal",
    "losses": {"commitment": 0.25},
    "maintenance": {"ema": {"decay": 0.99}},
}


@register(
    "ema",
    paper="VQ-VAE, arXiv 1711.00937, A.1",
    summary="codes are moving averages of their latents",
    cost="N K d; stores K d",
)
def ema(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Vector quantization with a codebook of moving averages."""
    return compose(num_codes, dim, PARTS, overrides)
