# SPDX-License-Identifier: Apache-2.0
"""Quantizers without a codebook: every feature is quantized by itself, and the codes are all combinations of levels.

A fixed `Grid` says where each feature changes level and what the levels stand for, so that a look-up costs O(N d) and no
table of K codes is ever needed. FSQ, LFQ and BSQ are grids with a map in front (`project`) and losses behind.

A level is found by comparing the latent with thresholds, not by rounding a computed number: comparisons are exact, so a
latent has the same token at every batch size, layout, device and autocast state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steadyvq.quantizers.assigning import AssigningQuantizer, check_indices
from steadyvq.quantizers.base import Assignment, alone, from_rows
from steadyvq.quantizers.compose import build_losses
from steadyvq.quantizers.losses import Loss
from steadyvq.quantizers.names import look_up

Order = Literal["little", "big"]
_ORDERS: dict[str, int] = {"little": 1, "big": -1}

# Entries of a materialised codebook: 2^30 float32 numbers are 4 GB.
_LARGEST_TABLE = 2**30


@dataclass(frozen=True)
class Grid:
    """The levels of every feature.

    Attributes:
        thresholds: Per feature, ascending: where a latent passes from one level to the next.
        values: Per feature: what the levels stand for, one more than thresholds.
        rounds_up: Whether a latent on a threshold belongs to the level above it.
        order: `little`: the first feature changes fastest in the index; `big`: the last one.
    """

    thresholds: Sequence[Sequence[float]]
    values: Sequence[Sequence[float]]
    rounds_up: bool = False
    order: Order = "little"

    @property
    def levels(self) -> list[int]:
        """Number of levels of each feature."""
        return [len(values) for values in self.values]

    def basis(self) -> list[int]:
        """What one level of each feature adds to the index."""
        steps = self.levels[:: _ORDERS[self.order]]
        return [math.prod(steps[:k]) for k in range(len(steps))][:: _ORDERS[self.order]]


class ScalarQuantizer(AssigningQuantizer):
    """Quantizes each feature by itself on a fixed grid.

    `assignment.table` is empty, (0, d): there is no table. `assignment.z` holds the latents where the codes live, that is,
    after `project`.

    Args:
        grid: The levels.
        losses: Losses by name.
        estimator: Name of the gradient estimator.
        temperature: tau of soft assignments, in units of the squared distance.
        channel_axis: The axis of the latents that holds the features.
        saved: Whether the grid is part of the state, because no argument of the method gives it.
    """

    places_codes = False
    thresholds: Tensor
    values: Tensor
    basis: Tensor
    levels: Tensor
    temperature: Tensor

    def __init__(
        self,
        grid: Grid,
        *,
        losses: Mapping[str, Loss] | None = None,
        estimator: str = "straight_through",
        temperature: float = 1.0,
        channel_axis: int = -1,
        saved: bool = False,
    ) -> None:
        look_up("order", grid.order, _ORDERS)
        num_codes = math.prod(grid.levels)
        super().__init__(num_codes, len(grid.levels), losses=losses, estimator=estimator, channel_axis=channel_axis)
        if num_codes >= 2**63:
            raise ValueError(
                f"{self.dim} features with {grid.levels[0]} and more levels make more than 2^63 codes, which int64 "
                "cannot number: use fewer features or levels"
            )
        if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature!r}, but soft assignments need a positive number")
        self.grid = grid
        most = max(grid.levels)
        thresholds = [[*row, *[math.inf] * (most - 1 - len(row))] for row in grid.thresholds]
        values = [[*row, *[0.0] * (most - len(row))] for row in grid.values]
        self.register_buffer("thresholds", torch.tensor(thresholds, dtype=torch.float32), persistent=saved)
        self.register_buffer("values", torch.tensor(values, dtype=torch.float32), persistent=saved)
        self.register_buffer("basis", torch.tensor(grid.basis()), persistent=False)
        self.register_buffer("levels", torch.tensor(grid.levels), persistent=False)
        self.register_buffer("temperature", torch.tensor(float(temperature)), persistent=False)

    def project(self, z: Tensor) -> Tensor:
        """Latents (N, d) in the space of the codes, differentiable; the gradient of z_q passes through it."""
        return z

    def _set_estimator(self, estimator: str | Callable[..., Any]) -> None:
        if estimator == "direct":
            raise ValueError(
                "estimator 'direct' hands the gradient of z_q to the codes, but the codes of a fixed grid do not move: "
                "leave it out"
            )
        super()._set_estimator(estimator)

    def _assign(self, latents: Tensor, mask: Tensor | None) -> Assignment:
        z, weight, num_valid = self._rows(latents, mask, self.values.dtype)
        digits = self._digits(z.detach())
        indices = (digits * self.basis).sum(-1)
        selected = self._vectors(digits)
        inner = self.project(z)
        distance = (inner.detach() - selected).square().sum(-1)
        if mask is not None:
            indices = torch.where(mask.reshape(-1), indices, -1)
        return Assignment(
            z=inner,
            table=selected.new_empty(0, self.dim),
            indices=indices,
            distance=distance,
            selected=selected,
            num_valid=num_valid,
            temperature=self.temperature,
            row_weight=weight,
            # Evaluation may run in one process alone, so it must not wait for the others.
            reduce=self.reduce if self.training else alone,
        )

    def _digits(self, z: Tensor) -> Tensor:
        """The level of every feature (N, d), int64; 0 where a feature is not a number."""
        by_feature = z.t().contiguous()
        passed = torch.searchsorted(self.thresholds, by_feature, right=self.grid.rounds_up).t()
        # Infinity may pass the padding of features with fewer levels.
        return torch.where(z.isnan(), 0, torch.minimum(passed, self.levels - 1))

    def _vectors(self, digits: Tensor) -> Tensor:
        """The codes (N, d) of levels (N, d)."""
        return self.values[torch.arange(self.dim, device=digits.device), digits]

    def decode(self, indices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """See `Quantizer.decode`; needs no table."""
        with torch.autocast(indices.device.type, enabled=False):
            check_indices(indices, self.num_codes)
            flat = indices.reshape(-1, 1).long()
            digits = flat.clamp_min(0) // self.basis % self.levels
            # A code that does not exist points outside the values, where an accelerator checks by itself.
            digits = torch.where(flat < self.num_codes, digits, self.values.shape[1])
            rows = torch.where(flat >= 0, self._vectors(digits), 0.0)
            return from_rows(rows, indices.shape, self.channel_axis).to(dtype or self.values.dtype)

    @torch.no_grad()
    def codebook(self) -> Tensor:
        """See `Quantizer.codebook`. Nothing else needs this table, and `decode` gives single codes.

        Raises:
            ValueError: It would have more than 2^30 entries.
        """
        if self.num_codes * self.dim > _LARGEST_TABLE:
            raise ValueError(
                f"the table of {self.num_codes} codes of {self.dim} features is too large to be written out: "
                "decode the indices you need"
            )
        return self.decode(torch.arange(self.num_codes, device=self.values.device)).movedim(self.channel_axis, -1)

    def init_from(
        self, latents: Tensor, mask: Tensor | None = None, *, method: str = "kmeans", seed: int | None = None
    ) -> None:
        """Refuses: the grid is fixed.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"init_from({method!r}) was called, but this quantizer has a fixed grid and no codes to place: leave it out "
            "(in a recipe: quantizer.init: none)"
        )

    @torch.no_grad()
    def bake(self) -> ScalarQuantizer:
        """See `Quantizer.bake`: the bare grid, with the same thresholds and values, which are part of its state."""
        baked = ScalarQuantizer(self.grid, channel_axis=self.channel_axis, saved=True)
        baked.to(self.values).load_state_dict({"thresholds": self.thresholds, "values": self.values})
        baked.spec = {
            "name": "baked_grid",
            "num_codes": self.num_codes,
            "dim": self.dim,
            "levels": self.grid.levels,
            "order": self.grid.order,
            "rounds_up": self.grid.rounds_up,
            "channel_axis": self.channel_axis,
        }
        return baked.train(self.training)


def read_options(
    defaults: Mapping[str, Any], overrides: Mapping[str, Any], losses: Mapping[str, Callable[..., Any]]
) -> dict[str, Any]:
    """The options of a method on a grid: `defaults` with `overrides`, its losses built.

    `seed` is taken and not used, for a grid draws nothing; every method takes one.

    Args:
        defaults: The method's own.
        overrides: As `build_quantizer` got them; entries of `losses` are merged one by one, None leaves one out.
        losses: Constructors of the losses that the method can have.

    Raises:
        ValueError: Unknown names, or values of the wrong kind.
    """
    given = {"losses": {}, "estimator": "straight_through", "channel_axis": -1, "seed": 0, **defaults}
    for name in overrides:
        look_up("option", name, given)
    built = build_losses(given["losses"], overrides.get("losses"), losses)
    given |= {**overrides, "losses": built}
    for name in ("channel_axis", "seed"):
        if not isinstance(given[name], int) or isinstance(given[name], bool):
            raise ValueError(f"{name} is {given[name]!r}, but it needs an integer")
    if not isinstance(given["estimator"], str):
        raise ValueError(f"estimator is {given['estimator']!r}, but it needs a name")
    del given["seed"]
    return given
