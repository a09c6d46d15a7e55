# SPDX-License-Identifier: Apache-2.0
"""Reductions of the softmax over codes, in blocks of latents: memory is two blocks of N x K scores plus the outputs."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from steadyvq.kernels import choice, native, triton

# Softmax weights below this are zero: e^-60.
_NEGLIGIBLE = 1e-26
_LOWEST = -60.0


def soft_statistics(
    z: Tensor,
    table: Tensor,
    indices: Tensor,
    temperature: Tensor | float,
    row_weight: Tensor | None = None,
    column_weight: Tensor | None = None,
    *,
    losers: bool = True,
    squared: bool = True,
    want_row_sum: bool = False,
    block_rows: int | None = None,
    compiled: bool | None = None,
) -> tuple[Tensor, ...]:
    """Same contract as `reference.soft_statistics`, in one pass over blocks of rows, in the working dtype.

    Distances are expanded (|z|^2 + |e|^2 - 2 z.e), so both inputs should be centred first. Weights below 1e-26 are zero.

    Args:
        z: (N, d) latents, float32 or float64.
        table: (K, d) codes, same dtype.
        indices: (N,) int64.
        temperature: tau > 0.
        row_weight: (N,) or None.
        column_weight: (K,) or None.
        losers: zero the winner's weight.
        squared: D is the squared distance, else the distance.
        want_row_sum: fill the last two outputs.
        block_rows: latents per block, chosen from K if None.
        compiled: whether the weights come from the compiled kernel (None: where there is one that pays).
    """
    row = torch.ones_like(z[:, 0]) if row_weight is None else row_weight.to(z.dtype)
    present = row != 0
    z = torch.where(present.unsqueeze(1), z, 0.0)
    kind = _kind(z, table, squared, compiled)
    sums = kind(z, table, temperature, want_row_sum)
    factor = torch.ones_like(sums.norms) if column_weight is None else column_weight.to(z.dtype)
    scaled = table * factor.unsqueeze(1) if want_row_sum else table
    rows = max(1, min(block_rows or _soft_rows(table), z.shape[0]))
    first, second = (z.new_empty(rows, table.shape[0] if needed else 0) for needed in (True, kind.buffers == 2))
    for top in range(0, z.shape[0], rows):
        block = slice(top, min(top + rows, z.shape[0]))
        buffers = first[: block.stop - top], second[: block.stop - top]
        weight, total = sums.add(block, row[block], indices[block], losers, *buffers)
        if want_row_sum:
            sums.row_mass[block] = (weight @ factor) / total
            sums.row_sum[block] = (weight @ scaled) / total.unsqueeze(1)
    return sums.outputs(present)


def chosen(
    z: Tensor,
    table: Tensor,
    indices: Tensor,
    temperature: Tensor | float,
    row_weight: Tensor | None = None,
    column_weight: Tensor | None = None,
    *,
    losers: bool = True,
    squared: bool = True,
    want_row_sum: bool = False,
) -> tuple[Tensor, ...]:
    """`soft_statistics` by the kernels that suit the device."""
    reduce = triton.soft_statistics if choice.uses_triton(z, table) else soft_statistics
    options = {"losers": losers, "squared": squared, "want_row_sum": want_row_sum}
    return reduce(z, table, indices, temperature, row_weight, column_weight, **options)


class Rows(NamedTuple):
    """A softmax over the columns of a block, not yet divided by its normaliser.

    Attributes:
        weight: (R, K) exp(l - m), zero below e^-60.
        largest: (R,) m.
        total: (R,) sum of the weights.
        moment: (R,) sum of weight times l - m.
    """

    weight: Tensor
    largest: Tensor
    total: Tensor
    moment: Tensor

    @property
    def entropy(self) -> Tensor:
        """(R,) entropy of each row."""
        return self.total.log() - self.moment / self.total

    @property
    def log_normaliser(self) -> Tensor:
        """(R,) log sum_j exp(l_j)."""
        return self.total.log() + self.largest


def softmax_rows(logits: Tensor) -> Rows:
    """The softmax of a block of logits (R, K), which may be overwritten; exp of what vanishes would be denormal, and slow."""
    rows, codes = logits.shape
    if choice.softmax_choice(rows, codes, 1, device=logits.device.type, dtype=logits.dtype).backend == "native":
        first = torch.zeros(rows, dtype=torch.int64)
        largest, top, rest, moment = native.softmax_rows(logits, first, False)
        return Rows(logits, largest, top + rest, moment)
    largest = logits.amax(1)
    shifted = logits.sub_(largest.unsqueeze(1)).clamp_(min=_LOWEST)
    weight = F.threshold(shifted.exp(), _NEGLIGIBLE, 0.0)
    return Rows(weight, largest, weight.sum(1), torch.linalg.vecdot(weight, shifted))


class _Sums(ABC):
    """The accumulated outputs of `soft_statistics`."""

    buffers = 2
    """Number of (R, K) buffers that a block of R latents needs."""

    def __init__(self, z: Tensor, table: Tensor, temperature: Tensor | float, want_row_sum: bool) -> None:
        self.z, self.table, self.temperature = z, table, temperature
        self.norms = torch.linalg.vector_norm(table, dim=1).square_()
        self.squares = torch.linalg.vecdot(z, z)
        self.lse, self.winner_mass, self.loser_mass, self.row_cost = (torch.zeros_like(z[:, 0]) for _ in range(4))
        kept = z.shape[0] if want_row_sum else 0
        self.row_mass, self.row_sum = z.new_zeros(kept), z.new_zeros(kept, z.shape[1])

    @abstractmethod
    def add(
        self, block: slice, row: Tensor, winner: Tensor, losers: bool, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adds a block of latents; writes to the buffers.

        Returns:
            weight: (R, K) gradient weights v times `total`.
            total: (R,) what they have yet to be divided by.
        """

    @abstractmethod
    def _columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """column_mass, gradient_mass, column_sum, column_cost."""

    def _split(self, block: slice, weight: Tensor, winner: Tensor, losers: bool) -> Tensor:
        """Notes the masses of winner and losers of a softmax (R, K), zeroes the winner if asked; returns what is left."""
        winner = winner.unsqueeze(1)
        top = weight.gather(1, winner)
        # The losers are added up by themselves: 1 - winner mass would lose them where the winner has nearly all of it.
        rest = weight.scatter_(1, winner, 0.0).sum(1)
        self.winner_mass[block], self.loser_mass[block] = top.squeeze(1), rest
        if losers:
            return rest
        weight.scatter_(1, winner, top)
        return rest + top.squeeze(1)

    def outputs(self, present: Tensor) -> tuple[Tensor, ...]:
        """The tuple of the contract; rows that are not present are zero."""
        rows = (self.lse, self.winner_mass, self.loser_mass, self.row_cost)
        last = (self.row_mass, self.row_sum)
        if self.row_mass.shape[0]:
            last = (self.row_mass * present, self.row_sum * present.unsqueeze(1))
        return (*(value * present for value in rows), *self._columns(), *last)


class _SquaredSums(_Sums):
    """Of squared distances: |z|^2 shifts a row's logits as a whole, and all sums over latents are one matrix product.

    With logits l_j = (2 z . e_j - |e_j|^2) / tau the weights are softmax(l), and sum_j w_j D_j = |z|^2 sum_j w_j - tau
    sum_j w_j l_j. Columns r and r |z|^2 beside r z give the sums of w and, with the rest of D_ij, of w D.
    """

    def __init__(self, z: Tensor, table: Tensor, temperature: Tensor | float, want_row_sum: bool) -> None:
        super().__init__(z, table, temperature, want_row_sum)
        # What makes logits of a latent and a one: the bias is a column of its own.
        self.right = table.new_empty(table.shape[0], table.shape[1] + 1)
        torch.mul(table, 2 / temperature, out=self.right[:, :-1])
        torch.div(self.norms, -temperature, out=self.right[:, -1])
        # Transposed, the product that adds a block to it reads the weights as they lie, which is a third quicker.
        self.columns = table.new_zeros(table.shape[1] + 2, table.shape[0])

    def add(
        self, block: slice, row: Tensor, winner: Tensor, losers: bool, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `_Sums.add`."""
        z, squares = self.z[block], self.squares[block]
        logits = torch.addmm(self.right[:, -1], z, self.right[:, :-1].t(), out=first)
        weight = torch.softmax(logits, 1, out=second)
        self.lse[block] = logits.amax(1) - weight.amax(1).log() - squares / self.temperature
        # Weights next to nothing would make the matrix products slow: their products are denormal numbers.
        F.threshold(weight, _NEGLIGIBLE, 0.0, inplace=True)
        mass = self._split(block, weight, winner, losers)
        expected = torch.linalg.vecdot(weight, logits)
        self.row_cost[block] = torch.clamp(squares * mass - self.temperature * expected, min=0.0)
        self._count(block, weight, row)
        return weight, torch.ones_like(row)

    def _count(self, block: slice, weight: Tensor, share: Tensor) -> None:
        """Adds weights (R, K), times a share of their row (R,), to the sums over latents."""
        extra = torch.stack([torch.ones_like(share), self.squares[block]], 1)
        counted = torch.cat([self.z[block], extra], 1) * share.unsqueeze(1)
        self.columns.addmm_(counted.t(), weight)

    def _columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        del self.right  # the logits are done with; what comes now takes its room
        total, mass, squares = self.columns[:-2].t().contiguous(), self.columns[-2], self.columns[-1]
        cost = squares + self.norms * mass - 2 * torch.linalg.vecdot(self.table, total)
        return mass.clone(), mass.clone(), total, cost.clamp_(min=0.0)


class _CompiledSums(_SquaredSums):
    """Weights and their sums over codes from a compiled pass over the logits, which are overwritten.

    The weights stay exp(l - m), m the largest logit of the row, and D_ij = D_m - tau (l_ij - m) with D_m = |z|^2 - tau m.
    """

    buffers = 1

    def __init__(self, z: Tensor, table: Tensor, temperature: Tensor | float, want_row_sum: bool) -> None:
        super().__init__(z, table, temperature, want_row_sum)
        # With the ones in the product, adding the bias is no pass of its own over the logits.
        self.left = torch.cat([z, torch.ones_like(z[:, :1])], 1)

    def add(
        self, block: slice, row: Tensor, winner: Tensor, losers: bool, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `_Sums.add`."""
        weight = torch.mm(self.left[block], self.right.t(), out=first)
        largest, top, rest, moment = native.softmax_rows(weight, winner, losers)
        total = rest + top
        nearest = (self.squares[block] - self.temperature * largest).clamp_(min=0.0)
        self.lse[block] = total.log() + largest - self.squares[block] / self.temperature
        self.winner_mass[block], self.loser_mass[block] = top / total, rest / total
        kept = rest if losers else total
        self.row_cost[block] = (kept * nearest - self.temperature * moment) / total
        self._count(block, weight, row / total)
        return weight, total


class _PlainSums(_Sums):
    """Of distances that are not squared, entry by entry."""

    def __init__(self, z: Tensor, table: Tensor, temperature: Tensor | float, want_row_sum: bool) -> None:
        super().__init__(z, table, temperature, want_row_sum)
        self.column_mass, self.gradient_mass, self.column_cost = (torch.zeros_like(self.norms) for _ in range(3))
        self.column_sum = torch.zeros_like(table.t(), memory_format=torch.contiguous_format)

    def add(
        self, block: slice, row: Tensor, winner: Tensor, losers: bool, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `_Sums.add`."""
        z = self.z[block]
        distance = torch.addmm(self.norms, z, self.table.t(), alpha=-2.0, out=first)
        distance.add_(self.squares[block].unsqueeze(1)).clamp_(min=0.0).sqrt_()
        torch.div(distance, -self.temperature, out=second)
        lowest = second.amax(1)
        weight = torch.softmax(second, 1)
        self.lse[block] = lowest - weight.amax(1).log()
        F.threshold(weight, _NEGLIGIBLE, 0.0, inplace=True)
        self._split(block, weight, winner, losers)
        self.column_mass.addmv_(weight.t(), row)
        # v = w / (2 D), 0 where D is 0, and the cost w D.
        cost = torch.mul(weight, distance, out=second)
        weight.div_(distance).mul_(0.5).masked_fill_(distance == 0, 0.0)
        self.row_cost[block] = cost.sum(1)
        self.column_cost.addmv_(cost.t(), row)
        self.gradient_mass.addmv_(weight.t(), row)
        self.column_sum.addmm_((z * row.unsqueeze(1)).t(), weight)
        return weight, torch.ones_like(row)

    def _columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.column_mass, self.gradient_mass, self.column_sum.t().contiguous(), self.column_cost


def _kind(z: Tensor, table: Tensor, squared: bool, compiled: bool | None) -> type[_Sums]:
    """How the sums of this problem are computed."""
    if not squared:
        return _PlainSums
    if compiled is None:
        size = z.shape[0], table.shape[0], z.shape[1]
        compiled = choice.softmax_choice(*size, device=z.device.type, dtype=z.dtype).backend == "native"
    return _CompiledSums if compiled else _SquaredSums


def _soft_rows(table: Tensor) -> int:
    """Latents per block: buffers of 4 MB in float32 on a CPU; more where 128 rows need it, up to 64 MB, and 64 rows always.

    Every block goes once over the sums of all codes, so that few rows make the sums the larger part of the work.
    """
    area, most = (1 << 20, 1 << 24) if table.device.type == "cpu" else (1 << 24, 1 << 28)
    codes = table.shape[0]
    return max(64, min(512, max(area // codes, min(128, most // codes))))
