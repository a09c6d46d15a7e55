# SPDX-License-Identifier: Apache-2.0
"""Maintenance: the bookkeeping that `update()` does after an optimiser step, as an ordered list of small modules.

    EMA                   the codebook is a moving average of its latents       (VQ-VAE-2; VQGAN-EMA)
    ReplaceDead           dead codes become jittered copies of active ones      (NSVQ, arXiv 2606.11363, stage 1)
    CalibrateTemperature  tau follows the scale of the latents                  (ours)
    Anneal                tau falls with the number of updates                  (NS-VQ, Gumbel-VQ, neural gas)

All of it is a function of the step's global batch: counts are summed over processes, noise comes from (seed, number of
updates), never from the global generator.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from steadyvq.quantizers.base import SHORTEST, Assignment, Gather, Reduce, unit
from steadyvq.quantizers.codebooks import Codebook, FrozenCodebook
from steadyvq.quantizers.noise import Noise

TEMPERATURE_MIN, TEMPERATURE_MAX = 1e-12, 1e12


@dataclass
class UpdateBatch:
    """What one optimiser step did, over all micro-batches and processes.

    Attributes:
        assignments: The detached records of this process, one per micro-batch.
        codes: The codebook, which maintenance may write.
        temperature: The quantizer's tau (0-d buffer), which maintenance may write.
        hits: Latents per code (K,).
        distortion: Summed squared distance of the latents of each code (K,).
        tokens: Number of valid latents (0-d).
        reduce: Sums over processes.
        gather: Concatenates rows over processes.
        noise: Random numbers for the K codes, the same in every process.
        generator: Noise for this update, the same in every process.
        rewrite: `rewrite(dst, src, noise)` makes the codes `dst` copies of `src` and tells everyone who remembers rows:
            optimiser, moving average, all maintenance.
        unit_sphere: Codes are directions: their lengths mean nothing.
    """

    assignments: list[Assignment]
    codes: Codebook
    temperature: Tensor
    hits: Tensor
    distortion: Tensor
    tokens: Tensor
    reduce: Reduce
    gather: Gather
    noise: Noise
    generator: torch.Generator
    rewrite: Callable[[Tensor, Tensor, Tensor], None]
    unit_sphere: bool = False


class Maintenance(nn.Module, ABC):
    """One kind of bookkeeping with its own buffers."""

    @abstractmethod
    def forward(self, batch: UpdateBatch) -> dict[str, float]:
        """Does the bookkeeping of one step; returns what happened, by name."""

    def rows_copied(self, dst: Tensor, src: Tensor, table: Tensor) -> None:
        """Is told that in `table` the codes `dst` are now copies of the codes `src` and will share their latents."""

    def rows_set(self, table: Tensor) -> None:
        """Is told that the whole table was placed anew."""

    def rows_moved(self, rows: Tensor, table: Tensor) -> None:
        """Is told that the codes `rows` were moved to where they now are in `table`."""

    def check(self, codes: Codebook) -> None:
        """Raises ValueError if this maintenance cannot work on that codebook."""


class EMA(Maintenance):
    """Codes are exponential moving averages of the latents assigned to them.

        n_j <- g n_j + (1 - g) hits_j,    m_j <- g m_j + (1 - g) sum_{i: q_i = j} z_i,    e_j = m_j / n~_j
        n~_j = (n_j + eps) / (sum n + K eps) * sum n        (Laplace smoothing)

    Source: van den Oord et al. 2017 (arXiv 1711.00937), appendix A.1.
    Differs from the source: counts start at 1, not 0: with 0 the first update divides an unused code by about eps and
    throws it 10^4 away.

    Args:
        num_codes: K.
        dim: d.
        decay: g, per optimiser step.
        eps: Laplace smoothing in latents.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, num_codes: int, dim: int, *, decay: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}, but an exponential moving average needs a decay in [0, 1)")
        self.decay, self.eps = decay, eps
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", torch.zeros(num_codes, dim))

    def check(self, codes: Codebook) -> None:
        """Refuses codebooks whose rows are not the table, or that a gradient moves as well."""
        if not isinstance(codes, FrozenCodebook):
            raise ValueError(
                f"EMA cannot maintain a {type(codes).__name__}: it writes the table's rows itself, so it needs "
                "codebook='frozen' (no transform, no gradient)"
            )

    def rows_set(self, table: Tensor) -> None:
        """Starts the averages at the placed rows."""
        self.counts.fill_(1)
        self.sums.copy_(table)

    def rows_copied(self, dst: Tensor, src: Tensor, table: Tensor) -> None:
        """Splits the count of each source between it and its copy."""
        self.counts[src] /= 2
        self.counts[dst] = self.counts[src]
        rows = torch.cat([dst, src])
        self.sums[rows] = table[rows] * self._smoothed()[rows, None]

    def rows_moved(self, rows: Tensor, table: Tensor) -> None:
        """Goes on from the new places with the counts as they are."""
        self.sums[rows] = table[rows] * self._smoothed()[rows, None]

    def _smoothed(self) -> Tensor:
        total = self.counts.sum()
        return (self.counts + self.eps) / (total + self.counts.numel() * self.eps) * total

    def forward(self, batch: UpdateBatch) -> dict[str, float]:
        """Averages the latents of this step into the codes."""
        sums = torch.zeros_like(self.sums)
        for a in batch.assignments:
            valid = a.counted
            sums.index_add_(0, a.indices[valid], a.z[valid].to(sums))
        return self._average(batch, batch.hits, batch.reduce(sums))

    def _average(self, batch: UpdateBatch, hits: Tensor, sums: Tensor) -> dict[str, float]:
        """Takes hits (K,) and sums (K, d) of all processes into the averages and writes the codes."""
        self.counts.lerp_(hits.to(self.counts), 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        rows = self.sums / self._smoothed()[:, None]
        if batch.unit_sphere:
            # The average of a code that is never hit fades to nothing; its direction stays.
            length = self.sums.norm(dim=-1, keepdim=True)
            rows = torch.where(length > SHORTEST, unit(self.sums), batch.codes.base)
        batch.codes.set_rows_(rows)
        return {}


class ReplaceDead(Maintenance):
    """Dead codes become jittered copies of active codes.

    A code is dead when it has had no hit while `patience` hits per code were handed out on average, that is, for
    `patience * K` latents: a threshold in expected hits means the same at every batch size and K. The donors share
    their latents with their copies.

    Source: NSVQ, arXiv 2606.11363, section on dead-code replacement (period, threshold and noise are not in the text).

    Args:
        num_codes: K.
        dim: d.
        patience: Expected hits under uniform use that a code may miss.
        every: Updates between two events.
        cap: Largest fraction of the K codes replaced in one event (at least one code).
        donors: How active codes are drawn: by `distortion` mass n_j D_j (what a split lowers) or by `usage` n_j.
        jitter: Standard deviation of the noise per element, relative to the cell radius sqrt(D_j / d) of the donor.
        decay: Of the averages of usage and distortion per update.
    """

    idle: Tensor
    usage: Tensor
    mass: Tensor
    updates: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        patience: float = 30.0,
        every: int = 1,
        cap: float = 0.01,
        donors: Literal["distortion", "usage"] = "distortion",
        jitter: float = 0.1,
        decay: float = 0.95,
    ) -> None:
        super().__init__()
        if donors not in ("distortion", "usage"):
            raise ValueError(f"donors is {donors!r}, but replacement draws its donors by 'distortion' or by 'usage'")
        if not 0 < cap <= 1 or patience <= 0 or every < 1 or not 0 <= decay < 1 or jitter < 0:
            raise ValueError(
                f"patience={patience}, every={every}, cap={cap}, jitter={jitter}, decay={decay}, but replacement needs "
                "patience > 0, every >= 1, 0 < cap <= 1, jitter >= 0 and 0 <= decay < 1"
            )
        self.dim, self.patience, self.every, self.cap = dim, patience, every, cap
        self.donors, self.jitter, self.decay = donors, jitter, decay
        self.register_buffer("idle", torch.zeros(num_codes, dtype=torch.int64))
        self.register_buffer("usage", torch.zeros(num_codes))
        self.register_buffer("mass", torch.zeros(num_codes))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def check(self, codes: Codebook) -> None:
        """Refuses codebooks whose codes cannot be copied."""
        if codes.cannot_copy:
            raise ValueError(f"replacement makes codes copies of others, but {codes.cannot_copy}")

    def rows_set(self, table: Tensor) -> None:
        """Forgets the past of the old table."""
        for buffer in (self.idle, self.usage, self.mass):
            buffer.zero_()

    def forward(self, batch: UpdateBatch) -> dict[str, float]:
        """Counts this step and, when an event is due, replaces dead codes."""
        self.idle += batch.tokens.to(torch.int64)
        self.idle[batch.hits > 0] = 0
        self.usage.lerp_(batch.hits.to(self.usage), 1 - self.decay)
        self.mass.lerp_(batch.distortion.to(self.mass), 1 - self.decay)
        self.updates += 1
        if int(self.updates) % self.every:
            return {"replaced": 0.0}
        dst, src = self._choose(batch.generator)
        if dst.numel():
            self._replace(batch, dst, src)
        return {"replaced": float(len(dst))}

    def _choose(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Dead codes, the longest idle first, and as many active donors; no code is in both."""
        num_codes = self.idle.numel()
        dead = self.idle > self.patience * num_codes
        weight = torch.where(dead, 0.0, self.mass if self.donors == "distortion" else self.usage)
        weight = torch.where(weight.isfinite(), weight, 0.0)
        limit = max(1, int(self.cap * num_codes))
        count = min(int(dead.sum()), int((weight > 0).sum()), limit)
        order = torch.sort(torch.where(dead, self.idle, -1), descending=True, stable=True).indices
        # Gumbel top-k draws without replacement, so that no donor is split twice in one event.
        noise = torch.rand(num_codes, generator=generator).clamp_(1e-20, 1 - 1e-7)
        score = weight.log() - (-noise.log()).log().to(weight)
        return order[:count], score.topk(count).indices

    def _replace(self, batch: UpdateBatch, dst: Tensor, src: Tensor) -> None:
        radius = (self.mass[src] / self.usage[src].clamp_min(1e-12) / self.dim).sqrt()
        noise = torch.randn(len(dst), self.dim, generator=batch.generator).to(radius.device)
        batch.rewrite(dst, src, self.jitter * radius[:, None] * noise)

    def rows_copied(self, dst: Tensor, src: Tensor, table: Tensor) -> None:
        """Splits usage and distortion of each source between it and its copy, which counts as just used."""
        for statistic in (self.usage, self.mass):
            statistic[src] /= 2
            statistic[dst] = statistic[src]
        self.idle[dst] = 0


class CalibrateTemperature(Maintenance):
    """Moves tau until the loser weights of a latent are spread over a target number of codes.

    A fixed tau means nothing without the scale of the latents: for the same tau the winner's softmax mass runs from
    almost 1 to almost 0 when latents shrink tenfold. The number of effective losers exp(H) of the softmax over losers
    grows with tau, so log tau follows log(target / effective losers), at most a factor of 2 per update.

    Args:
        num_codes: K.
        dim: d.
        effective_losers: The target, geometric mean over latents; below K - 1, the number of losers.
        rate: Share of the log error that is corrected in one update.
    """

    def __init__(self, num_codes: int, dim: int, *, effective_losers: float = 16.0, rate: float = 0.2) -> None:
        super().__init__()
        if not 1 < effective_losers < num_codes - 1:
            raise ValueError(
                f"effective_losers is {effective_losers}, but with {num_codes} codes the target must lie between 1 and "
                f"{num_codes - 1}, the number of losers"
            )
        self.effective_losers, self.rate = effective_losers, rate

    def forward(self, batch: UpdateBatch) -> dict[str, float]:
        """Corrects tau by this step's effective losers; nothing happens where no soft assignment was made."""
        seen = [a for a in batch.assignments if "effective_losers" in a.stats]
        if not seen:
            return {}
        sums = [torch.stack([a.num_valid * a.stats["effective_losers"].log(), a.num_valid]) for a in seen]
        log_sum, count = batch.reduce(torch.stack(sums).sum(0))
        log_seen = log_sum / count
        error = torch.log(torch.full_like(log_seen, self.effective_losers)) - log_seen
        step = (self.rate * error).clamp(-0.693, 0.693).exp()
        batch.temperature.mul_(torch.where(step.isfinite(), step, 1.0)).clamp_(TEMPERATURE_MIN, TEMPERATURE_MAX)
        return {}


class Anneal(Maintenance):
    """tau falls with the number of updates from the value the quantizer was built with.

        exponential  tau = max(floor, start rate^(t / period))
        linear       tau = start + (floor - start) min(1, t / period)
        cosine       tau = floor + (start - floor) (1 + cos(pi min(1, t / period))) / 2

    Papers count epochs; a quantizer knows none, so `period` is a number of updates.

    Args:
        num_codes: K.
        dim: d.
        shape: `exponential`, `linear` or `cosine`.
        period: Updates in which tau falls by `rate`, or all the way.
        rate: Of the exponential.
        floor: Smallest tau.
        hold: Updates before it begins to fall.
        stairs: Counts whole periods only (`exponential`), as a schedule by epochs does.
    """

    start: Tensor
    updates: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        shape: Literal["exponential", "linear", "cosine"] = "exponential",
        period: int = 1000,
        rate: float = 0.5,
        floor: float = 1e-8,
        hold: int = 0,
        stairs: bool = False,
    ) -> None:
        super().__init__()
        if shape not in ("exponential", "linear", "cosine"):
            raise ValueError(f"shape is {shape!r}, but tau is annealed 'exponential', 'linear' or 'cosine'")
        if period < 1 or not 0 < rate <= 1 or floor <= 0 or hold < 0:
            raise ValueError(
                f"period={period}, rate={rate}, floor={floor}, hold={hold}, but annealing needs period >= 1, "
                "0 < rate <= 1, floor > 0 and hold >= 0"
            )
        self.shape, self.period, self.rate, self.floor = shape, period, rate, floor
        self.hold, self.stairs = hold, stairs
        self.register_buffer("start", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: UpdateBatch) -> dict[str, float]:
        """Sets tau for the next step."""
        if int(self.updates) == 0:
            self.start.copy_(batch.temperature)
        self.updates += 1
        batch.temperature.fill_(self._at(float(self.start), max(0, int(self.updates) - self.hold) / self.period))
        return {}

    def _at(self, start: float, periods: float) -> float:
        if self.shape == "exponential":
            return max(self.floor, start * self.rate ** (math.floor(periods) if self.stairs else periods))
        done = min(1.0, periods)
        share = done if self.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
        return start + (self.floor - start) * share


MAINTENANCE: dict[str, Callable[..., Maintenance]] = {
    "ema": EMA,
    "replace": ReplaceDead,
    "temperature": CalibrateTemperature,
    "anneal": Anneal,
}
