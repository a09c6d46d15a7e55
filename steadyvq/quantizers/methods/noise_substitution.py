# SPDX-License-Identifier: Apache-2.0
"""Noise substitution: in training the quantisation error is replaced by noise of the same length.

    z_q = z + |e_q - z| n / |n|,   n ~ N(0, I)       in training
    z_q = e_q                                        in evaluation

The decoder sees latents that are as far from z as the code is, in any direction; the length is differentiated, so latent and
code are pulled together, and no loss on either is needed.

Source: Vali and Baeckstroem 2022, "NSVQ: Noise Substitution in Vector Quantization for Machine Learning" (IEEE Access 10),
the method of the PyPI package `nsvq`. Not to be confused with `nsvq` here, non-stationary vector quantization.
Differs from the source: dead codes become jittered copies of active ones as everywhere here (its code replaces those used in
less than 1 % of a period by active ones with a small noise).
In training z_q is not the code, by definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steadyvq.quantizers import noise
from steadyvq.quantizers.base import Assignment, Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.estimators import ESTIMATORS
from steadyvq.quantizers.methods.diveq import step
from steadyvq.quantizers.registry import register


@dataclass
class NoiseSubstitution:
    """The carrier of the module docstring, which is also the value in training."""

    own_value = True
    needs_update = True

    def __call__(self, a: Assignment) -> Tensor:
        """The step from z in a random direction."""
        if a.noise is None:
            raise ValueError(
                "noise substitution was given an assignment without noise: use it inside a VectorQuantizer"
            )
        return step(a, a.noise.normal(a.z.shape[1], noise.ESTIMATOR, a.z.dtype))


ESTIMATORS["noise_substitution"] = NoiseSubstitution()

PARTS: dict[str, Any] = {
    "codebook": "free",
    "init": "normal",
    "estimator": "noise_substitution",
    "maintenance": {"replace": {}},
}


@register(
    "noise_substitution",
    paper="Noise substitution (Vali and Bäckström 2022)",
    summary="noise of the length of the error stands for it in training",
    cost="N K d; stores K",
)
def noise_substitution(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Noise substitution in vector quantization."""
    return compose(num_codes, dim, PARTS, overrides)
