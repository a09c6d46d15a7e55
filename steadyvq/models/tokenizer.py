# SPDX-License-Identifier: Apache-2.0
"""The image tokenizer: encoder, quantizer, decoder.

tokenizer = Tokenizer.build(AutoencoderConfig(), steadyvq.build_quantizer("nsvq", num_codes=65536, dim=128, channel_axis=1))
indices = tokenizer.encode(images)          # (B, 3, H, W) in [-1, 1] -> (B, h, w)
images = tokenizer.decode(indices)          # and back, clamped to [-1, 1]
tokenizer.save_pretrained("folder"); Tokenizer.from_pretrained("folder")
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steadyvq.models.autoencoder import AutoencoderConfig, Decoder, Encoder
from steadyvq.quantizers.base import Quantized, Quantizer

FORMAT = "steadyvq-tokenizer-1"


class Tokenizer(nn.Module):
    """An image tokenizer.

    Args:
        encoder: Images (B, 3, H, W) to features (B, z_channels, h, w).
        decoder: Features back to images.
        quantizer: A quantizer with channel_axis=1.
        pre_quant: Features to latents of the quantizer's dim, where the widths differ.
        post_quant: Codes back to features.
        config: The sizes of encoder and decoder, needed for `save_pretrained`.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        quantizer: Quantizer,
        pre_quant: nn.Module | None = None,
        post_quant: nn.Module | None = None,
        config: AutoencoderConfig | None = None,
    ) -> None:
        super().__init__()
        if quantizer.channel_axis != 1:
            raise ValueError(
                f"the quantizer has channel_axis={quantizer.channel_axis}, but a Tokenizer quantizes (B, d, h, w): build "
                "it with channel_axis=1"
            )
        self.encoder, self.decoder, self.quantizer = encoder, decoder, quantizer
        self.pre_quant = pre_quant or nn.Identity()
        self.post_quant = post_quant or nn.Identity()
        self.config = config

    @classmethod
    def build(cls, config: AutoencoderConfig, quantizer: Quantizer) -> Tokenizer:
        """A new tokenizer of these sizes; 1x1 convolutions join the widths where z_channels is not the quantizer's dim."""
        encoder, decoder = config.build()
        pre: nn.Module | None = None
        post: nn.Module | None = None
        if config.z_channels != quantizer.dim:
            pre = nn.Conv2d(config.z_channels, quantizer.dim, 1)
            post = nn.Conv2d(quantizer.dim, config.z_channels, 1)
        return cls(encoder, decoder, quantizer, pre, post, config)

    def parts(self) -> dict[str, list[nn.Module]]:
        """What a training stage may freeze: everything before the quantizer is `encoder`, everything after `decoder`."""
        return {
            "encoder": [self.encoder, self.pre_quant],
            "decoder": [self.decoder, self.post_quant],
            "quantizer": [self.quantizer],
        }

    def latents(self, images: Tensor) -> Tensor:
        """The latents that are quantized, (B, d, h, w), of images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: H or W is no multiple of the downsampling.
        """
        factor = self.encoder.downsampling
        if images.dim() != 4 or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, but (B, 3, H, W) with H and W multiples of {factor} is needed: "
                "resize or crop them"
            )
        latents: Tensor = self.pre_quant(self.encoder(images))
        return latents

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstructions (B, 3, H, W), not clamped, and what the quantizer returned."""
        quantized: Quantized = self.quantizer(self.latents(images))
        return self._reconstruct(quantized.z_q), quantized

    def _reconstruct(self, z_q: Tensor) -> Tensor:
        image: Tensor = self.decoder(self.post_quant(z_q))
        return image

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Indices (B, h, w), int64, of images (B, 3, H, W) in [-1, 1]."""
        return self.quantizer.encode(self.latents(images))

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of indices (B, h, w)."""
        dtype = next(self.decoder.parameters()).dtype
        return self._reconstruct(self.quantizer.decode(indices, dtype=dtype)).clamp(-1, 1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.safetensors and config.json; an earlier tokenizer there is replaced file by file.

        Raises:
            ValueError: The tokenizer was built by hand, so that it cannot be described.
        """
        if self.config is None:
            raise ValueError("this tokenizer was built from parts: make it with Tokenizer.build to save it")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "format": FORMAT,
            "autoencoder": dataclasses.asdict(self.config),
            "quantizer": self.quantizer.spec,
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        _replace(folder / "model.safetensors", lambda path: save_file(tensors, path))
        text = json.dumps(description, indent=2) + "\n"
        _replace(folder / "config.json", lambda path: path.write_text(text))

    @classmethod
    def from_pretrained(cls, folder: str | Path, quantizer: Quantizer | None = None) -> Tokenizer:
        """Reads what `save_pretrained` wrote.

        Args:
            folder: The folder.
            quantizer: A quantizer of the saved shape; needed only where the saved one was not built by name.

        Raises:
            ValueError: The folder holds no such tokenizer, or the weights do not fit.
        """
        folder = Path(folder)
        description = _read_description(folder)
        config = AutoencoderConfig(**description["autoencoder"])
        tokenizer = cls.build(config, quantizer or _saved_quantizer(description, folder))
        try:
            weights = load_file(folder / "model.safetensors")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder}/model.safetensors cannot be read ({error}): save the tokenizer anew") from error
        _check_fit(tokenizer.state_dict(), weights, folder)
        tokenizer.load_state_dict(weights)
        return tokenizer


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        description = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds no saved tokenizer ({error}): give a folder of save_pretrained") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path} is no description of a steadyvq tokenizer: give a folder of save_pretrained")
    return description


def _saved_quantizer(description: Mapping[str, Any], folder: Path) -> Quantizer:
    # The registry stands above this module; it is needed here alone, to build what a file names.
    from steadyvq.quantizers import build_quantizer

    spec = dict(description["quantizer"] or {})
    name = spec.pop("name", None)
    if name is None or ".py:" in name:
        raise ValueError(
            f"the tokenizer in {folder} has a quantizer of its own ({name or 'built by hand'}): pass quantizer="
        )
    return build_quantizer(name, **spec)


def _check_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], folder: Path) -> None:
    wrong = sorted({*own} ^ {*weights})
    wrong += sorted(name for name in {*own} & {*weights} if own[name].shape != weights[name].shape)
    if wrong:
        raise ValueError(
            f"the weights in {folder} do not fit this tokenizer at {', '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}: load them with the quantizer they were saved with"
        )
