# SPDX-License-Identifier: Apache-2.0
"""LFQ: look-up-free quantization. One bit per feature, so that d = log2 K and the codes are the corners of a cube.

    q_b = sign(z_b)   (+1 if z_b > 0, else -1),   index = sum_b 2^b [z_b > 0],   straight-through
    L = 0.25 mean (z - sg[q])^2 + 0.1 (H_s - H_b)
    H_s = mean_i H(p_i),   H_b = H(mean_i p_i),   p_i = softmax over all codes of 2 z_i . c_j / T,   T = 0.01

H_s makes every bit sure, H_b spreads the batch over all K codes. Both are in nats; H_b is minus `batch_entropy`, the value
of the loss. See `steadyvq.quantizers.bits` for how neither needs an N x K matrix.

Source: MAGVIT-v2, arXiv 2310.05737, section 3.1 (no public code); weights, T and eps = 1e-5 in log(q + eps) as in the released
Open-MAGVIT2 (configuration: entropy 0.1, commitment 0.25). The paper's plain entropy is
`losses={"batch_entropy": {"eps": 0.0}}`.
Differs from the source: Open-MAGVIT2 takes H_b over the latents of each process, here it is that of the global batch. Its
option to enlarge the entropy weight in the first steps (off in its configurations) is a stage here.
Bit order: `order="little"` as in Open-MAGVIT2, feature 0 is bit 0; `order="big"` as in lucidrains' vector-quantize-pytorch.
"""

from __future__ import annotations

from typing import Any

from steadyvq.quantizers import bits
from steadyvq.quantizers.base import Quantizer
from steadyvq.quantizers.registry import register
from steadyvq.quantizers.scalar import read_options

PARTS: dict[str, Any] = {
    "losses": {"commitment": 0.25, "sample_entropy": 0.1, "batch_entropy": {"weight": 0.1, "eps": 1e-5}},
    "temperature": 0.01,
    "order": "little",
}


@register(
    "lfq",
    paper="MAGVIT-v2, arXiv 2310.05737",
    summary="one bit per feature, no codebook; entropies spread the batch over all codes",
    cost="N d + N K for the entropy, no table",
    example=(64, 6),
)
def lfq(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Look-up-free quantization; num_codes is a power of two and dim its logarithm."""
    return bits.BitQuantizer(num_codes, dim, **read_options(PARTS, overrides, bits.LOSSES))
