# SPDX-License-Identifier: Apache-2.0
"""Small training runs with a planted disease, watched by a monitor: what the doctor is tried on.

Each is an autoencoder on crops of real photographs in a plain loop of its own, as a user of some other trainer would write it:
neither the loop nor the monitor says which disease was planted.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steadyvq.data import CropDataset, load_collection
from steadyvq.diagnosis import Monitor
from steadyvq.models import Tokenizer
from steadyvq.models.adversarial import discriminator_loss, generator_loss
from steadyvq.models.autoencoder import AutoencoderConfig
from steadyvq.models.discriminator import PatchDiscriminator
from steadyvq.quantizers import Quantized, build_quantizer

SIDE = 32
CROPS = 4096


@dataclass(frozen=True)
class Patient:
    """One run.

    Attributes:
        disease: What was planted; `healthy` if nothing was.
        seed: Of everything.
        num_codes: K.
        method: One of our quantizers, `plain` (an embedding whose look-up is not shielded from autocast), or
            `vqp-ema`, `vqp-simvq` of vector-quantize-pytorch.
        options: Overrides for `build_quantizer`.
        init: `none`, `data` or `kmeans` places the codes on first latents.
        scale: What the placed or initial codes are multiplied by.
        copies: How many codes start in the same place (1: none do).
        lr: Adam's learning rate of the networks, after `warmup` steps in which it rises linearly.
        warmup: Steps of warm-up.
        codebook_lr: That of a free codebook.
        steps: Optimiser steps.
        batch: Crops in a step, of 64 tokens each.
        dim: d.
        freeze: Step from which the encoder is frozen.
        gan: Step from which a discriminator pushes, by `gan_weight`; `gan_ramp` steps to full weight.
        autocast: Forward under bfloat16 autocast.
        every: Steps between rows of the monitor.
    """

    disease: str
    seed: int
    num_codes: int
    method: str = "vq"
    options: dict[str, Any] = field(default_factory=dict)
    init: str = "data"
    scale: float = 1.0
    copies: int = 1
    lr: float = 1e-3
    warmup: int = 40
    codebook_lr: float = 1e-2
    steps: int = 200
    batch: int = 16
    dim: int = 16
    freeze: int | None = None
    gan: int | None = None
    gan_weight: float = 0.0
    gan_ramp: int = 1
    autocast: bool = False
    every: int = 10

    @property
    def name(self) -> str:
        """A name for files; no two patients of an experiment share one."""
        return f"{self.disease.replace(' ', '-')}-{self.method}-K{self.num_codes}-{self.hash()[:4]}-{self.seed}"

    def hash(self) -> str:
        """Twelve hexadecimal digits that name everything but the seed."""
        plain = json.dumps(asdict(replace(self, seed=0)), sort_keys=True)
        return hashlib.sha256(plain.encode()).hexdigest()[:12]


class PlainVQ(nn.Module):
    """A bare vector quantizer over (B, d, h, w), computed in whatever precision it is called in."""

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes with a straight-through gradient, commitment and codebook loss, indices (B, h, w)."""
        rows = latents.movedim(1, -1)
        flat, table = rows.reshape(-1, rows.shape[-1]), self.embedding.weight
        distance = flat.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * flat @ table.T
        indices = distance.argmin(1).reshape(rows.shape[:-1])
        z_q = self.embedding(indices)
        loss = (z_q - rows.detach()).square().mean() + 0.25 * (z_q.detach() - rows).square().mean()
        return (rows + (z_q - rows).detach()).movedim(-1, 1), loss, indices


@cache
def crops() -> Tensor:
    """Training crops of the built-in photographs, (CROPS, 3, 32, 32) in [-1, 1]."""
    photographs = load_collection("mvtb", min_side=SIDE, max_side=512).split("train")
    return CropDataset(photographs, SIDE, CROPS, 0, (1.0, 4.0), True).batch(0, 0, CROPS)


def build(patient: Patient) -> nn.Module:
    """The VQ module of a patient."""
    size = {"num_codes": patient.num_codes, "dim": patient.dim}
    if patient.method == "plain":
        return PlainVQ(**size)
    if patient.method.startswith("vqp-"):
        import vector_quantize_pytorch as vqp

        if patient.method == "vqp-ema":
            return vqp.VectorQuantize(  # type: ignore[no-any-return]
                dim=patient.dim,
                codebook_size=patient.num_codes,
                accept_image_fmap=True,
                kmeans_init=True,
                threshold_ema_dead_code=1,
                **patient.options,
            )
        return vqp.SimVQ(dim=patient.dim, codebook_size=patient.num_codes, channel_first=True)  # type: ignore[no-any-return]
    return build_quantizer(patient.method, **size, channel_axis=1, **patient.options)


def codes_of(vq: nn.Module) -> Tensor | None:
    """The rows that a patient's codes are stored in, or None where they are computed."""
    if isinstance(vq, PlainVQ):
        return vq.embedding.weight
    base = getattr(getattr(vq, "codes", None), "base", None)
    return base if isinstance(base, Tensor) else None


class Run:
    """The run of one patient."""

    def __init__(self, patient: Patient, log: Path | Callable[[dict[str, Any]], object]) -> None:
        self.patient = patient
        torch.manual_seed(patient.seed)
        self.generator = torch.Generator().manual_seed(patient.seed)
        self.vq = build(patient)
        networks = AutoencoderConfig(
            channels=16, multipliers=(1, 2), num_res_blocks=1, num_mid_blocks=0, z_channels=patient.dim, patch=2
        )
        whole = Tokenizer.build(networks, build_quantizer("vq", num_codes=2, dim=patient.dim, channel_axis=1))
        self.encoder, self.decoder = whole.encoder, whole.decoder
        self._place()
        own = [p for p in [codes_of(self.vq)] if isinstance(p, nn.Parameter)]
        rest = [
            p
            for part in (self.encoder, self.decoder, self.vq)
            for p in part.parameters()
            if all(p is not q for q in own)
        ]
        groups: list[dict[str, Any]] = [{"params": rest, "lr": patient.lr}]
        groups += [{"params": own, "lr": patient.codebook_lr}] if own else []
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self.judge = PatchDiscriminator(SIDE, channels=16, layers=2, norm="group")
        self.judge_optimizer = torch.optim.Adam(self.judge.parameters(), lr=1e-3, betas=(0.5, 0.9))
        still = crops()[-32:]
        self.monitor = Monitor(
            self.vq, log, probe=lambda: self.vq(self.encoder(still)), every=patient.every, watch_every=5, warn=False
        )

    @torch.no_grad()
    def _place(self) -> None:
        patient, rows = self.patient, codes_of(self.vq)
        if patient.init != "none" and rows is not None:
            latents = self.encoder(crops()[:256])
            if isinstance(self.vq, PlainVQ):
                flat = latents.movedim(1, -1).reshape(-1, patient.dim)
                rows.copy_(flat[torch.randperm(len(flat), generator=self.generator)[: len(rows)]])
            else:
                self.vq.init_from(latents, method=patient.init, seed=patient.seed)  # type: ignore[operator]
        if rows is not None:
            rows.mul_(patient.scale)
            rows.copy_(rows[torch.arange(len(rows)) // patient.copies])

    def step(self, index: int) -> None:
        """One optimiser step."""
        patient = self.patient
        self.optimizer.param_groups[0]["lr"] = patient.lr * min(1.0, (index + 1) / patient.warmup)
        images = crops()[torch.randint(len(crops()) - 32, (patient.batch,), generator=self.generator)]
        frozen = patient.freeze is not None and index >= patient.freeze
        self.encoder.requires_grad_(not frozen)
        with torch.autocast("cpu", torch.bfloat16, enabled=patient.autocast):
            out = self.vq(self.encoder(images))
            z_q, loss = (out.z_q, out.loss) if isinstance(out, Quantized) else _of_foreign(out)
            made = self.decoder(z_q)
        reconstruction = (made.float() - images).square().mean()
        values: dict[str, float | Tensor] = {"reconstruction": reconstruction}
        total = reconstruction + loss.sum()
        if patient.gan is not None and index >= patient.gan:
            weight = patient.gan_weight * min(1.0, (index - patient.gan + 1) / patient.gan_ramp)
            values["adversarial"] = generator_loss("hinge", self.judge(made.float()))
            total = total + weight * values["adversarial"]
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        if patient.gan is not None and index >= patient.gan:
            self.judge_optimizer.zero_grad()
            judged = discriminator_loss("hinge", self.judge(images), self.judge(made.float().detach()))
            judged.backward()  # type: ignore[no-untyped-call]
            self.judge_optimizer.step()
        if isinstance(out, Quantized):
            self.vq.update(out, optimizer=self.optimizer)  # type: ignore[operator]
        self.monitor.step(values)

    def train(self) -> Mapping[str, str]:
        """All steps; returns the monitor's warnings."""
        for index in range(self.patient.steps):
            self.step(index)
        return self.monitor.warned


def _of_foreign(out: Any) -> tuple[Tensor, Tensor]:
    """Codes and loss, which is a scalar wherever it stands."""
    return out[0], next(x for x in out[1:] if x.is_floating_point())
