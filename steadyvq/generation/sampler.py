# SPDX-License-Identifier: Apache-2.0
"""Pictures from a prior, as files: sample i is a function of (seed, i), whoever draws it and whatever is drawn with it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from steadyvq.data.shards import read_json
from steadyvq.files import write_atomically, write_text
from steadyvq.generation.priors import Drawing, TrainedPrior
from steadyvq.generation.sampling import SamplingConfig, balanced_labels
from steadyvq.generation.shares import Share
from steadyvq.generation.tokens import refuse_other_tokenizer, tokenizer_hash
from steadyvq.metrics import to_uint8
from steadyvq.models import Tokenizer
from steadyvq.models.perceptual_weights import digest
from steadyvq.report import image_grid

PLAN, GRID = "samples.json", "grid.png"
IN_GRID = 64


@dataclass(frozen=True)
class SampleSettings:
    """What is drawn.

    Attributes:
        count: Pictures in all.
        seed: Of the set.
        classes: Numbers of the classes that take turns; all if there are none here.
        drawing: How tokens are drawn, of the prior's kind.
    """

    count: int
    seed: int = 0
    classes: tuple[int, ...] = ()
    drawing: Drawing = field(default_factory=SamplingConfig)


class Sampler:
    """Draws pictures into a folder, or goes on with it.

    Args:
        prior: Is converted to `dtype`.
        tokenizer: Decodes; on the CPU or the prior's device.
        name: What the tokenizer is called in messages.
        out: The folder.
        settings: What is drawn.
        batch: Pictures drawn together.
        share: The part of this process.
        dtype: In float64 the batch does not matter; see `sample_tokens`.
        device: Where the prior draws.

    Raises:
        ValueError: The tokenizer is another one than that of the prior's tokens, or the folder holds other samples.
    """

    def __init__(
        self,
        prior: TrainedPrior,
        tokenizer: Tokenizer,
        name: str,
        out: Path,
        settings: SampleSettings,
        *,
        batch: int = 64,
        share: Share | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if settings.count < 1 or batch < 1:
            raise ValueError(
                f"{settings.count} pictures in batches of {batch} were asked for, but each must be at least 1"
            )
        refuse_other_tokenizer(
            prior.tokenizer_hash,
            f"the tokens that the prior knows ({prior.tokenizer_name})",
            tokenizer_hash(tokenizer),
            name,
        )
        if settings.drawing.guidance != 1 and not prior.model.num_classes:
            raise ValueError(f"guidance is {settings.drawing.guidance}, but this prior knows no classes: leave it at 1")
        self.tokenizer, self.out, self.settings, self.batch = tokenizer, out, settings, batch
        prior.kind.check_drawing(prior.model, settings.drawing)
        self.kind, self.model = prior.kind, prior.model
        self._begin(digest(self.model.state_dict()))
        self.model.to(device, dtype)
        own = share or Share()
        groups = range(-(-settings.count // batch))
        # Whole batches are shared out; of a batch only the missing pictures are drawn.
        numbers = [i for g in own.of(len(groups)) for i in range(g * batch, min((g + 1) * batch, settings.count))]
        self.total = len(numbers)
        self.missing = [number for number in numbers if not self.path(number).is_file()]

    def _begin(self, weights: str) -> None:
        plan = {"format": "steadyvq-samples", "prior": weights, **json.loads(json.dumps(asdict(self.settings)))}
        path = self.out / PLAN
        if not path.is_file():
            if self.out.is_dir() and any(not entry.name.startswith(".") for entry in self.out.iterdir()):
                raise ValueError(f"{self.out} holds other files: give a new folder for the samples with --out")
            write_text(path, json.dumps(plan, indent=2) + "\n")
        found = read_json(path)
        unlike = [key for key in plan if key != "count" and found.get(key) != plan[key]]
        if unlike:
            raise ValueError(
                f"{self.out} holds samples that were drawn otherwise (differs in {', '.join(unlike)}): repeat the settings, or "
                "give another folder with --out"
            )
        if found["count"] < plan["count"]:
            # More of the same: those that are there stay what they are.
            write_text(path, json.dumps(plan, indent=2) + "\n")

    def path(self, number: int) -> Path:
        """The file of a picture."""
        return self.out / f"{number:06d}.png"

    def draw(self, tell: Callable[[int], object] = lambda count: None) -> bool:
        """Draws what is missing of this part; `tell` hears how many pictures are done.

        Returns:
            Whether all pictures of all parts are there; the grid is then written.
        """
        for start in range(0, len(self.missing), self.batch):
            numbers = self.missing[start : start + self.batch]
            for number, image in zip(numbers, self.images(numbers), strict=True):
                picture = Image.fromarray(image.permute(1, 2, 0).numpy())
                write_atomically(self.path(number), picture.save)
            tell(len(numbers))
        if not all(self.path(number).is_file() for number in range(self.settings.count)):
            return False
        shown = [np.asarray(Image.open(self.path(i))) for i in range(min(IN_GRID, self.settings.count))]
        write_atomically(self.out / GRID, image_grid(np.stack(shown).transpose(0, 3, 1, 2)).save)
        return True

    @torch.no_grad()
    def tokens(self, numbers: Sequence[int]) -> Tensor:
        """Tokens of pictures, as `Tokenizer.decode` takes them."""
        labels = balanced_labels(self.model, self.settings.classes, numbers)
        device = next(self.model.parameters()).device
        settings = self.settings
        drawn = self.kind.draw(self.model, labels.to(device), settings.seed, numbers, settings.drawing, self.tokenizer)
        return drawn.cpu()

    @torch.no_grad()
    def images(self, numbers: Sequence[int]) -> Tensor:
        """Pictures (B, 3, H, W) uint8."""
        grids = self.tokens(numbers)
        device = next(self.tokenizer.parameters()).device
        # One at a time, so that the decoder's rounding does not depend on the batch either.
        images = [self.tokenizer.decode(grid[None].to(device)).cpu() for grid in grids]
        return to_uint8(torch.cat(images))
