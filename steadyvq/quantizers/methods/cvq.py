# SPDX-License-Identifier: Apache-2.0
"""CVQ-VAE: online clustered codebook. Codes that are little used are moved onto latents of the batch, at every step.

    q_i = argmin_j |z_i - e_j|^2,   straight-through,   L = mean (e_q - sg[z])^2 + 0.25 mean (sg[e_q] - z)^2
    p_j <- 0.99 p_j + 0.01 mean_i [q_i = j]                                             use of code j, 0 at the start
    alpha_j = exp(-p_j K 10 / (1 - 0.99) - 1e-3),   e_j <- (1 - alpha_j) e_j + alpha_j anchor_j
    anchor_j: `closest` the latent nearest to code j; `random` one of a pool of past latents;
              `probabilistic` a latent drawn with probability softmax_i(-|z_i - e_j|^2)

Optional, `losses={"contrastive": 1.0}`: every code is drawn to the N/K latents nearest to it and away from the farther half,

    L_con = mean_j -log( exp(s+_j / 0.07) / (exp(s+_j / 0.07) + sum_{i in F_j} exp(s_ij / 0.07)) ),   s_ij = -|sg[z_i] - e_j|^2
    s+_j the mean of the max(1, N // K) largest s_ij,   F_j the N // 2 latents with the smallest

p = 0 gives alpha = 0.999 and p = 1/K gives e^-1000: at the first steps the whole codebook is placed on data, afterwards only
codes move that are used a hundred times less than their share.

Source: Zheng and Vedaldi, arXiv 2307.15139.
Differs from the source: distances are Euclidean (its configurations take the cosine for the look-up; its class has both); the
move comes after the optimiser step, in `update`, not between forward and backward, and resets the optimiser's moments of the
rows it moves; use and anchors are those of all processes (in the official code each process has its own, and codebooks
diverge); the pool is saved. The contrastive loss is off, as in the official code unless asked for, where it has weight 1
and the score of the look-up: `losses={"contrastive": {"score": "cosine"}}` is the one of cosine look-ups. With fewer latents
than dead codes several codes get the same `closest` anchor and stay equal until another anchor splits them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steadyvq import kernels
from steadyvq.kernels import soft
from steadyvq.kernels.contrast import contrast
from steadyvq.quantizers import noise
from steadyvq.quantizers.base import Assignment, Quantizer, unit
from steadyvq.quantizers.codebooks import Codebook, FreeCodebook, FrozenCodebook
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.losses import LOSSES
from steadyvq.quantizers.maintenance import MAINTENANCE, Maintenance, UpdateBatch
from steadyvq.quantizers.registry import register

# A smaller share of the way is none: e^-16.
NEGLIGIBLE = 1e-7


class Anchor(Maintenance):
    """Moves little-used codes towards anchors among the latents.

    The latents of all processes are gathered, so that each of them computes the same codebook; anchors are sought only for
    codes that move, in one streamed pass.

    Args:
        num_codes: K.
        dim: d.
        anchors: `closest`, `random` or `probabilistic`.
        decay: Of the use of a code, per update.
        sharpness: 10 in the exponent of alpha.
    """

    usage: Tensor
    pool: Tensor
    filled: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        anchors: Literal["closest", "random", "probabilistic"] = "closest",
        decay: float = 0.99,
        sharpness: float = 10.0,
    ) -> None:
        super().__init__()
        if anchors not in ("closest", "random", "probabilistic"):
            raise ValueError(f"anchors is {anchors!r}, but anchors are 'closest', 'random' or 'probabilistic'")
        if not 0 <= decay < 1 or sharpness <= 0:
            raise ValueError(f"decay={decay}, sharpness={sharpness}, but anchors need 0 <= decay < 1 and sharpness > 0")
        self.anchors, self.decay, self.sharpness = anchors, decay, sharpness
        self.register_buffer("usage", torch.zeros(num_codes))
        self.register_buffer("pool", torch.zeros(num_codes if anchors == "random" else 0, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def check(self, codes: Codebook) -> None:
        """Refuses codebooks whose rows are not the table."""
        if not isinstance(codes, FreeCodebook | FrozenCodebook):
            raise ValueError(
                f"anchors cannot move the codes of a {type(codes).__name__}: they are points of the table, so they need "
                "codebook='free' or 'frozen' (no transform)"
            )

    def forward(self, batch: UpdateBatch) -> dict[str, float]:
        """Counts this step and moves the codes that are little used."""
        latents = batch.gather(torch.cat([a.z[a.counted] for a in batch.assignments]))
        if latents.shape[0] == 0:
            return {"anchored": 0.0}
        self.usage.lerp_((batch.hits / batch.tokens.clamp_min(1)).to(self.usage), 1 - self.decay)
        num_codes = self.usage.numel()
        share = (-self.usage * num_codes * self.sharpness / (1 - self.decay) - 1e-3).exp()
        if self.anchors == "random":
            self._fill(latents, batch.noise)
        moved = (share > NEGLIGIBLE).nonzero()[:, 0]
        if moved.numel():
            codes = batch.codes()[moved]
            places = unit(codes) if batch.unit_sphere else codes
            step = share[moved, None].to(codes) * (self._choose(moved, places, latents, batch.noise) - codes)
            batch.rewrite(moved, moved, step)
        return {"anchored": float(moved.numel())}

    def _choose(self, moved: Tensor, codes: Tensor, latents: Tensor, source: noise.Noise) -> Tensor:
        """Anchors (n, d) of the codes `moved`."""
        if self.anchors == "closest":
            return latents[kernels.nearest(codes, latents)[0]]
        if self.anchors == "random":
            pick = source.uniform(1, noise.MAINTENANCE)[moved, 0] * self.filled
            return self.pool[pick.long()].to(codes)
        gumbel = soft.Gumbel(source.stream(noise.MAINTENANCE), source.rows[moved])
        return latents[soft.gumbel_argmax(codes, latents, gumbel)]

    def _fill(self, latents: Tensor, source: noise.Noise) -> None:
        """Puts random latents of the step into the pool: at its end while it has room, then at random places."""
        size = self.pool.shape[0]
        rows = torch.arange(latents.shape[0], device=latents.device)
        order = noise.Noise(source.key, rows).uniform(1, noise.LOSS)[:, 0].argsort(stable=True)
        room = size - int(self.filled)
        places = source.uniform(1, noise.LOSS)[:, 0].argsort(stable=True)
        if room:
            places = torch.arange(int(self.filled), size, device=latents.device)
        count = min(len(order), len(places))
        self.pool[places[:count]] = latents[order[:count]].to(self.pool)
        self.filled.add_(min(room, count))


@dataclass
class CodeContrast:
    """L_con: draws each code to the latents nearest to it and away from the farther half of them; no gradient to latents.

    Every code counts alike, used or not. Neighbours are sought among the latents of this process, as in the official code.

    Attributes:
        weight: 1 in the official class, where it is switched on.
        score: s, `l2` or `cosine`.
        temperature: 0.07 in the official class.
        negatives: Share of the latents that a code is driven away from.
    """

    weight: float = 1.0
    score: Literal["l2", "cosine"] = "l2"
    temperature: float = 0.07
    negatives: float = 0.5
    batch_coupled = True

    def __post_init__(self) -> None:
        if self.score not in ("l2", "cosine"):
            raise ValueError(f"score is {self.score!r}, but codes are contrasted by 'l2' or 'cosine'")
        if not self.temperature > 0 or not 0 < self.negatives <= 1:
            raise ValueError(
                f"temperature={self.temperature}, negatives={self.negatives}, but the contrastive loss needs "
                "temperature > 0 and 0 < negatives <= 1"
            )

    def __call__(self, a: Assignment) -> Tensor:
        """The contrastive loss (0-d)."""
        z, table = (a.z, a.table) if self.score == "l2" else (unit(a.z), unit(a.table))
        return contrast(
            z,
            table,
            temperature=self.temperature,
            negatives=self.negatives,
            row_weight=a.counted.to(z.dtype),
            score="l2" if self.score == "l2" else "dot",
        )


MAINTENANCE["anchor"] = Anchor
LOSSES["contrastive"] = CodeContrast

PARTS: dict[str, Any] = {
    "codebook": "free",
    "init": "uniform",
    "losses": {"commitment": 0.25, "codebook": 1.0},
    "maintenance": {"anchor": {"anchors": "closest", "decay": 0.99, "sharpness": 10.0}},
}


@register(
    "cvq",
    paper="CVQ-VAE, arXiv 2307.15139",
    summary="little-used codes are moved onto latents at every step",
    cost="N K d; stores K",
)
def cvq(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Online clustered codebook; `maintenance={"anchor": {"anchors": "random"}}` takes another anchor."""
    return compose(num_codes, dim, PARTS, overrides)
