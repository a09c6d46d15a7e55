# SPDX-License-Identifier: Apache-2.0
"""Affine codes and a synchronised update: the codebook shares a scale and a shift, and codes hear the decoder a little.

    E_j = (1 + r s) * c_j + r b       s, b (d) trained, 0 at the start, r = 10 a factor on their learning rate; c_j trained
    q_i = argmin_j |z_i - E_j|^2
    gradient of z_q: all of it to z (straight-through), and nu = 0.2 of it to the selected code as well
    L = 0.95 mean (E_q - sg[z])^2 + 0.05 mean (sg[E_q] - z)^2

Codes that are not selected follow the mean and the spread of the latents through s and b; the synchronised gradient keeps a
code from lagging one step behind the decoder.

Source: "Straightening Out the Straight-Through Estimator", arXiv 2305.08842, sections 4.1 and 4.3, and its code vqtorch:
beta = 0.95, `affine_lr` and `sync_nu` as in its README.
Differs from the source: one group of s and b; the alternated optimisation (a codebook step of its own inside the forward)
is left out, since a forward here changes nothing; vqtorch's replacement by random latents too: `maintenance={"replace": {}}`
is ours. There it writes latents into c, though the look-up uses E; here `init_from` sets s = b = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steadyvq.quantizers.base import Assignment, Quantizer
from steadyvq.quantizers.codebooks import CODEBOOKS, TransformedCodebook
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.estimators import ESTIMATORS
from steadyvq.quantizers.registry import register

PARTS: dict[str, Any] = {
    "init": "normal",
    "losses": {"commitment": 0.05, "codebook": 0.95},
    "estimator": "synced",
}


@dataclass
class Synced:
    """The gradient of z_q is handed to z, and a part of it to the selected code.

    Source: arXiv 2305.08842, section 4.3: z_q = z + sg[e - z] + nu (e - sg[e]).

    Attributes:
        nu: The part.
    """

    nu: float = 0.2

    def __call__(self, a: Assignment) -> Tensor:
        """The carrier (N, d)."""
        return a.z + self.nu * a.selected


ESTIMATORS["synced"] = Synced()


class AffineCodebook(TransformedCodebook):
    """E = (1 + r s) * base + r b, see the module.

    Args:
        rows: The base (K, d), trained.
        generator: Not used: nothing here starts at random.
        rate: r, by which steps of s and b are larger than the optimiser makes them.
    """

    trainable = True

    def __init__(self, rows: Tensor, generator: torch.Generator, *, rate: float = 10.0) -> None:
        super().__init__()
        if not 0 < rate < float("inf"):
            raise ValueError(f"rate is {rate}, but the factor on scale and shift must be positive")
        self.rate = rate
        self.base = nn.Parameter(rows.clone())
        self.scale = nn.Parameter(torch.zeros(rows.shape[1]))
        self.shift = nn.Parameter(torch.zeros(rows.shape[1]))

    def transform(self) -> Tensor:
        """The scaled and shifted table."""
        return (1 + self.rate * self.scale) * self.base + self.rate * self.shift

    def set_rows_(self, rows: Tensor) -> None:
        """Puts the rows into the base and makes scale and shift the identity."""
        with torch.no_grad():
            self.base.copy_(rows)
            self.scale.zero_()
            self.shift.zero_()

    def copy_rows_(self, dst: Tensor, src: Tensor, noise: Tensor) -> None:
        """Copies rows of the base; the noise is divided by the scale."""
        gain = (1 + self.rate * self.scale.detach()).abs().clamp_min(1e-6)
        super().copy_rows_(dst, src, noise.to(gain) / gain)


CODEBOOKS["affine"] = AffineCodebook


@register(
    "affine",
    paper="Straightening Out the STE, arXiv 2305.08842",
    summary="all codes share a scale and a shift; codes get a part of the decoder's gradient",
    cost="N K d; stores d",
)
def affine(num_codes: int, dim: int, *, rate: float = 10.0, **overrides: Any) -> Quantizer:
    """VQ with affine codes and the synchronised update of vqtorch."""
    codebook = partial(AffineCodebook, rate=rate)
    return compose(num_codes, dim, {**PARTS, "codebook": codebook}, overrides)
