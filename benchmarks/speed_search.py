# SPDX-License-Identifier: Apache-2.0
"""Exact search against what others use: torch.cdist, the expanded matrix, torch.compile of it, faiss, KeOps."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pairs import compared, mm_seconds
from torch import Tensor
from trained import trained_latents

from steadyvq import kernels
from steadyvq.kernels import native

SIZES = [(2048, 65536, 128), (8192, 16384, 8), (4096, 1024, 64), (8192, 1024, 8), (32768, 1024, 32)]
QUICK = [(512, 2048, 16)]
# KeOps needs seconds per run and a minute to compile at d = 128.
_KEOPS_UP_TO = 16


def cdist(z: Tensor, codes: Tensor) -> Tensor:
    """As in vector-quantize-pytorch and the TransVQ code."""
    return torch.cdist(z, codes).argmin(1)


def expanded(z: Tensor, codes: Tensor) -> Tensor:
    """As in taming-transformers and the official SimVQ."""
    return (z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.t()).argmin(1)


def rivals(z: Tensor, codes: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, search) of everything that is installed."""
    yield "torch.cdist + argmin", lambda: cdist(z, codes)
    yield "expanded matrix + argmin", lambda: expanded(z, codes)
    compiled = torch.compile(expanded, dynamic=False)
    yield "torch.compile of the expanded matrix", lambda: compiled(z, codes)
    with contextlib.suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(z.shape[1])
        index.add(codes.numpy())
        yield "faiss IndexFlatL2", lambda: torch.from_numpy(index.search(z.numpy(), 1)[1][:, 0])
    if z.shape[1] <= _KEOPS_UP_TO:
        with contextlib.suppress(ImportError):
            from pykeops.torch import LazyTensor

            yield (
                "KeOps argmin",
                lambda: ((LazyTensor(z[:, None]) - LazyTensor(codes[None])) ** 2).sum(2).argmin(1)[:, 0],
            )


def adversarial(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Two far clusters of codes a few float32 steps wide: half of all codes are within every bound."""
    generator = torch.Generator().manual_seed(0)
    bump = torch.randint(-2, 3, (k, d), generator=generator)
    centres = (10 * torch.randn(2, d, generator=generator)).repeat(k // 2, 1)
    return 10 * torch.randn(n, d, generator=generator), centres * (1 + bump * torch.finfo(torch.float32).eps)


def inputs(n: int, k: int, d: int, quick: bool) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, latents, codes)."""
    generator = torch.Generator().manual_seed(0)
    yield "random", torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    if not quick:
        yield "trained", *trained_latents(n, k, d)


def measure(quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row for every size, input and rival, and one for the adversarial input."""
    rows = []
    screen = torch.bfloat16 if native.library().bfloat16 else torch.float32
    for n, k, d in QUICK if quick else SIZES:
        floor = 1e3 * mm_seconds(n, k, d, screen)
        for kind, z, codes in inputs(n, k, d, quick):
            found = kernels.nearest(z, codes)[0]
            for name, rival in rivals(z, codes):
                row = compared(
                    lambda z=z, codes=codes: kernels.nearest(z, codes), rival, 5 if quick else 30, most_seconds=10
                )
                agree = (rival() == found).double().mean().item()
                rows.append({"size": [n, k, d], "input": kind, "rival": name, **row, "floor_ms": floor, "agree": agree})
                say(line(rows[-1]))
    n, k, d = (64, 512, 16) if quick else (256, 16384, 64)
    z, codes = adversarial(n, k, d)
    row = compared(lambda: kernels.nearest(z, codes), lambda: cdist(z, codes), 5 if quick else 10)
    agree = (cdist(z, codes) == kernels.nearest(z, codes)[0]).double().mean().item()
    rows.append({"size": [n, k, d], "input": "adversarial", "rival": "torch.cdist + argmin", **row, "agree": agree})
    rows[-1]["floor_ms"] = 1e3 * mm_seconds(n, k, d, screen)
    say(line(rows[-1]))
    return rows


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    size = " x ".join(map(str, row["size"]))
    return (
        f"search {size} {row['input']}: {row['ours_ms']:.1f} ms, {row['rival']} {row['rival_ms']:.1f} ms = "
        f"{row['ratio']:.2f} x [{row['low']:.2f}, {row['high']:.2f}], floor {row['floor_ms']:.1f} ms "
        f"({row['floor_ms'] / row['ours_ms']:.0%}), same codes {row['agree']:.2%}"
    )
