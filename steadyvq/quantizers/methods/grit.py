# SPDX-License-Identifier: Apache-2.0
"""GRIT-VQ, reconstructed: a radius-based update along the quantisation direction, and codes that share a transform.

    z_q = z + r u,   u = sg[(e_q - z) / |e_q - z|],   r = |e_q - z| in value, with the gradient of rho(|e_q - z|)
    dz_q/dz = I - rho' u u^T,   dz_q/de_q = rho' u u^T                with rho' = rho'(|e_q - z|) in [0, 1]
    E = T(base), a linear map W of a frozen base, or I + V U^T of a given rank
    L = mean (E_q - sg[z])^2 + 0.25 mean (sg[E_q] - z)^2

The forward stays hard. Of the decoder's gradient the part along u, by which only |e_q - z| could change, goes to the code with
weight rho' and to z with 1 - rho'; the part across u goes to z as in the straight-through estimator, which is rho' = 0.

Source: GRIT-VQ, arXiv 2602.01140, of which only the abstract was within reach: "a radius-based update that moves latents
along the quantization direction with a controllable, geometry-aware step" and "a data-agnostic integrated transform" by
which all codes move through shared parameters. Neither rho nor T is given there; so this is one reading of it, and no number
should be published as GRIT-VQ's from it. `rho`: `log` (rho' = 1 / (1 + |e_q - z|), the default), `identity` (rho' = 1),
`clipped` (rho' = 1 up to `limit`, then 0), `constant` (rho' = 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steadyvq.quantizers.base import Assignment, Quantizer
from steadyvq.quantizers.codebooks import CODEBOOKS, LinearCodebook, TransformedCodebook
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.estimators import ESTIMATORS
from steadyvq.quantizers.registry import register

PARTS: dict[str, Any] = {
    "init": "normal",
    "losses": {"commitment": 0.25, "codebook": 1.0},
    "estimator": "radius",
}


@dataclass
class Radius:
    """The gradient of z_q along the quantisation direction is shared between z and the code, see the module.

    Attributes:
        rho: `log`, `identity`, `clipped` or `constant`.
        limit: Where `clipped` ends, a length in latent space.
    """

    rho: Literal["log", "identity", "clipped", "constant"] = "log"
    limit: float = 1.0

    def __post_init__(self) -> None:
        if self.rho not in ("log", "identity", "clipped", "constant") or self.limit <= 0:
            raise ValueError(
                f"rho={self.rho!r}, limit={self.limit}, but a radius update needs rho 'log', 'identity', 'clipped' or "
                "'constant' and a positive limit"
            )

    def __call__(self, a: Assignment) -> Tensor:
        """The carrier (N, d)."""
        step = a.selected - a.z
        radius = step.norm(dim=-1, keepdim=True)
        length = radius.detach()
        direction = step.detach() / torch.where(length > 0, length, 1.0)
        return a.z + self._rho(radius) * direction

    def _rho(self, radius: Tensor) -> Tensor:
        if self.rho == "identity":
            return radius
        if self.rho == "clipped":
            return radius.clamp_max(self.limit)
        return radius.log1p() if self.rho == "log" else radius.detach()


ESTIMATORS["radius"] = Radius()


class LowRankCodebook(TransformedCodebook):
    """E = base + (base V) U^T with a frozen base, trained V ~ N(0, 1/d) and U = 0 at the start, both (d, r).

    Args:
        rows: The base (K, d).
        generator: Of the start of V.
        rank: r.
    """

    averaged_buffers = ("base",)

    def __init__(self, rows: Tensor, generator: torch.Generator, *, rank: int = 8) -> None:
        super().__init__()
        dim = rows.shape[1]
        if not 1 <= rank <= dim:
            raise ValueError(f"rank is {rank}, but a low-rank map of {dim} dimensions needs a rank from 1 to {dim}")
        self.register_buffer("base", rows.clone())
        self.down = nn.Parameter(torch.empty(dim, rank).normal_(0, dim**-0.5, generator=generator))
        self.up = nn.Parameter(torch.zeros(dim, rank))

    def transform(self) -> Tensor:
        """The transformed table."""
        return self.base + (self.base @ self.down) @ self.up.T

    def set_rows_(self, rows: Tensor) -> None:
        """Puts the rows into the base and makes the map the identity."""
        with torch.no_grad():
            self.base.copy_(rows)
            self.up.zero_()

    def copy_rows_(self, dst: Tensor, src: Tensor, noise: Tensor) -> None:
        """Copies rows of the base; the noise is divided by the map's root-mean-square gain."""
        with torch.no_grad():
            dim = self.base.shape[1]
            gain = (torch.eye(dim).to(self.down) + self.down @ self.up.T).square().sum().div(dim).sqrt()
        super().copy_rows_(dst, src, noise.to(gain) / gain.clamp_min(1e-6))


CODEBOOKS["low_rank"] = LowRankCodebook


@register(
    "grit",
    paper="GRIT-VQ, arXiv 2602.01140",
    summary="decoder gradient along the quantisation direction is shared with the code; codes share a map",
    cost="N K d + K d^2; stores d^2",
    status="reconstructed",
)
def grit(num_codes: int, dim: int, *, rank: int | None = None, **overrides: Any) -> Quantizer:
    """GRIT-VQ as the module reads it; `rank` makes the shared map I + V U^T instead of a full one."""
    codebook = LinearCodebook if rank is None else partial(LowRankCodebook, rank=rank)
    return compose(num_codes, dim, {**PARTS, "codebook": codebook}, overrides)
