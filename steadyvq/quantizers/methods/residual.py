# SPDX-License-Identifier: Apache-2.0
"""Residual quantization: each layer quantizes what the layers before it leave.

    r_1 = z,   e_l = code of r_l at layer l,   r_{l+1} = r_l - e_l,   z_q = e_1 + ... + e_L,   straight-through once
    L = sum_l (losses of layer l on r_l),   r_l = z - sg[e_1 + ... + e_{l-1}]

The commitment of layer l is then |z - sg[e_1 + ... + e_l]|^2, and its gradient reaches the encoder from every layer; the
codebook term of layer l reaches the codes of layer l alone. Indices are (..., L). A prefix (..., l) decodes too, and -1 (a
masked position, a dropped layer) adds nothing.

Source: RQ-VAE, arXiv 2203.01941, equations 2 to 4 and its commitment loss, a sum over depths; SoundStream, arXiv 2107.03312,
algorithm 1 and quantizer dropout. As they have it, a layer is `inner="ema"` with `shared=True` (RQ-VAE; separate in
SoundStream); here any registered quantizer is one, `nsvq` by default.

Losses of layers are summed (`reduction="sum"`), as in the paper: each table gets the gradient it would get alone, so the
weights and the learning rate of its method stay right. `reduction="mean"` divides by the number of layers that were used:
the released RQ-VAE code does so with the commitment, EnCodec too.

Quantizer dropout: `dropout` is the share of training steps that use only the first n layers, n uniform in 1..L. n is drawn by
`update` from (seed, number of updates), so it is the same in all micro-batches and processes of a step. Dropped layers
have index -1, no loss, no hit and no maintenance; evaluation and `encode` use all layers.
Differs from the source: SoundStream draws n for every example (`dropout=1`), DAC (arXiv 2306.06546) for a share of them.

`estimator` is `straight_through` (z_q hands its gradient to z, once), `direct` (to the codes of all layers), or `each`: every
layer's own estimator, with gradients along the residuals, which under straight-through arrives once as well but lets
only the first layer's commitment reach the encoder (the released DAC code). `each` is the default where the layers'
own estimator is another one, and any other name means `each` with that estimator in the layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steadyvq.quantizers.base import HostNumber, Quantized, Quantizer, WeightAverage
from steadyvq.quantizers.estimators import ESTIMATORS
from steadyvq.quantizers.registry import register
from steadyvq.quantizers.wrappers import Visit, Wrapper, build_layers, check_count, check_options


class Residual(Wrapper):
    """Layers that quantize each other's residuals.

    Args:
        inner: The layers, or a single one that all share.
        count: Number of layers.
        channel_axis: The axis of the latents that holds the features.
        reduction: `sum` or `mean` of the layers' losses.
        dropout: Share of training steps that use a random number of layers.
        estimator: Where the gradient of z_q goes; None: `straight_through`, or `each` if the layers have another one.
        seed: Of the quantizer dropout.
    """

    method = "residual"
    active: Tensor
    updates: Tensor

    def __init__(
        self,
        inner: Sequence[Quantizer],
        count: int,
        *,
        channel_axis: int = -1,
        reduction: str = "sum",
        dropout: float = 0.0,
        estimator: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(inner, count, inner[0].dim, channel_axis=channel_axis, reduction=reduction)
        if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout!r}, but it is a share of training steps, between 0 and 1")
        self.dropout = float(dropout)
        self.seed = seed
        self.needs_update = self.needs_update or dropout > 0
        own = getattr(inner[0], "estimator", None)
        self._built_estimator = estimator or ("straight_through" if own is ESTIMATORS["straight_through"] else "each")
        self._estimator = self._built_estimator
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("active", torch.full((), count, dtype=torch.int64))
        self._count, self._used = HostNumber(), HostNumber()
        self._draw()
        self.configure()

    def _draw(self) -> None:
        """How many layers the next step uses."""
        generator = torch.Generator().manual_seed((self.seed + 500_009) * 1_000_003 + int(self._count.of(self.updates)))
        drop = float(torch.rand((), generator=generator)) < self.dropout
        drawn = int(torch.randint(1, self.count + 1, (), generator=generator))
        self._used.assign(self.active, drawn if drop else self.count)

    def _num_active(self) -> int:
        return int(self._used.of(self.active))

    def configure(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        paused: Sequence[str] = (),
        estimator: str | None = None,
        frozen: bool = False,
    ) -> None:
        """See `Quantizer.configure`."""
        name = estimator or self._built_estimator
        self._estimator = name if name in ("straight_through", "direct") else "each"
        own = None if name in ("straight_through", "each") else name
        super().configure(weights=weights, paused=paused, estimator=own, frozen=frozen)

    def forward(self, latents: Tensor, mask: Tensor | None = None) -> Quantized:
        """See `Quantizer.forward`."""
        self._remind()
        dropping = self.training and self.dropout > 0
        with torch.autocast(latents.device.type, enabled=False):
            z = rest = self._latents(latents, mask)
            total = torch.zeros_like(z)
            outs = []
            for i in range(self.count):
                valid = mask
                if dropping and i > 0:
                    used = (self.active > i).expand(z.shape[:-1])
                    valid = used if mask is None else mask & used
                out = self.layer(i)(rest, valid)
                # A layer returns masked latents as they are; here they add nothing.
                codes = out.z_q if valid is None else torch.where(valid.unsqueeze(-1), out.z_q, 0.0)
                total = total + codes
                rest = rest - (codes if self._estimator == "each" else codes.detach())
                outs.append(out)
            rows = total.detach() + (z - z.detach()) if self._estimator == "straight_through" else total
            loss, losses = self._losses(outs, self.active if dropping else self.count)
            return self._result(latents, mask, z, rows, outs, loss, losses)

    def _walk(self, z: Tensor, mask: Tensor | None, visit: Visit) -> list[Tensor]:
        found = []
        for i in range(self.count):
            indices = visit(i, z, mask)
            z = z - self.layer(i).decode(indices, dtype=z.dtype)
            found.append(indices)
        return found

    def decode(self, indices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """See `Quantizer.decode`; indices (..., l) of the first l <= L layers give their sum.

        Raises:
            ValueError: There are more layers of indices than layers.
        """
        axis = -1 - self._extra_axes
        if indices.dim() < -axis or not 1 <= indices.shape[axis] <= self.count:
            raise ValueError(
                f"indices have shape {tuple(indices.shape)}, but this quantizer needs an axis {axis} of 1 to {self.count} "
                "layers"
            )
        with torch.autocast(indices.device.type, enabled=False):
            parts = [self.layer(i).decode(p, dtype=self.anchor.dtype) for i, p in enumerate(indices.unbind(axis))]
            total = torch.zeros_like(parts[0])
            for part in parts:
                total = total + part
            return total.movedim(-1, self.channel_axis).to(dtype or total.dtype)

    def _update_all(
        self, batch: list[Quantized], optimizer: torch.optim.Optimizer | None, ema: WeightAverage | None
    ) -> dict[str, float]:
        events = super()._update_all(batch, optimizer, ema)
        self._count.advance(self.updates)
        self._draw()
        return events

    def _rebuilt(self, inner: Sequence[Quantizer]) -> Wrapper:
        return Residual(inner, self.count, channel_axis=self.channel_axis, estimator="straight_through")

    def _options(self) -> dict[str, Any]:
        return {"layers": self.count, "shared": self.shared, "estimator": "straight_through"}


@register(
    "residual",
    paper="RQ-VAE, arXiv 2203.01941; SoundStream, arXiv 2107.03312",
    summary="layers of any quantizer, each on what the ones before leave",
    cost="L N K d; stores L tables, as inner",
    status="variant",
)
def residual(
    num_codes: int,
    dim: int,
    *,
    layers: int = 4,
    inner: str = "nsvq",
    inner_options: Mapping[str, Any] | None = None,
    shared: bool = False,
    dropout: float = 0.0,
    reduction: str = "sum",
    estimator: str | None = None,
    channel_axis: int = -1,
    seed: int = 0,
    **options: Any,
) -> Quantizer:
    """Residual quantization with K codes per layer; options not named here are the inner quantizer's."""
    check_count("layers", layers)
    options = {**check_options(inner_options), **options}
    built = build_layers(inner, num_codes, dim, 1 if shared else layers, options, seed)
    return Residual(
        built,
        layers,
        channel_axis=channel_axis,
        reduction=reduction,
        dropout=dropout,
        estimator=estimator,
        seed=seed,
    )
