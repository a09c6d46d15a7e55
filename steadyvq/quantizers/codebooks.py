# SPDX-License-Identifier: Apache-2.0
"""Codebooks: where the effective table of codes comes from.

A codebook's `forward()` is the one table (K, d) that look-up and decode both use. Its source is the `base`:

    free      E = base, a parameter that the losses train                      (VQ, NSVQ)
    frozen    E = base, a buffer that no gradient reaches                      (EMA, baked quantizers)
    linear    E = base W^T + b with a frozen base: every code moves with W     (SimVQ, arXiv 2411.02038)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from steadyvq.quantizers.base import WeightAverage


def uniform(num_codes: int, dim: int, generator: torch.Generator) -> Tensor:
    """U(-1/K, 1/K), the start of VQGAN's codebook; at large K every code lies next to the origin."""
    return torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes, generator=generator)


def normal(num_codes: int, dim: int, generator: torch.Generator) -> Tensor:
    """N(0, 1/d) per element: codes of norm about 1, the start of SimVQ's base."""
    return torch.empty(num_codes, dim).normal_(0, dim**-0.5, generator=generator)


def unit_normal(num_codes: int, dim: int, generator: torch.Generator) -> Tensor:
    """N(0, 1) per element, the start of torch.nn.Embedding: codes of norm about sqrt(d)."""
    return torch.randn(num_codes, dim, generator=generator)


INITS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "uniform": uniform,
    "normal": normal,
    "unit_normal": unit_normal,
}


class Codebook(nn.Module, ABC):
    """The source of the effective table.

    Attributes:
        base: The stored rows (K, d'), parameter or buffer.
        trainable: Whether a gradient reaches `base`, so that it wants a learning rate of its own.
        averaged_buffers: Names of buffers that change in training and so belong into a moving average of the weights.
    """

    base: Tensor
    trainable: bool = False
    averaged_buffers: tuple[str, ...] = ()

    @abstractmethod
    def forward(self) -> Tensor:
        """The effective table (K, d)."""

    @abstractmethod
    def set_rows_(self, rows: Tensor) -> None:
        """Makes `rows` (K, d) the effective table."""

    def copy_rows_(self, dst: Tensor, src: Tensor, noise: Tensor) -> None:
        """Sets the codes `dst` to copies of the codes `src` plus `noise` (n, d), given in the table's space."""
        with torch.no_grad():
            self.base[dst] = self.base[src] + noise.to(self.base)

    def forget_rows(self, rows: Tensor, optimizer: torch.optim.Optimizer | None, average: WeightAverage | None) -> None:
        """Resets what an optimiser and a moving average remember of rows that were just rewritten."""
        state = {} if optimizer is None else optimizer.state.get(self.base, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == self.base.shape:
                value[rows] = 0
        if average is not None:
            average.copy_rows(self.base, rows)


class FreeCodebook(Codebook):
    """E = base, a trainable parameter."""

    trainable = True

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.base = nn.Parameter(rows.clone())

    def forward(self) -> Tensor:
        """The parameter itself."""
        return self.base

    def set_rows_(self, rows: Tensor) -> None:
        """Overwrites the parameter."""
        with torch.no_grad():
            self.base.copy_(rows)


class FrozenCodebook(Codebook):
    """E = base, a buffer: maintenance may write it, no gradient does."""

    averaged_buffers = ("base",)

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("base", rows.clone())

    def forward(self) -> Tensor:
        """The buffer itself."""
        return self.base

    def set_rows_(self, rows: Tensor) -> None:
        """Overwrites the buffer."""
        self.base.copy_(rows)


class LinearCodebook(Codebook):
    """E = base W^T + b with a frozen base and trainable W (d, d), b (d).

    Every code moves with W, so codes without assignments follow the encoder too.

    Source: SimVQ, arXiv 2411.02038, section 4. W and b start as torch.nn.Linear does, as in the official code.
    """

    averaged_buffers = ("base",)

    def __init__(self, rows: Tensor, *, generator: torch.Generator, bias: bool = True) -> None:
        super().__init__()
        self.register_buffer("base", rows.clone())
        dim = rows.shape[1]
        bound = 1 / math.sqrt(dim)
        self.weight = nn.Parameter(torch.empty(dim, dim).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound, generator=generator)) if bias else None

    def forward(self) -> Tensor:
        """The transformed table."""
        return nn.functional.linear(self.base, self.weight, self.bias)

    def set_rows_(self, rows: Tensor) -> None:
        """Puts the rows into the base and makes the transform the identity."""
        with torch.no_grad():
            self.base.copy_(rows)
            self.weight.copy_(torch.eye(rows.shape[1]))
            if self.bias is not None:
                self.bias.zero_()

    def copy_rows_(self, dst: Tensor, src: Tensor, noise: Tensor) -> None:
        """Copies rows of the base; the noise is divided by W's root-mean-square gain to have its size in the table."""
        gain = self.weight.detach().square().sum().div(self.weight.shape[0]).sqrt().clamp_min(1e-6)
        super().copy_rows_(dst, src, noise / gain)


def _free(rows: Tensor, generator: torch.Generator) -> Codebook:
    return FreeCodebook(rows)


def _frozen(rows: Tensor, generator: torch.Generator) -> Codebook:
    return FrozenCodebook(rows)


def _linear(rows: Tensor, generator: torch.Generator) -> Codebook:
    return LinearCodebook(rows, generator=generator)


CODEBOOKS: dict[str, Callable[[Tensor, torch.Generator], Codebook]] = {
    "free": _free,
    "frozen": _frozen,
    "linear": _linear,
}
