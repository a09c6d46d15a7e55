# SPDX-License-Identifier: Apache-2.0
"""The non-stationary loss, forward and backward, against autograd on N x K and the shape of the official code."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fresh import extra_bytes
from pairs import compared, exp_seconds, mm_seconds
from torch import Tensor

from steadyvq import kernels

SIZES = [(2048, 8192, 64), (8192, 65536, 128)]
QUICK = [(256, 1024, 16)]
TAU = 0.35
# The official shape at the second size would need 250 GB and an hour; the N x K form 9 GB.
_OFFICIAL_UP_TO = 2048 * 8192 * 64


def problem(n: int, k: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, codes and the nearest codes; distances of the size that tau = 0.35 is made for."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, d, generator=generator) / d**0.5
    codes = (torch.randn(k, d, generator=generator) / d**0.5).requires_grad_()
    return z, codes, kernels.nearest(z, codes)[0]


def ours(z: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """Gradient of the codes by the closed form."""
    loss = kernels.non_stationary_loss(z, codes, indices, temperature=TAU)
    return torch.autograd.grad(loss, codes)[0]


def on_matrices(z: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """Gradient by autograd on N x K distances."""
    distance = z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.t()
    weight = torch.softmax(-distance.detach() / TAU, 1).scatter(1, indices[:, None], 0.0)
    return torch.autograd.grad((weight * distance).sum() / z.numel(), codes)[0]


def official(z: Tensor, codes: Tensor, indices: Tensor) -> Tensor:
    """Gradient by autograd on differences (rows, K, d), in chunks of 1,024 pairs' worth, as the official codes lay it out."""
    total = torch.zeros(())
    for part, winner in zip(z.split(1024), indices.split(1024), strict=True):
        distance = (part[:, None, :] - codes[None]).square().sum(-1)
        weight = torch.softmax(-distance.detach() / TAU, 1).scatter(1, winner[:, None], 0.0)
        total = total + (weight * distance).sum()
    return torch.autograd.grad(total / z.numel(), codes)[0]


FORMS = {"ours": ours, "on_matrices": on_matrices, "official": official}


def measure(quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row for every size and rival."""
    rows = []
    for n, k, d in QUICK if quick else SIZES:
        given = z, codes, indices = problem(n, k, d)
        floor = 1e3 * (2 * mm_seconds(n, k, d) + exp_seconds(n * k))
        extra = extra_bytes(__file__, "ours", n, k, d)
        small = n * k * d <= _OFFICIAL_UP_TO
        rivals = {"autograd on N x K": on_matrices, **({"official shape (N x K x d)": official} if small else {})}
        expected = on_matrices(z.double(), codes.double(), indices) if small else None
        for name, rival in rivals.items():
            few = 3 if name.startswith("official") else 15
            row = compared(partial(ours, *given), partial(rival, *given), 3 if quick else few)
            rows.append({"size": [n, k, d], "rival": name, **row, "floor_ms": floor, "extra_mb": extra / 1e6})
            exact = rival(z, codes, indices) if expected is None else expected
            error = (ours(z, codes, indices) - exact).abs().max() / exact.abs().max()
            rows[-1]["error"] = float(error)
            say(line(rows[-1]))
    return rows


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    size = " x ".join(map(str, row["size"]))
    return (
        f"NS loss {size}: {row['ours_ms']:.1f} ms = {row['ours_ms'] / row['floor_ms']:.2f} x floor "
        f"({row['floor_ms']:.1f} ms), {row['extra_mb']:.0f} MB extra; {row['rival']} {row['rival_ms']:.1f} ms = "
        f"{row['ratio']:.1f} x [{row['low']:.1f}, {row['high']:.1f}]; error of the gradient {row['error']:.1e}"
    )


def once(form: str, n: int, k: int, d: int) -> None:
    """What a fresh process does whose memory is measured; `none` stops before the call."""
    z, codes, indices = problem(n, k, d)
    ours(z[:64], codes[:64].detach().requires_grad_(), indices[:64] % 64)
    if form != "none":
        FORMS[form](z, codes, indices)
