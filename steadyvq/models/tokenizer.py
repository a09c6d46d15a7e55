# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: encoder -> quantizer -> decoder, from images to a grid of integers and back.

    tokenizer = Tokenizer.build(autoencoder_config("small_f4"), quantizer)
    reconstruction, quantized = tokenizer(images)      # training: not clamped, with gradients
    indices = tokenizer.encode(images)                 # (B, h, w)
    images = tokenizer.decode(indices)                 # (B, 3, H, W) in [-1, 1]

A tokenizer receives its quantizer and never chooses one; `from_pretrained` alone rebuilds the one that a saved folder
names. A saved folder holds `model.safetensors` and `config.json` and nothing that runs code when it is read.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steadyvq.files import write_atomically, write_text
from steadyvq.models.autoencoder import AutoencoderConfig, Decoder, Encoder
from steadyvq.models.rectifier import Rectifier
from steadyvq.models.vqgan import VqganDecoder, VqganEncoder
from steadyvq.quantizers.base import Quantized, Quantizer

FORMAT = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_NAMES_IN_AN_ERROR = 4
_FIRST_SIZE_KEYS = {"channels", "multipliers", "num_res_blocks", "num_mid_blocks", "z_channels", "patch"}


class Tokenizer(nn.Module):
    """An encoder, a quantizer and a decoder.

    Args:
        encoder: images to latents (B, z_channels, h, w).
        decoder: latents (B, z_channels, h, w) to images.
        quantizer: takes latents with the features at axis 1.
        pre_quant: maps the encoder's output to the quantizer's dimension; identity if None.
        post_quant: maps codes to the decoder's input width; identity if None.
        rectifier: maps codes back to latents, before `post_quant`; identity if None.

    Attributes:
        config: the size that `build` was given; None for a tokenizer put together by hand, which cannot be saved
            with `save_pretrained`.

    Raises:
        ValueError: the quantizer's channel axis is not 1.
    """

    def __init__(
        self,
        encoder: Encoder | VqganEncoder,
        decoder: Decoder | VqganDecoder,
        quantizer: Quantizer,
        pre_quant: nn.Module | None = None,
        post_quant: nn.Module | None = None,
        rectifier: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if quantizer.channel_axis != 1:
            raise ValueError(
                f"quantizer has channel_axis={quantizer.channel_axis}, but a tokenizer's latents are (B, d, h, w): "
                "build it with channel_axis=1."
            )
        self.encoder = encoder
        self.decoder = decoder
        self.quantizer = quantizer
        self.pre_quant = nn.Identity() if pre_quant is None else pre_quant
        self.post_quant = nn.Identity() if post_quant is None else post_quant
        self.rectifier = nn.Identity() if rectifier is None else rectifier
        self.config: AutoencoderConfig | None = None

    @classmethod
    def build(cls, config: AutoencoderConfig, quantizer: Quantizer) -> "Tokenizer":
        """Return a freshly initialised tokenizer, with 1x1 convolutions where z_channels differs from the code size.

        `config.projection` asks for them in any case.

        Raises:
            ValueError: they are to be left out, but z_channels differs from the code size.
        """
        pre_quant = post_quant = None
        differs = config.z_channels != quantizer.dim
        if differs and config.projection is False:
            raise ValueError(
                f"projection is false, but z_channels is {config.z_channels} and the quantizer's dim {quantizer.dim}: "
                "make them equal, or leave projection out."
            )
        if differs or config.projection:
            pre_quant = nn.Conv2d(config.z_channels, quantizer.dim, 1)
            post_quant = nn.Conv2d(quantizer.dim, config.z_channels, 1)
        encoder, decoder = config.build()
        rectifier = None
        if config.rectifier:
            width = config.channels * config.multipliers[-1]
            rectifier = Rectifier(quantizer.dim, width, config.rectifier, config.groups)
        tokenizer = cls(encoder, decoder, quantizer, pre_quant, post_quant, rectifier)
        tokenizer.config = config
        return tokenizer

    @property
    def downsampling(self) -> int:
        """Image pixels per token, along one side."""
        return self.encoder.downsampling

    @property
    def index_rank(self) -> int:
        """Number of axes of what `encode` gives: 3, unless the quantizer gives a latent several indices."""
        return len(self.quantizer.index_shape((1, 1, 1)))

    def latents(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to latents (B, d, h, w), before quantization.

        Raises:
            ValueError: the images are not floats, not of rank 4, or their sides are no multiples of the downsampling.
        """
        self._check(images)
        latents: Tensor = self.pre_quant(self.encoder(images))
        return latents

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstruct images.

        Args:
            images: (B, 3, H, W) in [-1, 1], sides multiples of the downsampling.

        Returns:
            The reconstruction (B, 3, H, W), not clamped, and what the quantizer returned for the latents.
        """
        quantized: Quantized = self.quantizer(self.latents(images))
        return self.decoder(self.post_quant(self.rectifier(quantized.z_q))), quantized

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the indices, int64, of images (B, 3, H, W) in [-1, 1]; no gradient.

        They are (B, h, w), or what `quantizer.index_shape((B, h, w))` says where a latent has several.
        """
        return self.quantizer.encode(self.latents(images))

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Return the images (B, 3, H, W), clamped to [-1, 1], of indices as `encode` gives them; no gradient.

        Raises:
            ValueError: the indices are not of the rank that `encode` gives.
        """
        rank = self.index_rank
        if indices.dim() != rank:
            wanted = "grids (B, h, w)" if rank == 3 else f"indices of {rank} axes, as `encode` gives them"
            raise ValueError(f"indices have shape {tuple(indices.shape)}, but a tokenizer decodes {wanted}.")
        z_q = self.quantizer.decode(indices, dtype=self.decoder.conv_in.weight.dtype)
        image: Tensor = self.decoder(self.post_quant(self.rectifier(z_q)))
        return image.clamp(-1, 1)

    def parts(self) -> dict[str, list[nn.Module]]:
        """Return the modules by the names that training stages freeze; together they hold every parameter.

        `pre_quant` belongs to the encoder: tokens stay what they are only if it is frozen too.
        """
        return {
            "encoder": [self.encoder, self.pre_quant],
            "quantizer": [self.quantizer],
            "rectifier": [self.rectifier],
            "decoder": [self.decoder, self.post_quant],
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write `model.safetensors` and `config.json` into a folder, which is made if it is not there.

        Raises:
            ValueError: the tokenizer was not made by `build`, so its size is not known.
        """
        if self.config is None:
            raise ValueError(
                "this tokenizer was put together by hand, so its size cannot be written down: make it with "
                "Tokenizer.build, or save its state_dict."
            )
        write_folder(folder := Path(folder), self.config, self.quantizer.spec, self.state_dict())
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], quantizer: Quantizer | None = None) -> "Tokenizer":
        """Read what `save_pretrained` wrote, on the CPU, in evaluation mode.

        Args:
            folder: holds `model.safetensors` and `config.json`.
            quantizer: takes the weights of the saved quantizer; built from the saved specification if None.

        Raises:
            ValueError: a file is missing or unreadable, the quantizer is not one of this package's and none was given,
                or the weights do not fit.
        """
        folder = Path(folder)
        config = read_config(folder)
        if quantizer is None:
            quantizer = _build_quantizer(config.get("quantizer"), folder)
        tokenizer = cls.build(AutoencoderConfig(**config["autoencoder"]), quantizer)
        state = read_weights(folder)
        check_fit(tokenizer.state_dict(), state, folder)
        tokenizer.load_state_dict(state)
        return tokenizer.eval()

    def _check(self, images: Tensor) -> None:
        shape = tuple(images.shape)
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}, but a tokenizer takes floats in [-1, 1]: use x / 127.5 - 1.")
        channels = self.encoder.in_channels
        if images.dim() != 4 or shape[1] != channels:
            raise ValueError(f"images have shape {shape}, but a tokenizer takes (B, {channels}, H, W).")
        if shape[2] % self.downsampling or shape[3] % self.downsampling or 0 in shape[2:]:
            raise ValueError(
                f"images are {shape[2]}x{shape[3]}, but both sides must be multiples of the downsampling "
                f"{self.downsampling}: crop or resize them."
            )


def write_folder(
    folder: Path, size: AutoencoderConfig, quantizer: Mapping[str, Any] | None, state: Mapping[str, Tensor]
) -> None:
    """Writes `model.safetensors` and `config.json`; without a quantizer only `steadyvq transplant` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "autoencoder": asdict(size), "quantizer": quantizer}, indent=2) + "\n"
    # safetensors refuses tensors that share memory, which tied parameters do: each gets a copy of its own.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    write_atomically(folder / WEIGHTS_FILE, lambda path: _save_weights(copies, path))
    write_text(folder / CONFIG_FILE, text)


def _save_weights(state: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # A full disk among others: the caller of a write expects an OSError.
        raise OSError(f"the weights could not be written: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return what `config.json` of a saved tokenizer says.

    Raises:
        ValueError: a file is missing, or it is not what `save_pretrained` writes.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give a folder written by save_pretrained.")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: give a folder written by save_pretrained.")
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): save the tokenizer again.") from None
    if not isinstance(config, dict) or not isinstance(config.get("autoencoder"), dict):
        raise ValueError(f"{path} names no autoencoder: give a folder written by Tokenizer.save_pretrained.")
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {config.get('format')!r}, but this version of steadyvq reads format {FORMAT}: "
            "use the version that wrote it, or a newer one."
        )
    _check_size_keys(config["autoencoder"], path)
    return config


def _check_size_keys(size: Mapping[str, Any], path: Path) -> None:
    known = AutoencoderConfig.__dataclass_fields__
    # What a later version added has a default that means what there was before.
    wrong = sorted((set(size) - set(known)) | (_FIRST_SIZE_KEYS - set(size)))
    if wrong:
        raise ValueError(f"{path}: the autoencoder's keys must be {', '.join(known)}, but {wrong[0]!r} is not right.")


def _build_quantizer(spec: Any, folder: Path) -> Quantizer:
    """Build a registered quantizer; a method that lives in a user's file is never executed from here."""
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise ValueError(f"{folder / CONFIG_FILE} does not say how its quantizer was built: pass quantizer=...")
    own = next((name for name in _quantizer_names(spec) if ":" in name), None)
    if own is not None:
        raise ValueError(
            f"the quantizer of {folder} comes from the file {own!r}, which is not run when a tokenizer is "
            "read: build the quantizer yourself and pass quantizer=..."
        )
    # The library half of this package imports the methods only where one is asked for by name.
    from steadyvq.quantizers import build_quantizer

    quantizer: Quantizer = build_quantizer(**spec)
    return quantizer


def _quantizer_names(spec: Mapping[str, Any]) -> list[str]:
    """The method that a specification names, and those that it hands on to the layers inside."""
    names = [str(spec[key]) for key in ("name", "inner") if key in spec]
    parts = spec.get("parts")
    nested = [spec.get("inner_options"), *(parts if isinstance(parts, list) else [])]
    return names + [name for part in nested if isinstance(part, Mapping) for name in _quantizer_names(part)]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a saved tokenizer by name.

    Raises:
        ValueError: the file cannot be read.
    """
    path = folder / WEIGHTS_FILE
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): copy or save it again.") from None


def check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], folder: Path) -> None:
    """Raise ValueError unless names and shapes agree, naming the first few that do not."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if expected[name].shape != found[name].shape:
            problems.append(f"{name} is {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}")
    if problems:
        shown = "; ".join(sorted(problems)[:_NAMES_IN_AN_ERROR])
        more = f"; and {len(problems) - _NAMES_IN_AN_ERROR} more" if len(problems) > _NAMES_IN_AN_ERROR else ""
        raise ValueError(f"the weights in {folder} do not fit this tokenizer: {shown}{more}.")
