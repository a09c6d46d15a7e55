# SPDX-License-Identifier: Apache-2.0
"""BSQ: binary spherical quantization. LFQ on the unit sphere, with an entropy of groups of bits.

    u = z / |z|,   q = sign(u) / sqrt(d),   index: feature 0 is the highest bit
    backward: q is treated as u / sqrt(d), so the gradient of q reaches u divided by sqrt(d), and z through z / |z|
    L = 0.1 (H_s - sum_g H(mean_i p_ig)),   p_i = softmax over all codes of 2 u_i . c_j / T,   T = 1

|u - q| is at most sqrt(2 - 2 / sqrt(d)), so there is no commitment loss (`losses={"commitment": 0.25}` adds one). The entropy
of the mean is that of groups of bits, each as if independent of the others; with groups of one bit it is linear in d, so
that K = 2^36 costs no more than K = 2^18.

Source: BSQ, arXiv 2406.07548; weights, T, groups of one bit and eps = 1e-8 as in the released bsq-vit (configuration
b18g18: gamma0 = gamma = zeta = 1, codebook_weight 0.1). `losses={"batch_entropy": {"group_size": 9}}` is its class default
(128 x 128), 0 the exact joint entropy.
Differs from the source: in the released code "analytical" sample entropy makes the batch entropy one of single bits, whatever
group_size says; the two are independent here. Its factor 3 on the entropies, falling to 1 in the first 2,000 steps, is a
stage. The paper writes p = sigma(2 c u / T), the released code 2 c . u in the softmax, sigma(4 c u / T), as here.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from steadyvq.quantizers import bits
from steadyvq.quantizers.base import Assignment, Quantizer
from steadyvq.quantizers.registry import register
from steadyvq.quantizers.scalar import read_options

PARTS: dict[str, Any] = {
    "losses": {"sample_entropy": 0.1, "batch_entropy": {"weight": 0.1, "group_size": 1, "eps": 1e-8}},
    "temperature": 1.0,
    "order": "big",
}


class SphericalBits(bits.BitQuantizer):
    """Bits of latents on the unit sphere; the codes lie on it too."""

    def __init__(self, num_codes: int, dim: int, **options: Any) -> None:
        bits.check_bits(num_codes, dim)
        super().__init__(num_codes, dim, magnitude=1 / math.sqrt(dim), **options)

    def project(self, z: Tensor) -> Tensor:
        """u = z / |z|; 0 stays 0."""
        return normalize(z, dim=-1)

    def _carrier(self, assignment: Assignment) -> Tensor:
        return super()._carrier(assignment) / math.sqrt(self.dim)


@register(
    "bsq",
    paper="BSQ, arXiv 2406.07548",
    summary="one bit per feature on the unit sphere; entropies of groups of bits",
    cost="N d, no table",
    example=(64, 6),
)
def bsq(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Binary spherical quantization; num_codes is a power of two and dim its logarithm."""
    return SphericalBits(num_codes, dim, **read_options(PARTS, overrides, bits.LOSSES))
