# SPDX-License-Identifier: Apache-2.0
"""Evaluation crops: a fixed, named and hashed set cut evenly from the photographs of one split."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from steadyvq.data.collection import Collection
from steadyvq.data.crops import check_crop, uniforms
from steadyvq.data.decode import resize, to_float


@dataclass(frozen=True)
class CropSource:
    """Where a crop comes from: the photograph's name and the box (left, top, right, bottom) in its own pixels."""

    photograph: str
    box: tuple[int, int, int, int]


class EvaluationCrops:
    """A deterministic set of crops, spread evenly over the photographs.

    Each photograph is shrunk by ``scale`` and cut by a centred grid into crops that do not overlap; a seeded choice
    of the cells is taken, the same number from every photograph as far as its cells reach. Only when all cells of all
    photographs are fewer than ``count``, further crops at other places of the same photographs follow, which overlap;
    and only when there are no such places left either, the set is smaller than ``count``.

    Args:
        collection: The photographs, normally ``load_collection(...).split("val")``, each at least ``crop_size`` wide
            and high.
        crop_size: Side of a crop in pixels.
        count: Number of crops wanted.
        seed: Chooses among the cells.
        scale: Factor by which the photographs are shrunk first (never below the crop size), at least 1.

    Attributes:
        images: The crops, uint8.
        sources: The photograph and box of each.
        overlapping: How many of them lie off the grid.
        skipped: (name, reason) of the photographs that could not be read.
        record: What a report must state: ``data``, ``split``, ``crop``, ``count``, ``photographs``, ``scale``,
            ``seed``, ``overlapping`` and ``hash``, the SHA-256 of the pixels.
    """

    def __init__(self, collection: Collection, crop_size: int, count: int, seed: int = 0, scale: float = 1.0) -> None:
        check_crop(collection, crop_size)
        if count < 1:
            raise ValueError(f"count is {count}, but an evaluation needs at least 1 crop: pass count >= 1")
        if scale < 1.0:
            raise ValueError(f"scale is {scale}, but photographs are only shrunk: pass scale >= 1")
        self.crop_size, self.skipped = crop_size, collection.skipped
        shrunk = [_shrink(image, crop_size, scale) for image in collection.images]
        corners, self.overlapping = _choose(shrunk, crop_size, count, seed)
        crops: list[Tensor] = []
        self.sources: list[CropSource] = []
        for name, image, original, places in zip(collection.names, shrunk, collection.images, corners, strict=True):
            factor = original.shape[2] / image.shape[2]
            for top, left in places:
                crops.append(image[:, top : top + crop_size, left : left + crop_size])
                box = (left, top, left + crop_size, top + crop_size)
                self.sources.append(CropSource(name, _scaled(box, factor)))
        self.images: UInt8[Tensor, "N 3 S S"] = torch.stack(crops)
        self.record: dict[str, str | int | float] = {
            "data": collection.data,
            "split": collection.split_label,
            "crop": crop_size,
            "count": len(crops),
            "photographs": len({source.photograph for source in self.sources}),
            "scale": scale,
            "seed": seed,
            "overlapping": self.overlapping,
            "hash": hashlib.sha256(self.images.numpy().tobytes()).hexdigest(),
        }

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def photographs(self) -> list[str]:
        """The photograph of each crop, as intervals by photograph need it."""
        return [source.photograph for source in self.sources]

    def batches(self, size: int) -> Iterator[Float[Tensor, "B 3 S S"]]:
        """Yield the crops in order as float32 in [-1, 1], ``size`` at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield to_float(self.images[start : start + size])


def _shrink(image: Tensor, crop_size: int, scale: float) -> Tensor:
    height, width = image.shape[1:]
    factor = max(1.0 / scale, crop_size / min(height, width))
    return resize(image, max(crop_size, round(height * factor)), max(crop_size, round(width * factor)))


def _choose(images: Sequence[Tensor], crop: int, count: int, seed: int) -> tuple[list[list[tuple[int, int]]], int]:
    """Return the chosen (top, left) corners of every image and the number of them that lie off the grid."""
    grids = [_grid(image, crop) for image in images]
    places = [(image.shape[1] - crop + 1) * (image.shape[2] - crop + 1) for image in images]
    turn = np.argsort(uniforms(len(images), seed), kind="stable").tolist()
    on_grid = _quotas([len(grid) for grid in grids], count, turn)
    spare = [place - len(grid) for place, grid in zip(places, grids, strict=True)]
    off_grid = _quotas(spare, count - sum(on_grid), turn)
    corners = []
    for number, (image, grid) in enumerate(zip(images, grids, strict=True)):
        order = np.argsort(uniforms(len(grid), seed, 1 + number), kind="stable")
        chosen = sorted(grid[cell] for cell in order[: on_grid[number]])
        corners.append(chosen + _elsewhere(image, crop, grid, off_grid[number], seed, number))
    return corners, sum(off_grid)


def _grid(image: Tensor, crop: int) -> list[tuple[int, int]]:
    """Return the corners of a centred grid of cells that do not overlap."""
    tops, lefts = ([(side % crop) // 2 + crop * i for i in range(side // crop)] for side in image.shape[1:])
    return [(top, left) for top in tops for left in lefts]


def _quotas(capacities: Sequence[int], count: int, turn: Sequence[int]) -> list[int]:
    """Deal ``count`` out as evenly as the capacities allow; ``turn`` says who gets the remainder first."""
    dealt = [0] * len(capacities)
    while count > 0 and (open_to := [i for i in turn if dealt[i] < capacities[i]]):
        share = max(1, count // len(open_to))
        for i in open_to:
            given = min(share, capacities[i] - dealt[i], count)
            dealt[i] += given
            count -= given
    return dealt


def _elsewhere(
    image: Tensor, crop: int, grid: Sequence[tuple[int, int]], count: int, seed: int, number: int
) -> list[tuple[int, int]]:
    """Return ``count`` distinct corners that are not on the grid."""
    if not count:
        return []
    across = image.shape[2] - crop + 1
    places = (image.shape[1] - crop + 1) * across
    order = np.argsort(uniforms(places, seed, 1 + number, 1), kind="stable")
    taken = {top * across + left for top, left in grid}
    free = (int(place) for place in order if int(place) not in taken)
    return sorted(divmod(place, across) for place, _ in zip(free, range(count), strict=False))


def _scaled(box: tuple[int, int, int, int], factor: float) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(side * factor) for side in box)
    return left, top, right, bottom
