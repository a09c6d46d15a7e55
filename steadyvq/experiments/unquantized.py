# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a quantizer that hands latents through in training: how an autoencoder converges without one.

The decoder sees the latents and the codes learn nothing, so what an evaluation says of them means nothing. Used to begin
experiments from a converged autoencoder; not a method.
"""

from __future__ import annotations

from typing import Any

from steadyvq.quantizers import Quantizer, compose
from steadyvq.quantizers.methods import vq


def unquantized(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """A plain codebook that training passes by."""
    parts = {**vq.PARTS, "losses": {}, "estimator": "unquantized"}
    return compose(num_codes, dim, parts, overrides)
