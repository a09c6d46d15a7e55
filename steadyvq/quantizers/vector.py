# SPDX-License-Identifier: Apache-2.0
"""The vector quantizer: a composition of codebook, assignment, estimator, losses and maintenance.

Published methods are combinations along five seams, so a method is a choice of parts:

    VQ      = free codebook   + l2 + straight-through + {commitment, codebook}
    EMA     = frozen codebook + l2 + straight-through + {commitment}                 + EMA
    SimVQ   = linear codebook + l2 + straight-through + {commitment, codebook}
    NSVQ    = free codebook   + l2 + straight-through + {commitment, codebook, ns}   + replacement
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steadyvq.kernels.passes import select, sums_by_code
from steadyvq.quantizers.assign import ASSIGNMENTS, Setting, described, evaluated
from steadyvq.quantizers.assigning import AssigningQuantizer, check_indices
from steadyvq.quantizers.base import (
    Assignment,
    HostNumber,
    Quantizer,
    WeightAverage,
    added,
    alone,
    check_mask,
    from_rows,
    to_rows,
    unit,
)
from steadyvq.quantizers.codebooks import Codebook, FrozenCodebook
from steadyvq.quantizers.initialise import place
from steadyvq.quantizers.losses import Loss
from steadyvq.quantizers.maintenance import Maintenance, UpdateBatch
from steadyvq.quantizers.names import ASSIGNMENT, look_up
from steadyvq.quantizers.noise import Noise, positions


class VectorQuantizer(AssigningQuantizer):
    """Assigns each latent to a code of one table.

    Args:
        codes: The codebook.
        losses: Losses by name.
        maintenance: Bookkeeping by name, done in this order by `update`.
        assign: The assignment or its name.
        estimator: The gradient estimator or its name.
        temperature: tau of soft assignments, in units of the squared distance.
        channel_axis: The axis of the latents that holds the features.
        seed: Of all noise in `update` and `init_from`.
        unit_sphere: Latents and codes are divided by their lengths before the look-up; losses, codes and statistics are
            those of unit vectors. "latents": the table is taken as it is stored, already of unit length (`bake`).
    """

    temperature: Tensor
    updates: Tensor

    def __init__(
        self,
        codes: Codebook,
        *,
        losses: Mapping[str, Loss] | None = None,
        maintenance: Mapping[str, Maintenance] | None = None,
        assign: str | Callable[..., Any] = "l2",
        estimator: str | Callable[..., Any] = "straight_through",
        temperature: float = 0.35,
        channel_axis: int = -1,
        seed: int = 0,
        unit_sphere: bool | Literal["latents"] = False,
    ) -> None:
        if unit_sphere not in (False, True, "latents"):
            raise ValueError(f"unit_sphere is {unit_sphere!r}, but it needs true, false or 'latents'")
        with torch.no_grad():
            table = unit(codes()) if unit_sphere is True else codes()
        size = (table.shape[0], table.shape[1])
        super().__init__(*size, losses=losses, estimator=estimator, channel_axis=channel_axis)
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}, but a softmax needs a positive temperature")
        self.codes = codes
        self.unit_sphere = unit_sphere
        self.places_codes = not codes.cannot_place
        self.maintenance = nn.ModuleDict(maintenance or {})
        self.assign = look_up("assignment", assign, ASSIGNMENTS) if isinstance(assign, str) else assign
        self.seed = seed
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        # Noise and schedules advance with the number of updates.
        parts = (*self.losses.values(), self.assign, self.estimator)
        self.needs_update = bool(self.maintenance) or any(getattr(part, "needs_update", False) for part in parts)
        self._paused: frozenset[str] = frozenset()
        self._count = HostNumber()
        self._optimizer_checked = False
        for part in self._parts():
            part.check(codes)
            part.rows_set(table)

    def _parts(self) -> list[Maintenance]:
        return [part for part in self.maintenance.values() if isinstance(part, Maintenance)]

    def _table(self) -> Tensor:
        """The effective table (K, d) that look-up and decode share."""
        table: Tensor = self.codes()
        return unit(table) if self.unit_sphere is True else table

    def active_maintenance(self) -> list[Maintenance]:
        """What `update` does in the present stage, in this order."""
        return [part for name, part in self.maintenance.items() if name not in self._paused]  # type: ignore[misc]

    def configure(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        paused: Sequence[str] = (),
        estimator: str | None = None,
        frozen: bool = False,
    ) -> None:
        """See `AssigningQuantizer.configure`; `frozen` and `paused` rest maintenance."""
        super().configure(weights=weights, estimator=estimator)
        self._paused = frozenset(self.maintenance if frozen else paused)

    @property
    def batch_coupled(self) -> tuple[str, ...]:
        """See `Quantizer.batch_coupled`."""
        coupled = super().batch_coupled
        return (*coupled, ASSIGNMENT) if getattr(self.assign, "batch_coupled", False) else coupled

    def _assign(self, latents: Tensor, mask: Tensor | None) -> Assignment:
        table = self._table()
        z, weight, num_valid = self._rows(latents, mask, table.dtype)
        if self.unit_sphere:
            z = unit(z)
        # Evaluation may run in one process alone, so it must not wait for the others.
        reduce = self.reduce if self.training else alone
        noise = Noise.at(self.seed, self.updates, self._positions(latents))
        setting = Setting(self.training, self.temperature, noise, weight, reduce)
        extra = (setting,) if getattr(self.assign, "informed", False) else ()
        indices, distance = self.assign(z.detach(), table.detach(), *extra)
        selected = select(table, indices)
        if mask is not None:
            indices = torch.where(mask.reshape(-1), indices, -1)
        return Assignment(
            z=z,
            table=table,
            indices=indices,
            distance=distance,
            selected=selected,
            num_valid=num_valid,
            temperature=self.temperature,
            row_weight=weight,
            noise=noise,
            reduce=reduce,
        )

    def _positions(self, latents: Tensor) -> Tensor:
        """Where the latents stand in the global batch, whose samples lie along the first axis."""
        items = latents.shape[0] if latents.dim() > 1 and self.channel_axis % latents.dim() != 0 else 1
        return positions(self._first_item, items, latents.numel() // max(1, items * self.dim))

    def decode(self, indices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """See `Quantizer.decode`."""
        with torch.autocast(indices.device.type, enabled=False):
            table = self._table()
            check_indices(indices, self.num_codes)
            flat = indices.reshape(-1)
            rows = nn.functional.embedding(flat.clamp_min(0), table)
            rows = torch.where((flat >= 0)[:, None], rows, 0.0)
            return from_rows(rows, indices.shape, self.channel_axis).to(dtype or table.dtype)

    @torch.no_grad()
    def codebook(self) -> Tensor:
        """See `Quantizer.codebook`."""
        return self._table().clone()

    @torch.no_grad()
    def init_from(
        self, latents: Tensor, mask: Tensor | None = None, *, method: str = "kmeans", seed: int | None = None
    ) -> None:
        """See `Quantizer.init_from`."""
        if self.codes.cannot_place:
            raise ValueError(f"init_from cannot place these codes on data: {self.codes.cannot_place}")
        rows = to_rows(latents.detach(), self.dim, self.channel_axis, self.codes.base.dtype)
        if mask is not None:
            check_mask(mask, latents, self.channel_axis)
            rows = rows[mask.reshape(-1)]
        rows = self.gather(unit(rows) if self.unit_sphere else rows)
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        table = place(rows.to(self.codes.base.device), self.num_codes, method, generator)
        table = unit(table) if self.unit_sphere else table
        self.codes.set_rows_(table)
        for part in self._parts():
            part.rows_set(table)

    def bake(self) -> Quantizer:
        """See `Quantizer.bake`."""
        assign = evaluated(self.assign)
        baked = VectorQuantizer(
            FrozenCodebook(self.codebook()),
            assign=assign,
            channel_axis=self.channel_axis,
            # Dividing by the length a second time would change last digits.
            unit_sphere="latents" if self.unit_sphere else False,
        )
        baked.spec = {
            "name": "baked",
            "num_codes": self.num_codes,
            "dim": self.dim,
            "channel_axis": self.channel_axis,
            **({"unit_sphere": "latents"} if self.unit_sphere else {}),
        }
        if assign is not ASSIGNMENTS["l2"]:
            baked.spec["assign"] = described(assign)
        return baked.to(self.codes.base.device).train(self.training)

    def _update(
        self, batch: list[Assignment], optimizer: torch.optim.Optimizer | None, ema: WeightAverage | None
    ) -> dict[str, float]:
        count = self._count.advance(self.updates)
        if not batch or not self.maintenance:
            return {}
        self._check_optimizer(optimizer)
        sums = [sums_by_code(a.indices, a.distance[:, None], self.num_codes, row_weight=a.counted) for a in batch]
        hits = self.reduce(added([part.mass for part in sums]))
        distortion = added([part.sums for part in sums])[:, 0]

        def rewrite(dst: Tensor, src: Tensor, noise: Tensor) -> None:
            if self.unit_sphere:
                # The noise is meant for unit vectors, and rows that are divided by their lengths have others.
                noise = noise * self.codes()[src].norm(dim=-1, keepdim=True).to(noise)
            self.codes.copy_rows_(dst, src, noise)
            self.codes.forget_rows(dst, optimizer, ema)
            table = self._table()
            for part in self._parts():
                part.rows_copied(dst, src, table)

        step = UpdateBatch(
            assignments=batch,
            codes=self.codes,
            temperature=self.temperature,
            hits=hits,
            distortion=self.reduce(distortion),
            tokens=hits.sum(),
            reduce=self.reduce,
            gather=self.gather,
            noise=Noise.at(self.seed, self.updates, torch.arange(self.num_codes, device=hits.device)),
            generator=torch.Generator().manual_seed(self.seed * 1_000_003 + count),
            rewrite=rewrite,
            unit_sphere=bool(self.unit_sphere),
        )
        events: dict[str, float] = {}
        for part in self.active_maintenance():
            events |= part(step)
        return events

    def _check_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is None or not self.codes.trainable or self._optimizer_checked:
            return
        self._optimizer_checked = True
        if all(p is not self.codes.base for group in optimizer.param_groups for p in group["params"]):
            warnings.warn(
                "update was given an optimizer that does not hold the codebook: the moments of replaced codes stay as "
                "they are; pass the optimizer of `quantizer.parameters()`",
                UserWarning,
                stacklevel=4,
            )
