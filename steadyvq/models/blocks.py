# SPDX-License-Identifier: Apache-2.0
"""Blocks of encoders and decoders: residual, attention, the ways to change the resolution, and rows of them.

Source: the encoder and decoder of VQGAN (arXiv 2012.09841), which follow DDPM (arXiv 2006.11239, appendix B); the adaptive
group norm is that of MAGVIT-v2's decoder as in Open-MAGVIT2.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NORM_EPS = 1e-6


def group_count(channels: int) -> int:
    """Return the number of GroupNorm groups for a width.

    It is 32 for every width of the published sizes (a multiple of 32 from 128 on); narrower layers get the largest
    divisor of the width that leaves at least four channels in a group, since a group of one channel would erase that
    channel's mean, and with it the overall colour of an image.
    """
    limit = max(1, min(32, channels // 4))
    return next(groups for groups in range(limit, 0, -1) if channels % groups == 0)


def group_norm(channels: int, groups: int | None = None, affine: bool = True) -> nn.GroupNorm:
    """Return the GroupNorm of a width; `groups` None is `group_count`.

    Raises:
        ValueError: the width is no multiple of the groups.
    """
    groups = group_count(channels) if groups is None else groups
    if channels % groups:
        raise ValueError(
            f"groups is {groups}, but a layer has {channels} channels: choose a divisor, or null for each width's own."
        )
    return nn.GroupNorm(groups, channels, eps=NORM_EPS, affine=affine)


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return `function(*arguments)`; what is inside is not kept for backward but computed there a second time.

    Only what draws no random numbers and keeps no statistics may be computed twice. Without gradients nothing is kept anyway.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    out: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return out


class Blocks(nn.Sequential):
    """A row of layers that takes nearly all the time and memory of a network: what is compiled, recomputed and sharded.

    Args:
        layers: One after the other.
        starts: Numbers of the layers with which the pieces begin that are recomputed one at a time (None: every layer).

    Attributes:
        recompute: Keep the inputs of the pieces alone for backward, which saves memory and costs a forward more.
    """

    def __init__(self, *layers: nn.Module, starts: Sequence[int] | None = None) -> None:
        super().__init__(*layers)
        self.starts = tuple(range(len(layers)) if starts is None else starts)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """Map x through all layers."""
        for first, end in pairwise((*self.starts, len(self))):
            x = recomputed(self._piece, first, end, x) if self.recompute else self._piece(first, end, x)
        return x

    def _piece(self, first: int, end: int, x: Tensor) -> Tensor:
        for i in range(first, end):
            x = self[i](x)
        return x


class ResBlock(nn.Module):
    """Residual block: x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 skip where the width changes.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        bias: whether the convolutions have biases.
        groups: of the norms; None: `group_count` of the width.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = False, groups: int | None = None) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.skip: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, h, w)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        out: Tensor = self.skip(x) + hidden
        return out


class Attention(nn.Module):
    """Self-attention of one head over all positions: x + proj(softmax(q k^T / sqrt(C)) v), q, k, v of norm(x).

    Args:
        channels: C.
        groups: of the norm; None: `group_count` of the width.
    """

    def __init__(self, channels: int, groups: int | None = None) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return out


class PaddedDownsample(nn.Module):
    """Half the resolution: one row and column of zeros below and on the right, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h / 2, w / 2)."""
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


class NearestUpsample(nn.Module):
    """Twice the resolution: every pixel as a square of four, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, 2 h, 2 w)."""
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled


class AdaptiveNorm(nn.Module):
    """Group norm whose scale and shift are linear in the spread and the mean of an image's latents.

        gamma(std(z)) * norm(x) + beta(mean(z)),   std(z)^2 = unbiased variance over positions + 1e-6

    Args:
        z_channels: width of the latents.
        channels: width of x.
        groups: of the norm; None: `group_count` of the width.
    """

    def __init__(self, z_channels: int, channels: int, groups: int | None = None) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups, affine=False)
        self.gamma = nn.Linear(z_channels, channels)
        self.beta = nn.Linear(z_channels, channels)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Map x (B, C, h, w), by the latents z (B, z_channels, h', w'), to the same shape."""
        flat = z.flatten(2)
        # One position has no spread, and its unbiased variance would be 0 / 0.
        variance = flat.var(-1) if flat.shape[-1] > 1 else flat.new_zeros(flat.shape[:2])
        scale, shift = self.gamma((variance + NORM_EPS).sqrt()), self.beta(flat.mean(-1))
        out: Tensor = scale[..., None, None] * self.norm(x) + shift[..., None, None]
        return out


def res_blocks(
    in_channels: int, out_channels: int, count: int, *, bias: bool = False, groups: int | None = None
) -> list[nn.Module]:
    """Return `count` residual blocks, the first of which changes the width."""
    widths = [in_channels] + [out_channels] * count
    return [ResBlock(a, b, bias=bias, groups=groups) for a, b in pairwise(widths)]


def attending_blocks(
    in_channels: int, out_channels: int, count: int, *, attention: bool, groups: int | None
) -> list[nn.Module]:
    """Return `count` residual blocks with biases, each followed by attention if it is asked for."""
    layers = []
    for block in res_blocks(in_channels, out_channels, count, bias=True, groups=groups):
        layers += [block, Attention(out_channels, groups)] if attention else [block]
    return layers


def middle_blocks(channels: int, *, attention: bool, groups: int | None) -> list[nn.Module]:
    """Return a residual block, attention if it is asked for, and a residual block."""
    first, last = res_blocks(channels, channels, 2, bias=True, groups=groups)
    return [first, Attention(channels, groups), last] if attention else [first, last]
