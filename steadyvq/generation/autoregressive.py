# SPDX-License-Identifier: Apache-2.0
"""An autoregressive prior over token grids: transformers' Llama with a class prefix and rotary embeddings in two dimensions.

The model reads [class, t_0, ..., t_{n-2}] and predicts t_0, ..., t_{n-1}, row by row. It is LlamaGen's class-conditional model
(arXiv 2406.06525), with a head that starts at 0. As in LlamaGen's code the class is not rotated but has cos = sin = 0: every
query scores it 0, and it acts through its value alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steadyvq.generation.body import Rotary, TokenPrior, places_of
from steadyvq.generation.sampling import SamplingConfig, keyed_uniforms
from steadyvq.training.prior_config import PriorConfig


class AutoregressivePrior(TokenPrior):
    """A distribution over token grids, given a class.

    Args:
        config: Its size.
        vocabulary: K.
        grid: Height and width in tokens.
        num_classes: Classes; 0 for a prior that knows none.
    """

    def __init__(self, config: PriorConfig, vocabulary: int, grid: tuple[int, int], num_classes: int) -> None:
        size = config.chosen
        rotary = Rotary(places_of(grid), size.width // size.heads, config.rope_base, first=1)
        super().__init__(config, vocabulary, grid, num_classes, rotary)

    def read(
        self, tokens: Int[Tensor, "B L"], labels: Int[Tensor, "B"] | None, cache: Any = None
    ) -> Float[Tensor, "B M d"]:
        """Hidden states that predict what follows.

        Args:
            tokens: What was not read before (L may be 0).
            labels: The class, at the beginning of a grid; None where it lies in the cache.
            cache: Of `new_cache`, or None to read without.

        Returns:
            One state for each token, and one before them for the class.
        """
        parts = [] if labels is None else [self.classes(labels)[:, None]]
        return self.states(torch.cat([*parts, self.head.embed(tokens)], dim=1), cache)

    def forward(self, tokens: Int[Tensor, "B n"], labels: Int[Tensor, "B"]) -> Float[Tensor, "B n"]:
        """-log p of every token in nats, given the class and those before it."""
        return self.head.surprisal(self.read(tokens[:, :-1], labels), tokens)

    @torch.no_grad()
    def sample(
        self,
        labels: Int[Tensor, "B"],
        seed: int,
        numbers: Sequence[int],
        config: SamplingConfig,
        *,
        cached: bool = True,
    ) -> Int[Tensor, "B n"]:
        """Draws grids; see `sample_tokens`.

        Args:
            labels: The class of each.
            seed: Of the whole set.
            numbers: Number of each in the set.
            config: How they are drawn.
            cached: Keep keys and values. Without, all is read again for every token, which gives the same and takes longer.
        """
        digits = self.head.digits
        uniform = keyed_uniforms(self.num_tokens * digits, seed, numbers)
        classes = self.with_null(labels, config.guidance != 1)
        tokens = labels.new_zeros(len(labels), 0)
        cache = self.new_cache() if cached else None
        for place in range(self.num_tokens):
            begun = cached and place > 0
            new = (tokens[:, -1:] if begun else tokens).repeat(len(classes) // len(labels), 1)
            state = self.read(new, None if begun else classes, cache)[:, -1:]
            own = uniform[:, place * digits : (place + 1) * digits]
            tokens = torch.cat([tokens, self.choose(state, own, config, config.guidance)[0]], dim=1)
        return tokens
