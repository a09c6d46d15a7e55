# SPDX-License-Identifier: Apache-2.0
"""Training steps: a whole model with `nsvq` against `simvq`, a quantizer against its search and against the best-known one."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from pairs import compared

import steadyvq
from steadyvq import Tokenizer, build_quantizer, kernels
from steadyvq.models.autoencoder import AUTOENCODERS

# (images, side, K, d) of the whole step; (N, K, d) of the quantizer alone; (N, K, d) beside vector-quantize-pytorch.
FULL = (4, 128, 65536, 128), (8192, 65536, 128), [(32768, 1024, 32), (32768, 1024, 64)]
QUICK = (1, 64, 256, 128), (256, 512, 16), [(512, 64, 8)]


def whole_step(name: str, images: torch.Tensor, num_codes: int, dim: int) -> Callable[[], object]:
    """A training step of the 128x128 f8 model: forward, losses, backward, Adam, bookkeeping."""
    torch.manual_seed(0)
    quantizer = build_quantizer(name, num_codes=num_codes, dim=dim, channel_axis=1)
    model = Tokenizer.build(AUTOENCODERS["simvq_f8"], quantizer).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        reconstruction, out = model(images)
        ((reconstruction - images).square().mean() + out.loss).backward()
        optimizer.step()
        model.quantizer.update(out)

    return step


def quantizer_step(vq: Any, z: torch.Tensor) -> Callable[[], object]:
    """Forward, backward to latents and codes, and bookkeeping of one of our quantizers."""

    def step() -> None:
        z.grad = None
        vq.zero_grad()
        out = vq(z)
        (out.z_q.sum() + out.loss).backward()
        vq.update(out)

    return step


def measure(quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row for every pair of steps."""
    (count, side, codes, dim), (n, k, d), rivals = QUICK if quick else FULL
    rows = []

    def pair(name: str, ours: Callable[[], object], rival_name: str, rival: Callable[[], object], pairs: int) -> None:
        row = compared(ours, rival, 3 if quick else pairs, most_seconds=150)
        rows.append({"ours": name, "rival": rival_name, **row})
        say(
            f"step: {name} {row['ours_ms']:.1f} ms, {rival_name} {row['rival_ms']:.1f} ms = "
            f"{row['ratio']:.3f} x [{row['low']:.3f}, {row['high']:.3f}]"
        )

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, side, side, generator=generator) * 2 - 1
    size = f"whole step, {count} images of {side} x {side}, K = {codes}, d = {dim}"
    steps = [whole_step(name, images, codes, dim) for name in ("simvq", "nsvq")]
    pair(f"`simvq`: {size}", steps[0], "`nsvq`: the same", steps[1], 9)
    del steps
    z = torch.randn(n, d, generator=generator).requires_grad_()
    for name in ("vq", "simvq", "nsvq"):
        vq = build_quantizer(name, num_codes=k, dim=d, init="normal")
        table = vq.codebook()
        search = lambda table=table: kernels.nearest(z.detach(), table)  # noqa: E731
        pair(f"search alone: {n} x {k} x {d}", search, f"`{name}`, forward and backward", quantizer_step(vq, z), 9)
    with contextlib.suppress(ImportError):
        from vector_quantize_pytorch import VectorQuantize

        for n, k, d in rivals:
            z = torch.randn(n, d, generator=generator).requires_grad_()
            theirs = VectorQuantize(dim=d, codebook_size=k, decay=0.8, commitment_weight=1.0)

            def step(theirs: Any = theirs, z: torch.Tensor = z) -> None:
                z.grad = None
                out, _, loss = theirs(z[None])
                (out.sum() + loss.sum()).backward()

            ours = quantizer_step(steadyvq.build_quantizer("ema", num_codes=k, dim=d, init="normal"), z)
            pair(f"`ema`: {n} x {k} x {d}", ours, "vector-quantize-pytorch (EMA)", step, 30)
    return rows
