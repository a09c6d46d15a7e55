# SPDX-License-Identifier: Apache-2.0
"""What priors over tokens are made of: transformers' Llama as the body, rotary embeddings in two dimensions, classes, heads.

Of Llama a prior takes what LlamaGen's model (arXiv 2406.06525) has: RMS norms, SwiGLU of width 256 ceil(floor(8 d / 3) / 256),
no biases. Which tokens see which is a mask that the prior gives.

Rotation: half of the pairs of a head's features turn with the row and half with the column of a token,

    angle_j = row * b^(-4 j / h)  and  column * b^(-4 j / h),  j = 0 .. h/4 - 1,  h the width of a head,

(arXiv 2104.09864, equation 15, along each axis).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from steadyvq.generation.priors import PriorModel
from steadyvq.generation.sampling import SamplingConfig, draw, guided_logits, probabilities
from steadyvq.training.prior_config import PriorConfig

MISSING = "this prior is built on transformers: pip install 'steadyvq[ar]'"


def llama_parts() -> tuple[Any, Any, Any]:
    """transformers' LlamaModel, LlamaConfig and DynamicCache.

    Raises:
        ValueError: transformers is not installed.
    """
    try:
        from transformers.cache_utils import DynamicCache
        from transformers.models.llama.configuration_llama import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaModel
    except ImportError as error:
        raise ValueError(MISSING) from error
    return LlamaModel, LlamaConfig, DynamicCache


def places_of(grid: tuple[int, int]) -> Float[Tensor, "n 2"]:
    """(row, column) of every token of a grid, row by row, float64."""
    axes = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    return torch.stack([axis.flatten().double() for axis in axes], dim=1)


class Rotary(nn.Module):
    """Cosines and sines of places in the plane, in place of Llama's own.

    Args:
        places: (row, column) of every position (L, 2), float64.
        head_width: Features of an attention head, a multiple of 4.
        base: b.
        first: So many positions come before these with cos = sin = 0: every query scores them 0, and they act through their
            values alone.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, places: Float[Tensor, "L 2"], head_width: int, base: float, first: int = 0) -> None:
        super().__init__()
        frequencies = base ** (-torch.arange(0, head_width // 2, 2, dtype=torch.float64) / (head_width // 2))
        angles = torch.cat([torch.outer(axis, frequencies) for axis in places.unbind(1)], dim=1)
        # Llama turns feature j with feature j + h/2.
        table = torch.cat([angles, angles], dim=1)
        zero = torch.zeros(first, head_width, dtype=torch.float64)
        # They are computed from the configuration, so checkpoints need not hold them; float64 stays exact for float64 models.
        self.register_buffer("cos", torch.cat([zero, table.cos()]), persistent=False)
        self.register_buffer("sin", torch.cat([zero, table.sin()]), persistent=False)

    def forward(self, x: Tensor, position_ids: Int[Tensor, "#B L"]) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (B, L, h), in the type of the hidden states x."""
        return self.cos[position_ids].to(x.dtype), self.sin[position_ids].to(x.dtype)


class DroppedLinear(nn.Linear):
    """A linear layer with dropout on its output."""

    rate: float = 0.0

    def forward(self, input: Tensor) -> Tensor:
        """The product, some of its entries dropped in training."""
        return F.dropout(super().forward(input), self.rate, self.training)


class TokenHead(nn.Module):
    """Logits of the next token.

    Args:
        width: Of the hidden states.
        vocabulary: K.
        embeds: Whether tokens are also read through it.

    A subclass splits a token into several digits; here it is one.
    """

    digits = 1

    def __init__(self, width: int, vocabulary: int, *, embeds: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width) if embeds else None
        self.output = nn.Linear(width, vocabulary, bias=False)
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def embed(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L d"]:
        """Embeddings of tokens."""
        assert self.embedding is not None
        embedded: Tensor = self.embedding(tokens)
        return embedded

    def split(self, tokens: Tensor) -> list[Tensor]:
        """The digits of tokens."""
        return [tokens]

    def join(self, digits: list[Tensor]) -> Tensor:
        """The tokens of digits."""
        return digits[0]

    def logits(self, hidden: Float[Tensor, "*B d"], earlier: list[Tensor]) -> Float[Tensor, "*B K"]:
        """Logits of the next digit, given those before it."""
        scores: Tensor = self.output(hidden)
        return scores

    def surprisal(self, hidden: Float[Tensor, "B L d"], tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """-log p of tokens in nats, given the states that predict them."""
        total, earlier = torch.zeros(tokens.shape, device=hidden.device), list[Tensor]()
        for digit in self.split(tokens):
            logits = self.logits(hidden, earlier).flatten(0, 1).float()
            total = total + F.cross_entropy(logits, digit.flatten(), reduction="none").view_as(digit)
            earlier.append(digit)
        return total


class DigitHead(TokenHead):
    """A token t < K as two digits (t // b, t % b), b = ceil(sqrt(K)): p(t) = p(first) p(second | first).

    Embeddings and head have 2 b instead of K rows. The second digit sees the first by its embedding, added to the hidden state.
    """

    digits = 2

    def __init__(self, width: int, vocabulary: int, *, embeds: bool = True) -> None:
        nn.Module.__init__(self)
        self.vocabulary = vocabulary
        self.base = base = int(vocabulary**0.5)
        while self.base * self.base < vocabulary:
            self.base = base = self.base + 1
        self.firsts = -(-vocabulary // base)
        sizes = (self.firsts, base) if embeds else ()
        self.embeddings = nn.ModuleList([nn.Embedding(size, width) for size in sizes])
        self.given = nn.Embedding(self.firsts, width)
        outputs = [nn.Linear(width, self.firsts, bias=False), nn.Linear(width, base, bias=False)]
        self.outputs = nn.ModuleList(outputs)
        for table in (*self.embeddings.parameters(), self.given.weight):
            nn.init.normal_(table, std=0.02)
        for output in outputs:
            nn.init.zeros_(output.weight)

    def embed(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L d"]:
        """Sum of the embeddings of both digits."""
        first, second = self.split(tokens)
        embedded: Tensor = self.embeddings[0](first) + self.embeddings[1](second)
        return embedded

    def split(self, tokens: Tensor) -> list[Tensor]:
        """The digits of tokens."""
        return [tokens // self.base, tokens % self.base]

    def join(self, digits: list[Tensor]) -> Tensor:
        """The tokens of digits."""
        return digits[0] * self.base + digits[1]

    def logits(self, hidden: Float[Tensor, "*B d"], earlier: list[Tensor]) -> Float[Tensor, "*B D"]:
        """Logits of the next digit, given those before it; digits of no token have -inf."""
        if not earlier:
            first: Tensor = self.outputs[0](hidden)
            return first
        scores: Tensor = self.outputs[1](hidden + self.given(earlier[0]))
        second = torch.arange(self.base, device=scores.device)
        beyond = earlier[0][..., None] * self.base + second >= self.vocabulary
        return scores.masked_fill(beyond, float("-inf"))


class TokenPrior(PriorModel, ABC):
    """What every prior over tokens has.

    Args:
        config: Its size.
        vocabulary: K.
        shape: Of the tokens of an image.
        num_classes: Classes; 0 for a prior that knows none.
        rotary: Of all positions.
        embeds: Whether tokens are read through the head's embeddings.

    Attributes:
        num_tokens: Tokens of an image.
        null: The class that stands for none; the only one where there are no classes.
    """

    def __init__(
        self,
        config: PriorConfig,
        vocabulary: int,
        shape: tuple[int, ...],
        num_classes: int,
        rotary: Rotary,
        *,
        embeds: bool = True,
    ) -> None:
        super().__init__()
        model, settings, _ = llama_parts()
        size = config.chosen
        hidden = -(-(8 * size.width // 3) // 256) * 256
        self.config, self.vocabulary, self.shape, self.num_classes = config, vocabulary, shape, num_classes
        self.num_tokens, self.null = math.prod(shape), num_classes
        llama = settings(
            vocab_size=1,
            hidden_size=size.width,
            intermediate_size=hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=self.num_tokens,
            rms_norm_eps=1e-5,
            initializer_range=0.02,
            attention_dropout=config.attention_dropout,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
        self.body = model(llama)
        # Inputs come as embeddings, of tokens and of the class, so its own table is not used.
        self.body.embed_tokens = None
        self.body.rotary_emb = rotary
        for layer in self.body.layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.__class__ = DroppedLinear
                part.rate = config.dropout
        self.classes = nn.Embedding(num_classes + 1, size.width)
        nn.init.normal_(self.classes.weight, std=0.02)
        self.head = (DigitHead if config.factorised else TokenHead)(size.width, vocabulary, embeds=embeds)

    def new_cache(self) -> Any:
        """Keys and values of what was read."""
        return llama_parts()[2](config=self.body.config)

    def states(
        self, inputs: Float[Tensor, "B L d"], cache: Any = None, seen: Tensor | None = None
    ) -> Float[Tensor, "B L d"]:
        """Hidden states of embeddings.

        Args:
            inputs: What was not read before.
            cache: Of `new_cache`, or None to read without.
            seen: Which of all positions so far each of these sees (L, M), True for seen; None: those before it and itself.
        """
        inputs = F.dropout(inputs, self.config.dropout, self.training)
        start = 0 if cache is None else cache.get_seq_length()
        places = torch.arange(start, start + inputs.shape[1], device=inputs.device)[None]
        # A mask of four dimensions is used as it is.
        mask = None if seen is None else seen[None, None].expand(len(inputs), 1, -1, -1)
        out = self.body(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    @abstractmethod
    def sample(
        self, labels: Int[Tensor, "B"], seed: int, numbers: Sequence[int], config: SamplingConfig
    ) -> Int[Tensor, "B n"]:
        """Draws tokens; see `sample_tokens`."""

    def with_null(self, labels: Int[Tensor, "B"], guided: bool) -> Int[Tensor, "C"]:
        """The classes, and if guided the same number of times none below them."""
        return torch.cat([labels, torch.full_like(labels, self.null)]) if guided else labels

    def choose(
        self, hidden: Float[Tensor, "C M d"], numbers: Float[Tensor, "B m"], config: SamplingConfig, guidance: float
    ) -> tuple[Int[Tensor, "B M"], Float[Tensor, "B M"]]:
        """Draws tokens from the states that predict them.

        Args:
            hidden: For classes of `with_null`.
            numbers: Uniform numbers, one for each digit of each token.
            config: Temperature, top-k, top-p.
            guidance: s.

        Returns:
            Tokens, and their log p before temperature, top-k and top-p.
        """
        count = hidden.shape[1]
        states = hidden.flatten(0, 1)
        copies = len(hidden) // len(numbers)
        uniform = numbers.reshape(-1, self.head.digits).to(states.device)
        digits, log_p = list[Tensor](), states.new_zeros(len(uniform))
        for number in uniform.unbind(1):
            logits = self.head.logits(states, [digit.repeat(copies) for digit in digits])
            logits = guided_logits(logits, guidance) if copies == 2 else logits
            digits.append(draw(probabilities(logits, config), number))
            log_p = log_p + logits.log_softmax(1).gather(1, digits[-1][:, None])[:, 0]
        return self.head.join(digits).view(-1, count), log_p.view(-1, count)
