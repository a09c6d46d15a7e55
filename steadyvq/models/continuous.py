# SPDX-License-Identifier: Apache-2.0
"""Autoencoders without a quantizer, saved for `steadyvq transplant` to put one inside."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from steadyvq.models.autoencoder import AutoencoderConfig, Decoder, Encoder
from steadyvq.models.tokenizer import check_fit, write_folder
from steadyvq.models.vqgan import VqganDecoder, VqganEncoder


class Autoencoder(nn.Module):
    """An encoder and a decoder, freshly initialised.

    Args:
        config: Their size; with `projection` there are 1x1 convolutions between them, as around a tokenizer's quantizer.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = config.build()
        width = config.z_channels
        self.pre_quant, self.post_quant = (
            nn.Conv2d(width, width, 1) if config.projection else nn.Identity() for _ in range(2)
        )

    def latents(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to latents (B, z_channels, h, w)."""
        latents: Tensor = self.pre_quant(self.encoder(images))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents (B, z_channels, h, w) to images (B, 3, H, W), not clamped."""
        images: Tensor = self.decoder(self.post_quant(latents))
        return images

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct images (B, 3, H, W) without any quantisation."""
        return self.decode(self.latents(images))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write it into a folder, which is made if it is not there."""
        write_folder(folder := Path(folder), self.config, None, self.state_dict())
        return folder


def save_autoencoder(
    folder: str | os.PathLike[str],
    config: AutoencoderConfig,
    encoder: Encoder | VqganEncoder,
    decoder: Decoder | VqganDecoder,
) -> Path:
    """Write an encoder and a decoder of your own, without a quantizer, for `steadyvq transplant` to put one inside.

    Args:
        folder: is made if it is not there.
        config: the size that both were built with, `config.build()`.
        encoder: images to latents.
        decoder: latents to images.

    Raises:
        ValueError: the two are not of this size.
    """
    folder = Path(folder)
    parts = {"encoder": encoder, "decoder": decoder}
    with torch.device("meta"):
        sized = dict(zip(parts, config.build(), strict=True))
    state = _prefixed(parts)
    check_fit(_prefixed(sized), state, folder)
    write_folder(folder, config, None, state)
    return folder


def _prefixed(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}
