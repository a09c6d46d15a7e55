# SPDX-License-Identifier: Apache-2.0
"""FVQ: a small transformer, the VQBridge, computes the codebook from a trained base, so that all codes move together.

    compress    X  = base (K, d) as T = K / p^2 tokens of p^2 consecutive codes,  T_0 = X W_in + b_in         (T, h)
    process     T_{l+1} = T'_l + MLP(LN T'_l),   T'_l = T_l + Attention(LN T_l)                               depth blocks
    recover     E  = LN(T_L) W_out + b_out as (K, d)
    q_i = argmin_j |z_i - E_j|^2,   straight-through,   L = mean (E_q - sg[z])^2 + 0.25 mean (sg[E_q] - z)^2

LN without parameters, eps 1e-6; 4 heads with biases; MLP h -> 2h -> h with tanh-GELU; no positions and no way round the
bridge. Attention is over T x T patches, never K x K. Released sizes: p = 4 at K = 16,384 and p = 8 at K = 65,536 and
262,144, h = 256 ("L"; XS 32, S 64, B 128, XL 512), depth 2.

Source: FVQ, arXiv 2509.10140; `qbridge_ViT.py` of its code ("corresponds to the paper"). The paper trains with learning
annealing: `optim.decay: linear`, `optim.warmup_steps`, `optim.hold: 0.37` and `optim.final: 0.01`.
Differs from the source: the official code cuts a square image of the codes into p x p patches; here a patch is p^2
consecutive codes, which names the same codes in another order and allows every K that is a multiple of p^2. `square=True` is
the order of the source, for weights that come from there. Its scripts call another file (DiT blocks with a constant
condition); its always computed entropy loss is left out.

The start. As in the source W_out = b_out = 0: every code is exactly 0 at the first step, and every latent gets code 0.
A base of U(-1/K, 1/K) is below the eps of LN: activations start at 0.05 (K = 16,384) to 0.003 (K = 262,144) of their
usual size, so the larger K, the slower the start; `init="normal"` is the remedy. `start="xavier"` draws W_out as all other
layers, so codes differ from the first step. `start="residual"` (ours) is E = base + bridge(base) with W_out = 0: codes start
at the base, and `init_from` can place them on data.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steadyvq.quantizers.base import Quantizer
from steadyvq.quantizers.codebooks import CODEBOOKS, TransformedCodebook
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.layers import linear
from steadyvq.quantizers.registry import register

PARTS: dict[str, Any] = {"init": "uniform", "losses": {"commitment": 0.25, "codebook": 1.0}}

HEADS = 4
EPS = 1e-6

Start = Literal["zeros", "xavier", "residual"]


def patch_of(num_codes: int) -> int:
    """The side p of the released patches: 8 from 65,536 codes on, else 4."""
    return 8 if num_codes >= 65536 else 4


class Block(nn.Module):
    """x + Attention(LN x), then x + MLP(LN x)."""

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.qkv = linear(hidden, 3 * hidden, generator, xavier=True)
        self.out = linear(hidden, hidden, generator, xavier=True)
        self.wide = linear(hidden, 2 * hidden, generator, xavier=True)
        self.narrow = linear(2 * hidden, hidden, generator, xavier=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (T, h)."""
        count, hidden = tokens.shape
        q, k, v = self.qkv(_norm(tokens)).reshape(count, 3, HEADS, hidden // HEADS).permute(1, 2, 0, 3).unbind()
        mixed = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        tokens = tokens + self.out(mixed.transpose(0, 1).reshape(count, hidden))
        wide = nn.functional.gelu(self.wide(_norm(tokens)), approximate="tanh")
        update: Tensor = self.narrow(wide)
        return tokens + update


def _norm(tokens: Tensor) -> Tensor:
    return nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=EPS)


class BridgeCodebook(TransformedCodebook):
    """E = bridge(base), see the module.

    Args:
        rows: The base (K, d), trained.
        generator: Of the start of all layers.
        patch: p; p^2 codes are one token. K must be a multiple of p^2.
        registers: Trained tokens beside those of the codes, N(0, 0.02^2) at the start; their output is dropped.
        hidden: h, a multiple of 4.
        depth: Number of blocks.
        start: `zeros` (the source), `xavier` or `residual`.
        square: Patches are those of the image of sqrt(K) x sqrt(K) codes, row by row, instead of consecutive codes.
    """

    trainable = True
    cannot_copy = (
        "the codes of a bridge share tokens and layers, so one of them cannot be set alone: leave out the replacement"
    )

    def __init__(
        self,
        rows: Tensor,
        generator: torch.Generator,
        *,
        patch: int = 8,
        registers: int = 0,
        hidden: int = 256,
        depth: int = 2,
        start: Start = "zeros",
        square: bool = False,
    ) -> None:
        super().__init__()
        num_codes, dim = rows.shape
        _check(num_codes, patch, registers, hidden, depth, start)
        self.side = _side(num_codes, patch) if square else None
        self.patch, self.per_token = patch, patch * patch
        self.residual = start == "residual"
        if not self.residual:
            self.cannot_place = (
                "they are computed by a bridge that has no way round it: leave the start as it is, or build the layer "
                "with start='residual'"
            )
        self.base = nn.Parameter(rows.clone())
        self.compress = linear(self.per_token * dim, hidden, generator, xavier=True)
        tokens = torch.empty(registers, hidden).normal_(0, 0.02, generator=generator)
        self.registers = nn.Parameter(tokens) if registers else None
        self.blocks = nn.ModuleList(Block(hidden, generator) for _ in range(depth))
        self.recover = linear(hidden, self.per_token * dim, generator, xavier=True)
        if start != "xavier":
            nn.init.zeros_(self.recover.weight)

    def transform(self) -> Tensor:
        """Compresses, processes, recovers."""
        num_codes, dim = self.base.shape
        tokens: Tensor = self.compress(self._cut(self.base).reshape(-1, self.per_token * dim))
        if self.registers is not None:
            tokens = torch.cat([tokens, self.registers])
        for block in self.blocks:
            tokens = block(tokens)
        table: Tensor = self.recover(_norm(tokens[: num_codes // self.per_token])).reshape(num_codes, dim)
        table = self._joined(table)
        return self.base + table if self.residual else table

    def _cut(self, codes: Tensor) -> Tensor:
        """Codes (K, d) patch by patch."""
        return codes if self.side is None else self._swapped(codes, self.side // self.patch, self.patch)

    def _joined(self, codes: Tensor) -> Tensor:
        """Codes (K, d) that lie patch by patch in their own order."""
        return codes if self.side is None else self._swapped(codes, self.patch, self.side // self.patch)

    def _swapped(self, codes: Tensor, inner: int, outer: int) -> Tensor:
        """Codes whose positions are (a, b, c, d) with b of `outer` and c of `inner` values as (a, c, b, d)."""
        blocks = codes.reshape(-1, outer, inner, self.patch, codes.shape[1])
        return blocks.transpose(1, 2).reshape(codes.shape)

    def set_rows_(self, rows: Tensor) -> None:
        """Puts the rows into the base and closes the bridge (`start="residual"` alone)."""
        if self.cannot_place:
            raise ValueError(f"set_rows_ cannot place codes: {self.cannot_place}")
        with torch.no_grad():
            self.base.copy_(rows)
            self.recover.weight.zero_()
            self.recover.bias.zero_()

    def copy_rows_(self, dst: Tensor, src: Tensor, noise: Tensor) -> None:
        """Refuses."""
        raise ValueError(f"copy_rows_ cannot copy codes: {self.cannot_copy}")


CODEBOOKS["bridge"] = BridgeCodebook


def _side(num_codes: int, patch: int) -> int:
    """The side of the square image of all codes."""
    side = math.isqrt(num_codes)
    if side * side != num_codes or side % patch:
        raise ValueError(
            f"num_codes is {num_codes}, but square=True needs the square of a multiple of patch={patch}: leave it out"
        )
    return side


def _check(num_codes: int, patch: int, registers: int, hidden: int, depth: int, start: str) -> None:
    if patch < 1 or registers < 0 or hidden < HEADS or hidden % HEADS or depth < 0:
        raise ValueError(
            f"patch={patch}, registers={registers}, hidden={hidden}, depth={depth}, but a bridge needs patch >= 1, "
            f"registers >= 0, depth >= 0 and hidden a positive multiple of its {HEADS} heads"
        )
    if start not in ("zeros", "xavier", "residual"):
        raise ValueError(f"start is {start!r}, but a bridge starts from 'zeros', 'xavier' or 'residual'")
    unit = patch * patch
    below = num_codes // unit * unit
    if below != num_codes:
        fit = f"{below} or {below + unit}" if below else f"{unit} or {2 * unit}"
        raise ValueError(
            f"num_codes is {num_codes}, but a bridge with patch={patch} takes {unit} codes as one token and needs a "
            f"multiple of that: use {fit}, or another patch"
        )


@register(
    "fvq",
    paper="FVQ, arXiv 2509.10140",
    summary="a transformer over patches of the codebook computes all codes",
    cost="N K d + K h (d + h / p^2 + K / p^4); stores h (p^2 d + h)",
    example=(48, 6),
)
def fvq(
    num_codes: int,
    dim: int,
    *,
    patch: int | None = None,
    registers: int = 0,
    hidden: int = 256,
    depth: int = 2,
    start: Start = "zeros",
    square: bool = False,
    **overrides: Any,
) -> Quantizer:
    """FVQ; `patch` is 8 from 65,536 codes on and 4 below, as released, if it is not given."""
    bridge = partial(
        BridgeCodebook,
        patch=patch_of(num_codes) if patch is None else patch,
        registers=registers,
        hidden=hidden,
        depth=depth,
        start=start,
        square=square,
    )
    return compose(num_codes, dim, {**PARTS, "codebook": bridge}, overrides)
