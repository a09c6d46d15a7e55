# SPDX-License-Identifier: Apache-2.0
"""Layers of codebook transforms, started from a generator of their own: the global random state is left alone."""

from __future__ import annotations

import math

import torch
from torch import nn


def linear(
    inputs: int, outputs: int, generator: torch.Generator, *, bias: bool = True, xavier: bool = False
) -> nn.Linear:
    """A linear layer that starts as torch.nn.Linear does, or (`xavier`) with Xavier's uniform weights and no bias."""
    layer: nn.Linear = nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(device="cpu")
    bound = math.sqrt(6 / (inputs + outputs)) if xavier else 1 / math.sqrt(inputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        if bias and xavier:
            layer.bias.zero_()
        elif bias:
            layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
