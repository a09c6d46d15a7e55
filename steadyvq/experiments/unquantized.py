# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a quantizer that hands latents through in training: how an autoencoder converges without one.

The decoder sees the latents and the codes learn nothing, so what an evaluation says of them means nothing. Used to begin
experiments from a converged autoencoder; not a method.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steadyvq.quantizers import Assignment, Quantizer, compose
from steadyvq.quantizers.methods import vq


class HandedThrough:
    """An estimator whose value in training is the latent itself."""

    own_value = True

    def __call__(self, a: Assignment) -> Tensor:
        """The latents (N, d)."""
        return a.z


def unquantized(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """A plain codebook that training passes by."""
    parts = {**vq.PARTS, "losses": {}, "estimator": HandedThrough()}
    return compose(num_codes, dim, parts, overrides)
