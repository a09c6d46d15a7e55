# SPDX-License-Identifier: Apache-2.0
"""The settings of a prior over stored tokens."""

from dataclasses import dataclass
from typing import NamedTuple


class Size(NamedTuple):
    """Layers, attention heads and width of a transformer."""

    layers: int
    heads: int
    width: int


SIZES = {
    "tiny": Size(4, 4, 128),
    "small": Size(6, 6, 240),
    "masked": Size(24, 8, 768),
    "d16": Size(16, 16, 1024),
    "B": Size(12, 12, 768),
    "L": Size(24, 16, 1024),
    "XL": Size(36, 20, 1280),
    "XXL": Size(48, 24, 1536),
    "XXXL": Size(48, 40, 2560),
    "1B": Size(22, 32, 2048),
    "3B": Size(24, 32, 3200),
    "7B": Size(32, 32, 4096),
}
"""By name. From B on they are LlamaGen's, d16 is VAR's, `masked` MaskGIT's; tiny and small are ours, for laptops."""


@dataclass(frozen=True)
class PriorConfig:
    """A transformer as an autoregressive, a masked or a next-scale prior. The tokens are `data.source`.

    Attributes:
        size: A name of `SIZES`: tiny, small, masked, d16, B, L, XL, XXL, XXXL, 1B, 3B, 7B.
        layers: Instead of the size's (None: the size's), likewise the two that follow.
        heads: Attention heads.
        width: Width of the hidden states.
        vocabulary: Codes that the prior knows (None: those of the tokens).
        conditional: By class, which needs labels; null: where the tokens have classes.
        label_dropout: Share of training samples whose class is hidden, for classifier-free guidance.
        dropout: On embeddings and on what every block adds.
        attention_dropout: On attention weights.
        factorised: Predict a code as two digits, the second given the first, which saves memory from 65,536 codes on.
        rope_base: Of the rotary embeddings.
        weight_decay: Of AdamW, on matrices alone.
        shown: Pictures that are sampled at every evaluation (0: none).
    """

    size: str = "tiny"
    layers: int | None = None
    heads: int | None = None
    width: int | None = None
    vocabulary: int | None = None
    conditional: bool | None = None
    label_dropout: float = 0.1
    dropout: float = 0.1
    attention_dropout: float = 0.0
    factorised: bool = False
    rope_base: float = 10000.0
    weight_decay: float = 0.05
    shown: int = 16

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"prior.size is {self.size!r}, but it must be one of {', '.join(SIZES)}")
        for name in ("label_dropout", "dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"prior.{name} is {getattr(self, name)}, but it is a share in [0, 1)")
        if min(self.layers or 1, self.heads or 1, self.width or 4, self.vocabulary or 1) < 1 or self.shown < 0:
            raise ValueError("prior.layers, heads, width and vocabulary must be at least 1, and shown at least 0")
        if self.weight_decay < 0 or self.rope_base <= 1:
            raise ValueError(
                f"prior.weight_decay is {self.weight_decay} and rope_base {self.rope_base}, but weight_decay >= 0 and "
                "rope_base > 1 are needed"
            )
        chosen = self.chosen
        if chosen.width % (4 * chosen.heads):
            raise ValueError(
                f"the prior's width is {chosen.width} for {chosen.heads} heads, but the width of a head must be a multiple of "
                "4 (rows and columns are rotated in pairs): change prior.width or prior.heads"
            )

    @property
    def chosen(self) -> Size:
        """Layers, heads and width."""
        named = SIZES[self.size]
        return Size(self.layers or named.layers, self.heads or named.heads, self.width or named.width)
