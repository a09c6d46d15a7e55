# SPDX-License-Identifier: Apache-2.0
"""Training crops of photographs that stay on disk, each photograph once per pass.

Order, crop, mirror and what stands in for an unreadable photograph are pure functions of (seed, epoch, index), so they
do not depend on the number of processes or workers, and a run goes on in the middle of an epoch.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from steadyvq.data.crops import CropRule, uniforms
from steadyvq.data.decode import to_float
from steadyvq.data.sources import ImageSource

_ORDER, _SUBSTITUTE = 1, 2
"""What numbers are drawn for; the crops themselves have 0 in this place of the key."""

SUBSTITUTES = 16
"""Photographs that are tried one after the other in place of an unreadable one."""


@dataclass
class Faults:
    """Photographs that could not be read.

    Attributes:
        replaced: Samples in whose place another photograph stood.
        reasons: Why, by name.
    """

    replaced: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, other: "Faults") -> None:
        """Takes those of another record in."""
        self.replaced += other.replaced
        self.reasons |= other.reasons


@dataclass
class Piece:
    """Consecutive crops of an epoch.

    Attributes:
        epoch: Which epoch.
        positions: Where in it, first and one behind the last.
        images: The crops, uint8 (B, 3, S, S).
        numbers: Which photograph each is of; where one could not be read, the one that stands in for it.
        faults: What could not be read.
        seconds: How long reading, decoding and cutting took.
    """

    epoch: int
    positions: tuple[int, int]
    images: UInt8[Tensor, "B 3 S S"]
    numbers: list[int]
    faults: Faults
    seconds: float


class StreamedCrops:
    """Square crops of photographs on disk; epoch after epoch goes through all of them, in a new order each pass.

    The crops of all epochs are one long line, in which crop ``index`` of an epoch stands at ``epoch * length + index``.
    It is cut into passes of as many crops as there are photographs, and each pass is a permutation of them. So where an
    epoch is as long as there are photographs, it holds each exactly once.

    Args:
        source: The photographs, with ``min_side`` at least the crop size.
        rule: How they are cut.
        length: Crops per epoch.
        seed: Any integer.
    """

    def __init__(self, source: ImageSource, rule: CropRule, length: int, seed: int = 0) -> None:
        if rule.size < 1 or length < 1:
            raise ValueError(f"the crop size is {rule.size} and length {length}, but both need at least 1")
        if source.min_side < rule.size:
            raise ValueError(
                f"the photographs have min_side={source.min_side}, but the crop size is {rule.size}: open them with "
                f"min_side={rule.size}, which enlarges smaller ones"
            )
        self.source, self.rule, self.length, self.seed = source, rule, length, seed
        self._orders: dict[int, NDArray[np.int32]] = {}

    def __len__(self) -> int:
        return self.length

    def number(self, epoch: int, index: int) -> int:
        """Which photograph a crop is of, before any has turned out to be unreadable."""
        turn, place = divmod(epoch * self.length + index, len(self.source))
        return int(self._order(turn)[place])

    def _order(self, turn: int) -> NDArray[np.int32]:
        """The order of the photographs in a pass."""
        if turn not in self._orders:
            # An epoch may lie in two passes; what came before is not needed again.
            self._orders = {t: order for t, order in self._orders.items() if abs(t - turn) == 1}
            draws = uniforms(len(self.source), self.seed, turn, 0, _ORDER)
            self._orders[turn] = np.argsort(draws, kind="stable").astype(np.int32)
        return self._orders[turn]

    def keys(self, epoch: int, positions: range) -> list[tuple[int, int, int]]:
        """(epoch, index, photograph) of these crops, which is all that a worker needs to know."""
        return [(epoch, index, self.number(epoch, index)) for index in positions]

    def photograph(self, number: int, faults: Faults) -> tuple[UInt8[Tensor, "3 H W"], int]:
        """A decoded photograph, or the first readable one of those that stand in for it, and its number.

        Raises:
            ValueError: None of them can be read.
        """
        reasons: dict[str, str] = {}
        for candidate in chain([number], self._substitutes(number)):
            try:
                image = self.source.decode(candidate, planes=False)
            except ValueError as error:
                reasons[self.source.name(candidate)] = str(error)
                continue
            faults.add(Faults(bool(reasons), reasons))
            return image, candidate
        name, reason = next(iter(reasons.items()))
        raise ValueError(
            f"{name!r} of {self.source.data!r} cannot be read ({reason}), and neither can {SUBSTITUTES} others in its "
            "place: check the files, or the shards with `steadyvq data verify`"
        )

    def _substitutes(self, number: int) -> Iterator[int]:
        draws = uniforms(SUBSTITUTES, self.seed, number, 0, _SUBSTITUTE)
        yield from (draws * len(self.source)).astype(np.int64).tolist()

    def piece(self, keys: Sequence[tuple[int, int, int]]) -> Piece:
        """The crops of these keys, which are consecutive ones of an epoch."""
        started, faults = time.perf_counter(), Faults()
        images, numbers = [], []
        for epoch, index, wanted in keys:
            image, number = self.photograph(wanted, faults)
            images.append(self.rule.cut(image, self.rule.draws(self.seed, epoch, index)))
            numbers.append(number)
        (epoch, first, _), seconds = keys[0], time.perf_counter() - started
        return Piece(epoch, (first, first + len(keys)), torch.stack(images), numbers, faults, seconds)

    def batch(self, epoch: int, start: int, size: int) -> Float[Tensor, "B 3 S S"]:
        """Return crops ``start`` to ``start + size - 1`` of an epoch as float32 in [-1, 1]."""
        return to_float(self.piece(self.keys(epoch, range(start, start + size))).images)

    def labels(self, numbers: Sequence[int]) -> Int[Tensor, "B"]:
        """The classes of photographs, as positions in ``source.classes``; -1 where there are none."""
        rows = self.source.rows[np.asarray(numbers, np.int64)]
        return torch.from_numpy(self.source.labels[rows].astype(np.int64))
