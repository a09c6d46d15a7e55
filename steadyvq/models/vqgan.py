# SPDX-License-Identifier: Apache-2.0
"""The encoder and decoder of VQGAN, which latent diffusion, LlamaGen, IBQ, FVQ and diffusers' `VQModel` share.

    images (B, 3, H, W) -> VqganEncoder -> (B, z_channels, H / f, W / f) -> VqganDecoder -> (B, 3, H, W)

- residual blocks with biases, GroupNorm with eps 1e-6 and swish; one level per multiplier;
- attention of one head after each residual block of chosen levels, and in the middle: residual block, attention, residual
  block;
- down: a row and a column of zeros below and on the right, a 3x3 convolution of stride 2; up: nearest, a 3x3 convolution;
- the encoder ends GroupNorm -> swish -> 3x3 to `z_channels`; 1x1 convolutions to the codes and back belong to the tokenizer;
- the decoder has a residual block more per level than the encoder.

Source: arXiv 2012.09841 and the layout of its released weights. Published: channels 128; f = 16 with multipliers
(1, 1, 2, 2, 4) and attention on the lowest level, z_channels 256; f = 4 of latent diffusion with (1, 2, 4), attention in the
middle alone and z_channels 3. IBQ has four residual blocks per level (five in the decoder).
"""

from collections.abc import Collection, Iterable

from torch import Tensor, nn
from torch.nn import functional as F

from steadyvq.models.blocks import (
    Blocks,
    NearestUpsample,
    PaddedDownsample,
    attending_blocks,
    group_norm,
    middle_blocks,
)


class VqganEncoder(nn.Module):
    """Images to latents.

    Args:
        channels: width of the first convolution.
        multipliers: width of each level in units of `channels`, highest resolution first.
        num_res_blocks: residual blocks per level.
        z_channels: width of the latents.
        attention: levels with attention, 0 the highest resolution.
        mid_attention: whether the middle has attention.
        groups: of the norms; None: as many as fit each width.
        in_channels: channels of the images.
    """

    def __init__(
        self,
        channels: int,
        multipliers: Iterable[int],
        num_res_blocks: int,
        z_channels: int,
        attention: Collection[int] = (),
        mid_attention: bool = True,
        groups: int | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        self.in_channels = in_channels
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.levels = nn.ModuleList()
        for level, (before, width) in enumerate(zip([channels, *widths], widths, strict=False)):
            layers = attending_blocks(before, width, num_res_blocks, attention=level in attention, groups=groups)
            if level < len(widths) - 1:
                layers.append(PaddedDownsample(width))
            self.levels.append(Blocks(*layers))
        self.mid = Blocks(*middle_blocks(widths[-1], attention=mid_attention, groups=groups))
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    @property
    def downsampling(self) -> int:
        """Image pixels per latent, along one side."""
        return int(2 ** (len(self.levels) - 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) in [-1, 1] to latents (B, z_channels, H / f, W / f)."""
        x: Tensor = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return x


class VqganDecoder(nn.Module):
    """Latents to images.

    Args:
        channels: unit of the widths, as in the encoder.
        multipliers: width of each level in units of `channels`, highest resolution first, as in the encoder.
        num_res_blocks: residual blocks per level.
        z_channels: width of the latents.
        attention: levels with attention, numbered as in the encoder.
        mid_attention: whether the middle has attention.
        groups: of the norms; None: as many as fit each width.
        out_channels: channels of the images.
    """

    def __init__(
        self,
        channels: int,
        multipliers: Iterable[int],
        num_res_blocks: int,
        z_channels: int,
        attention: Collection[int] = (),
        mid_attention: bool = True,
        groups: int | None = None,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers][::-1]
        highest = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = Blocks(*middle_blocks(widths[0], attention=mid_attention, groups=groups))
        self.levels = nn.ModuleList()
        for level, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            attends = highest - level in attention
            layers = attending_blocks(before, width, num_res_blocks, attention=attends, groups=groups)
            if level < highest:
                layers.append(NearestUpsample(width))
            self.levels.append(Blocks(*layers))
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    @property
    def downsampling(self) -> int:
        """Image pixels per latent, along one side."""
        return int(2 ** (len(self.levels) - 1))

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents (B, z_channels, h, w) to images (B, out_channels, f h, f w), not clamped."""
        x: Tensor = self.mid(self.conv_in(latents))
        for level in self.levels:
            x = level(x)
        return self.to_images(F.silu(self.norm_out(x)))

    def to_images(self, features: Tensor) -> Tensor:
        """The last layer alone: features (B, channels, f h, f w) to images (B, out_channels, f h, f w)."""
        images: Tensor = self.conv_out(features)
        return images
