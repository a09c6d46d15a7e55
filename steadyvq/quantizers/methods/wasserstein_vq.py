# SPDX-License-Identifier: Apache-2.0
"""W-VQ: codes are held to the distribution of the latents by the Wasserstein distance of their Gaussians.

    A = 0.25 cov(z), a = mean z;   B = cov(e), b = mean e
    W = |a - b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)                              gradient to the codes alone
    L = mean (e_q - sg[z])^2 + 0.25 mean (sg[e_q] - z)^2 + 0.5 W / d

The covariance of the latents is scaled by 0.25, that is, latents contracted to their mean by 0.5: a best quantizer's codes
spread less than the data.

Source: VQ-Transplant (ICLR 2026), the regulariser of its W-VQ, and the closed form of Dowson and Landau 1982.
Reconstructed: the division by d, which makes the weight 0.5 mean the same in every dimension, and that the commitment term
stays (the paper trains codes on a frozen encoder, where it is nothing).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steadyvq.kernels import attach_gradient
from steadyvq.quantizers.base import Assignment, Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.losses import LOSSES
from steadyvq.quantizers.registry import register


@dataclass
class Wasserstein:
    """W / d of the module docstring, over the latents of all processes.

    dW/dB = I - T with T = A^1/2 (A^1/2 B A^1/2)^-1/2 A^1/2, the linear map that transports codes to latents; the gradient of
    a code is 2/K [(I - T)(e_j - b) + b - a]. It follows from the sums of z and z z^T, so several processes have it alike.

    Attributes:
        weight: gamma, 0.5 in the paper.
        contraction: Of the latents to their mean; 0.5 scales their covariance by 0.25.
    """

    weight: float = 0.5
    contraction: float = 0.5
    batch_coupled = True

    def __call__(self, a: Assignment) -> Tensor:
        """The distance (0-d), 0 without latents."""
        with torch.no_grad():
            dim = a.z.shape[1]
            mean, cov, present = self._latents(a)
            table = a.table.detach().double()
            middle = table.mean(0)
            codes = table - middle
            root = _power(self.contraction**2 * cov, 0.5)
            inner = root @ (codes.T @ codes / len(codes)) @ root
            value = (
                (mean - middle).square().sum() + self.contraction**2 * cov.trace() + codes.square().sum() / len(codes)
            )
            value = (value - 2 * _power(inner, 0.5).trace()) / dim * present
            transport = root @ _power(inner, -0.5) @ root
            grad = (codes - codes @ transport + middle - mean) * (2 / (len(codes) * dim)) * present
        return attach_gradient(value.to(a.z.dtype), a.table, grad.to(a.table.dtype))

    def _latents(self, a: Assignment) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (d) and covariance (d, d) of the latents of all processes, and 1 if there are any, else 0."""
        # A broken latent has no place in a distribution, and a decomposition does not survive it.
        row = a.counted.double()[:, None]
        z = torch.where(a.counted[:, None], a.z.detach().double(), 0.0)
        count = a.reduce(row.sum())
        mean = a.reduce(z.sum(0)) / count.clamp_min(1)
        rest = (z - mean) * row
        return mean, a.reduce(rest.T @ rest) / count.clamp_min(1), (count > 0).double()


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A symmetric positive matrix to a power; directions without any spread stay without."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = values > 1e-12 * values.abs().amax()
    powered = torch.where(kept, torch.where(kept, values, 1.0) ** exponent, 0.0)
    out: Tensor = (vectors * powered) @ vectors.T
    return out


LOSSES["wasserstein"] = Wasserstein

PARTS: dict[str, Any] = {
    "codebook": "free",
    "init": "normal",
    "losses": {"commitment": 0.25, "codebook": 1.0, "wasserstein": {"weight": 0.5}},
}


@register(
    "wasserstein_vq",
    paper="VQ-Transplant (ICLR 2026), W-VQ",
    summary="codes match mean and covariance of the latents",
    cost="N K d + (N + K) d^2 + d^3",
    status="reconstructed",
)
def wasserstein_vq(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """VQ with the Gaussian Wasserstein distance between latents and codes."""
    return compose(num_codes, dim, PARTS, overrides)
