# SPDX-License-Identifier: Apache-2.0
"""Placing codes on data: a random subset of the latents, or k-means++ followed by Lloyd's iterations."""

from __future__ import annotations

import torch
from torch import Tensor

from steadyvq import kernels

LLOYD_ITERATIONS = 10
SEEDING_ROUNDS = 256
SAMPLES_PER_CODE = 64


def place(latents: Tensor, num_codes: int, method: str, generator: torch.Generator) -> Tensor:
    """K codes placed on latents (N, d).

    Args:
        latents: Finite latents, N >= 1; fewer than K are repeated with a jitter of 1 % of their spread.
        num_codes: K.
        method: `data` or `kmeans`.
        generator: CPU generator of all choices.

    Raises:
        ValueError: Unknown method, or no latents.
    """
    if method not in ("data", "kmeans"):
        raise ValueError(
            f"method is {method!r}, but codes are placed by 'data' (random latents) or 'kmeans' (k-means++)"
        )
    latents = latents[latents.isfinite().all(-1)]
    if latents.shape[0] == 0:
        raise ValueError("init_from was given no finite latents: pass at least one batch of encoder output")
    if latents.shape[0] < num_codes:
        return _repeat(latents, num_codes, generator)
    order = torch.randperm(latents.shape[0], generator=generator)[: SAMPLES_PER_CODE * num_codes]
    sample = latents[order.to(latents.device)]
    if method == "data":
        return sample[:num_codes]
    return lloyd(sample, seed_plus_plus(sample, num_codes, generator))


def _repeat(latents: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    rows = latents[torch.arange(num_codes, device=latents.device) % latents.shape[0]]
    spread = (latents - latents.mean(0)).square().mean().sqrt()
    # A single latent has no spread; its size says what a small jitter is.
    scale = torch.maximum(spread, latents.square().mean().sqrt()).clamp_min(1e-6) if spread == 0 else spread
    noise = torch.randn(rows.shape, generator=generator).to(rows) * (0.01 * scale)
    noise[: latents.shape[0]] = 0
    return rows + noise


def seed_plus_plus(latents: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeds (K, d): each drawn with probability proportional to its squared distance to the seeds so far.

    Source: Arthur and Vassilvitskii 2007. Above 256 codes, seeds are drawn in 256 rounds of K/256 at a time, as in
    k-means|| (Bahmani et al. 2012), so that the cost stays N K d.
    """
    per_round = max(1, num_codes // SEEDING_ROUNDS)
    first = torch.randint(latents.shape[0], (1,), generator=generator).to(latents.device)
    chosen = [first]
    distance = (latents - latents[first]).square().sum(-1)
    count = 1
    while count < num_codes:
        draw = _draw(distance, min(per_round, num_codes - count), generator)
        chosen.append(draw)
        count += draw.numel()
        _, nearest = kernels.nearest(latents, latents[draw])
        distance = torch.minimum(distance, nearest)
    return latents[torch.cat(chosen)].clone()


def _draw(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Distinct positions, drawn with probability proportional to `weight`; positions of weight 0 come last."""
    noise = torch.rand(weight.shape[0], generator=generator).clamp_(1e-20, 1 - 1e-7)
    score = weight.double().clamp_min(1e-300).log().to(weight.device) - (-noise.double().log()).log().to(weight.device)
    return score.topk(count).indices


def lloyd(latents: Tensor, codes: Tensor, iterations: int = LLOYD_ITERATIONS) -> Tensor:
    """Lloyd's iterations from given codes (K, d); a code without latents stays where it is."""
    codes = codes.clone()
    for _ in range(iterations):
        indices, _ = kernels.nearest(latents, codes)
        counts = torch.bincount(indices, minlength=codes.shape[0])
        sums = torch.zeros_like(codes).index_add_(0, indices, latents)
        hit = counts > 0
        codes[hit] = sums[hit] / counts[hit, None]
    return codes
