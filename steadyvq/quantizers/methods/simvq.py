# SPDX-License-Identifier: Apache-2.0
"""SimVQ: the codebook is a trainable linear map of a frozen random base, so that all codes move together.

    E = C W^T + b,   C ~ N(0, 1/d) frozen,   q_i = argmin_j |z_i - E_j|^2,   straight-through
    L = mean (E_q - sg[z])^2 + 0.25 mean (sg[E_q] - z)^2

Source: SimVQ, arXiv 2411.02038; weights as in its configuration files (legacy: false), bias as in its code.
The paper also trains C and W together, which works as well: `train_base=True` (also the "Qbridge-lin/1" ablation of FVQ);
`bias=False` leaves out b.
Differs from the source: the official `get_codebook_entry` returns rows of C; here `decode` uses E, as forward does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from steadyvq.quantizers.base import Quantizer
from steadyvq.quantizers.codebooks import LinearCodebook
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.registry import register

PARTS: dict[str, Any] = {"init": "normal", "losses": {"commitment": 0.25, "codebook": 1.0}}


@register(
    "simvq",
    paper="SimVQ, arXiv 2411.02038",
    summary="one linear map moves all codes of a frozen base",
    cost="N K d + K d^2; stores d^2",
)
def simvq(num_codes: int, dim: int, *, train_base: bool = False, bias: bool = True, **overrides: Any) -> Quantizer:
    """SimVQ. With `losses={"ns": 0.1}` it is the "SimVQ + NS" of the NSVQ paper's Table 1."""
    codebook = partial(LinearCodebook, train_base=train_base, bias=bias)
    return compose(num_codes, dim, {**PARTS, "codebook": codebook}, overrides)
