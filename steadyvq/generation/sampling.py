# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens from a prior: every sample is a function of its own key, whatever is drawn beside it.

Guidance (arXiv 2207.12598, in LlamaGen's form): logits = u + s (c - u), c given the class and u without; s = 1 is none.
A digit is drawn by inversion: the first whose cumulative probability exceeds a uniform number that belongs to (key, position).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steadyvq.data.crops import uniforms
from steadyvq.generation.priors import Drawing, PriorModel

_DRAWS = 3
"""In the key of the uniform numbers, so that they are not those of training."""


@dataclass(frozen=True)
class SamplingConfig(Drawing):
    """How tokens are drawn.

    Attributes:
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_k: Only so many likeliest codes (0: all).
        top_p: Only the likeliest codes that together have this probability.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not self.guidance >= 0:
            raise ValueError(
                f"temperature is {self.temperature}, top_k {self.top_k}, top_p {self.top_p} and guidance {self.guidance}, but "
                "temperature >= 0, top_k >= 0, 0 < top_p <= 1 and guidance >= 0 are needed"
            )


def keyed_uniforms(
    count: int, seed: int, numbers: Sequence[int], step: int = 0, purpose: int = _DRAWS
) -> Float[Tensor, "B n"]:
    """The uniform numbers of samples, float64 in [0, 1)."""
    return torch.stack([torch.from_numpy(uniforms(count, seed, number, step, purpose)) for number in numbers])


def probabilities(logits: Float[Tensor, "B K"], config: SamplingConfig) -> Float[Tensor, "B K"]:
    """What a digit is drawn from, in float64: temperature, then top-k, then top-p."""
    scores = logits.double()
    if config.temperature == 0:
        return torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
    scores = scores / config.temperature
    if 0 < config.top_k < scores.shape[1]:
        least = scores.topk(config.top_k, dim=1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    chances = scores.softmax(1)
    if config.top_p < 1:
        ordered, order = chances.sort(dim=1, descending=True, stable=True)
        # A code stays while those likelier than it have less than top_p; so the likeliest always does.
        gone = (ordered.cumsum(1) - ordered) >= config.top_p
        chances = chances.masked_fill(torch.zeros_like(gone).scatter(1, order, gone), 0.0)
    return chances


def draw(chances: Float[Tensor, "B K"], numbers: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """The first code whose cumulative probability exceeds a uniform number."""
    ends = chances.cumsum(1)
    found = (ends <= numbers.to(ends)[:, None] * ends[:, -1:]).sum(1)
    # Rounding may carry a number next to 1 past the last code that has any probability.
    last = chances.shape[1] - 1 - (chances > 0).int().flip(1).argmax(1)
    return torch.minimum(found, last)


def guided_logits(logits: Float[Tensor, "C K"], guidance: float) -> Float[Tensor, "B K"]:
    """u + s (c - u) in float64, with s = 1 the logits c themselves.

    Args:
        logits: c, and below them u.
        guidance: s.
    """
    given, without = logits.chunk(2)
    if guidance == 1:
        return given
    given, without = given.double(), without.double()
    # A digit of no token has -inf in both, and their difference is no number.
    return (without + guidance * (given - without)).where(given.isfinite(), given)


class Sampled(Protocol):
    """A prior whose tokens are drawn."""

    num_classes: int

    def sample(self, labels: Tensor, seed: int, numbers: Sequence[int], config: Any) -> Tensor:
        """See `sample_tokens`."""


def sample_tokens(
    prior: Sampled, labels: Int[Tensor, "B"], seed: int, numbers: Sequence[int], config: SamplingConfig | None = None
) -> Int[Tensor, "B n"]:
    """Draws the tokens of images.

    Args:
        prior: In evaluation mode. In float64 a sample does not depend on those beside it; in lower precisions rounding, which
            depends on the size of the batch, may now and then tip a draw.
        labels: The class of each; `prior.null` for none.
        seed: Of the whole set.
        numbers: Number of each in the set; (seed, number) is the key of a sample.
        config: How they are drawn.

    Raises:
        ValueError: Guidance was asked of a prior without classes.
    """
    config = config or SamplingConfig()
    if config.guidance != 1 and not prior.num_classes:
        raise ValueError(f"guidance is {config.guidance}, but this prior knows no classes: leave it at 1")
    return prior.sample(labels, seed, numbers, config)


def class_numbers(wanted: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The classes that a user names, by name or number.

    Raises:
        ValueError: There is none of that name.
    """
    known = {name: i for i, name in enumerate(classes)} | {str(i): i for i in range(len(classes))}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        shown = ", ".join(list(classes)[:8]) + (", ..." if len(classes) > 8 else "")
        raise ValueError(
            f"there is no class {unknown[0]!r}: the prior knows {len(classes)} ({shown}), by name or by number from 0"
        )
    return [known[name] for name in wanted]


def balanced_labels(prior: PriorModel, chosen: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """The class of each sample: the chosen ones in turn, of all if none is chosen; none where the prior knows none."""
    turn = list(chosen) or list(range(prior.num_classes)) or [prior.null]
    return torch.tensor(np.array(turn)[np.array(numbers) % len(turn)])
