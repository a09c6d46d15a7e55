# SPDX-License-Identifier: Apache-2.0
"""A prior that draws an image scale after scale (VAR), over the tokens of the quantizer `multiscale`.

    p(r_1, ..., r_S) = prod_k p(r_k | r_1, ..., r_{k-1}),    r_k the grid (h_k, w_k) of the tokens of scale k

All tokens of a scale are drawn at once, each from its own distribution. The model reads, for every token of scale k + 1,
what the scales before it add up to at its place, area_{k+1}(f^_k), and for those of scale 1 the class. A position sees
all positions of its own scale and of coarser ones; what a finer one reads holds no token of its own scale.

Source: VAR, arXiv 2404.02905, equation 6 and algorithms 1 and 2; an embedding for every position and one for its scale, and
guidance that grows from none at the first scale to s at the last, as in the released code: s_k = 1 + (s - 1) (k - 1) / (S - 1).
Differs from the source: the body is Llama's. The class is read in the place of the first scale alone, with no
scaling of norms by it. Places are rotated in two dimensions, in units of the last grid.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from steadyvq.generation.body import Rotary, TokenPrior, places_of
from steadyvq.generation.sampling import SamplingConfig, keyed_uniforms
from steadyvq.quantizers.methods.multiscale import MultiScale
from steadyvq.training.prior_config import PriorConfig


def scale_places(scales: Sequence[tuple[int, int]]) -> Float[Tensor, "T 2"]:
    """(row, column) of the middle of every token, in tokens of the last scale, float64."""
    last = torch.tensor(scales[-1], dtype=torch.float64)
    return torch.cat([(places_of(scale) + 0.5) * last / torch.tensor(scale) - 0.5 for scale in scales])


def scale_mask(scales: Sequence[tuple[int, int]]) -> Bool[Tensor, "T T"]:
    """Which position sees which: those of its own scale and of coarser ones."""
    number = torch.cat([torch.full((h * w,), k) for k, (h, w) in enumerate(scales)])
    return number[:, None] >= number


class NextScalePrior(TokenPrior):
    """A distribution over the tokens of all scales of an image, given a class.

    Args:
        config: Its size.
        quantizer: Whose tokens they are; it is baked, does not learn, and is saved with the prior.
        num_classes: Classes; 0 for a prior that knows none.

    Raises:
        ValueError: The quantizer has scales that cannot be saved.
    """

    seen: Tensor
    scale_of: Tensor

    def __init__(self, config: PriorConfig, quantizer: MultiScale, num_classes: int) -> None:
        size, scales = config.chosen, quantizer.scales
        places = scale_places(scales)
        rotary = Rotary(places, size.width // size.heads, config.rope_base)
        super().__init__(config, quantizer.num_codes, (len(places),), num_classes, rotary, embeds=False)
        baked = quantizer.bake()
        if baked.spec is None or not isinstance(baked, MultiScale):
            raise ValueError(
                "the scales of this quantizer differ in more than their codes, so it cannot be saved with a prior: train a "
                "tokenizer whose scales are all of one method"
            )
        self.quantizer = baked
        self.project = nn.Linear(quantizer.dim, size.width)
        self.places = nn.Embedding(len(places), size.width)
        self.levels = nn.Embedding(len(scales), size.width)
        for table in (self.places, self.levels):
            nn.init.normal_(table.weight, std=0.02)
        self.register_buffer("seen", scale_mask(scales), persistent=False)
        numbers = torch.cat([torch.full((h * w,), k) for k, (h, w) in enumerate(scales)])
        self.register_buffer("scale_of", numbers, persistent=False)

    def span(self, scale: int) -> tuple[int, int]:
        """Where the tokens of a scale begin and end."""
        sizes = [h * w for h, w in self.quantizer.scales]
        return sum(sizes[:scale]), sum(sizes[: scale + 1])

    def read(
        self, tokens: Int[Tensor, "B L"], labels: Int[Tensor, "B"], cache: object = None
    ) -> Float[Tensor, "B M d"]:
        """States that predict the tokens of the first scales.

        Args:
            tokens: Those of all scales before the last of these.
            labels: The classes.
            cache: Of `new_cache`, which holds what was read for all scales before the last of these, and gets what is read
                for it; the states are those of this scale alone. None: the states of all of these scales.
        """
        with torch.no_grad():
            found = self.quantizer.following(tokens) if tokens.shape[1] else []
        first = self.classes(labels)[:, None].expand(-1, self.span(0)[1], -1)
        inputs = [first] + [self.project(part.flatten(1, 2).to(first.dtype)) for part in found]
        start, end = (0 if cache is None else self.span(len(found))[0]), self.span(len(found))[1]
        own = inputs[-1] if cache is not None else torch.cat(inputs, dim=1)
        own = own + self.places.weight[start:end] + self.levels(self.scale_of[start:end])
        return self.states(own, cache, self.seen[start:end, :end])

    def forward(self, tokens: Int[Tensor, "B T"], labels: Int[Tensor, "B"]) -> Float[Tensor, "B T"]:
        """-log p of every token in nats, given the class and the tokens of coarser scales."""
        last = self.span(len(self.quantizer.scales) - 1)[0]
        return self.head.surprisal(self.read(tokens[:, :last], labels), tokens)

    @torch.no_grad()
    def sample(
        self,
        labels: Int[Tensor, "B"],
        seed: int,
        numbers: Sequence[int],
        config: SamplingConfig,
        *,
        cached: bool = True,
    ) -> Int[Tensor, "B T"]:
        """Draws the tokens of all scales; see `sample_tokens`.

        Args:
            labels: The class of each.
            seed: Of the whole set.
            numbers: Number of each in the set.
            config: How they are drawn.
            cached: Keep keys and values. Without, all is read again for every scale, which gives the same and takes longer.
        """
        digits, scales = self.head.digits, len(self.quantizer.scales)
        uniform = keyed_uniforms(self.num_tokens * digits, seed, numbers)
        classes = self.with_null(labels, config.guidance != 1)
        tokens = labels.new_zeros(len(labels), 0)
        cache = self.new_cache() if cached else None
        for scale in range(scales):
            start, end = self.span(scale)
            states = self.read(tokens.repeat(len(classes) // len(labels), 1), classes, cache)[:, start - end :]
            guidance = 1 + (config.guidance - 1) * scale / max(1, scales - 1)
            drawn = self.choose(states, uniform[:, start * digits : end * digits], config, guidance)[0]
            tokens = torch.cat([tokens, drawn], dim=1)
        return tokens
