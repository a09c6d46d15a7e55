# SPDX-License-Identifier: Apache-2.0
"""Codebooks: where the effective table of codes comes from.

A codebook's `forward()` is the one table (K, d) that look-up and decode both use. Its source is the `base`:

    free      E = base, a parameter that the losses train                      (VQ, NSVQ)
    frozen    E = base, a buffer that no gradient reaches                      (EMA, baked quantizers)
    linear    E = base W^T + b with a frozen base: every code moves with W     (SimVQ, arXiv 2411.02038)

A method may bring a table of its own (a `TransformedCodebook`); see methods/fvq.py and methods/transvq.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

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
        cannot_place: Why `set_rows_` cannot make given rows the table; empty if it can.
        cannot_copy: Why `copy_rows_` cannot make codes copies of others; empty if it can.
    """

    base: Tensor
    trainable: bool = False
    averaged_buffers: tuple[str, ...] = ()
    cannot_place: str = ""
    cannot_copy: str = ""

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


class _Kept(NamedTuple):
    """A table that was computed, and what it was computed from."""

    key: tuple[object, ...]
    sources: list[Tensor]
    table: Tensor
    version: int


class TransformedCodebook(Codebook):
    """A table that is computed from the base, at a price that is worth paying once.

    With a gradient to carry, and in training mode, every `forward()` computes it anew. In evaluation without gradients it
    is kept until a parameter or buffer changes, which its address and PyTorch's count of writes tell: loading, averaged
    weights, optimiser steps, replacement and `.to()` are all seen. `train()`, `eval()` and a forward with gradients drop it
    as well, because fused optimisers do not count their writes. What writes in evaluation through `.data` calls
    `forget_table()`. The kept table is no part of the state, of a copy or of a pickle.

    The transform runs in the precision of the base, also under autocast: a half-precision table has other neighbours.
    """

    _kept: _Kept | None = None

    @abstractmethod
    def transform(self) -> Tensor:
        """Computes the effective table (K, d)."""

    def forward(self) -> Tensor:
        """The effective table, kept or computed."""
        if torch.compiler.is_compiling():
            return self._computed()
        if self.training or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            self.forget_table()
            return self._computed()
        # A tensor made in inference mode could not be used outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            sources = [t.detach() for t in (*self.parameters(), *self.buffers())]
            key = _key(sources)
            kept = self._kept
            if kept is None or key is None or kept.key != key or kept.table._version != kept.version:
                table = self._computed()
                # The sources are held, so that no other tensor can take their addresses.
                self._kept = None if key is None else _Kept(key, sources, table, table._version)
                return table
            return kept.table

    def _computed(self) -> Tensor:
        with torch.autocast(self.base.device.type, enabled=False):
            return self.transform()

    def forget_table(self) -> None:
        """Drops the kept table."""
        self._kept = None

    def train(self, mode: bool = True) -> TransformedCodebook:
        """Sets the mode; the kept table is dropped."""
        self.forget_table()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TransformedCodebook:
        self.forget_table()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def _key(tensors: list[Tensor]) -> tuple[object, ...] | None:
    """What tells whether tensors have changed; None where that cannot be told.

    Tensors made in inference mode have no count of writes, and those of tracers and `torch.func` no memory.
    """
    try:
        return tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in tensors)
    except RuntimeError:
        return None


class LinearCodebook(TransformedCodebook):
    """E = base W^T + b with trainable W (d, d') and b (d) and a base (K, d') that is frozen or trained as well.

    Every code moves with W, so codes without assignments follow the encoder too.

    Source: SimVQ, arXiv 2411.02038, section 4. W and b start as torch.nn.Linear does, as in the official code.

    Args:
        rows: The base (K, d').
        generator: Of the start of W and b.
        bias: Whether there is a b.
        train_base: Whether a gradient reaches the base too.
        dim: d (None: d').
    """

    def __init__(
        self,
        rows: Tensor,
        generator: torch.Generator,
        *,
        bias: bool = True,
        train_base: bool = False,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        self.trainable = train_base
        if train_base:
            self.base = nn.Parameter(rows.clone())
        else:
            self.register_buffer("base", rows.clone())
            self.averaged_buffers = ("base",)
        inputs = rows.shape[1]
        outputs = inputs if dim is None else dim
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound, generator=generator)) if bias else None

    def transform(self) -> Tensor:
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


CODEBOOKS: dict[str, Callable[..., Codebook]] = {
    "free": _free,
    "frozen": _frozen,
    "linear": LinearCodebook,
}
