# SPDX-License-Identifier: Apache-2.0
"""A discriminator on the features of a frozen DINO (arXiv 2104.14294), from a checkpoint file that the user has.

The file holds the state of the published vision transformer (`cls_token`, `pos_embed`, `patch_embed.proj.*`, `blocks.N.*`,
`norm.*`), bare or under `teacher`, with or without `backbone.` before the names, as .pth or .safetensors. Its sizes are read
from its shapes. A .pth file is read as tensors alone: nothing in it is run.
"""

import pickle
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from steadyvq.models.blocks import recomputed
from steadyvq.models.discriminator import Norm, normalisation, weights_path

HEAD_DIM = 64
"""Width of an attention head in every DINO."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_PREFIXES = ("module.", "backbone.")


def read_dino(weights: str | None) -> dict[str, Tensor]:
    """Return the tensors of a DINO checkpoint by their published names, in float32.

    Raises:
        ValueError: there is no such file, it cannot be read, or it is no vision transformer of this kind.
    """
    path = weights_path(weights)
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason}): download or copy it again") from error
    for key in ("teacher", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds {type(state).__name__} and no tensors by name: give the checkpoint of a DINO")
    tensors = {_bare(str(name)): value.float() for name, value in state.items() if isinstance(value, Tensor)}
    missing = [name for name in _needed(tensors) if name not in tensors]
    if missing:
        raise ValueError(
            f"{path} is no DINO vision transformer: {missing[0]} is missing ({len(missing)} names are): give a checkpoint "
            "such as dino_deitsmall16_pretrain.pth"
        )
    return tensors


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _depth(tensors: Mapping[str, Tensor]) -> int:
    return sum(name.startswith("blocks.") and name.endswith(".norm1.weight") for name in tensors)


def _needed(tensors: Mapping[str, Tensor]) -> list[str]:
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    for block in range(max(1, _depth(tensors))):
        names += [f"blocks.{block}.{layer}.{kind}" for layer in _BLOCK for kind in ("weight", "bias")]
    return names


class DinoFeatures(nn.Module):
    """A frozen vision transformer that returns what stands between its blocks.

    Its weights are buffers that are not saved: a checkpoint of a run does not carry them, the file does.

    Args:
        tensors: what `read_dino` returned.
        image_size: side of the images, a multiple of the patch.

    Raises:
        ValueError: the images do not divide into patches.
    """

    mean: Tensor
    std: Tensor
    recompute = False
    """Keep the tokens between blocks alone for backward."""

    def __init__(self, tensors: Mapping[str, Tensor], image_size: int) -> None:
        super().__init__()
        self.dim, _, self.patch, _ = tensors["patch_embed.proj.weight"].shape
        self.depth = _depth(tensors)
        if image_size % self.patch:
            raise ValueError(
                f"images are {image_size} pixels wide, but this DINO cuts them into patches of {self.patch}: use crops of "
                f"a multiple of {self.patch} pixels"
            )
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        for name in _needed(tensors):
            self.register_buffer(name.replace(".", "_"), tensors[name].clone(), persistent=False)
        self.pos_embed: Tensor = _positions(tensors["pos_embed"], image_size // self.patch)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (B, 3, S, S) in [-1, 1] to the tokens (B, 1 + n, dim) before the first and after every block."""
        x = ((images + 1) / 2 - self.mean) / self.std
        weight, bias = self._pair("patch_embed.proj")
        x = F.conv2d(x, weight, bias, stride=self.patch).flatten(2).movedim(1, 2)
        start = self._tensor("cls_token").expand(len(x), -1, -1)
        states = [torch.cat([start, x], 1) + self.pos_embed]
        for block in range(self.depth):
            name, before = f"blocks.{block}", states[-1]
            again = self.recompute and before.requires_grad
            states.append(recomputed(self._block, name, before) if again else self._block(name, before))
        return states

    def _block(self, name: str, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = F.linear(self._norm(f"{name}.norm1", x), *self._pair(f"{name}.attn.qkv"))
        query, key, value = qkv.reshape(batch, tokens, 3, dim // HEAD_DIM, HEAD_DIM).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).movedim(1, 2).reshape(batch, tokens, dim)
        x = x + F.linear(mixed, *self._pair(f"{name}.attn.proj"))
        hidden = F.gelu(F.linear(self._norm(f"{name}.norm2", x), *self._pair(f"{name}.mlp.fc1")))
        return x + F.linear(hidden, *self._pair(f"{name}.mlp.fc2"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), *self._pair(name), eps=1e-6)

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self, name.replace(".", "_"))
        return tensor


def _positions(embedding: Tensor, side: int) -> Tensor:
    """The embedding of positions for a grid of another size: bicubic between those of the checkpoint's grid."""
    first, grid = embedding[:, :1], embedding[:, 1:]
    own = round(grid.shape[1] ** 0.5)
    if own != side:
        grid = grid.reshape(1, own, own, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        grid = grid.flatten(2).movedim(1, 2)
    return torch.cat([first, grid], 1)


class _Head(nn.Module):
    """Tokens (B, dim, n) to logits (B, n): a 1x1 block, a residual block over 9 tokens, a 1x1 convolution."""

    def __init__(self, dim: int, norm: Norm) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(dim, dim, 1), normalisation(norm, dim, axes=1), nn.LeakyReLU(0.2))
        wide = nn.Conv1d(dim, dim, 9, padding=4, padding_mode="circular")
        self.second = nn.Sequential(wide, normalisation(norm, dim, axes=1), nn.LeakyReLU(0.2))
        self.last = nn.Conv1d(dim, 1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.first(tokens)
        x = (x + self.second(x)) * 0.5**0.5
        logits: Tensor = self.last(x)
        return logits.squeeze(1)


class DinoDiscriminator(nn.Module):
    """Heads on the tokens of a frozen DINO: on its input and after the blocks that end each quarter of it.

    Differs from the source: without augmentation of what it sees and without spectral norm; `norm` is that of one process.

    Args:
        image_size: side of the images, a multiple of DINO's patch; fewer than 9 patches are refused.
        weights: path of the checkpoint.
        norm: `batch` or `group` in the heads.

    Raises:
        ValueError: no weights are given, or they or the images do not fit.
    """

    def __init__(self, image_size: int, weights: str | None = None, norm: Norm = "batch") -> None:
        super().__init__()
        self.features = DinoFeatures(read_dino(weights), image_size)
        depth, grid = self.features.depth, image_size // self.features.patch
        if grid**2 < 9:
            raise ValueError(
                f"images are {image_size} pixels wide, {grid**2} patches of this DINO, but its heads look at 9 at a time: "
                f"use crops of at least {3 * self.features.patch} pixels"
            )
        self.taps = sorted({0, *(round(depth * quarter / 4) for quarter in range(1, 5))})
        self.heads = nn.ModuleList(_Head(self.features.dim, norm) for _ in self.taps)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, taps * patches)."""
        states = self.features(images)
        tokens = [states[tap][:, 1:].movedim(1, 2) for tap in self.taps]
        return torch.cat([head(own) for head, own in zip(self.heads, tokens, strict=True)], 1)
