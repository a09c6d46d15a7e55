# SPDX-License-Identifier: Apache-2.0
"""An autoregressive prior over token grids: transformers' Llama with a class prefix and rotary embeddings in two dimensions.

The model reads [class, t_0, ..., t_{n-2}] and predicts t_0, ..., t_{n-1}, row by row. It is LlamaGen's class-conditional model
(arXiv 2406.06525): RMS norms, SwiGLU of width 256 ceil(floor(8 d / 3) / 256), no biases, a head that starts at 0.

Rotation: half of the pairs of a head's features turn with the row and half with the column of a token,

    angle_j = row * b^(-4 j / h)  and  column * b^(-4 j / h),  j = 0 .. h/4 - 1,  h the width of a head,

(arXiv 2104.09864, equation 15, along each axis). As in LlamaGen's code the class is not rotated but has cos = sin = 0: every
query scores it 0, and it acts through its value alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from steadyvq.generation.priors import PriorModel
from steadyvq.training.prior_config import PriorConfig

MISSING = "the autoregressive prior is built on transformers: pip install 'steadyvq[ar]'"


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


class GridRotary(nn.Module):
    """Cosines and sines of positions 0 (the class) and 1 + row * width + column, in place of Llama's own.

    Args:
        grid: Height and width in tokens.
        head_width: Features of an attention head, a multiple of 4.
        base: b.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, grid: tuple[int, int], head_width: int, base: float) -> None:
        super().__init__()
        frequencies = base ** (-torch.arange(0, head_width // 2, 2, dtype=torch.float64) / (head_width // 2))
        row, column = (axis.flatten().double() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        angles = torch.cat([torch.outer(row, frequencies), torch.outer(column, frequencies)], dim=1)
        # Llama turns feature j with feature j + h/2.
        table = torch.cat([angles, angles], dim=1)
        zero = torch.zeros(1, head_width, dtype=torch.float64)
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

    A subclass splits a token into several digits; here it is one.
    """

    digits = 1

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def embed(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B L d"]:
        """Embeddings of tokens."""
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


class DigitHead(TokenHead):
    """A token t < K as two digits (t // b, t % b), b = ceil(sqrt(K)): p(t) = p(first) p(second | first).

    Embeddings and head have 2 b instead of K rows. The second digit sees the first by its embedding, added to the hidden state.
    """

    digits = 2

    def __init__(self, width: int, vocabulary: int) -> None:
        nn.Module.__init__(self)
        self.vocabulary = vocabulary
        self.base = base = int(vocabulary**0.5)
        while self.base * self.base < vocabulary:
            self.base = base = self.base + 1
        self.firsts = -(-vocabulary // base)
        self.embeddings = nn.ModuleList([nn.Embedding(self.firsts, width), nn.Embedding(base, width)])
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


class AutoregressivePrior(PriorModel):
    """A distribution over token grids, given a class.

    Args:
        config: Its size.
        vocabulary: K.
        grid: Height and width in tokens.
        num_classes: Classes; 0 for a prior that knows none.

    Attributes:
        null: The class that stands for none; the only one where there are no classes.
    """

    def __init__(self, config: PriorConfig, vocabulary: int, grid: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        model, settings, _ = llama_parts()
        size = config.chosen
        hidden = -(-(8 * size.width // 3) // 256) * 256
        self.config, self.vocabulary, self.grid, self.num_classes = config, vocabulary, grid, num_classes
        self.num_tokens, self.null = grid[0] * grid[1], num_classes
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
        self.body.rotary_emb = GridRotary(grid, size.width // size.heads, config.rope_base)
        for layer in self.body.layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.__class__ = DroppedLinear
                part.rate = config.dropout
        self.classes = nn.Embedding(num_classes + 1, size.width)
        nn.init.normal_(self.classes.weight, std=0.02)
        self.head = (DigitHead if config.factorised else TokenHead)(size.width, vocabulary)

    def new_cache(self) -> Any:
        """Keys and values of what was read, for `read`."""
        return llama_parts()[2](config=self.body.config)

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
        inputs = torch.cat([*parts, self.head.embed(tokens)], dim=1)
        inputs = F.dropout(inputs, self.config.dropout, self.training)
        start = 0 if cache is None else cache.get_seq_length()
        places = torch.arange(start, start + inputs.shape[1], device=inputs.device)[None]
        out = self.body(inputs_embeds=inputs, position_ids=places, past_key_values=cache, use_cache=cache is not None)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def forward(self, tokens: Int[Tensor, "B n"], labels: Int[Tensor, "B"]) -> Float[Tensor, "B n"]:
        """-log p of every token in nats, given the class and those before it."""
        hidden = self.read(tokens[:, :-1], labels)
        total, earlier = torch.zeros(tokens.shape, device=hidden.device), list[Tensor]()
        for digit in self.head.split(tokens):
            logits = self.head.logits(hidden, earlier)
            total = total + F.cross_entropy(logits.flatten(0, 1).float(), digit.flatten(), reduction="none").view_as(
                digit
            )
            earlier.append(digit)
        return total
