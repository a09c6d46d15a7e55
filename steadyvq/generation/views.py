# SPDX-License-Identifier: Apache-2.0
"""Views: the crops of a photograph whose tokens are stored.

    centre        the shorter side resized to the size, the centre square (as `steadyvq encode` and LlamaGen do it)
    ten-crop      the four corners and the centre of a square `crop_range` times larger, then the same mirrored
    random-N      N random crops, cut as training crops are
    flip          every view also mirrored, after all others (ten-crop has its mirrors already)

Views are joined by commas: `centre,flip` is what LlamaGen calls flip augmentation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from steadyvq.data import CropRule
from steadyvq.data.decode import centre_square

KNOWN = "centre, ten-crop, random-N (such as random-8), each with or without flip"


@dataclass(frozen=True)
class Views:
    """How a photograph becomes the crops that are tokenised.

    Attributes:
        text: Views as the user names them, joined by commas.
        size: Side of a crop in pixels.
        crop_range: Side of the square that ten-crop cuts, in crop sides.
        scales: Of random crops, as in ``CropRule``.
        seed: Of random crops.
    """

    text: str = "centre"
    size: int = 32
    crop_range: float = 1.1
    scales: tuple[float, float] = (1.0, 2.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"the size of a view is {self.size}, but it must be at least 1 pixel")
        if not 1 <= self.crop_range < 100:
            raise ValueError(f"the crop range is {self.crop_range}, but it is a factor of at least 1, such as 1.1")
        self._base()

    def _base(self) -> tuple[str, int]:
        """The kind of view and, of random crops, their number."""
        words = [word.strip() for word in self.text.split(",")]
        kinds = [word for word in words if word != "flip"] or ["centre"]
        name, _, number = kinds[0].partition("-")
        if len(kinds) > 1 or words.count("flip") > 1:
            raise ValueError(f"views are {self.text!r}, but one kind is stored at a time: use one of {KNOWN}")
        if kinds[0] in ("centre", "center", "ten-crop"):
            return kinds[0].replace("center", "centre"), 0
        if name == "random" and number.isdecimal() and int(number) > 0:
            return name, int(number)
        raise ValueError(f"there is no view {kinds[0]!r}: use {KNOWN}")

    @property
    def is_random(self) -> bool:
        """Whether the crops are cut as training crops are."""
        return self._base()[0] == "random"

    @property
    def names(self) -> list[str]:
        """One for each view, in the order they are stored in."""
        kind, number = self._base()
        if kind == "ten-crop":
            corners = ["top-left", "top-right", "bottom-left", "bottom-right", "centre"]
            return corners + [f"{name}-flip" for name in corners]
        plain = [kind] if kind == "centre" else [f"random-{i}" for i in range(number)]
        return plain + [f"{name}-flip" for name in plain] if self._flips else plain

    def __len__(self) -> int:
        return len(self.names)

    @property
    def _flips(self) -> bool:
        return "flip" in [word.strip() for word in self.text.split(",")]

    def cut(self, image: UInt8[Tensor, "3 H W"], number: int) -> UInt8[Tensor, "V 3 S S"]:
        """The views of a photograph.

        Args:
            image: Its pixels.
            number: Its place in the data set, which random crops depend on.
        """
        kind, _ = self._base()
        plain = {"centre": self._centre, "ten-crop": self._five, "random": self._random}[kind](image, number)
        mirrored = kind == "ten-crop" or self._flips
        return torch.stack([*plain, *(view.flip(2) for view in plain)] if mirrored else plain)

    def _centre(self, image: Tensor, number: int) -> list[Tensor]:
        return [centre_square(image, self.size)]

    def _five(self, image: Tensor, number: int) -> list[Tensor]:
        """Four corners and the centre, in torchvision's order."""
        size = self.size
        square = centre_square(image, int(size * self.crop_range))
        far = square.shape[1] - size
        middle = round(far / 2)
        places = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
        return [square[:, top : top + size, left : left + size] for top, left in places]

    def _random(self, image: Tensor, number: int) -> list[Tensor]:
        # Where every view is stored mirrored too, none needs to be mirrored by chance.
        rule = CropRule(self.size, self.scales, flip=not self._flips)
        cut: Callable[[int], Tensor] = lambda view: rule.cut(image, rule.draws(self.seed, view, number))  # noqa: E731
        return [cut(view) for view in range(self._base()[1])]
