# SPDX-License-Identifier: Apache-2.0
"""Training crops whose every choice is a pure function of (seed, epoch, index).

Nothing is drawn from a running stream, so a crop is the same in any process, with any number of workers, and after
a resume in the middle of an epoch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from steadyvq.data.collection import Collection
from steadyvq.data.decode import resize, to_float

FLAT_STD = 8.0
"""Crops whose grey values have a smaller standard deviation (of 255) count as flat: sky, walls, black borders."""

_RETRIES = 8
_WORD = (1 << 64) - 1


def uniforms(count: int, *key: int) -> NDArray[np.float64]:
    """Return ``count`` numbers in [0, 1) that depend on the key alone.

    The generator is counter based (Philox); only its raw words are used, which NumPy keeps stable between versions.

    Args:
        count: How many numbers.
        key: Up to four integers, such as (seed, epoch, index); each is taken modulo 2**64.
    """
    # An explicit type: NumPy turns lists with integers from 2**63 on into floats.
    words = np.array([part & _WORD for part in key] + [0] * (4 - len(key)), dtype=np.uint64)
    # The lowest counter word runs with the stream, so the key takes the two key words and the two upper counter words.
    philox = np.random.Philox(key=words[:2], counter=np.append(np.zeros(2, np.uint64), words[2:]))
    raw: NDArray[np.uint64] = philox.random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class CropRule:
    """How a photograph becomes a square crop, given the numbers that decide about it.

    Attributes:
        size: Side of a crop in pixels.
        scales: Smallest and largest side of the region that becomes a crop, in crop sides, at least 1. The side is
            log-uniform between them, limited by the photograph's shorter side.
        flip: Mirror half of the crops left to right.
        skip_flat: Redraw a nearly flat crop from the same photograph, up to 8 times, and keep the last.
    """

    size: int
    scales: tuple[float, float] = (1.0, 2.0)
    flip: bool = True
    skip_flat: bool = True

    def __post_init__(self) -> None:
        if not 1.0 <= self.scales[0] <= self.scales[1]:
            raise ValueError(
                f"scales is {self.scales}, but needs 1 <= smallest <= largest: pass for example (1.0, 2.0)"
            )

    @staticmethod
    def draws(seed: int, epoch: int, index: int) -> list[float]:
        """The numbers that decide about a crop: the photograph, the mirror, and three for each try at a region."""
        numbers: list[float] = uniforms(2 + 3 * (1 + _RETRIES), seed, epoch, index).tolist()
        return numbers

    def cut(self, image: UInt8[Tensor, "3 H W"], draws: list[float]) -> UInt8[Tensor, "3 S S"]:
        """Return the crop of a photograph whose shorter side is at least ``size``."""
        for attempt in range(1 + _RETRIES):
            region = self._region(image, *draws[2 + 3 * attempt : 5 + 3 * attempt])
            if not self.skip_flat or not is_flat(region):
                break
        if region.stride(2) != 1:
            # The channels lie side by side; rounding must not depend on it.
            region = region.contiguous()
        crop = resize(region, self.size, self.size)
        return crop.flip(2) if self.flip and draws[1] < 0.5 else crop

    def _region(self, image: Tensor, size: float, top: float, left: float) -> Tensor:
        """Cut the region that three numbers in [0, 1) choose."""
        height, width = image.shape[1:]
        largest = min(height, width, self.size * self.scales[1])
        smallest = min(largest, self.size * self.scales[0])
        side = max(self.size, int(smallest * (largest / smallest) ** size))
        y, x = int(top * (height - side + 1)), int(left * (width - side + 1))
        return image[:, y : y + side, x : x + side]


class CropDataset(Dataset[UInt8[Tensor, "3 S S"]]):
    """Square crops of a collection, every photograph with equal weight.

    ``dataset[index]`` is a crop of epoch 0 and ``dataset[epoch, index]`` of any epoch, so a sampler that yields pairs
    carries the epoch into worker processes without shared state.

    Args:
        collection: Photographs whose shorter side is at least ``crop_size``.
        crop_size: Side of a crop in pixels.
        length: Crops per epoch.
        seed: Any integer.
        scales: As in ``CropRule``, like the two that follow.
        flip: Mirror half of the crops.
        skip_flat: Redraw nearly flat crops.
    """

    def __init__(
        self,
        collection: Collection,
        crop_size: int,
        length: int,
        seed: int = 0,
        scales: tuple[float, float] = (1.0, 2.0),
        flip: bool = True,
        skip_flat: bool = True,
    ) -> None:
        check_crop(collection, crop_size)
        if length < 1:
            raise ValueError(f"length is {length}, but an epoch needs at least 1 crop: pass length >= 1")
        self.rule = CropRule(crop_size, scales, flip, skip_flat)
        self.collection = collection
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: int | tuple[int, int]) -> UInt8[Tensor, "3 S S"]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < self.length:
            raise IndexError(f"crop {index} of an epoch of {self.length}")
        return self.crop(epoch, index)

    def crop(self, epoch: int, index: int) -> UInt8[Tensor, "3 S S"]:
        """Return crop ``index`` of an epoch, values 0 to 255."""
        draws = self.rule.draws(self.seed, epoch, index)
        return self.rule.cut(self.collection.images[int(draws[0] * len(self.collection))], draws)

    def batch(self, epoch: int, start: int, size: int) -> Float[Tensor, "B 3 S S"]:
        """Return crops ``start`` to ``start + size - 1`` of an epoch as float32 in [-1, 1]."""
        return to_float(torch.stack([self.crop(epoch, index) for index in range(start, start + size)]))


def is_flat(image: UInt8[Tensor, "3 H W"]) -> bool:
    """Whether the standard deviation of the grey values (the mean of the channels) is below ``FLAT_STD``."""
    grey = image.sum(0, dtype=torch.int32).numpy()
    return float(grey.std()) < 3.0 * FLAT_STD


def check_crop(collection: Collection, crop_size: int) -> None:
    """Raise ``ValueError`` where a photograph is smaller than the crop, or the crop has no pixels."""
    if crop_size < 1:
        raise ValueError(f"the crop size is {crop_size}, but needs at least 1 pixel: pass a positive crop size")
    for name, image in zip(collection.names, collection.images, strict=True):
        if min(image.shape[1:]) < crop_size:
            raise ValueError(
                f"the photograph {name!r} is {image.shape[2]} x {image.shape[1]}, "
                f"but the crop size is {crop_size}: "
                f"load the collection with min_side={crop_size}, which enlarges it"
            )
