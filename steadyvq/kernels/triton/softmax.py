# SPDX-License-Identifier: Apache-2.0
"""Reductions of the softmax over codes on a graphics card: logits are computed once per pass and kept by none.

`reduce_rows` goes over the codes for blocks of latents (log-sum-exp and what else is summed over codes), `reduce_columns` over
the latents for blocks of codes (the gradient of the codes, whose weights are stop-gradient, so that nothing waits for a
backward), `pull_rows` over the codes once more if the latents get a gradient too. So the loss with its gradient of the codes is
three products of N x K x d and two exponentials per pair; nothing of size N x K is written, and every sum has one owner, so
there are no atomics and the same inputs give the same bits. Above d = 128 the logits are computed again for every 128 columns
of sums.

Products are in float32 made of three TF32 products by default: the error of the weights then keeps the bound of the
contract. `precision="tf32"` is three times as quick and gives weights to about 2^-10 |z| |e| / tau.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from steadyvq.kernels.triton.tiles import Tiles, block_of, capability_of, softmax_tiles

Precision = Literal["tf32x3", "tf32", "ieee"]


class Problem(NamedTuple):
    """What all passes read.

    Attributes:
        z: (N, d) latents; absent rows are zero.
        table: (K, d) codes.
        squares: (N,) squared lengths of the latents.
        norms: (K,) of the codes.
        winner: (N,) int64.
        row: (N,) row weights, 0 where absent.
        tau: 0-d.
        tiles: Of all passes.
        options: Constants of the kernels.
    """

    z: Tensor
    table: Tensor
    squares: Tensor
    norms: Tensor
    winner: Tensor
    row: Tensor
    tau: Tensor
    tiles: Tiles
    options: dict[str, Any]

    @property
    def columns(self) -> tuple[int, int]:
        """(columns of a block of sums, how many such blocks make d)."""
        width = block_of(self.z.shape[1], 128)
        return width, -(-self.z.shape[1] // width)


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
    precision: Precision = "tf32x3",
    tiles: Tiles | None = None,
) -> tuple[Tensor, ...]:
    """Same contract as `reference.soft_statistics`, in float32. Both inputs should be centred, as distances are expanded.

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        indices: (N,) int64.
        temperature: tau > 0.
        row_weight: (N,) or None.
        column_weight: (K,) or None.
        losers: Zero the winner's weight.
        squared: D is the squared distance, else the distance.
        want_row_sum: Fill the last two outputs.
        precision: How float32 products are made.
        tiles: Chosen from the card if None.
    """
    given = _problem(z, table, indices, temperature, row_weight, losers, squared, precision, tiles)
    rows, shift = _rows(given)
    columns = _columns(given, shift)
    if not want_row_sum:
        return (*rows, *columns, given.row.new_zeros(0), given.z.new_zeros(0, z.shape[1]))
    factor = torch.ones_like(given.norms) if column_weight is None else column_weight.float().contiguous()
    return (*rows, *columns, *_pulls(given, shift, factor))


def _problem(
    z: Tensor,
    table: Tensor,
    indices: Tensor,
    temperature: Tensor | float,
    row_weight: Tensor | None,
    losers: bool,
    squared: bool,
    precision: Precision,
    tiles: Tiles | None,
) -> Problem:
    row = torch.ones_like(z[:, 0], dtype=torch.float32) if row_weight is None else row_weight.float().contiguous()
    latents = torch.where((row != 0).unsqueeze(1), z.float(), 0.0).contiguous()
    codes = table.float().contiguous()
    tau = temperature if isinstance(temperature, Tensor) else torch.full((), temperature, device=z.device)
    tiles = tiles or softmax_tiles(capability_of(z.device))
    dim = z.shape[1]
    block = block_of(dim, 32)
    options = {
        "D": dim,
        "PADDED": -(-dim // block) * block,
        "ROWS": tiles.rows,
        "CODES": tiles.codes,
        "BLOCK": block,
        "LOSERS": losers,
        "SQUARED": squared,
        "PRECISION": precision,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    squares, norms = (torch.linalg.vecdot(rows, rows) for rows in (latents, codes))
    return Problem(latents, codes, squares, norms, indices.contiguous(), row, tau.float(), tiles, options)


def _rows(given: Problem) -> tuple[tuple[Tensor, ...], Tensor]:
    """((lse, winner_mass, loser_mass, row_cost), normaliser of the logits), each (N,)."""
    from steadyvq.kernels.triton import device_softmax as device

    count = given.z.shape[0]
    shift, *outputs = (torch.zeros_like(given.row) for _ in range(5))
    if count:
        device.reduce_rows[(-(-count // given.tiles.rows),)](
            given.z,
            given.table,
            given.squares,
            given.norms,
            given.winner,
            (given.row != 0).to(torch.int8),
            given.tau,
            shift,
            *outputs,
            count,
            given.table.shape[0],
            **given.options,
        )
    return tuple(outputs), shift


def _columns(given: Problem, shift: Tensor) -> tuple[Tensor, ...]:
    """(column_mass, gradient_mass, column_sum, column_cost)."""
    from steadyvq.kernels.triton import device_softmax as device

    mass, gradient, cost = (torch.zeros_like(given.norms) for _ in range(3))
    sums = torch.zeros_like(given.table)
    width, blocks = given.columns
    device.reduce_columns[(-(-given.table.shape[0] // given.tiles.codes), blocks)](
        given.z,
        given.table,
        given.squares,
        given.norms,
        given.winner,
        shift,
        given.row,
        given.tau,
        mass,
        gradient,
        cost,
        sums,
        given.z.shape[0],
        given.table.shape[0],
        OUT=width,
        **given.options,
    )
    return mass, gradient, sums, cost


def _pulls(given: Problem, shift: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """(row_mass, row_sum) with the factors of the codes."""
    from steadyvq.kernels.triton import device_softmax as device

    mass, sums = torch.zeros_like(given.row), torch.zeros_like(given.z)
    width, blocks = given.columns
    if given.z.shape[0]:
        device.pull_rows[(-(-given.z.shape[0] // given.tiles.rows), blocks)](
            given.z,
            given.table,
            given.squares,
            given.norms,
            given.winner,
            shift,
            (given.row != 0).to(torch.int8),
            factor,
            given.tau,
            mass,
            sums,
            given.z.shape[0],
            given.table.shape[0],
            OUT=width,
            **given.options,
        )
    return mass, sums
