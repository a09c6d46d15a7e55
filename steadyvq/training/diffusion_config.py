# SPDX-License-Identifier: Apache-2.0
"""The settings of a diffusion prior over the latents of a tokenizer."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class UnetConfig:
    """A UNet as in DDPM, with attention on chosen levels.

    Attributes:
        widths: Channels by level, from the finest; every further one halves the grid.
        blocks: Residual blocks of a level.
        attention: Levels with attention, counted from 0, the finest.
        head_width: Channels of an attention head (None: one head of the whole width).
    """

    widths: tuple[int, ...] = (64, 128)
    blocks: int = 1
    attention: tuple[int, ...] = (0, 1)
    head_width: int | None = 32

    def __post_init__(self) -> None:
        heads = [self.widths[level] % (self.head_width or 1) for level in self.attention if level < len(self.widths)]
        if not self.widths or min((*self.widths, self.blocks, self.head_width or 1)) < 1:
            raise ValueError(
                "diffusion.unet.widths, blocks and head_width must be at least 1, and there must be a level"
            )
        if not all(0 <= level < len(self.widths) for level in self.attention):
            raise ValueError(
                f"diffusion.unet.attention is {list(self.attention)}, but the levels are 0 to {len(self.widths) - 1}"
            )
        if any(heads) or self.widths[-1] % (self.head_width or 1):
            raise ValueError(
                f"diffusion.unet.head_width is {self.head_width}, but the widths {list(self.widths)} of levels with attention, "
                "and the last, must be multiples of it"
            )


@dataclass(frozen=True)
class DitConfig:
    """A DiT (arXiv 2212.09748). Its XL has 28 layers, 16 heads and width 1152, B 12, 12 and 768.

    Attributes:
        layers: Blocks.
        heads: Attention heads.
        width: Of the hidden states.
        patch: Side of the squares of latents that become one token.
    """

    layers: int = 4
    heads: int = 4
    width: int = 128
    patch: int = 1

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.width, self.patch) < 1 or self.width % (2 * self.heads):
            raise ValueError(
                f"diffusion.dit has {self.layers} layers, {self.heads} heads, width {self.width} and patch {self.patch}, but "
                "each must be at least 1, and the width a multiple of twice the heads"
            )


@dataclass(frozen=True)
class DiffusionConfig:
    """A diffusion prior. The tokens are `data.source`.

    Attributes:
        network: `unet` or `dit`.
        unet: Its size, if that is the network.
        dit: Its size, if that is the network.
        space: What is denoised: `latents` before quantization, which `steadyvq tokenize --latents` stores, or `codes`, the
            vectors that the tokens stand for. Either way samples are quantized at the end.
        prediction: What the network gives: the noise (`epsilon`), `v` (arXiv 2202.00512), or the velocity of flow matching
            (`flow`), which has no schedule.
        schedule: Of the noise: `scaled_linear` (linear in the root of beta, as latent diffusion has it), `linear` or `cosine`.
        beta_start: First beta of the linear ones.
        beta_end: Last beta.
        times: Noise levels T.
        conditional: By class, which needs labels; null: where the tokens have classes.
        label_dropout: Share of training samples whose class is hidden, for classifier-free guidance.
        dropout: In the blocks of the network.
        weight_decay: Of AdamW, on matrices alone.
        shown: Pictures that are sampled at every evaluation (0: none).
    """

    network: Literal["unet", "dit"] = "unet"
    unet: UnetConfig = field(default_factory=UnetConfig)
    dit: DitConfig = field(default_factory=DitConfig)
    space: Literal["latents", "codes"] = "latents"
    prediction: Literal["epsilon", "v", "flow"] = "epsilon"
    schedule: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    times: int = 1000
    conditional: bool | None = None
    label_dropout: float = 0.1
    dropout: float = 0.0
    weight_decay: float = 0.0
    shown: int = 16

    def __post_init__(self) -> None:
        for name in ("label_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"diffusion.{name} is {getattr(self, name)}, but it is a share in [0, 1)")
        if not 0 < self.beta_start <= self.beta_end < 1 or self.times < 2:
            raise ValueError(
                f"diffusion.beta_start is {self.beta_start}, beta_end {self.beta_end} and times {self.times}, but "
                "0 < beta_start <= beta_end < 1 and at least 2 times are needed"
            )
        if self.weight_decay < 0 or self.shown < 0:
            raise ValueError("diffusion.weight_decay and shown must be at least 0")
