# SPDX-License-Identifier: Apache-2.0
"""LPIPS: the perceptual distance of two images, as a loss with gradients and as a metric.

    d(x, y) = sum_l mean_hw sum_c w_lc (f_lc(x) / |f_l(x)| - f_lc(y) / |f_l(y)|)^2

f_l are the activations of five layers of a classifier (AlexNet or VGG16, trained on ImageNet), |.| is the length over channels
at one position, and w_l >= 0 are linear heads fitted to human judgements. `load_lpips` finds the weights of both.

Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (CVPR 2018, arXiv 1801.03924),
equation 1, in version 0.1 of the authors' code: images in [-1, 1] are shifted and scaled before the classifier, and 1e-10 is
added to the lengths. The dropout in front of the heads there acts in training of the heads alone; it is left out here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadyvq.models.blocks import recomputed

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""What version 0.1 does to images in [-1, 1]: (x - shift) / scale, per colour."""
EPS = 1e-10
_EXACT = ("fp32_precision", "ieee")


@dataclass(frozen=True)
class Convolution:
    """A convolution followed by a ReLU.

    Attributes:
        index: Its place in torchvision's `features`, which names its weights.
        inputs: Channels.
        outputs: Channels.
        kernel: Side of the kernel.
        stride: Step.
        padding: Zeros on each side.
    """

    index: int
    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True)
class Block:
    """Max-pooling (kernel, stride), or none, and the convolutions after it; the last one's activations are compared."""

    pool: tuple[int, int] | None
    convolutions: tuple[Convolution, ...]


@dataclass(frozen=True)
class Classifier:
    """The part of a classifier up to the last layer that is compared.

    Attributes:
        title: Its name in words.
        blocks: Five of them.
        smallest: The smallest side of an image that reaches the last layer, in pixels.
    """

    title: str
    blocks: tuple[Block, ...]
    smallest: int

    @property
    def convolutions(self) -> list[Convolution]:
        """All of them, in order."""
        return [convolution for block in self.blocks for convolution in block.convolutions]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all weights: `conv.INDEX.weight`, `conv.INDEX.bias` and `head.LAYER`."""
        found: dict[str, tuple[int, ...]] = {}
        for c in self.convolutions:
            found[f"conv.{c.index}.weight"] = (c.outputs, c.inputs, c.kernel, c.kernel)
            found[f"conv.{c.index}.bias"] = (c.outputs,)
        for layer, block in enumerate(self.blocks):
            found[f"head.{layer}"] = (block.convolutions[-1].outputs,)
        return found


def _vgg16() -> tuple[Block, ...]:
    blocks, index, inputs = [], 0, 3
    for number, (outputs, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        convolutions = []
        for _ in range(count):
            convolutions.append(Convolution(index, inputs, outputs))
            index, inputs = index + 2, outputs
        index += 1  # the pooling that follows
        blocks.append(Block((2, 2) if number else None, tuple(convolutions)))
    return tuple(blocks)


def _alexnet() -> tuple[Block, ...]:
    return (
        Block(None, (Convolution(0, 3, 64, kernel=11, stride=4, padding=2),)),
        Block((3, 2), (Convolution(3, 64, 192, kernel=5, padding=2),)),
        Block((3, 2), (Convolution(6, 192, 384),)),
        Block(None, (Convolution(8, 384, 256),)),
        Block(None, (Convolution(10, 256, 256),)),
    )


CLASSIFIERS = {"alex": Classifier("AlexNet", _alexnet(), 31), "vgg": Classifier("VGG16", _vgg16(), 16)}


class LPIPS(nn.Module):
    """The distance of two batches of images, differentiable by both.

    It is frozen: its weights are buffers, which no optimiser and no data-parallel wrapper sees, and which are not saved with a
    module that holds it. It computes in float32 whatever the autocast state, and stays float32 when a parent is cast to half
    precision (float64 is honoured).

    Args:
        net: `alex` or `vgg`.
        weights: By the names and shapes of `CLASSIFIERS[net].shapes`.
        weights_hash: SHA-256 of these weights, for records; see `load_lpips`.
    """

    shift: Tensor
    scale: Tensor
    recompute = False
    """Keep what enters and leaves the five blocks alone for backward."""

    def __init__(self, net: str, weights: Mapping[str, Tensor], weights_hash: str = "") -> None:
        super().__init__()
        self.net, self.weights_hash, self.classifier = net, weights_hash, CLASSIFIERS[net]
        for name, value in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(value).reshape(1, 3, 1, 1), persistent=False)
        for name in self.classifier.shapes:
            # The names of buffers have no dots.
            self.register_buffer(name.replace(".", "_"), weights[name].detach().clone(), persistent=False)
        self.eval()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The distance of each pair.

        Args:
            first: Images (B, 3, H, W) with values in [-1, 1], of any floating type.
            second: The same shape.

        Returns:
            (B,), 0 for identical images.

        Raises:
            ValueError: The images cannot be compared.
        """
        self._check(first, second)
        with torch.autocast(first.device.type, enabled=False), full_precision(first.device):
            a, b = (self._features(images) for images in (first, second))
            layers = [_compare(f, g, self._weight(f"head_{i}")) for i, (f, g) in enumerate(zip(a, b, strict=True))]
            return torch.stack(layers).sum(0)

    def _weight(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Activations of the five layers, each (B, C, h, w)."""
        x, found = (images.to(self.shift.dtype) - self.shift) / self.scale, []
        for block in self.classifier.blocks:
            again = self.recompute and x.requires_grad  # originals are constants, of which nothing is kept
            x = recomputed(self._block, block, x) if again else self._block(block, x)
            found.append(x)
        return found

    def _block(self, block: Block, x: Tensor) -> Tensor:
        if block.pool is not None:
            x = F.max_pool2d(x, *block.pool)
        # Once more, since backward may come here by itself.
        with full_precision(x.device):
            for c in block.convolutions:
                weight, bias = self._weight(f"conv_{c.index}_weight"), self._weight(f"conv_{c.index}_bias")
                x = F.relu(F.conv2d(x, weight, bias, c.stride, c.padding))
        return x

    def _check(self, first: Tensor, second: Tensor) -> None:
        if first.shape != second.shape or first.dim() != 4 or first.shape[1] != 3:
            raise ValueError(
                f"images have shapes {tuple(first.shape)} and {tuple(second.shape)}, but LPIPS compares two batches of one "
                "shape (B, 3, H, W)"
            )
        if not (first.is_floating_point() and second.is_floating_point()):
            raise ValueError(
                f"images have dtypes {first.dtype} and {second.dtype}, but LPIPS needs floats in [-1, 1]: convert them"
            )
        if min(first.shape[2:]) < self.classifier.smallest:
            raise ValueError(too_small(self.net, min(first.shape[2:])))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LPIPS":
        """Moves the weights, but never below float32."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.element_size() >= 4 else tensor.to(moved.device)

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """The network, for `print(model)`."""
        return f"net={self.net!r}"


def too_small(net: str, side: int) -> str:
    """Why images of this side cannot be compared, in one sentence."""
    classifier = CLASSIFIERS[net]
    return (
        f"images have a side of {side} pixels, but LPIPS with {classifier.title} needs {classifier.smallest} or more: compare "
        "larger images"
    )


def _compare(first: Tensor, second: Tensor, head: Tensor) -> Tensor:
    """(B,): squared differences of unit vectors, weighted over channels, mean over positions."""
    return (head.reshape(1, -1, 1, 1) * (_unit(first) - _unit(second)).square()).sum(1).mean((1, 2))


def _unit(features: Tensor) -> Tensor:
    squares = features.square().sum(1, keepdim=True)
    # A position where nothing is active has the gradient 0, not that of a root at 0; the value is the same.
    return features / (squares.clamp_min(torch.finfo(features.dtype).tiny).sqrt() + EPS)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Convolutions on a GPU round their inputs to 10 bits by default; inside this context they do not."""
    if device.type != "cuda":
        yield
        return
    # Newer versions of torch have a setting for convolutions, and refuse the older one where somebody has used it.
    setting: Any = getattr(torch.backends.cudnn, "conv", None)
    place, name, exact = (torch.backends.cudnn, "allow_tf32", False) if setting is None else (setting, *_EXACT)
    before = getattr(place, name)
    setattr(place, name, exact)
    try:
        yield
    finally:
        setattr(place, name, before)
