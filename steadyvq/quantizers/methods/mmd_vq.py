# SPDX-License-Identifier: Apache-2.0
"""MMD-VQ: codes are held to the distribution of the latents by the maximum mean discrepancy.

    z' = mean z + 0.5 (z - mean z),   d(x, y) = |x - y|^2 / sqrt(dim)
    k(x, y) = exp(-d / b) + exp(-d / 2b),   b = mean of d over all pairs of latents and codes
    MMD = mean k(z', z') + mean k(e, e) - 2 mean k(z', e)                          gradient to the codes alone
    L = mean (e_q - sg[z])^2 + 0.25 mean (sg[e_q] - z)^2 + 0.5 MMD

Source: VQ-Transplant (ICLR 2026), the regulariser of its MMD-VQ.
Differs from the source: the kernels are estimated by random Fourier features (Rahimi and Recht 2007), drawn anew after every
update, so that the gradient is right in the mean, memory and time are linear in N and K (all pairs of 65,536 codes are 17 GB),
and processes need to add up only the mean features of their latents.
Reconstructed: that b pools latents and codes and has no gradient, and that the commitment term stays (the paper trains codes
on a frozen encoder, where it is nothing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steadyvq.kernels import attach_gradient
from steadyvq.quantizers import noise
from steadyvq.quantizers.base import Assignment, Quantizer
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.losses import LOSSES
from steadyvq.quantizers.registry import register

BLOCK = 1024
FREQUENCIES = noise.LOSS


@dataclass
class Discrepancy:
    """MMD of the module docstring, over the latents of all processes.

        exp(-|x - y|^2 / c) = E cos(w . (x - y)),   w ~ N(0, 2/c),   c = b sqrt(dim) and 2 b sqrt(dim)
        MMD = sum over w of [mean_i cos(w . z'_i) - mean_j cos(w . e_j)]^2 + the same of sin, / features

    Attributes:
        weight: gamma, 0.5 in the paper.
        contraction: Of the latents to their mean.
        features: Number of frequencies for each of the two kernels.
    """

    weight: float = 0.5
    contraction: float = 0.5
    features: int = 512
    batch_coupled = True
    needs_update = True

    def __call__(self, a: Assignment) -> Tensor:
        """The discrepancy (0-d), 0 without latents."""
        with torch.no_grad():
            table, dim = a.table.detach(), a.z.shape[1]
            row = torch.ones_like(a.distance) if a.row_weight is None else a.row_weight
            count = a.reduce(a.num_valid)
            mean = a.reduce((a.z * row[:, None]).sum(0)) / count.clamp_min(1)
            latents = self.contraction * (a.z.detach() - mean)
            codes = table - mean
            spread = a.reduce(latents.square().sum(1) @ row)
            scale = _mean_pair(spread, count, codes) / math.sqrt(dim)
            waves = self._frequencies(a, dim) * (2 / (scale * math.sqrt(dim)).clamp_min(1e-30)).sqrt()
            seen = a.reduce(_features(latents, row, waves)) / count.clamp_min(1)
            ours = _features(codes, torch.ones_like(codes[:, 0]), waves) / len(codes)
            gap = (ours - seen) * (count > 0)
            value = gap.square().sum() / self.features
            grad = _gradient(codes, waves, gap) * (2 / (len(codes) * self.features))
        return attach_gradient(value, a.table, grad)

    def _frequencies(self, a: Assignment, dim: int) -> Tensor:
        """(2 features, d) standard normal numbers, those of the wider kernel divided by sqrt(2)."""
        if a.noise is None:
            raise ValueError("the discrepancy was given an assignment without noise: use it inside a VectorQuantizer")
        rows = torch.arange(2 * self.features, device=a.z.device)
        # The same in every process: a function of the update alone, not of the latents' positions.
        draws = noise.Noise(a.noise.key, rows).normal(dim, FREQUENCIES, a.z.dtype)
        return torch.where((rows < self.features)[:, None], draws, draws / math.sqrt(2))


def _mean_pair(spread: Tensor, count: Tensor, codes: Tensor) -> Tensor:
    """Mean |x - y|^2 over all pairs of contracted latents and codes, both relative to the latents' mean."""
    total = count + len(codes)
    return 2 * ((spread + codes.square().sum()) / total - (codes.sum(0) / total).square().sum())


def _features(rows: Tensor, weight: Tensor, waves: Tensor) -> Tensor:
    """(2, F) weighted sums of cos and sin of w . x, in blocks of rows."""
    out = torch.zeros_like(waves[:, :1]).T.repeat(2, 1)
    for part, r in zip(torch.split(rows, BLOCK), torch.split(weight, BLOCK), strict=True):
        phase = part @ waves.T
        out = out + torch.stack([r @ phase.cos(), r @ phase.sin()])
    return out


def _gradient(codes: Tensor, waves: Tensor, gap: Tensor) -> Tensor:
    """(K, d) sum over w of [-gap_cos sin(w . e_j) + gap_sin cos(w . e_j)] w, in blocks of codes."""
    parts = []
    for part in torch.split(codes, BLOCK):
        phase = part @ waves.T
        parts.append((gap[1] * phase.cos() - gap[0] * phase.sin()) @ waves)
    return torch.cat(parts)


LOSSES["mmd"] = Discrepancy

PARTS: dict[str, Any] = {
    "codebook": "free",
    "init": "normal",
    "losses": {"commitment": 0.25, "codebook": 1.0, "mmd": {"weight": 0.5}},
}


@register(
    "mmd_vq",
    paper="VQ-Transplant (ICLR 2026), MMD-VQ",
    summary="codes match the distribution of the latents by random features",
    cost="N K d + (N + K) d F for F features",
    status="reconstructed",
)
def mmd_vq(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """VQ with the maximum mean discrepancy between latents and codes."""
    return compose(num_codes, dim, PARTS, overrides)
