# SPDX-License-Identifier: Apache-2.0
"""Discriminators: images (B, 3, H, W) in [-1, 1] to logits (B, ...), high for photographs.

    patch     logits of overlapping patches (pix2pix, arXiv 1611.07004; as in VQGAN's code)
    stylegan  one logit for the whole image, residual blocks down to 4x4 (StyleGAN2, arXiv 1912.04958; as in LlamaGen's code)
    dino      heads on the features of a frozen DINO that the user has (StyleGAN-T, arXiv 2301.09515; as in VAR's code)

They hold no running statistics, since a discriminator is never evaluated: a forward changes nothing.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadyvq.models.blocks import Blocks, group_count

DISCRIMINATORS = ("patch", "stylegan", "dino")
Norm = Literal["batch", "group"]


def build_discriminator(name: str, image_size: int, **options: Any) -> nn.Module:
    """Return a freshly initialised discriminator.

    Args:
        name: one of `DISCRIMINATORS`.
        image_size: side of the images that it will see.
        options: arguments of its class beside the size.

    Raises:
        ValueError: there is no such discriminator, it does not have such an option, or it cannot see such images.
    """
    from steadyvq.models.dino import DinoDiscriminator

    kinds: dict[str, type[nn.Module]] = {
        "patch": PatchDiscriminator,
        "stylegan": StyleGanDiscriminator,
        "dino": DinoDiscriminator,
    }
    if name not in kinds:
        raise ValueError(f"no discriminator is called {name!r}: the names are {', '.join(DISCRIMINATORS)}")
    known = [key for key in kinds[name].__init__.__annotations__ if key not in ("image_size", "return")]
    wrong = next((key for key in options if key not in known), None)
    if wrong is not None:
        raise ValueError(f"the discriminator {name!r} has no option {wrong!r}: its options are {', '.join(known)}")
    return kinds[name](image_size=image_size, **options)


def normalisation(kind: str, channels: int, axes: int = 2) -> nn.Module:
    """Return a normalisation layer for features of this width.

    Args:
        kind: `batch` (statistics of the batch of one process, as published) or `group` (of each image by itself, so that the
            result does not depend on how a batch is cut).
        channels: width.
        axes: spatial axes of the features, 1 or 2.

    Raises:
        ValueError: there is no such kind.
    """
    if kind == "group":
        return nn.GroupNorm(group_count(channels), channels)
    if kind == "batch":
        batch = nn.BatchNorm2d if axes == 2 else nn.BatchNorm1d
        return batch(channels, track_running_stats=False)
    raise ValueError(f"norm is {kind!r}, but a discriminator normalises by 'batch' or by 'group'")


class PatchDiscriminator(nn.Module):
    """Convolutions 4x4: `layers` of stride 2, one of stride 1, and one to the logits; LeakyReLU 0.2 between them.

    Widths are `channels` times 1, 2, 4, 8, 8, ...; all but the first and the last layer are normalised and have no bias;
    weights start as N(0, 0.02), scales of norms as N(1, 0.02).

    Args:
        image_size: side of the images.
        channels: width of the first layer.
        layers: how often the resolution is halved; a logit sees 70 pixels for 3, 34 for 2.
        norm: `batch` or `group`, see `normalisation`.

    Raises:
        ValueError: the images are too small for so many layers.
    """

    def __init__(self, image_size: int, channels: int = 64, layers: int = 3, norm: Norm = "batch") -> None:
        super().__init__()
        if layers < 1 or channels < 1:
            raise ValueError(f"channels={channels} and layers={layers}, but a patch discriminator needs one of each")
        if image_size // 2**layers < 3:
            raise ValueError(
                f"images are {image_size} pixels wide, but a patch discriminator of {layers} layers needs at least "
                f"{3 * 2**layers}: use fewer layers or larger crops"
            )
        widths = [channels * min(2**level, 8) for level in range(layers + 1)]
        stages: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level, (before, width) in enumerate(pairwise(widths), 1):
            stride = 2 if level < layers else 1
            stages += [
                nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False),
                normalisation(norm, width),
                nn.LeakyReLU(0.2),
            ]
        stages.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        # Recomputed up to the next convolution: its input is all that is kept of the layers between.
        starts = [i for i, layer in enumerate(stages) if isinstance(layer, nn.Conv2d)]
        self.layers = Blocks(*stages, starts=starts)
        self.apply(_start_small)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the logits of patches (B, 1, h, w)."""
        logits: Tensor = self.layers(images)
        return logits


def _start_small(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class Blur(nn.Module):
    """The filter [1, 2, 1] x [1, 2, 1] / 16 on every channel, images continued by reflection."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", torch.outer(line, line)[None, None] / 16, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        channels = x.shape[1]
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.kernel.to(x.dtype).expand(channels, 1, 3, 3), groups=channels)


class _DownBlock(nn.Module):
    """Two 3x3 convolutions, then blur and a 3x3 convolution of stride 2; a 1x1 skip of stride 2; scaled by 1 / sqrt(2)."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(before, width, 1, stride=2)
        self.body = nn.Sequential(
            nn.Conv2d(before, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.down = nn.Sequential(Blur(), nn.Conv2d(width, width, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, before, h, w) to (B, width, h / 2, w / 2)."""
        out: Tensor = (self.down(self.body(x)) + self.skip(x)) * 0.5**0.5
        return out


class StyleGanDiscriminator(nn.Module):
    """Residual blocks from the image's resolution down to 4x4, then two linear layers to one logit.

    Widths are 512 up to 32x32, then 256, 128, 64 for each doubling, times `width`. Without minibatch statistics and
    equalised learning rates.

    Args:
        image_size: side of the images, a power of two.
        width: factor on all widths.

    Raises:
        ValueError: the size is no power of two of at least 8.
    """

    def __init__(self, image_size: int, width: float = 1.0) -> None:
        super().__init__()
        if image_size < 8 or image_size & (image_size - 1):
            raise ValueError(
                f"images are {image_size} pixels wide, but a StyleGAN discriminator halves them down to 4: use crops of 8, "
                "16, 32, 64, ... pixels, or another discriminator"
            )
        sizes = [image_size >> level for level in range(image_size.bit_length() - 2)]
        widths = [max(8, int(width * min(512, 512 * 32 // size))) for size in sizes]
        self.start = nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1), nn.LeakyReLU(0.2))
        self.blocks = Blocks(*(_DownBlock(a, b) for a, b in pairwise(widths)))
        last = widths[-1]
        self.end = nn.Sequential(nn.Conv2d(last, last, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten())
        self.logit = nn.Sequential(nn.Linear(last * 16, last), nn.LeakyReLU(0.2), nn.Linear(last, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, 1)."""
        logits: Tensor = self.logit(self.end(self.blocks(self.start(images))))
        return logits


def weights_path(weights: str | None) -> Path:
    """Return the file of a DINO's weights, or say what is needed."""
    if not weights:
        raise ValueError(
            "the discriminator 'dino' needs the weights of a DINO and none are given: put the path of a checkpoint, such as "
            "dino_deitsmall16_pretrain.pth, into its option `weights`, or choose 'patch' or 'stylegan'"
        )
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {path} with the weights of a DINO: give a .pth or .safetensors file")
    return path
