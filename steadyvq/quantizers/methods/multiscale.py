# SPDX-License-Identifier: Apache-2.0
"""Multi-scale residual quantization (VAR): coarse grids of tokens first, each on what the coarser ones leave.

    f^ = 0;   for k = 1..S:   e_k = codes of area_k(f - f^)            (B, h_k, w_k, d)
                              f^ <- f^ + phi_k(bicubic_HW(e_k))        phi(h) = (1 - r) h + r conv3x3(h)
    z_q = f^, straight-through once
    L = 1/S sum_k [ mean (f^_k - sg[f])^2 + 0.25 mean (sg[f^_k] - f)^2 ]     f^_k: f^ after scale k

The first term reaches the codes of scales 1..k and their phi, the second the encoder. One table for all scales.

Source: VAR, arXiv 2404.02905, algorithms 1 and 2; r = 0.5, four phi, 0.25 and 1 as in the released code (models/quant.py), and
so is the phi of a scale: the one whose tick is nearest to k / (S - 1), the ticks from 1/3P to 1 - 1/3P for P = 4 and from
1/2P to 1 - 1/2P otherwise. There `inner="vq"`; here any registered quantizer is the inner one, `nsvq` by default, whose own
commitment and codebook terms give way to the two above. Its other losses act on area_k(f - sg[f^]) and are averaged over
scales as well (`reduction="sum"` adds them all up instead).
Differs from the source: upsampling and phi are computed in float64 and rounded, so that tokens do not hang on the batch
size or on TF32. The residual is f - f^ of the sum rather than a running difference.

Latents are (B, d, H, W) with H, W the last scale. Indices are (B, sum h_k w_k), scale after scale; `decode` takes the first k
scales as well. Masks are refused: averages and convolutions would carry masked positions to their neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steadyvq.quantizers.base import Quantized, Quantizer
from steadyvq.quantizers.losses import CodebookLoss, Commitment, Loss
from steadyvq.quantizers.names import look_up
from steadyvq.quantizers.registry import register
from steadyvq.quantizers.vector import VectorQuantizer
from steadyvq.quantizers.wrappers import Visit, Wrapper, build_layers, check_count, check_options

VAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)

OWN_LOSSES = {"commitment": 0.25, "codebook": 1.0}

Grid = tuple[int, int]


class Phi(nn.Module):
    """phi(h) = (1 - r) h + r (conv3x3(h) + b), in float64; starts as torch.nn.Conv2d does.

    Args:
        dim: d.
        ratio: r.
        generator: Of the start.
        trainable: Whether its weights are parameters, or buffers.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, dim: int, ratio: float, generator: torch.Generator, *, trainable: bool = True) -> None:
        super().__init__()
        self.ratio = ratio
        bound = (9 * dim) ** -0.5
        for name, shape in (("weight", (dim, dim, 3, 3)), ("bias", (dim,))):
            value = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            if trainable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, h: Tensor) -> Tensor:
        """Refines an upsampled grid of codes (B, d, H, W) in float64."""
        refined = F.conv2d(h, self.weight.double(), self.bias.double(), padding=1)
        return (1 - self.ratio) * h + self.ratio * refined


class MultiScale(Wrapper):
    """Scales of token grids that quantize each other's residuals.

    Args:
        inner: The quantizers of the scales, or a single one that all share.
        scales: Sides (h, w) of the token grids, the last the size of the latents.
        losses: Weights of `commitment` and `codebook`.
        phis: Number of refinement convolutions that the scales share, at most one for each; 0: none.
        ratio: r, how much of the refinement is the convolution.
        reduction: `mean` or `sum` of the scales' losses.
        trainable: Whether the convolutions learn.
        estimator: `straight_through` or `direct`.
        seed: Of the start of the convolutions.
    """

    method = "multiscale"

    def __init__(
        self,
        inner: Sequence[Quantizer],
        scales: Sequence[Grid],
        *,
        losses: Mapping[str, Loss] | None = None,
        phis: int = 4,
        ratio: float = 0.5,
        reduction: str = "mean",
        trainable: bool = True,
        estimator: str = "straight_through",
        seed: int = 0,
    ) -> None:
        super().__init__(inner, len(scales), inner[0].dim, channel_axis=1, reduction=reduction)
        self.scales = list(scales)
        self.own_losses = dict(losses or {})
        self.ratio = ratio
        # More than one for each scale would leave some without a gradient.
        phis = min(phis, len(scales))
        generator = torch.Generator().manual_seed(seed)
        self.phis = nn.ModuleList(Phi(self.dim, ratio, generator, trainable=trainable) for _ in range(phis))
        self._phi_of_scale = [_nearest_tick(k, len(scales), phis) for k in range(len(scales))]
        self._built_estimator = self._checked(estimator)
        self.configure()

    def _checked(self, estimator: str) -> str:
        if estimator not in ("straight_through", "direct"):
            raise ValueError(
                f"estimator is {estimator!r}, but the sum over scales has 'straight_through' (to the latents) and 'direct' "
                "(to codes and convolutions)"
            )
        return estimator

    @property
    def losses(self) -> Mapping[str, Any]:
        """The two losses of the sum over scales, and what else the inner quantizer has."""
        return {**super().losses, **self.own_losses}

    def weight(self, name: str) -> float:
        """The present weight of `commitment` or `codebook`."""
        return self._weights.get(name, self.own_losses[name].weight)

    def configure(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        paused: Sequence[str] = (),
        estimator: str | None = None,
        frozen: bool = False,
    ) -> None:
        """See `Quantizer.configure`; `commitment` and `codebook` are those of the sum over scales."""
        self._estimator = self._checked(estimator or self._built_estimator)
        self._weights = {n: v for n, v in (weights or {}).items() if n in OWN_LOSSES}
        for name, value in self._weights.items():
            if value != 0:
                look_up("loss of this quantizer", name, self.own_losses)
        others = {n: v for n, v in (weights or {}).items() if n not in OWN_LOSSES}
        # The codes of a scale get the gradient of the sum that they are part of; those of a grid do not move.
        inner = "direct" if _learns(self.layer(0)) else None
        super().configure(
            weights={**others, **dict.fromkeys(OWN_LOSSES, 0.0)}, paused=paused, estimator=inner, frozen=frozen
        )

    def index_shape(self, grid: Sequence[int]) -> tuple[int, ...]:
        """See `Quantizer.index_shape`: all scales of an image, one after the other."""
        return (grid[0], sum(h * w for h, w in self.scales), *self.layer(0).index_shape(()))

    def split(self, indices: Tensor) -> list[Tensor]:
        """Indices (B, T) of the first scales as grids (B, h_k, w_k).

        Raises:
            ValueError: T is not the number of tokens of the first k scales for any k.
        """
        sizes = [h * w for h, w in self.scales]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        if indices.dim() != 2 + self._extra_axes or indices.shape[1] not in ends:
            raise ValueError(
                f"indices have shape {tuple(indices.shape)}, but this quantizer needs (images, tokens) with "
                f"{ends[-1]} tokens, or those of its first scales: {ends}"
            )
        parts = torch.split(indices, sizes[: ends.index(indices.shape[1]) + 1], 1)
        return [part.reshape(len(part), *self.scales[k], *part.shape[2:]) for k, part in enumerate(parts)]

    def entries(self, indices: Tensor) -> Tensor:
        """See `Quantizer.entries`."""
        return self._joined([self._entries_of(k, part) for k, part in enumerate(self.split(indices))])

    def index_map(self, indices: Tensor) -> Tensor:
        """See `Quantizer.index_map`: the finest scale."""
        return self.layer(0).index_map(self.split(indices)[-1])

    def _joined(self, indices: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.flatten(1, 2) for part in indices], 1)

    def _latents(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            raise ValueError(
                "a mask was given, but averages and convolutions over images would carry masked positions to their "
                "neighbours: crop the images instead"
            )
        if latents.dim() != 4 or tuple(latents.shape[2:]) != self.scales[-1]:
            height, width = self.scales[-1]
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, but this quantizer needs (B, {self.dim}, {height}, {width}): "
                "its last scale is the size of the latents"
            )
        return super()._latents(latents, None)

    def _down(self, rest: Tensor, scale: int) -> Tensor:
        """A residual (B, d, H, W) averaged to a scale, (B, h, w, d)."""
        if self.scales[scale] != self.scales[-1]:
            rest = F.interpolate(rest.contiguous(), size=self.scales[scale], mode="area")
        return rest.movedim(1, -1).contiguous()

    def _up(self, codes: Tensor, scale: int) -> Tensor:
        """Codes of a scale (B, h, w, d) as their share of z_q, (B, d, H, W)."""
        image = codes.movedim(-1, 1).double().contiguous()
        if self.scales[scale] != self.scales[-1]:
            image = F.interpolate(image, size=self.scales[-1], mode="bicubic")
        if self.phis:
            image = self.phis[self._phi_of_scale[scale]](image)
        return image.to(codes.dtype)

    def forward(self, latents: Tensor, mask: Tensor | None = None) -> Quantized:
        """See `Quantizer.forward`; a mask is refused."""
        self._remind()
        with torch.autocast(latents.device.type, enabled=False):
            z = self._latents(latents, mask)
            image = z.movedim(-1, 1)
            total = torch.zeros_like(image)
            outs, sums = [], []
            for k in range(self.count):
                out = self.layer(k)(self._down(image - total.detach(), k))
                # Other quantizers may hand z_q's gradient to the latents, which the terms below detach.
                total = total + self._up(out.z_q if _learns(self.layer(k)) else out.z_q.detach(), k)
                outs.append(out)
                sums.append(total.movedim(1, -1))
            rows = sums[-1]
            if self._estimator == "straight_through":
                rows = rows.detach() + (z - z.detach())
            loss, losses = self._losses(outs, self.count)
            for name, value in self._losses_of_sums(outs[0], z, sums).items():
                losses[name] = value
                loss = loss + self.weight(name) * value
            return self._result(latents, None, z, rows, outs, loss, losses)

    def _losses_of_sums(self, first: Quantized, z: Tensor, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        """Commitment and codebook loss of the approximation after every scale."""
        flat = z.reshape(-1, self.dim)
        count = flat.new_full((), float(flat.shape[0]))
        after = [
            replace(first.assignment, z=flat, selected=part.reshape(-1, self.dim), num_valid=count, row_weight=None)
            for part in sums
        ]
        active = {name: loss for name, loss in self.own_losses.items() if self.weight(name) != 0}
        return {name: self._combined([loss(a) for a in after], self.count) for name, loss in active.items()}

    def _walk(self, z: Tensor, mask: Tensor | None, visit: Visit) -> list[Tensor]:
        image = z.movedim(-1, 1)
        total = torch.zeros_like(image)
        found = []
        for k in range(self.count):
            found.append(visit(k, self._down(image - total, k), None))
            total = total + self._up(self.layer(k).decode(found[-1], dtype=z.dtype), k)
        return found

    def decode(self, indices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """See `Quantizer.decode`: (B, d, H, W) from indices (B, T) of all scales, or of the first few."""
        with torch.autocast(indices.device.type, enabled=False):
            total: Tensor | None = None
            for k, part in enumerate(self.split(indices)):
                share = self._up(self.layer(k).decode(part, dtype=self.anchor.dtype), k)
                total = torch.zeros_like(share) + share if total is None else total + share
            assert total is not None
            return total.to(dtype or total.dtype)

    def following(self, indices: Tensor) -> list[Tensor]:
        """What a prior reads that predicts scale after scale: f^ after each scale, averaged to the size of the next.

        Args:
            indices: (B, T) of the first scales, without the last of all.

        Returns:
            area_{k+1}(f^_k), (B, h_{k+1}, w_{k+1}, d), for every scale k that was given.
        """
        parts = self.split(indices)
        if len(parts) == self.count:
            raise ValueError(f"indices hold all {self.count} scales, but nothing follows the last: leave it out")
        with torch.autocast(indices.device.type, enabled=False):
            found: list[Tensor] = []
            total = self.anchor.new_zeros(len(indices), self.dim, *self.scales[-1])
            for k, part in enumerate(parts):
                total = total + self._up(self.layer(k).decode(part, dtype=self.anchor.dtype), k)
                found.append(self._down(total, k + 1))
            return found

    def _rebuilt(self, inner: Sequence[Quantizer]) -> Wrapper:
        baked = MultiScale(inner, self.scales, phis=len(self.phis), ratio=self.ratio, trainable=False)
        baked.phis.load_state_dict(self.phis.state_dict())
        return baked

    def _options(self) -> dict[str, Any]:
        return {
            "scales": [list(scale) for scale in self.scales],
            "shared": self.shared,
            "phis": len(self.phis),
            "ratio": self.ratio,
            "trainable": False,
            "losses": dict.fromkeys(OWN_LOSSES),
        }


def _learns(layer: Quantizer) -> bool:
    """Whether a gradient can move the codes."""
    return _learns(layer.layer(0)) if isinstance(layer, Wrapper) else isinstance(layer, VectorQuantizer)


def _nearest_tick(scale: int, scales: int, phis: int) -> int:
    """Which of the shared convolutions a scale uses.

    Scales halfway between two ticks (the third and the eighth of VAR's ten) go where the rounding of the released code,
    numpy.linspace in float64, sends them; its arithmetic is repeated here so that its weights can be used.
    """
    if phis < 2:
        return 0
    first = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    last = 1 - first
    step = (last - first) / (phis - 1)
    ticks = [*(i * step + first for i in range(phis - 1)), last]
    at = scale / max(1, scales - 1)
    return min(range(phis), key=lambda i: abs(ticks[i] - at))


def _grids(scales: Any) -> list[Grid]:
    """Scales as pairs; ValueError unless they are sides, or pairs of sides, that do not shrink."""
    if not isinstance(scales, Sequence) or isinstance(scales, str) or not scales:
        raise ValueError(f"scales is {scales!r}, but it needs a list of sides, such as [1, 2, 3, 4]")
    grids: list[Grid] = []
    for scale in scales:
        pair = scale if isinstance(scale, Sequence) and not isinstance(scale, str) else (scale, scale)
        if len(pair) != 2:
            raise ValueError(f"a scale is {scale!r}, but it needs a side or a pair (height, width)")
        for side in pair:
            check_count("the side of a scale", side)
        grids.append((pair[0], pair[1]))
    if any(a > b for one, other in pairwise(grids) for a, b in zip(one, other, strict=True)):
        raise ValueError(
            f"scales are {list(scales)}, but they go from coarse to fine, the last the size of the latents"
        )
    return grids


def _own_losses(given: Mapping[str, Any]) -> dict[str, Loss]:
    """Commitment and codebook with their weights; None leaves one out."""
    kinds: dict[str, Any] = {"commitment": Commitment, "codebook": CodebookLoss}
    losses: dict[str, Loss] = {}
    for name, weight in {**OWN_LOSSES, **{n: v for n, v in given.items() if n in OWN_LOSSES}}.items():
        value = weight.get("weight") if isinstance(weight, Mapping) else weight
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(
                f"the weight of loss {name!r} is {value!r}, but it needs a number, or null to leave it out"
            )
        losses[name] = kinds[name](float(value))
    return losses


@register(
    "multiscale",
    paper="VAR, arXiv 2404.02905",
    summary="token grids from coarse to fine, each on what the coarser ones leave",
    cost="T K d + S N d^2, T tokens in S scales; stores d^2",
    status="variant",
)
def multiscale(
    num_codes: int,
    dim: int,
    *,
    scales: Sequence[int | Sequence[int]] = VAR_SCALES,
    inner: str = "nsvq",
    inner_options: Mapping[str, Any] | None = None,
    shared: bool = True,
    losses: Mapping[str, Any] | None = None,
    phis: int = 4,
    ratio: float = 0.5,
    reduction: str = "mean",
    trainable: bool = True,
    estimator: str = "straight_through",
    channel_axis: int = 1,
    seed: int = 0,
    **options: Any,
) -> Quantizer:
    """Multi-scale residual quantization of images; options not named here are the inner quantizer's."""
    if channel_axis != 1:
        raise ValueError(f"channel_axis is {channel_axis!r}, but multi-scale latents are (B, d, H, W): set it to 1")
    if losses is not None and not isinstance(losses, Mapping):
        raise ValueError(f"losses is {losses!r}, but it needs a mapping from names to weights")
    if not isinstance(phis, int) or isinstance(phis, bool) or phis < 0:
        raise ValueError(f"phis is {phis!r}, but it needs a number of convolutions, or 0 for none")
    grids = _grids(scales)
    options = {**check_options(inner_options), **options}
    others = {name: value for name, value in (losses or {}).items() if name not in OWN_LOSSES}
    if others:
        options["losses"] = {**options.get("losses", {}), **others}
    return MultiScale(
        build_layers(inner, num_codes, dim, 1 if shared else len(grids), options, seed),
        grids,
        losses=_own_losses(losses or {}),
        phis=phis,
        ratio=ratio,
        reduction=reduction,
        trainable=trainable,
        estimator=estimator,
        seed=seed,
    )
