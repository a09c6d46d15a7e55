# SPDX-License-Identifier: Apache-2.0
"""VQGAN-FC: few dimensions, and only directions count. The quantizer of ViT-VQGAN and LlamaGen.

    z^ = z / |z|,   e^_j = e_j / |e_j|,   q_i = argmin_j |z^_i - e^_j|^2 (the largest cosine),   straight-through to z^
    L = mean (e^_q - sg[z^])^2 + 0.25 mean (sg[e^_q] - z^)^2

z_q is the normalised code. The gradient reaches z through the normalisation, so none of it changes |z|.

Source: ViT-VQGAN, arXiv 2110.04627, section 3.2; codes, weights and start as in LlamaGen's `vq_model.py`: U(-1/K, 1/K),
then normalised, so directions of equal probability in the cube.
Differs from the source: LlamaGen also computes an entropy loss over N x K in every training step, even at weight 0; here it
is left out. The projection to d = 8 (32 in ViT-VQGAN) is the tokenizer's `pre_quant`: give `dim=8`. At d = 128 most codes
die, as with plain VQ.
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
    "unit_sphere": True,
}


@register(
    "vqgan_fc",
    paper="ViT-VQGAN, arXiv 2110.04627",
    summary="few dimensions, codes and latents on the unit sphere",
    cost="N K d",
)
def vqgan_fc(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """VQ on the unit sphere; meant for a small `dim` such as 8."""
    return compose(num_codes, dim, PARTS, overrides)
