# SPDX-License-Identifier: Apache-2.0
"""NSVQ: non-stationary vector quantization. The whole codebook follows a drifting encoder.

    q_i = argmin_j |z_i - e_j|^2,   straight-through
    L = mean (e_q - sg[z])^2 + 0.25 mean (sg[e_q] - z)^2
        + 0.1 / (N d) sum_i sum_{j != q_i} sg[softmax_j(-D_ij / tau)] D_ij            tau = 0.35

Codes without assignments ("losers") get a dense gradient towards the latents near them; codes that stay idle become
jittered copies of active ones. When the commitment loss no longer falls, the training schedule freezes the encoder
(`steadyvq.training.stages`), and codebook and decoder are consolidated without this loss and without replacement.

Source: NSVQ, arXiv 2606.11363. There is no public code; what the text leaves open is listed in docs/methods.md: squared
distance and detached z in the loss (`losses={"ns": {"squared": False}}` and `{"detach_latents": False}` switch them),
period, threshold and noise of the replacement. Not to be confused with the PyPI package `nsvq`, which is noise
substitution in vector quantization (2022).
"""

from __future__ import annotations

from typing import Any

from steadyvq.quantizers.base import Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.registry import register

PARTS: dict[str, Any] = {
    "codebook": "free",
    "init": "uniform",
    "losses": {"commitment": 0.25, "codebook": 1.0, "ns": {"weight": 0.1}},
    "maintenance": {"replace": {}},
    "temperature": 0.35,
}


@register(
    "nsvq",
    paper="NSVQ, arXiv 2606.11363",
    summary="dense loss and replacement let every code follow the encoder",
    cost="N K d; stores K",
)
def nsvq(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """NSVQ with the paper's weight and temperature; `temperature={"effective_losers": 16}` calibrates tau instead."""
    return compose(num_codes, dim, PARTS, overrides)
