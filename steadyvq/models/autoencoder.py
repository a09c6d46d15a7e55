# SPDX-License-Identifier: Apache-2.0
"""Convolutional encoder and decoder without attention, and their named sizes.

    images (B, 3, H, W) -> Encoder -> (B, z_channels, H / f, W / f) -> Decoder -> (B, 3, H, W)

The layout is the one of SimVQ's 128x128 experiments (arXiv 2411.02038; the code follows Open-MAGVIT2):

- residual block: GroupNorm -> swish -> 3x3 -> GroupNorm -> swish -> 3x3, a 1x1 skip where the width changes, no biases;
- one level per multiplier, a 3x3 convolution of stride 2 and padding 1 between levels: f = 2 ** (levels - 1);
- up: a 3x3 convolution to four times the width, then depth-to-space;
- the encoder ends GroupNorm -> swish -> 1x1 to `z_channels`, which is the code dimension, so no further projection follows;
- no attention anywhere, so any image size that is a multiple of f is accepted.

Differs from the source: depth-to-space here is `torch.nn.PixelShuffle`, which reads the channels as (width, 2, 2); the
source reads them as (2, 2, width). The functions are the same up to a fixed order of the convolution's output channels:
weights w (4C, ...) of the source become `w.unflatten(0, (4, C)).transpose(0, 1).flatten(0, 1)` here.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from steadyvq.models.blocks import AdaptiveNorm, Blocks, group_norm, res_blocks
from steadyvq.models.vqgan import VqganDecoder, VqganEncoder


def _downsample(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1)


def _upsample(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2))


class Encoder(nn.Module):
    """Images to latents.

    Args:
        channels: width of the first level.
        multipliers: width of each level in units of `channels`, highest resolution first.
        num_res_blocks: residual blocks per level.
        num_mid_blocks: residual blocks at the lowest resolution, after the levels.
        z_channels: width of the latents.
        patch: side of the pixel squares that are folded into channels first (1: none).
        in_channels: channels of the images.
        groups: of the norms; None: as many as fit each width.
    """

    def __init__(
        self,
        channels: int,
        multipliers: Iterable[int],
        num_res_blocks: int,
        num_mid_blocks: int,
        z_channels: int,
        patch: int = 1,
        in_channels: int = 3,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        self.in_channels = in_channels
        self.fold = nn.PixelUnshuffle(patch)
        self.conv_in = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1, bias=False)
        self.levels = nn.ModuleList()
        for level, (before, width) in enumerate(zip([channels, *widths], widths, strict=False)):
            layers = res_blocks(before, width, num_res_blocks, groups=groups)
            if level < len(widths) - 1:
                layers.append(_downsample(width))
            self.levels.append(Blocks(*layers))
        self.mid = Blocks(*res_blocks(widths[-1], widths[-1], num_mid_blocks, groups=groups))
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    @property
    def downsampling(self) -> int:
        """Image pixels per latent, along one side."""
        return self.fold.downscale_factor * int(2 ** (len(self.levels) - 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) in [-1, 1] to latents (B, z_channels, H / f, W / f)."""
        x: Tensor = self.conv_in(self.fold(images))
        for level in self.levels:
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return x


class Decoder(nn.Module):
    """Latents to images; the mirror image of `Encoder`, with the same arguments.

    Args:
        channels: width of the last level.
        multipliers: width of each level in units of `channels`, highest resolution first, as in the encoder.
        num_res_blocks: residual blocks per level.
        num_mid_blocks: residual blocks at the lowest resolution, before the levels.
        z_channels: width of the latents.
        patch: side of the pixel squares that are unfolded from channels last (1: none).
        out_channels: channels of the images.
        groups: of the norms; None: as many as fit each width.
        adaptive: whether a group norm that mean and spread of the latents scale comes before each level.
    """

    def __init__(
        self,
        channels: int,
        multipliers: Iterable[int],
        num_res_blocks: int,
        num_mid_blocks: int,
        z_channels: int,
        patch: int = 1,
        out_channels: int = 3,
        groups: int | None = None,
        adaptive: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers][::-1]
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = Blocks(*res_blocks(widths[0], widths[0], num_mid_blocks, groups=groups))
        self.levels = nn.ModuleList()
        entering = [widths[0], *widths[:-1]]
        norms = [AdaptiveNorm(z_channels, before, groups) for before in entering] if adaptive else None
        self.adaptive = None if norms is None else nn.ModuleList(norms)
        for level, (before, width) in enumerate(zip(entering, widths, strict=True)):
            layers = res_blocks(before, width, num_res_blocks, groups=groups)
            if level < len(widths) - 1:
                layers.append(_upsample(width))
            self.levels.append(Blocks(*layers))
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels * patch**2, 3, padding=1)
        self.unfold = nn.PixelShuffle(patch)

    @property
    def downsampling(self) -> int:
        """Image pixels per latent, along one side."""
        return self.unfold.upscale_factor * int(2 ** (len(self.levels) - 1))

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents (B, z_channels, h, w) to images (B, out_channels, f h, f w), not clamped."""
        x: Tensor = self.mid(self.conv_in(latents))
        for i, level in enumerate(self.levels):
            x = level(x if self.adaptive is None else self.adaptive[i](x, latents))
        return self.to_images(F.silu(self.norm_out(x)))

    def to_images(self, features: Tensor) -> Tensor:
        """The last layer alone: features (B, channels, f h, f w), less by `patch`, to images (B, out_channels, f h, f w)."""
        images: Tensor = self.unfold(self.conv_out(features))
        return images


@dataclass(frozen=True)
class AutoencoderConfig:
    """The size of an encoder and its decoder.

    Attributes:
        channels: width of the level of full resolution.
        multipliers: width of each level in units of `channels`, highest resolution first.
        num_res_blocks: residual blocks per level.
        num_mid_blocks: residual blocks at the lowest resolution (layout `simvq`; `vqgan` always has two).
        z_channels: width of the encoder's output and of the decoder's input.
        patch: side of the pixel squares that are folded into channels before the first level (1: none, as published).
            Saves the levels of full resolution, which are most of the cost of a small model (layout `simvq`).
        layout: `simvq`, the autoencoder of this module, or `vqgan`, that of `steadyvq.models.vqgan`.
        decoder_res_blocks: residual blocks per level of the decoder (layout `vqgan`; None: one more than in the encoder).
        attention: levels with attention, 0 the highest resolution (layout `vqgan`).
        mid_attention: attention at the lowest resolution (layout `vqgan`).
        groups: groups of every GroupNorm (None: 32, fewer where a width is small).
        projection: 1x1 convolutions before and after the quantizer (None: where z_channels is not the code size).
        adaptive: a group norm scaled by mean and spread of the latents before each level of the decoder, as in
            Open-MAGVIT2 (layout `simvq`).
        rectifier: residual blocks of a network that maps codes back to latents before the decoder (ReVQ; 0: none).
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    num_mid_blocks: int = 2
    z_channels: int = 128
    patch: int = 1
    layout: Literal["simvq", "vqgan"] = "simvq"
    decoder_res_blocks: int | None = None
    attention: tuple[int, ...] = ()
    mid_attention: bool = False
    groups: int | None = None
    projection: bool | None = None
    adaptive: bool = False
    rectifier: int = 0

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("channels", "num_res_blocks", "num_mid_blocks", "z_channels", "patch", "rectifier"):
            value, least = getattr(self, name), 0 if name in ("num_mid_blocks", "rectifier") else 1
            if not _is_count(value, least):
                raise ValueError(f"{name} is {value!r}, but it must be a whole number of at least {least}.")
        for name in ("decoder_res_blocks", "groups"):
            value = getattr(self, name)
            if value is not None and not _is_count(value, 1):
                raise ValueError(f"{name} is {value!r}, but it must be a whole number of at least 1, or null.")
        if not self.multipliers or not all(_is_count(multiplier, 1) for multiplier in self.multipliers):
            raise ValueError(
                f"multipliers is {self.multipliers!r}, but it must hold one whole number of at least 1 per level, "
                "such as (1, 2, 2, 4) for a downsampling of 8."
            )
        self._check_layout()

    def _check_layout(self) -> None:
        """Raise ValueError for settings that the layout does not have."""
        if self.layout not in _ONLY_OF_THE_OTHER:
            raise ValueError(f"layout is {self.layout!r}, but it must be one of {', '.join(_ONLY_OF_THE_OTHER)}.")
        for name, neutral in _ONLY_OF_THE_OTHER[self.layout].items():
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but the layout {self.layout!r} has no such part: leave it "
                    "out, or choose the other layout."
                )
        if not all(_is_count(level, 0) and level < len(self.multipliers) for level in self.attention):
            raise ValueError(
                f"attention is {self.attention!r}, but it must name levels, from 0 to {len(self.multipliers) - 1}."
            )

    @property
    def downsampling(self) -> int:
        """Image pixels per latent, along one side: patch * 2 ** (levels - 1)."""
        return self.patch * int(2 ** (len(self.multipliers) - 1))

    def build(self) -> tuple[Encoder | VqganEncoder, Decoder | VqganDecoder]:
        """Return a freshly initialised encoder and decoder of this size."""
        if self.layout == "vqgan":
            return self._build_vqgan()
        size = (self.channels, self.multipliers, self.num_res_blocks, self.num_mid_blocks, self.z_channels, self.patch)
        return Encoder(*size, groups=self.groups), Decoder(*size, groups=self.groups, adaptive=self.adaptive)

    def _build_vqgan(self) -> tuple[VqganEncoder, VqganDecoder]:
        more = {"attention": self.attention, "mid_attention": self.mid_attention, "groups": self.groups}
        up = self.num_res_blocks + 1 if self.decoder_res_blocks is None else self.decoder_res_blocks
        return (
            VqganEncoder(self.channels, self.multipliers, self.num_res_blocks, self.z_channels, **more),  # type: ignore[arg-type]
            VqganDecoder(self.channels, self.multipliers, up, self.z_channels, **more),  # type: ignore[arg-type]
        )


_ONLY_OF_THE_OTHER: dict[str, dict[str, object]] = {
    "simvq": {"decoder_res_blocks": None, "attention": (), "mid_attention": False},
    "vqgan": {"patch": 1, "adaptive": False},
}
"""By layout, the settings that only the other one has, and their neutral values."""


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


# simvq_f8 is the published size (128x128 images to 16x16 latents). The small ones are for 32x32 and 64x64 crops on a
# CPU: they spend their width where the resolution is full, which decides the reconstruction there, and forward and
# backward of small_f4 on 32 crops of 32x32 take less than a tenth of a second on one thread.
AUTOENCODERS: dict[str, AutoencoderConfig] = {
    "simvq_f8": AutoencoderConfig(),
    "small_f4": AutoencoderConfig(16, (1, 1, 2), num_res_blocks=1, num_mid_blocks=0, z_channels=32),
    "small_f8": AutoencoderConfig(16, (1, 1, 2, 2), num_res_blocks=1, num_mid_blocks=0, z_channels=32),
    "vqgan_f16": AutoencoderConfig(
        128, (1, 1, 2, 2, 4), z_channels=256, layout="vqgan", attention=(4,), mid_attention=True, projection=True
    ),
}


def autoencoder_config(name: str) -> AutoencoderConfig:
    """Return the named size; the names are the keys of `AUTOENCODERS`.

    Raises:
        ValueError: no size has this name.
    """
    if name not in AUTOENCODERS:
        nearest = difflib.get_close_matches(name, AUTOENCODERS, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"no autoencoder size is called {name!r}: the names are {', '.join(AUTOENCODERS)}.{hint}")
    return AUTOENCODERS[name]
