# SPDX-License-Identifier: Apache-2.0
"""A masked-token prior over token grids (MaskGIT): it predicts hidden tokens from the others, and draws many at once.

Training hides ceil(gamma(r) n) of n tokens, r uniform in [0, 1), gamma(r) = cos(pi r / 2), and minimises the mean of -log p
of the hidden tokens. Drawing begins with all tokens hidden; in step t of T a token is drawn for every hidden place, and the
ceil(gamma(t / T) n) least sure of them are hidden again:

    sureness = log p(token) + c (1 - t / T) G,    G a Gumbel number, c the choice temperature.

Source: MaskGIT, arXiv 2202.04200, section 3 (equation 1, the cosine schedule, iterative decoding); c = 4.5, and its fall to
0, as in the released code.
Differs from the source: the body is Llama's without a causal mask, its rotation in two dimensions beside the learned
positions; no label smoothing; classes can be hidden, for guidance (arXiv 2207.12598). Sureness is that of the guided
logits before temperature, top-k and top-p, so that it says something where the likeliest token is taken.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from steadyvq.generation.body import Rotary, TokenPrior, places_of
from steadyvq.generation.sampling import SamplingConfig, keyed_uniforms
from steadyvq.training.prior_config import PriorConfig

_DRAWS, _SURENESS = 6, 7
"""What uniform numbers are for, in their key."""


@dataclass(frozen=True)
class MaskedDrawing(SamplingConfig):
    """How tokens are drawn, many at once.

    Attributes:
        steps: T.
        choice_temperature: c, how much chance decides which tokens are hidden again.
    """

    steps: int = 8
    choice_temperature: float = 4.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not 0 <= self.choice_temperature < math.inf:
            raise ValueError(
                f"steps is {self.steps} and choice_temperature {self.choice_temperature}, but steps >= 1 and "
                "choice_temperature >= 0 are needed"
            )


def hidden_count(ratio: float, total: int) -> int:
    """How many of some tokens are hidden at r = ratio: ceil(cos(pi r / 2) total), at least one before the end."""
    # cos(pi / 3) is a little more than 1/2 in floating point, which must not hide one more.
    return 0 if ratio >= 1 else max(1, math.ceil(math.cos(math.pi * ratio / 2) * total - 1e-9))


def hidden_counts(steps: int, total: int) -> list[int]:
    """How many tokens are hidden after each step; every step uncovers at least one, so there may be fewer steps."""
    counts = [total]
    for step in range(1, steps + 1):
        counts.append(max(0, min(counts[-1] - 1, hidden_count(step / steps, total))))
        if not counts[-1]:
            break
    return counts[1:]


class MaskedPrior(TokenPrior):
    """Distributions of the hidden tokens of a grid, given the others and a class.

    Args:
        config: Its size.
        vocabulary: K.
        grid: Height and width in tokens.
        num_classes: Classes; 0 for a prior that knows none.
    """

    def __init__(self, config: PriorConfig, vocabulary: int, grid: tuple[int, int], num_classes: int) -> None:
        width = config.chosen.width
        rotary = Rotary(places_of(grid), width // config.chosen.heads, config.rope_base, first=1)
        super().__init__(config, vocabulary, grid, num_classes, rotary)
        self.places = nn.Embedding(self.num_tokens, width)
        self.mask = nn.Embedding(1, width)
        for table in (self.places, self.mask):
            nn.init.normal_(table.weight, std=0.02)

    def read(
        self, tokens: Int[Tensor, "B n"], hidden: Bool[Tensor, "B n"], labels: Int[Tensor, "B"]
    ) -> Float[Tensor, "B n d"]:
        """States that predict the tokens; those that are hidden are not looked at."""
        seen = self.head.embed(tokens.masked_fill(hidden, 0))
        inputs = torch.where(hidden[..., None], self.mask.weight[0], seen) + self.places.weight
        every = torch.ones(self.num_tokens + 1, self.num_tokens + 1, dtype=torch.bool, device=tokens.device)
        return self.states(torch.cat([self.classes(labels)[:, None], inputs], dim=1), seen=every)[:, 1:]

    def forward(
        self, tokens: Int[Tensor, "B n"], hidden: Bool[Tensor, "B n"], labels: Int[Tensor, "B"]
    ) -> Float[Tensor, "B n"]:
        """-log p of the hidden tokens in nats, given the others and the class; 0 for those that are not hidden."""
        surprisal = self.head.surprisal(self.read(tokens, hidden, labels), tokens)
        return surprisal.where(hidden, 0.0)

    @torch.no_grad()
    def sample(
        self, labels: Int[Tensor, "B"], seed: int, numbers: Sequence[int], config: SamplingConfig
    ) -> Int[Tensor, "B n"]:
        """Draws grids; see `sample_tokens`."""
        way = config if isinstance(config, MaskedDrawing) else MaskedDrawing(**asdict(config))
        counts = hidden_counts(way.steps, self.num_tokens)
        tokens = labels.new_zeros(len(labels), self.num_tokens)
        hidden = torch.ones_like(tokens, dtype=torch.bool)
        for step, count in enumerate(counts):
            drawn, log_p = self._drawn(tokens, hidden, labels, seed, numbers, way, step)
            tokens = torch.where(hidden, drawn, tokens)
            uniform = keyed_uniforms(self.num_tokens, seed, numbers, step, _SURENESS).to(log_p.device)
            gumbel = -(-uniform.log()).log()
            sureness = log_p.double() + way.choice_temperature * (1 - (step + 1) / len(counts)) * gumbel
            order = sureness.masked_fill(~hidden, math.inf).argsort(dim=1, stable=True)
            hidden = torch.zeros_like(hidden).scatter(1, order[:, :count], True)
        return tokens

    def _drawn(
        self,
        tokens: Tensor,
        hidden: Tensor,
        labels: Tensor,
        seed: int,
        numbers: Sequence[int],
        config: SamplingConfig,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """A token for every place and its log p, each (B, n)."""
        classes = self.with_null(labels, config.guidance != 1)
        copies = len(classes) // len(labels)
        states = self.read(tokens.repeat(copies, 1), hidden.repeat(copies, 1), classes)
        uniform = keyed_uniforms(self.num_tokens * self.head.digits, seed, numbers, step, _DRAWS)
        return self.choose(states, uniform, config, config.guidance)
