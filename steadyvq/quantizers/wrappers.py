# SPDX-License-Identifier: Apache-2.0
"""Quantizers that hold a list of quantizers: what `residual`, `grouped` and `multiscale` share.

A layer inside is any registered quantizer with the features last; it keeps its own losses, statistics and maintenance. The
wrapper says which latents each layer sees and what their codes make together:

    residual      layer l sees what the layers before it leave;   z_q = sum of the codes        indices (..., L)
    grouped       group g sees its share of the features;         z_q = their concatenation     indices (..., G)
    multiscale    scale k sees the residual, area-averaged;       z_q = sum of upsampled codes  indices (B, sum h_k w_k)

`Quantized.inner` holds what each layer returned, and `update` hands each layer its own. `codebook()` is (layers, K, d'): the
codes of an index i at layer l are `codebook()[l, i]`, whether the layers share a table or not. `num_codes` is K, the range
of an index; `num_entries` counts the rows of all tables, K times the number of tables.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from steadyvq.quantizers.base import Quantized, Quantizer, WeightAverage, check_mask, to_rows
from steadyvq.quantizers.registry import accepts, build_quantizer

SEED_STEP = 100_003
"""Distance of the seeds of two layers: different codes and different noise."""

REDUCTIONS = ("sum", "mean")

Visit = Callable[[int, Tensor, Tensor | None], Tensor]
"""(layer, its latents (..., d'), mask) -> its indices."""


def build_layers(
    inner: str, num_codes: int, dim: int, count: int, options: Mapping[str, Any], seed: int
) -> list[Quantizer]:
    """`count` quantizers of one method with different seeds; the first has `seed` itself.

    Raises:
        ValueError: `inner` is no name, or an option is the wrapper's to set.
    """
    if not isinstance(inner, str):
        raise ValueError(f"inner is {inner!r}, but it needs the name of a quantizer, such as 'nsvq'")
    for name in ("channel_axis", "seed"):
        if name in options:
            raise ValueError(f"{name} is among the options of the inner quantizer: give it to the outer one instead")
    layers = []
    for layer in range(count):
        own = {"seed": seed + SEED_STEP * layer} if accepts(inner, "seed") else {}
        layers.append(build_quantizer(inner, num_codes=num_codes, dim=dim, channel_axis=-1, **{**options, **own}))
    return layers


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, but it needs a positive integer")


def check_options(inner_options: Any) -> dict[str, Any]:
    """The options of the inner quantizer as a dict; ValueError unless they are a mapping."""
    if inner_options is not None and not isinstance(inner_options, Mapping):
        raise ValueError(
            f"inner_options is {inner_options!r}, but it needs a mapping of options of the inner quantizer"
        )
    return dict(inner_options or {})


class Wrapper(Quantizer):
    """A quantizer of quantizers.

    Args:
        inner: The layers, with the features last; a single one that all share, or `count`.
        count: Number of layers.
        dim: d of the latents.
        channel_axis: The axis of the latents that holds the features.
        reduction: How the losses of the layers become one: their `sum` or their `mean`.

    Attributes:
        method: The registered name of this wrapper, for the specification of a baked one.
    """

    method: str
    anchor: Tensor

    def __init__(
        self, inner: Sequence[Quantizer], count: int, dim: int, *, channel_axis: int = -1, reduction: str = "sum"
    ) -> None:
        super().__init__(inner[0].num_codes, dim, channel_axis=channel_axis)
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction is {reduction!r}, but the losses of the layers are combined by 'sum' or 'mean'"
            )
        if len(inner[0].index_shape((1, 1, 1))) < 3:
            raise ValueError(f"a {type(inner[0]).__name__} cannot be an inner quantizer: it needs whole images")
        self.inner = nn.ModuleList(inner)
        self.count = count
        self.reduction = reduction
        self.needs_update = any(layer.needs_update for layer in inner)
        self.places_codes = any(layer.places_codes for layer in inner)
        # Follows the layer to its device and to float64, whatever state the inner quantizers have.
        self.register_buffer("anchor", torch.ones(()), persistent=False)
        for layer in inner:
            # The wrapper reminds and warns for its layers.
            layer._forwards_without_update = None
            layer._warned_of_partial_statistics = True

    @property
    def shared(self) -> bool:
        """Whether all layers use one table."""
        return len(self.inner) < self.count

    def layer(self, index: int) -> Quantizer:
        """The quantizer of a layer."""
        quantizer = self.inner[0 if self.shared else index]
        assert isinstance(quantizer, Quantizer)
        return quantizer

    @property
    def losses(self) -> Mapping[str, Any]:
        """The losses of a layer, by name."""
        losses: Mapping[str, Any] = getattr(self.inner[0], "losses", {})
        return losses

    @property
    def batch_coupled(self) -> tuple[str, ...]:
        """See `Quantizer.batch_coupled`."""
        return self.layer(0).batch_coupled

    @property
    def _extra_axes(self) -> int:
        """Axes of a layer's indices beyond the latents' own: none, unless the layer is a wrapper too."""
        return len(self.layer(0).index_shape(()))

    def index_shape(self, grid: Sequence[int]) -> tuple[int, ...]:
        """See `Quantizer.index_shape`: one more axis, of the layers."""
        return (*grid, self.count, *self.layer(0).index_shape(()))

    @property
    def num_entries(self) -> int:
        """See `Quantizer.num_entries`."""
        return self.layer(0).num_entries * len(self.inner)

    def entries(self, indices: Tensor) -> Tensor:
        """See `Quantizer.entries`: layer after layer; layers that share a table share its positions."""
        axis = -1 - self._extra_axes
        parts = [self._entries_of(i, part) for i, part in enumerate(indices.unbind(axis))]
        return torch.stack(parts, axis)

    def _entries_of(self, index: int, indices: Tensor) -> Tensor:
        layer = self.layer(index)
        offset = 0 if self.shared else index * layer.num_entries
        return torch.where(indices < 0, -1, layer.entries(indices) + offset)

    def index_map(self, indices: Tensor) -> Tensor:
        """See `Quantizer.index_map`: the first layer."""
        return self.layer(0).index_map(indices.select(-1 - self._extra_axes, 0))

    @torch.no_grad()
    def codebook(self) -> Tensor:
        """The tables of the layers (layers, K, d'); a shared one stands there for each, in the same memory."""
        tables = torch.stack([self.layer(i).codebook() for i in range(len(self.inner))])
        return tables.expand(self.count, *tables.shape[1:])

    @abstractmethod
    def _walk(self, z: Tensor, mask: Tensor | None, visit: Visit) -> list[Tensor]:
        """Goes through the layers as `encode` does; `visit` gives the indices of each."""

    def _latents(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        """Latents with the features last (..., d), in the precision of the state; masked ones are zero."""
        rows = to_rows(latents, self.dim, self.channel_axis, self.anchor.dtype)
        z = rows.reshape(latents.movedim(self.channel_axis, -1).shape)
        if mask is None:
            return z
        check_mask(mask, latents, self.channel_axis)
        return torch.where(mask.unsqueeze(-1), z, 0.0)

    @torch.no_grad()
    def encode(self, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Quantizer.encode`; always through all layers."""
        with torch.autocast(latents.device.type, enabled=False):
            z = self._latents(latents, mask)
            return self._joined(self._walk(z, mask, lambda i, x, m: self.layer(i).encode(x, m)))

    def _joined(self, indices: Sequence[Tensor]) -> Tensor:
        """The indices of the layers as one tensor."""
        return torch.stack(list(indices), -1 - self._extra_axes)

    @torch.no_grad()
    def init_from(
        self, latents: Tensor, mask: Tensor | None = None, *, method: str = "kmeans", seed: int | None = None
    ) -> None:
        """See `Quantizer.init_from`: layer after layer on what it sees; a shared table on what all layers see."""
        z = self._latents(latents.detach(), mask)
        seen: list[tuple[Tensor, Tensor | None]] = []

        def place(index: int, x: Tensor, valid: Tensor | None) -> Tensor:
            seen.append((x, valid))
            if not self.shared or index == 0:
                own = None if seed is None else seed + SEED_STEP * index
                self.layer(index).init_from(x, valid, method=method, seed=own)
            return self.layer(index).encode(x, valid)

        self._walk(z, mask, place)
        if self.shared:
            # Sample by sample, so that the order is the same however the samples lie in processes.
            items = z.shape[0] if z.dim() > 1 else 1
            rows = torch.cat([x.reshape(items, -1, x.shape[-1]) for x, _ in seen], 1)
            valid = None if mask is None else torch.cat([m.reshape(items, -1) for _, m in seen if m is not None], 1)
            self.layer(0).init_from(rows, valid, method=method, seed=seed)

    def configure(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        paused: Sequence[str] = (),
        estimator: str | None = None,
        frozen: bool = False,
    ) -> None:
        """See `Quantizer.configure`; handed on to every layer."""
        for i in range(len(self.inner)):
            self.layer(i).configure(weights=weights, paused=paused, estimator=estimator, frozen=frozen)

    def _update_all(
        self, batch: list[Quantized], optimizer: torch.optim.Optimizer | None, ema: WeightAverage | None
    ) -> dict[str, float]:
        """Every layer gets its own outputs, a shared one those of all layers; events are added up over layers."""
        events: dict[str, float] = {}
        for i, outs in self._outputs_by_layer(batch):
            for name, value in self.layer(i).update(outs, optimizer, ema).items():
                events[name] = events.get(name, 0.0) + value
        return events

    def _outputs_by_layer(self, batch: Sequence[Quantized]) -> list[tuple[int, list[Quantized]]]:
        by_layer = [(i, [out.inner[i] for out in batch]) for i in range(self._num_active())]
        return [(0, [out for _, outs in by_layer for out in outs])] if self.shared else by_layer

    def _num_active(self) -> int:
        """How many layers this step used."""
        return self.count

    def _combined(self, values: Sequence[Tensor], count: Tensor | int) -> Tensor:
        """Losses of the layers as one, by `reduction`; `count` layers had latents."""
        total = torch.stack(list(values)).sum()
        return total / count if self.reduction == "mean" else total

    def _result(
        self,
        latents: Tensor,
        mask: Tensor | None,
        z: Tensor,
        rows: Tensor,
        outs: Sequence[Quantized],
        loss: Tensor,
        losses: dict[str, Tensor],
    ) -> Quantized:
        """What forward returns, from z and its quantized rows (..., d), which carry the gradient of z_q."""
        z_q = rows.movedim(-1, self.channel_axis).to(latents.dtype)
        if mask is not None:
            z_q = torch.where(mask.unsqueeze(self.channel_axis), z_q, latents)
        flat, codes = (x.detach().reshape(-1, self.dim) for x in (z, rows))
        first = outs[0].assignment
        position = torch.arange(flat.shape[0], device=flat.device)
        whole = replace(
            first,
            z=flat,
            table=codes,
            indices=position if mask is None else torch.where(mask.reshape(-1), position, -1),
            distance=(flat - codes).square().sum(-1),
            selected=codes,
            num_valid=flat.new_full((), float(flat.shape[0])) if mask is None else mask.sum().to(flat.dtype),
            row_weight=None if mask is None else mask.reshape(-1).to(flat.dtype),
            stats={f"{name}_{i}": value for i, out in enumerate(outs) for name, value in out.stats.items()},
        )
        return Quantized(z_q, self._joined([out.indices for out in outs]), loss, losses, whole, tuple(outs))

    def _losses(self, outs: Sequence[Quantized], count: Tensor | int) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of the layers together, and the unweighted ones by name."""
        losses = {name: self._combined([out.losses[name] for out in outs], count) for name in outs[0].losses}
        return self._combined([out.loss for out in outs], count), losses

    @abstractmethod
    def _rebuilt(self, inner: Sequence[Quantizer]) -> Wrapper:
        """This wrapper, with nothing to train of its own, around other layers."""

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """The options of the builder that `_rebuilt` makes, as plain data, without those of the layers."""

    def bake(self) -> Quantizer:
        """See `Quantizer.bake`: the wrapper around baked layers."""
        layers = [self.layer(i).bake() for i in range(len(self.inner))]
        baked = self._rebuilt(layers)
        spec = dict(layers[0].spec or {})
        if spec and all(layer.spec == layers[0].spec for layer in layers):
            options = {k: v for k, v in spec.items() if k not in ("name", "num_codes", "dim", "channel_axis", "seed")}
            size = {"num_codes": self.num_codes, "dim": self.dim, "channel_axis": self.channel_axis}
            baked.spec = {
                "name": self.method,
                **size,
                **self._options(),
                "inner": spec["name"],
                "inner_options": options,
            }
        return baked.to(self.anchor.device, self.anchor.dtype).train(self.training)

    def extra_repr(self) -> str:
        """The size and layout, for `print(model)`."""
        return f"{super().extra_repr()}, layers={self.count}, shared={self.shared}, reduction={self.reduction}"
