# SPDX-License-Identifier: Apache-2.0
"""Training a diffusion prior over the latents of stored tokens, as a task of the loop."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from steadyvq.data.crops import uniforms
from steadyvq.generation.diffusion import DiffusionDrawing, DiffusionPrior, sample_latents, timed_scheduler
from steadyvq.generation.token_task import TokenTask
from steadyvq.models import Tokenizer
from steadyvq.training.diffusion_config import DiffusionConfig
from steadyvq.training.run import RunFolder
from steadyvq.training.strict import from_dict
from steadyvq.training.task import StepOutput

MEASURED = 1 << 14
"""Crops whose latents give mean and deviation of the channels, at most."""
_NOISE, _HELD_OUT = 6, 7
"""What numbers are drawn for: time and noise of a training sample, those of a held-out image."""


class DiffusionTask(TokenTask):
    """A diffusion prior on the latents, or the codes, of stored tokens."""

    kind = "diffusion"
    group = "diffusion"
    drawing = DiffusionDrawing
    watchable = frozenset({"loss"})
    best = ("prediction_error", "min")
    columns: ClassVar[Mapping[str, tuple[str, str]]] = {
        "prediction error": ("prediction_error", ".4f"),
        "held-out images": ("held_out_images", ".0f"),
    }
    prior: DiffusionPrior

    def check_tokens(self) -> None:
        """Latents must have been stored, if they are what is learnt."""
        if self.config.diffusion.space == "latents":
            self.tokens.read_latents([0])

    def make_prior(self) -> DiffusionPrior:
        """An untrained prior for these latents."""
        channels, height, width = self.vectors(np.zeros(1, np.int64)).shape[1:]
        return DiffusionPrior(self.config.diffusion, (channels, height, width), len(self.classes))

    def facts(self) -> dict[str, Any]:
        """The shape of the latents."""
        return {"shape": self.prior.shape}

    @staticmethod
    def build(facts: Mapping[str, Any]) -> DiffusionPrior:
        """The prior that was saved, without its weights."""
        config = from_dict(DiffusionConfig, facts["config"], "diffusion")
        channels, height, width = facts["shape"]
        return DiffusionPrior(config, (channels, height, width), facts["num_classes"])

    @staticmethod
    def check_drawing(model: DiffusionPrior, drawing: DiffusionDrawing) -> None:
        """The scheduler must fit what the prior predicts, and the steps its noise levels."""
        timed_scheduler(model.config, drawing)

    @staticmethod
    def draw(
        model: DiffusionPrior,
        labels: Int[Tensor, "B"],
        seed: int,
        numbers: Sequence[int],
        drawing: DiffusionDrawing,
        tokenizer: Tokenizer,
    ) -> Int[Tensor, "B ..."]:
        """Latents from noise, and the codes nearest to them."""
        return snap(tokenizer, sample_latents(model, labels, seed, numbers, drawing))

    def vectors(self, rows: NDArray[np.int64], views: NDArray[np.int64] | int = 0) -> Float[Tensor, "B d h w"]:
        """What is learnt of images, float32, not normalised."""
        if self.config.diffusion.space == "latents":
            return torch.from_numpy(self.tokens.read_latents(rows, views).astype(np.float32))
        grids = self.tokens.grids(self.tokens.read(rows, views))
        with torch.no_grad():
            return self.tokenizer.quantizer.decode(grids, dtype=torch.float32)

    def prepare(self) -> None:
        """Measures the channels over the training images, evenly chosen where there are very many."""
        crops = len(self.train_rows) * self.tokens.num_views
        chosen = np.arange(0, crops, max(1, -(-crops // MEASURED)))
        mean, deviation = channel_statistics(
            lambda part: self.vectors(self.train_rows[part // self.tokens.num_views], part % self.tokens.num_views),
            chosen,
        )
        self.prior.mean.copy_(mean[:, None, None])
        # A channel that never changes is left where it is.
        self.prior.deviation.copy_(deviation.where(deviation > 1e-8, 1.0)[:, None, None])

    def batch(self, epoch: int, positions: range) -> list[Tensor]:
        """Latents (B, d, h, w), classes, times in [0, 1) and noise, all functions of the position."""
        rows, views, labels = self.choose(epoch, positions)
        vectors = self.vectors(rows, views)
        keys = [(self.config.seed, epoch, position, _NOISE) for position in positions]
        return [vectors, labels, *_times_and_noise(keys, vectors.shape[1:])]

    def loss(self, objective: str, model: nn.Module, batch: Any, earlier: Mapping[str, StepOutput]) -> StepOutput:
        """Mean squared error of what is predicted (L_simple, arXiv 2006.11239, equation 14)."""
        latents, labels, where, noise = batch
        noisy, times, wanted = self.prior.noised(self.prior.normalise(latents), noise, where)
        loss = F.mse_loss(model(noisy, times, labels).float(), wanted)
        return StepOutput(loss, {"loss": loss.detach()})

    @torch.no_grad()
    def validate(self, step: int, run: RunFolder) -> Mapping[str, float]:
        """Error on held-out images in their first view, at times and with noise that are the same in every evaluation."""
        rows = self.held_out[: self.config.data.eval_crops]
        device = next(self.prior.parameters()).device
        total = 0.0
        for start in range(0, len(rows), self.config.batch_size):
            part = rows[start : start + self.config.batch_size]
            vectors = self.vectors(part)
            keys = [(self.config.seed, start + i, 0, _HELD_OUT) for i in range(len(part))]
            _, noise = _times_and_noise(keys, vectors.shape[1:])
            # Evenly over all times, so that few images already see all of them.
            where = (torch.arange(start, start + len(part)) + 0.5) / len(rows)
            clean = self.prior.normalise(vectors.to(device))
            noisy, times, wanted = self.prior.noised(clean, noise.to(device), where.to(device))
            error = (self.prior(noisy, times, self.labels(part).to(device)).float() - wanted).square()
            total += float(error.flatten(1).mean(1).double().sum())
        self.show(step, run)
        return {"prediction_error": total / len(rows), "held_out_images": float(len(rows))}


def snap(tokenizer: Tokenizer, latents: Float[Tensor, "B d h w"]) -> Int[Tensor, "B ..."]:
    """The tokens of latents, in the tokenizer's units, on the CPU."""
    weight = next(tokenizer.parameters())
    return tokenizer.quantizer.encode(latents.to(weight.device, weight.dtype)).cpu()


def _times_and_noise(keys: Sequence[tuple[int, int, int, int]], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Uniform times (B,) and standard normal noise (B, d, h, w), both float32, by the keys of the samples."""
    count = int(np.prod(shape))
    drawn = np.stack([uniforms(1 + 2 * count, *key) for key in keys])
    # Box and Muller's: the numbers that NumPy keeps stable between versions are uniform.
    radius = np.sqrt(-2 * np.log1p(-drawn[:, 1 : 1 + count]))
    noise = radius * np.cos(2 * np.pi * drawn[:, 1 + count :])
    # float32 must not round a time up to 1.
    where = np.minimum(drawn[:, 0].astype(np.float32), np.float32(1 - 2**-24))
    return torch.from_numpy(where), torch.from_numpy(noise.astype(np.float32)).reshape(-1, *shape)


def channel_statistics(
    read: Callable[[NDArray[np.int64]], Float[Tensor, "B d h w"]], chosen: NDArray[np.int64], batch: int = 256
) -> tuple[Float[Tensor, "d"], Float[Tensor, "d"]]:
    """Mean and deviation of each channel over some crops, read some at a time, in float64."""
    total = squares = torch.zeros((), dtype=torch.float64)
    count = 0
    for start in range(0, len(chosen), batch):
        values = read(chosen[start : start + batch]).double()
        total = total + values.sum((0, 2, 3))
        squares = squares + values.square().sum((0, 2, 3))
        count += values.numel() // values.shape[1]
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0).sqrt()
