# SPDX-License-Identifier: Apache-2.0
"""`steadyvq kernels explain`: which kernels a problem gets on this machine, and why."""

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from steadyvq.cli.common import table

if TYPE_CHECKING:
    import torch


def explain(arguments: argparse.Namespace) -> int:
    """Says which search and which dense loss are used for N latents and K codes of d dimensions."""
    import torch

    from steadyvq.kernels import choice, native, triton

    n, k, d = arguments.num_latents, arguments.num_codes, arguments.dim
    for name, value in (("N", n), ("K", k), ("d", d)):
        if value < 1:
            raise ValueError(
                f"{name} is {value}, but there has to be at least 1: give numbers of latents, codes, dimensions"
            )
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[arguments.dtype]
    search = choice.search_choice(n, k, d, device=arguments.device, dtype=dtype)
    sums = choice.softmax_choice(n, k, d, device=arguments.device, dtype=dtype)
    print(f"{n:,} latents, {k:,} codes of {d} dimensions, {arguments.dtype} on {arguments.device}:")
    rows = [
        {"kernel": "nearest code", "backend": search.backend, "why": search.reason},
        {"kernel": "softmax over codes", "backend": sums.backend, "why": sums.reason},
    ]
    table(rows)
    library = native.library()
    print(f"compiled kernels: {library.reason if library.functions else 'none: ' + library.reason}")
    cards = triton.unusable() or "can be used here; the first use checks them on a small problem"
    print(f"Triton kernels (NVIDIA cards): {cards}")
    print(
        "others: STEADYVQ_NATIVE=0 and STEADYVQ_TRITON=0 switch the compiled ones off; "
        '`with kernels.use_backend("streaming")` does for a block'
    )
    if arguments.measure:
        _measure(n, k, d, dtype)
    return 0


def _measure(n: int, k: int, d: int, dtype: "torch.dtype") -> None:
    """Times the search, beside torch.cdist, on random numbers on this CPU."""
    import torch

    from steadyvq import kernels

    generator = torch.Generator().manual_seed(0)
    z, codes = (torch.randn(rows, d, generator=generator).to(dtype) for rows in (n, k))
    ours = _milliseconds(lambda: kernels.nearest(z, codes))
    part = z[: max(1, (1 << 26) // k)].float()
    rival = _milliseconds(lambda: torch.cdist(part, codes.float()).argmin(1)) * n / len(part)
    print(f"measured, {torch.get_num_threads()} thread(s): {ours:.1f} ms; torch.cdist and argmin {rival:.1f} ms")


def _milliseconds(call: Callable[[], object]) -> float:
    """The best of three, after one to warm up."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])
