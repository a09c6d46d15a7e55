# SPDX-License-Identifier: Apache-2.0
"""Quantizers on a stream of latents, without an encoder: how well does a codebook follow what moves under it?

A candidate is plain data, so any registered quantizer, any crossing of parts and any file of the user's own can be screened in
seconds: `{"quantizer": name or file.py:function, "options": {...}, "rate": 0.01, "init": "kmeans"}`. Its codes learn by
Adam from the quantizer's own losses plus |z_q - z|^2, which is the reconstruction of a decoder that does nothing: methods
whose codes get their gradient through z_q would not learn otherwise; where z_q carries none to the codes, it adds nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steadyvq.kernels import nearest
from steadyvq.quantizers import Quantizer, VectorQuantizer, build_quantizer
from steadyvq.quantizers.initialise import lloyd, seed_plus_plus

BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Candidate:
    """A quantizer and how it is trained.

    Attributes:
        quantizer: What `build_quantizer` takes.
        options: Its overrides.
        rate: Learning rate of everything that the quantizer trains.
        init: `none`, `data` or `kmeans`, on the latents that `Follower.begin` is given, or on the first batch.
        normalise: `none`, `center` (latents less a moving mean) or `scale` (and divided by their moving spread).
        ns_until: Share of the stream after which the non-stationary loss is off.
        transport: `none`; or `idle`: codes without a hit since the last look are moved by the affine map that was fitted to how
            the probe has moved since then (the others have followed their latents already).
        polish: Passes of Lloyd's iterations over the last latents at the end.
        cosine: The rate falls to zero along a cosine.
    """

    quantizer: str = "vq"
    options: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 1e-2
    init: str = "none"
    normalise: str = "none"
    ns_until: float = 1.0
    transport: str = "none"
    polish: int = 0
    cosine: bool = False


class Follower:
    """A candidate on its stream.

    Args:
        candidate: What is tried.
        num_codes: K.
        dim: d.
        steps: Length of the stream.
        seed: Of the quantizer.
    """

    def __init__(self, candidate: Candidate, num_codes: int, dim: int, steps: int, seed: int) -> None:
        self.candidate, self.steps = candidate, steps
        self.quantizer: Quantizer = build_quantizer(
            candidate.quantizer, num_codes=num_codes, dim=dim, **{"seed": seed, **candidate.options}
        )
        trained = [p for p in self.quantizer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=candidate.rate, betas=BETAS) if trained else None
        self.mean, self.spread = torch.zeros(dim), torch.ones(())
        self.done, self.begun = 0, False
        self.hit = torch.zeros(num_codes, dtype=torch.bool)

    def step(self, latents: Tensor) -> None:
        """Learns from a batch of latents (N, d)."""
        if not self.begun:
            self.begin(latents)
        self._follow_moments(latents)
        if self.done == int(self.candidate.ns_until * self.steps) and self.candidate.ns_until < 1:
            self.quantizer.configure(weights={"ns": 0.0})
        if self.optimizer is not None and self.candidate.cosine:
            share = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * self.done / self.steps))))
            self.optimizer.param_groups[0]["lr"] = self.candidate.rate * share
        z = self._inward(latents)
        out = self.quantizer(z)
        if self.optimizer is not None:
            self.optimizer.zero_grad()
            loss = out.loss + (out.z_q - z).square().mean()
            if loss.requires_grad:
                loss.backward()
                self.optimizer.step()
        self.quantizer.update(out, self.optimizer)
        if self.candidate.transport != "none":
            self.hit[out.indices] = True
        self.done += 1

    def begin(self, latents: Tensor) -> None:
        """Places the codes on latents (N, d), if the candidate asks for it."""
        self.begun = True
        self.mean, self.spread = latents.mean(0), latents.std()
        if self.candidate.init != "none":
            self.quantizer.init_from(self._inward(latents), method=self.candidate.init)

    def _follow_moments(self, latents: Tensor, rate: float = 0.05) -> None:
        self.mean = torch.lerp(self.mean, latents.mean(0), rate)
        self.spread = torch.lerp(self.spread, latents.std(), rate)

    def _inward(self, latents: Tensor) -> Tensor:
        if self.candidate.normalise == "none":
            return latents
        centred = latents - self.mean
        return centred / self.spread if self.candidate.normalise == "scale" else centred

    def _outward(self, latents: Tensor) -> Tensor:
        if self.candidate.normalise == "none":
            return latents
        return (latents * self.spread if self.candidate.normalise == "scale" else latents) + self.mean

    @torch.no_grad()
    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What the trained quantizer makes of latents (N, d) now: vectors of the same shape, indices (N,)."""
        self.quantizer.eval()
        out = self.quantizer(self._inward(latents))
        self.quantizer.train()
        return self._outward(out.z_q), out.indices

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The table in the space of the latents (K, d)."""
        return self._outward(self.quantizer.codebook())

    @torch.no_grad()
    def transport(self, before: Tensor, after: Tensor) -> None:
        """Moves the codes that had no hit since the last look by the map that takes the probe of then to that of now."""
        if self.candidate.transport == "none":
            return
        quantizer = self.quantizer
        assert isinstance(quantizer, VectorQuantizer)
        matrix, shift = affine(before, after)
        table = quantizer.codebook()
        idle = (~self.hit).nonzero().flatten()
        table[idle] = table[idle] @ matrix + shift
        quantizer.codes.set_rows_(table)
        for part in quantizer.active_maintenance():
            part.rows_moved(idle, table)
        self.hit.zero_()

    @torch.no_grad()
    def polish(self, latents: Tensor) -> None:
        """Lloyd's iterations from the present codes, if the candidate asks for them."""
        if self.candidate.polish:
            assert isinstance(self.quantizer, VectorQuantizer)
            table = lloyd(self._inward(latents), self.quantizer.codebook(), self.candidate.polish)
            self.quantizer.codes.set_rows_(table)


def affine(before: Tensor, after: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """The affine map (d, d), (d,) with the least squared error from rows to rows, with a small pull to the identity."""
    mean_before, mean_after = before.mean(0), after.mean(0)
    x, move = before - mean_before, (after - mean_after) - (before - mean_before)
    gram = x.T @ x
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram))
    matrix = torch.eye(len(gram)) + torch.linalg.solve(gram, x.T @ move)
    return matrix, mean_after - mean_before @ matrix


def explained(before: Tensor, after: Tensor) -> float:
    """Share of the movement of a probe that an affine map explains, judged on rows that it was not fitted to."""
    half = len(before) // 2
    matrix, shift = affine(before[:half], after[:half])
    moved = after[half:] - before[half:]
    left = after[half:] - (before[half:] @ matrix + shift)
    return 1 - float(left.square().sum()) / max(float(moved.square().sum()), 1e-12)


def distortion(latents: Tensor, made: Tensor) -> float:
    """Mean squared distance between latents and their vectors (N, d)."""
    return float((latents - made).square().sum(1).mean())


def spread(latents: Tensor) -> float:
    """Mean squared distance of latents to their mean."""
    return float((latents - latents.mean(0)).square().sum(1).mean())


def used(indices: Tensor, num_codes: int) -> float:
    """Share of the codes that are hit."""
    return len(torch.unique(indices)) / num_codes


@torch.no_grad()
def best_codes(latents: Tensor, num_codes: int, seed: int, iterations: int = 20, restarts: int = 1) -> Tensor:
    """The codes (K, d) of k-means++ with Lloyd's iterations that have the least distortion of several starts."""
    tables = []
    for start in range(restarts):
        generator = torch.Generator().manual_seed(1000 * seed + start)
        tables.append(lloyd(latents, seed_plus_plus(latents, num_codes, generator), iterations))
    return min(tables, key=lambda table: distortion_of(latents, table))


@torch.no_grad()
def distortion_of(latents: Tensor, table: Tensor) -> float:
    """Mean squared distance of latents to the nearest of some codes."""
    return float(nearest(latents, table)[1].mean())


def decibels(mine: float, best: float) -> float:
    """How much larger the first is, in dB."""
    return float(10 * torch.log10(torch.tensor(max(mine, 1e-20) / max(best, 1e-20), dtype=torch.float64)))


def batches(latents: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Random batches of latents without an end, each pass in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(latents), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            yield latents[order[start : start + size]]
