# SPDX-License-Identifier: Apache-2.0
"""Timing two sides against each other on a machine that does other things too.

Both sides run in turns in one process, on one thread, and CPU time counts, not the clock. The ratio of every pair is taken and
the median of the ratios reported with a 95 % interval by the bootstrap. Rates of torch.mm and torch.exp, taken in the same
process, give the floor.
"""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]


def seconds(call: Call) -> float:
    """CPU time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def compared(ours: Call, rival: Call, pairs: int = 30, most_seconds: float = 60.0) -> dict[str, Any]:
    """Median times in milliseconds, and how many times longer the rival takes.

    Args:
        ours: one side.
        rival: the other.
        pairs: how many pairs to take.
        most_seconds: stop after this long, but not before three pairs.
    """
    ours(), rival()
    times: list[tuple[float, float]] = []
    start = time.monotonic()
    while len(times) < pairs and (len(times) < 3 or time.monotonic() - start < most_seconds):
        # Whoever goes second finds the other's data in the caches: they take turns.
        first = len(times) % 2 == 0
        a = seconds(ours) if first else 0.0
        b = seconds(rival)
        times.append((a if first else seconds(ours), b))
    ratios = [b / a for a, b in times]
    low, high = interval(ratios)
    return {
        "ours_ms": 1e3 * statistics.median(a for a, _ in times),
        "rival_ms": 1e3 * statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "pairs": len(times),
    }


def interval(values: list[float]) -> tuple[float, float]:
    """95 % of the medians of 2,000 resamples."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (2000, len(values)), generator=generator)
    medians = torch.tensor(values, dtype=torch.float64)[picks].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def best(call: Call, times: int = 5) -> float:
    """The least CPU time of several calls, after one to warm up."""
    call()
    return min(seconds(call) for _ in range(times))


def mm_seconds(n: int, k: int, d: int, dtype: torch.dtype = torch.float32) -> float:
    """Time of an N x d by d x K product at the rate of torch.mm, taken on at most 1,024 rows and 32,768 columns."""
    rows, columns = min(n, 1024), min(k, 32768)
    a, b = torch.randn(rows, d).to(dtype), torch.randn(d, columns).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    return best(lambda: torch.mm(a, b, out=out)) * (n / rows) * (k / columns)


def exp_seconds(count: int) -> float:
    """Time of that many exponentials at the rate of torch.exp within the cache."""
    values = -10 * torch.rand(1 << 16)
    out = torch.empty_like(values)
    return best(lambda: torch.exp(values, out=out), 20) * count / values.numel()


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    from steadyvq.kernels import native

    kernels = native.library()
    return {
        "cpu": cpu,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": kernels.bfloat16,
        "compiled_kernels": kernels.functions is not None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
