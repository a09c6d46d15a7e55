# SPDX-License-Identifier: Apache-2.0
"""Quantizers of audio codecs, for weights that come from there: linear maps around a quantizer, and sums of quantizers.

    projected   x = z W_in + b_in,   q = any quantizer of x,   z_q = q W_out + b_out
    summed      z_q = q_1(z) + q_2(z) + ...,   indices concatenated on the last axis

DAC (arXiv 2306.06546) is `residual` with `projected` layers; Mimi (arXiv 2410.00037) is `summed`: one projected codebook for
meaning beside a projected `residual` for sound, both of the same latents. No methods of their own: in a model of yours,
projections are layers of the model.

Vectors are mapped in float64 and rounded, so that those of `decode` are those of `forward` whatever the shape of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from steadyvq.quantizers.base import Assignment, Quantized, Quantizer, WeightAverage, check_mask, to_rows
from steadyvq.quantizers.layers import linear
from steadyvq.quantizers.registry import build_quantizer, register
from steadyvq.quantizers.wrappers import SEED_STEP, check_count, check_options


def _mapped(layer: nn.Linear, rows: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return nn.functional.linear(rows.double(), layer.weight.double(), bias).to(rows.dtype)


class Around(Quantizer):
    """What `Projected` and `Summed` share: quantizers inside that see rows, and the vector that they make together.

    Args:
        inner: The quantizers, with the features last.
        dim: d of the latents.
        channel_axis: The axis of the latents that holds the features.
    """

    anchor: Tensor

    def __init__(self, inner: Sequence[Quantizer], dim: int, *, channel_axis: int = -1) -> None:
        super().__init__(inner[0].num_codes, dim, channel_axis=channel_axis)
        self.inner = nn.ModuleList(inner)
        self.needs_update = any(layer.needs_update for layer in inner)
        self.places_codes = all(layer.places_codes for layer in inner)
        self.register_buffer("anchor", torch.ones(()), persistent=False)
        for layer in inner:
            layer._forwards_without_update = None

    def layers(self) -> list[Quantizer]:
        """The quantizers inside."""
        return [layer for layer in self.inner if isinstance(layer, Quantizer)]

    @property
    def losses(self) -> Mapping[str, Any]:
        """The losses of the first quantizer inside, by name."""
        losses: Mapping[str, Any] = getattr(self.inner[0], "losses", {})
        return losses

    def _latents(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        rows = to_rows(latents, self.dim, self.channel_axis, self.anchor.dtype)
        z = rows.reshape(latents.movedim(self.channel_axis, -1).shape)
        if mask is None:
            return z
        check_mask(mask, latents, self.channel_axis)
        return torch.where(mask.unsqueeze(-1), z, 0.0)

    def _placed(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return rows.movedim(-1, self.channel_axis).to(dtype)

    def _result(
        self, latents: Tensor, mask: Tensor | None, z: Tensor, rows: Tensor, indices: Tensor, outs: Sequence[Quantized]
    ) -> Quantized:
        """What forward returns: the losses of all inside are summed."""
        z_q = self._placed(rows, latents.dtype)
        if mask is not None:
            z_q = torch.where(mask.unsqueeze(self.channel_axis), z_q, latents)
        loss = torch.stack([out.loss for out in outs]).sum()
        losses = {name: torch.stack([out.losses[name] for out in outs]).sum() for name in outs[0].losses}
        whole = _whole(outs[0].assignment, z.detach().reshape(-1, self.dim), rows.detach().reshape(-1, self.dim), mask)
        return Quantized(z_q, indices, loss, losses, whole, tuple(outs))

    def configure(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        paused: Sequence[str] = (),
        estimator: str | None = None,
        frozen: bool = False,
    ) -> None:
        """See `Quantizer.configure`; handed on to every quantizer inside."""
        for layer in self.layers():
            layer.configure(weights=weights, paused=paused, estimator=estimator, frozen=frozen)

    def _update_all(
        self, batch: list[Quantized], optimizer: torch.optim.Optimizer | None, ema: WeightAverage | None
    ) -> dict[str, float]:
        events: dict[str, float] = {}
        for i, layer in enumerate(self.layers()):
            for name, value in layer.update([out.inner[i] for out in batch], optimizer, ema).items():
                events[name] = events.get(name, 0.0) + value
        return events


def _whole(first: Assignment, z: Tensor, codes: Tensor, mask: Tensor | None) -> Assignment:
    """The record of all quantizers inside together: one row of `table` per latent."""
    position = torch.arange(z.shape[0], device=z.device)
    return replace(
        first,
        z=z,
        table=codes,
        selected=codes,
        indices=position if mask is None else torch.where(mask.reshape(-1), position, -1),
        distance=(z - codes).square().sum(-1),
        num_valid=z.new_full((), float(z.shape[0])) if mask is None else mask.sum().to(z.dtype),
        row_weight=None if mask is None else mask.reshape(-1).to(z.dtype),
    )


class Projected(Around):
    """A quantizer between two linear maps.

    Args:
        inner: The quantizer, with the features last.
        into: Maps latents (..., d) to those of the inner quantizer.
        out: Maps its vectors back.
        channel_axis: The axis of the latents that holds the features.
    """

    def __init__(self, inner: Quantizer, into: nn.Linear, out: nn.Linear, *, channel_axis: int = -1) -> None:
        super().__init__([inner], into.in_features, channel_axis=channel_axis)
        self.into, self.out = into, out

    def index_shape(self, grid: Sequence[int]) -> tuple[int, ...]:
        """See `Quantizer.index_shape`: as the inner quantizer."""
        return self.layers()[0].index_shape(grid)

    @property
    def num_entries(self) -> int:
        """See `Quantizer.num_entries`."""
        return self.layers()[0].num_entries

    def entries(self, indices: Tensor) -> Tensor:
        """See `Quantizer.entries`."""
        return self.layers()[0].entries(indices)

    def index_map(self, indices: Tensor) -> Tensor:
        """See `Quantizer.index_map`."""
        return self.layers()[0].index_map(indices)

    def forward(self, latents: Tensor, mask: Tensor | None = None) -> Quantized:
        """See `Quantizer.forward`."""
        self._remind()
        with torch.autocast(latents.device.type, enabled=False):
            z = self._latents(latents, mask)
            out = self.layers()[0](_mapped(self.into, z), mask)
            return self._result(latents, mask, z, _mapped(self.out, out.z_q), out.indices, [out])

    @torch.no_grad()
    def encode(self, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Quantizer.encode`."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.layers()[0].encode(_mapped(self.into, self._latents(latents, mask)), mask)

    def decode(self, indices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """See `Quantizer.decode`."""
        inner = self.layers()[0]
        with torch.autocast(indices.device.type, enabled=False):
            rows = _mapped(self.out, inner.decode(indices, dtype=self.anchor.dtype))
            there = indices >= 0
            for _ in range(len(inner.index_shape(()))):
                there = there.any(-1)
            return self._placed(torch.where(there.unsqueeze(-1), rows, 0.0), dtype or rows.dtype)

    @torch.no_grad()
    def codebook(self) -> Tensor:
        """The codes after the second map (..., K, d)."""
        return _mapped(self.out, self.layers()[0].codebook())

    @torch.no_grad()
    def init_from(
        self, latents: Tensor, mask: Tensor | None = None, *, method: str = "kmeans", seed: int | None = None
    ) -> None:
        """See `Quantizer.init_from`: places the inner codes on projected latents."""
        rows = _mapped(self.into, self._latents(latents.detach(), mask))
        self.layers()[0].init_from(rows, mask, method=method, seed=seed)

    def bake(self) -> Quantizer:
        """See `Quantizer.bake`: the same maps around the baked quantizer."""
        inner = self.layers()[0].bake()
        into, out = (_frozen_copy(layer) for layer in (self.into, self.out))
        baked = Projected(inner, into, out, channel_axis=self.channel_axis)
        if inner.spec:
            skipped = ("name", "num_codes", "dim", "channel_axis", "seed")
            baked.spec = {
                "name": "projected",
                "num_codes": self.num_codes,
                "dim": self.dim,
                "channel_axis": self.channel_axis,
                "inner": inner.spec["name"],
                "inner_dim": inner.dim,
                "bias": self.into.bias is not None,
                "inner_options": {key: value for key, value in inner.spec.items() if key not in skipped},
            }
        return baked.to(self.anchor.device, self.anchor.dtype).train(self.training)


class Summed(Around):
    """Quantizers of the same latents whose vectors are added.

    Args:
        inner: The quantizers, with the features last, all with indices (..., layers).
        channel_axis: The axis of the latents that holds the features.
    """

    def __init__(self, inner: Sequence[Quantizer], *, channel_axis: int = -1) -> None:
        super().__init__(inner, inner[0].dim, channel_axis=channel_axis)
        shapes = [layer.index_shape(()) for layer in inner]
        if any(len(shape) != 1 for shape in shapes) or any(layer.dim != self.dim for layer in inner):
            raise ValueError(
                "the summed quantizers need latents of one size and indices (..., layers), as `residual` has"
            )
        self.counts = [shape[0] for shape in shapes]

    def index_shape(self, grid: Sequence[int]) -> tuple[int, ...]:
        """See `Quantizer.index_shape`: one more axis, of all layers."""
        return (*grid, sum(self.counts))

    @property
    def num_entries(self) -> int:
        """See `Quantizer.num_entries`."""
        return sum(layer.num_entries for layer in self.layers())

    def entries(self, indices: Tensor) -> Tensor:
        """See `Quantizer.entries`: those of one quantizer after the other."""
        parts, offset = [], 0
        for layer, part in zip(self.layers(), torch.split(indices, self.counts, -1), strict=True):
            parts.append(torch.where(part < 0, -1, layer.entries(part) + offset))
            offset += layer.num_entries
        return torch.cat(parts, -1)

    def index_map(self, indices: Tensor) -> Tensor:
        """See `Quantizer.index_map`: the first layer of the first quantizer."""
        return self.layers()[0].index_map(indices[..., : self.counts[0]])

    def forward(self, latents: Tensor, mask: Tensor | None = None) -> Quantized:
        """See `Quantizer.forward`."""
        self._remind()
        with torch.autocast(latents.device.type, enabled=False):
            z = self._latents(latents, mask)
            outs = [layer(z, mask) for layer in self.layers()]
            rows = _total([out.z_q for out in outs])
            return self._result(latents, mask, z, rows, torch.cat([out.indices for out in outs], -1), outs)

    @torch.no_grad()
    def encode(self, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Quantizer.encode`."""
        with torch.autocast(latents.device.type, enabled=False):
            z = self._latents(latents, mask)
            return torch.cat([layer.encode(z, mask) for layer in self.layers()], -1)

    def decode(self, indices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """See `Quantizer.decode`; indices (..., l) of the first l layers of all give their sum."""
        if not indices.dim() or not 1 <= indices.shape[-1] <= sum(self.counts):
            raise ValueError(
                f"indices have shape {tuple(indices.shape)}, but this quantizer needs a last axis of 1 to "
                f"{sum(self.counts)} layers"
            )
        parts, begin = [], 0
        for layer, count in zip(self.layers(), self.counts, strict=True):
            if begin < indices.shape[-1]:
                parts.append(layer.decode(indices[..., begin : begin + count], dtype=self.anchor.dtype))
            begin += count
        return self._placed(_total(parts), dtype or parts[0].dtype)

    @torch.no_grad()
    def codebook(self) -> Tensor:
        """The tables of all layers (layers, K, d)."""
        return torch.cat([layer.codebook() for layer in self.layers()])

    @torch.no_grad()
    def init_from(
        self, latents: Tensor, mask: Tensor | None = None, *, method: str = "kmeans", seed: int | None = None
    ) -> None:
        """See `Quantizer.init_from`: each quantizer on the same latents."""
        z = self._latents(latents.detach(), mask)
        for layer in self.layers():
            layer.init_from(z, mask, method=method, seed=seed)

    def bake(self) -> Quantizer:
        """See `Quantizer.bake`: the sum of the baked quantizers."""
        inner = [layer.bake() for layer in self.layers()]
        baked = Summed(inner, channel_axis=self.channel_axis)
        if all(layer.spec for layer in inner):
            skipped = ("num_codes", "dim", "channel_axis", "seed")
            parts = [{k: v for k, v in (layer.spec or {}).items() if k not in skipped} for layer in inner]
            size = {"num_codes": self.num_codes, "dim": self.dim, "channel_axis": self.channel_axis}
            baked.spec = {"name": "summed", **size, "parts": parts}
        return baked.to(self.anchor.device, self.anchor.dtype).train(self.training)


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _frozen_copy(layer: nn.Linear) -> nn.Linear:
    generator = torch.Generator()
    copy = linear(layer.in_features, layer.out_features, generator, bias=layer.bias is not None).to(layer.weight)
    copy.load_state_dict(layer.state_dict())
    return copy.requires_grad_(False)


@register("projected", paper="DAC, arXiv 2306.06546", summary="a quantizer between two linear maps", listed=False)
def projected(
    num_codes: int,
    dim: int,
    *,
    inner: str = "vq",
    inner_dim: int = 8,
    bias: bool = True,
    inner_options: Mapping[str, Any] | None = None,
    channel_axis: int = -1,
    seed: int = 0,
) -> Quantizer:
    """Any quantizer of projected latents."""
    check_count("dim", dim)
    check_count("inner_dim", inner_dim)
    options = {"seed": seed, **check_options(inner_options)} if inner != "baked_grid" else check_options(inner_options)
    within = build_quantizer(inner, num_codes=num_codes, dim=inner_dim, channel_axis=-1, **options)
    make: Callable[[int, int], nn.Linear] = lambda a, b: linear(a, b, generator, bias=bias)  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    return Projected(within, make(dim, inner_dim), make(inner_dim, dim), channel_axis=channel_axis)


@register("summed", paper="Mimi, arXiv 2410.00037", summary="quantizers of the same latents, added", listed=False)
def summed(
    num_codes: int, dim: int, *, parts: Sequence[Mapping[str, Any]], channel_axis: int = -1, seed: int = 0
) -> Quantizer:
    """The sum of several quantizers; each of `parts` holds a `name` and its options."""
    if not parts or not all(isinstance(part, Mapping) and isinstance(part.get("name"), str) for part in parts):
        raise ValueError(f"parts is {parts!r}, but it needs a list of mappings, each with the name of a quantizer")
    inner = []
    for i, part in enumerate(parts):
        options = {"seed": seed + SEED_STEP * i, **{key: value for key, value in part.items() if key != "name"}}
        inner.append(build_quantizer(part["name"], num_codes=num_codes, dim=dim, channel_axis=-1, **options))
    return Summed(inner, channel_axis=channel_axis)
