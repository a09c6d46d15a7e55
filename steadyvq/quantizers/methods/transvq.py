# SPDX-License-Identifier: Apache-2.0
"""TransVQ: a transformer with linear attention over a frozen random table computes the codebook.

    X = C W_in + P             C (K, d) ~ N(0, 1/d) frozen, P (K, h) trained positions
    X <- X + A W_o,   A_j = phi(q_j) S / (phi(q_j) . s + 1e-6),   S = sum_j phi(k_j) v_j^T,  s = sum_j phi(k_j),  phi = elu + 1
    X <- X + MLP(LN X)         q, k, v from LN X without biases; MLP h -> 2h -> h with GELU
    E = LN(X) W_out            q_i = argmin_j |z_i - E_j|^2,   straight-through
    L = mean (E_q - sg[z])^2 + 0.25 mean (sg[E_q] - z)^2

Every code depends on all others through S and s, at a cost of K h^2; no K x K array exists.

Source: TransVQ in NS-VQ, arXiv 2602.18896, and its code (`CodebookTransformer`): h = 256, depth 1, one head, no dropout.
Differs from the source: `indices_to_codes` of the official code runs the transformer over the selected rows alone, which
gives other codes; here the table is computed whole and used for everything. All of it is float32, also under autocast: the
sum over 65,536 codes reaches the largest number of float16. The start of P, N(0, 1), is the official one; it is some 20
times as large as C W_in, so TransVQ is in effect a trained K x 256 table with a shared head: 16.8 of its 17.4 million
parameters at K = 65,536 are P.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steadyvq.quantizers.base import Quantizer, WeightAverage
from steadyvq.quantizers.codebooks import CODEBOOKS, TransformedCodebook
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.layers import linear
from steadyvq.quantizers.registry import register

PARTS: dict[str, Any] = {"init": "normal", "losses": {"commitment": 0.25, "codebook": 1.0}}

EPS = 1e-6


class Block(nn.Module):
    """x + LinearAttention(LN x), then x + MLP(LN x)."""

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query, self.key, self.value, self.out = (linear(hidden, hidden, generator, bias=False) for _ in range(4))
        self.wide, self.narrow = linear(hidden, 2 * hidden, generator), linear(2 * hidden, hidden, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Codes (K, h)."""
        normed = self.norm_attention(x)
        query, key = (nn.functional.elu(layer(normed)) + 1 for layer in (self.query, self.key))
        mixed = (query @ (key.T @ self.value(normed))) / ((query @ key.sum(0))[:, None] + EPS)
        x = x + self.out(mixed)
        update: Tensor = self.narrow(nn.functional.gelu(self.wide(self.norm_mlp(x))))
        return x + update


class TransformerCodebook(TransformedCodebook):
    """E = transformer(C, P), see the module.

    Args:
        rows: C (K, d), frozen.
        generator: Of the start of P and all layers.
        hidden: h.
        depth: Number of blocks.
    """

    averaged_buffers = ("base",)
    cannot_place = "a transformer over a frozen random table computes them: leave the start as it is"

    def __init__(self, rows: Tensor, generator: torch.Generator, *, hidden: int = 256, depth: int = 1) -> None:
        super().__init__()
        if hidden < 1 or depth < 0:
            raise ValueError(f"hidden={hidden}, depth={depth}, but a transformer needs hidden >= 1 and depth >= 0")
        self.register_buffer("base", rows.clone())
        self.enter = linear(rows.shape[1], hidden, generator, bias=False)
        self.positions = nn.Parameter(torch.empty(rows.shape[0], hidden).normal_(0, 1, generator=generator))
        self.blocks = nn.ModuleList(Block(hidden, generator) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden)
        self.leave = linear(hidden, rows.shape[1], generator, bias=False)

    def transform(self) -> Tensor:
        """The whole table; the codes of a part of the rows would be others."""
        x = self.enter(self.base) + self.positions
        for block in self.blocks:
            x = block(x)
        table: Tensor = self.leave(self.norm(x))
        return table

    def set_rows_(self, rows: Tensor) -> None:
        """Refuses."""
        raise ValueError(f"set_rows_ cannot place codes: {self.cannot_place}")

    def copy_rows_(self, dst: Tensor, src: Tensor, noise: Tensor) -> None:
        """Copies rows of C and P, so that the codes are copies; then jitters P until their distance is that of the noise.

        The noise is given in the table's space and P is in another, so its direction there is not the given one: a row of
        it is repeated along h, and one step of proportion sets its size.
        """
        with torch.no_grad():
            self.base[dst], self.positions[dst] = self.base[src], self.positions[src]
            plain = self.positions[dst]
            repeats = -(-plain.shape[1] // noise.shape[1])
            jitter = noise.to(plain).repeat(1, repeats)[:, : plain.shape[1]]
            self.positions[dst] = plain + jitter
            table = self()
            wanted = noise.to(plain).norm(dim=1, keepdim=True)
            reached = (table[dst] - table[src]).norm(dim=1, keepdim=True)
            self.positions[dst] = plain + jitter * (wanted / reached.clamp_min(1e-12)).clamp_max(1e3)

    def forget_rows(self, rows: Tensor, optimizer: torch.optim.Optimizer | None, average: WeightAverage | None) -> None:
        """Resets what is remembered of rows of C and P."""
        super().forget_rows(rows, optimizer, average)
        state = {} if optimizer is None else optimizer.state.get(self.positions, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == self.positions.shape:
                value[rows] = 0
        if average is not None:
            average.copy_rows(self.positions, rows)


CODEBOOKS["transformer"] = TransformerCodebook


@register(
    "transvq",
    paper="NS-VQ, arXiv 2602.18896",
    summary="a linear-attention transformer over a frozen table makes all codes",
    cost="N K d + K h (d + h); stores h (K + d + h)",
)
def transvq(num_codes: int, dim: int, *, hidden: int = 256, depth: int = 1, **overrides: Any) -> Quantizer:
    """TransVQ with the transformer of the official code."""
    codebook = partial(TransformerCodebook, hidden=hidden, depth=depth)
    return compose(num_codes, dim, {**PARTS, "codebook": codebook}, overrides)
