# SPDX-License-Identifier: Apache-2.0
"""Grouped (product) quantization: the features are cut into G groups, each with its own codes.

    z = [z_1, ..., z_G],   e_g = code of z_g in group g (d / G features),   z_q = [e_1, ..., e_G]
    L = 1/G sum_g (losses of group g on z_g)

K codes per group make K^G vectors. Indices are (..., G), or (..., G, L) with `inner="residual"`.

Source: product quantization, Jegou et al. 2011; with learned codes as in vq-wav2vec (arXiv 1910.05453, groups with their own
or a shared codebook). OptVQ (arXiv 2412.15195) has heads that share one codebook: `shared=True`.

Losses of groups are averaged (`reduction="mean"`): each is a mean over its own d / G features, so their mean is the mean over
all d features that a plain quantizer has. `reduction="sum"` gives each table the gradient it would get alone. The gradient
of z_q goes through each group's own estimator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steadyvq.quantizers.base import Quantized, Quantizer
from steadyvq.quantizers.registry import register
from steadyvq.quantizers.wrappers import Visit, Wrapper, build_layers, check_count, check_options


class Grouped(Wrapper):
    """Groups of features, each with a quantizer.

    Args:
        inner: The quantizers of the groups, or a single one that all share.
        count: G.
        channel_axis: The axis of the latents that holds the features.
        reduction: `mean` or `sum` of the groups' losses.
    """

    method = "grouped"

    def __init__(
        self, inner: Sequence[Quantizer], count: int, *, channel_axis: int = -1, reduction: str = "mean"
    ) -> None:
        super().__init__(inner, count, inner[0].dim * count, channel_axis=channel_axis, reduction=reduction)

    def forward(self, latents: Tensor, mask: Tensor | None = None) -> Quantized:
        """See `Quantizer.forward`."""
        self._remind()
        with torch.autocast(latents.device.type, enabled=False):
            z = self._latents(latents, mask)
            outs = [self.layer(i)(part, mask) for i, part in enumerate(z.chunk(self.count, -1))]
            loss, losses = self._losses(outs, self.count)
            return self._result(latents, mask, z, torch.cat([out.z_q for out in outs], -1), outs, loss, losses)

    def _walk(self, z: Tensor, mask: Tensor | None, visit: Visit) -> list[Tensor]:
        return [visit(i, part, mask) for i, part in enumerate(z.chunk(self.count, -1))]

    def decode(self, indices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """See `Quantizer.decode`.

        Raises:
            ValueError: The indices do not have one entry per group.
        """
        axis = -1 - self._extra_axes
        if indices.dim() < -axis or indices.shape[axis] != self.count:
            raise ValueError(
                f"indices have shape {tuple(indices.shape)}, but this quantizer needs an axis {axis} of {self.count} groups"
            )
        with torch.autocast(indices.device.type, enabled=False):
            parts = [self.layer(i).decode(p, dtype=self.anchor.dtype) for i, p in enumerate(indices.unbind(axis))]
            whole = torch.cat(parts, -1)
            return whole.movedim(-1, self.channel_axis).to(dtype or whole.dtype)

    def _rebuilt(self, inner: Sequence[Quantizer]) -> Wrapper:
        return Grouped(inner, self.count, channel_axis=self.channel_axis)

    def _options(self) -> dict[str, Any]:
        return {"groups": self.count, "shared": self.shared}


@register(
    "grouped",
    paper="Product quantization, Jegou et al. 2011; vq-wav2vec, arXiv 1910.05453",
    summary="groups of features, each with codes of its own (product quantization)",
    cost="N K d in all; stores as inner",
    status="variant",
)
def grouped(
    num_codes: int,
    dim: int,
    *,
    groups: int = 2,
    inner: str = "nsvq",
    inner_options: Mapping[str, Any] | None = None,
    shared: bool = False,
    reduction: str = "mean",
    channel_axis: int = -1,
    seed: int = 0,
    **options: Any,
) -> Quantizer:
    """Product quantization with K codes per group; options not named here are the inner quantizer's."""
    check_count("groups", groups)
    check_count("dim", dim)
    if dim % groups:
        raise ValueError(f"dim is {dim}, but {groups} groups need a multiple of {groups}")
    options = {**check_options(inner_options), **options}
    built = build_layers(inner, num_codes, dim // groups, 1 if shared else groups, options, seed)
    return Grouped(built, groups, channel_axis=channel_axis, reduction=reduction)
