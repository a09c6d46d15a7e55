# SPDX-License-Identifier: Apache-2.0
"""The noise of a forward: a pure function of (seed, number of updates, position of the latent, column).

A latent meets the same noise whatever the device, however a batch is cut into micro-batches and processes, however far it
is padded, and in a forward that is run again for activation checkpointing. Its position is the number of its sample in
the global batch, which `Quantizer.first_item` starts from, and its place within that sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steadyvq.kernels import hashing

ASSIGNMENT, ESTIMATOR, LOSS, MAINTENANCE = range(4)
"""Streams: what draws at the same position for different purposes draws independent numbers."""

_PLACES = 1 << 32


def positions(first_item: Tensor, items: int, per_item: int) -> Tensor:
    """(items * per_item,) int64: the positions of the latents of consecutive samples."""
    device = first_item.device
    item = (first_item + torch.arange(items, device=device)) * _PLACES
    return (item.unsqueeze(1) + torch.arange(per_item, device=device)).flatten()


@dataclass
class Noise:
    """Random numbers for a number of positions.

    Attributes:
        key: Hash of seed and number of updates (0-d int64).
        rows: The positions (N,), int64.
    """

    key: Tensor
    rows: Tensor

    @classmethod
    def at(cls, seed: int, updates: Tensor, rows: Tensor) -> Noise:
        """The noise between two updates."""
        start = torch.full((), seed, dtype=torch.int64, device=updates.device)
        return cls(hashing.combine(hashing.mix(start), updates), rows)

    def stream(self, stream: int) -> Tensor:
        """The key (0-d) of one purpose, for kernels that draw for themselves."""
        return hashing.combine(self.key, stream)

    def uniform(self, columns: int, stream: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Numbers in (0, 1), shape (positions, columns)."""
        return hashing.uniform(self.stream(stream), self.rows, self._columns(columns), dtype=dtype)

    def normal(self, columns: int, stream: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard normal numbers (positions, columns)."""
        return hashing.normal(self.stream(stream), self.rows, self._columns(columns), dtype=dtype)

    def gumbel(self, columns: int, stream: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard Gumbel numbers (positions, columns)."""
        return hashing.gumbel(self.stream(stream), self.rows, self._columns(columns), dtype=dtype)

    def _columns(self, count: int) -> Tensor:
        return torch.arange(count, device=self.rows.device)
