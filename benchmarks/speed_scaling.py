# SPDX-License-Identifier: Apache-2.0
"""Cost against the number of codes and of latents, memory against N x K, and a million codes in a training step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from fresh import extra_bytes
from pairs import best

from steadyvq import build_quantizer, kernels

DIM = 64
CODES = [1 << power for power in range(10, 21, 2)]
LATENTS = [1 << power for power in range(8, 15, 2)]
QUICK = [256, 1024]
# The other size, while one of them grows.
_LATENTS, _CODES = 1024, 16384


def once(form: str, n: int, k: int, d: int) -> None:
    """What a fresh process does whose memory is measured: a training step of `nsvq` with Adam."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, d, generator=generator)
    vq = build_quantizer("nsvq", num_codes=k, dim=d, init="normal")
    optimizer = torch.optim.Adam(vq.parameters(), lr=1e-3)
    (table,) = vq.parameters()
    table.grad = torch.zeros_like(table)
    optimizer.step()
    vq(z[:64])
    if form != "none":
        out = vq(z)
        out.loss.backward()
        optimizer.step()
        vq.update(out)


def measure(quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Times and extra memory of search and dense loss, and slopes of the times in log-log over the upper half."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    sizes = [("codes", _LATENTS, k) for k in (QUICK if quick else CODES)]
    sizes += [("latents", n, _CODES if not quick else 512) for n in (QUICK if quick else LATENTS)]
    for against, n, k in sizes:
        z, codes = torch.randn(n, DIM, generator=generator) / 8, torch.randn(k, DIM, generator=generator) / 8
        codes.requires_grad_()
        indices = kernels.nearest(z, codes)[0]

        def loss(z: Any = z, codes: Any = codes, indices: Any = indices) -> None:
            torch.autograd.grad(kernels.non_stationary_loss(z, codes, indices, temperature=0.35), codes)

        times = 1 if n * k > 1 << 27 else 3
        row = {"against": against, "size": [n, k, DIM]}
        row["search_ms"] = 1e3 * best(lambda z=z, codes=codes: kernels.nearest(z, codes), times)
        row["dense_ms"] = 1e3 * best(loss, times)
        row["extra_mb"] = extra_bytes(__file__, "nsvq", n, k, DIM) / 1e6
        rows.append(row)
        say(
            f"against {against}: {n} x {k} x {DIM}: search {row['search_ms']:.1f} ms, NS loss {row['dense_ms']:.1f} ms, "
            f"a step of nsvq takes {row['extra_mb']:.0f} MB beyond its state (N x K: {4e-6 * n * k:.0f} MB)"
        )
    for against, axis in (("codes", 1), ("latents", 0)):
        upper = [row for row in rows if row["against"] == against][-3:]
        for what in ("search_ms", "dense_ms"):
            first, last = upper[0], upper[-1]
            slope = math.log(last[what] / first[what]) / math.log(last["size"][axis] / first["size"][axis])
            rows.append({"against": against, "slope_of": what, "slope": slope})
            say(f"slope of {what.removesuffix('_ms')} against {against}: {slope:.2f}")
    return rows
