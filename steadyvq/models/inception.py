# SPDX-License-Identifier: Apache-2.0
"""The Inception network of the Frechet inception distance: Inception-v3 as it was trained in 2015, with 1008 classes.

Source: Szegedy et al., arXiv 1512.00567, in the form of the graph inception-2015-12-05 of TensorFlow. Names and shapes
of the weights are those of its published PyTorch file (pytorch-fid, release `fid_weights`), which follows
torchvision's names.

Differs from torchvision's Inception-v3 in two ways, which belong to the graph: average pooling divides by the number
of pixels inside the image, and the last block pools by the maximum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_FEATURES = 2048
NUM_CLASSES = 1008
_EPS = 1e-3


@dataclass(frozen=True)
class Step:
    """A convolution of a branch: name, output channels, kernel (height, width); a stride of 2 goes without padding."""

    name: str
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


Fork = tuple[Step, ...]
"""Convolutions of the same input; their outputs are stacked. Most forks have one."""
Branch = tuple[Fork, ...]


class Unit(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, padding: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, h, w)."""
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches side by side, and one that pools; their outputs are stacked in this order.

    Args:
        inputs: Channels.
        branches: Their convolutions.
        pool: `mean` or `max` over 3 x 3 pixels followed by a convolution, or `half`: the maximum with stride 2 alone.
        pooled: Output channels of the branch that pools.
    """

    def __init__(self, inputs: int, branches: Sequence[Branch], pool: str, pooled: int = 0) -> None:
        super().__init__()
        self.branches, self.pool = tuple(branches), pool
        self.outputs = inputs if pool == "half" else pooled
        for branch in self.branches:
            channels = inputs
            for fork in branch:
                for step in fork:
                    padding = (0, 0) if step.stride > 1 else (step.kernel[0] // 2, step.kernel[1] // 2)
                    self.add_module(step.name, Unit(channels, step.outputs, step.kernel, step.stride, padding))
                channels = sum(step.outputs for step in fork)
            self.outputs += channels
        if pool != "half":
            self.branch_pool = Unit(inputs, pooled, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, h, w)."""
        found = []
        for branch in self.branches:
            y = x
            for fork in branch:
                y = torch.cat([self.get_submodule(step.name)(y) for step in fork], 1)
            found.append(y)
        return torch.cat([*found, self._pooled(x)], 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "half":
            return F.max_pool2d(x, 3, 2)
        if self.pool == "max":
            y = F.max_pool2d(x, 3, 1, padding=1)
        else:
            y = F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
        out: Tensor = self.branch_pool(y)
        return out


def _branch(name: str, *steps: tuple[int, tuple[int, int]], last_stride: int = 1) -> Branch:
    """A chain of convolutions called name_1, name_2, ...; one alone is called by the name."""
    names = [f"{name}_{i}" for i in range(1, len(steps) + 1)] if len(steps) > 1 else [name]
    strides = [1] * (len(steps) - 1) + [last_stride]
    return tuple((Step(n, *step, stride),) for n, step, stride in zip(names, steps, strides, strict=True))


_POINT, _SQUARE, _FIVE, _ROW, _COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def _block_35(inputs: int, pooled: int) -> Block:
    double = _branch("branch3x3dbl", (64, _POINT), (96, _SQUARE), (96, _SQUARE))
    five = _branch("branch5x5", (48, _POINT), (64, _FIVE))
    return Block(inputs, (_branch("branch1x1", (64, _POINT)), five, double), "mean", pooled)


def _block_35_to_17(inputs: int) -> Block:
    double = _branch("branch3x3dbl", (64, _POINT), (96, _SQUARE), (96, _SQUARE), last_stride=2)
    return Block(inputs, (_branch("branch3x3", (384, _SQUARE), last_stride=2), double), "half")


def _block_17(inputs: int, width: int) -> Block:
    seven = _branch("branch7x7", (width, _POINT), (width, _ROW), (192, _COLUMN))
    middle = [(width, _COLUMN), (width, _ROW), (width, _COLUMN)]
    double = _branch("branch7x7dbl", (width, _POINT), *middle, (192, _ROW))
    return Block(inputs, (_branch("branch1x1", (192, _POINT)), seven, double), "mean", 192)


def _block_17_to_8(inputs: int) -> Block:
    three = _branch("branch3x3", (192, _POINT), (320, _SQUARE), last_stride=2)
    seven = _branch("branch7x7x3", (192, _POINT), (192, _ROW), (192, _COLUMN), (192, _SQUARE), last_stride=2)
    return Block(inputs, (three, seven), "half")


def _block_8(inputs: int, pool: str) -> Block:
    def fork(name: str) -> Fork:
        return Step(f"{name}a", 384, (1, 3)), Step(f"{name}b", 384, (3, 1))

    three = ((Step("branch3x3_1", 384),), fork("branch3x3_2"))
    double = ((Step("branch3x3dbl_1", 448),), (Step("branch3x3dbl_2", 384, _SQUARE),), fork("branch3x3dbl_3"))
    return Block(inputs, (_branch("branch1x1", (320, _POINT)), three, double), pool, 192)


class InceptionV3(nn.Module):
    """Images of 299 x 299 pixels in [-1, 1] to 2048 features: the mean over the 8 x 8 positions of the last block."""

    side = 299
    num_features = NUM_FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, _SQUARE, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, _SQUARE)
        self.Conv2d_2b_3x3 = Unit(32, 64, _SQUARE, padding=(1, 1))
        self.Conv2d_3b_1x1 = Unit(64, 80, _POINT)
        self.Conv2d_4a_3x3 = Unit(80, 192, _SQUARE)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(256, 64)
        self.Mixed_5d = _block_35(288, 64)
        self.Mixed_6a = _block_35_to_17(288)
        self.Mixed_6b = _block_17(768, 128)
        self.Mixed_6c = _block_17(768, 160)
        self.Mixed_6d = _block_17(768, 160)
        self.Mixed_6e = _block_17(768, 192)
        self.Mixed_7a = _block_17_to_8(768)
        self.Mixed_7b = _block_8(1280, "mean")
        self.Mixed_7c = _block_8(2048, "max")
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to features (B, 2048)."""
        # As pytorch-fid: bilinear without antialiasing.
        x = F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return torch.mean(x, (2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Scores of the classes (B, 1008)."""
        scores: Tensor = self.fc(features)
        return scores
