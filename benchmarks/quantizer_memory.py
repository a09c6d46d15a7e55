# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of one training step of `nsvq`, beside the dense form and torch.cdist.

    OMP_NUM_THREADS=1 python benchmarks/quantizer_memory.py                      # K = 65,536, d = 128, N = 8,192
    OMP_NUM_THREADS=1 python benchmarks/quantizer_memory.py --forms nsvq --json out.json

Every form runs in a fresh process. Its peak is `ru_maxrss` less that of a process that does the same except for the call:
parameters, gradients, Adam's moments and latents are allocated and touched in both. The floor of the time is the FLOP of
the form over the rate of torch.mm at the same shape in the same process, plus one exponential per pair at its own rate.
"""

import argparse
import json
import time

from fresh import in_fresh_process, peak_bytes

FORMS = ("nsvq", "dense", "cdist")


def step(form: str, num_codes: int, dim: int, count: int) -> dict[str, float]:
    """One forward and backward of a form; `none` does everything but the call."""
    import torch

    import steadyvq

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, dim, generator=generator, requires_grad=True)
    vq = steadyvq.build_quantizer("nsvq", num_codes=num_codes, dim=dim, init="normal")
    optimizer = torch.optim.Adam(vq.parameters(), lr=1e-2)
    (table,) = vq.parameters()
    table.grad = torch.zeros_like(table)
    latents.grad = torch.zeros_like(latents)
    optimizer.step()
    # The libraries' own start-up (thread pools, code caches) is no part of the form.
    small = steadyvq.build_quantizer("nsvq", num_codes=64, dim=dim)
    small(latents[:64]).loss.backward()
    start = time.perf_counter()
    if form == "nsvq":
        out = vq(latents)
        out.loss.backward()
    elif form == "dense":
        dense(latents, table).backward()
    elif form == "cdist":
        with torch.no_grad():
            torch.cdist(latents, table).argmin(1)
    seconds = time.perf_counter() - start
    return {"peak_bytes": peak_bytes(), "seconds": seconds}


def dense(z, table):
    """The same losses by autograd on N x K matrices, as the papers' codes write them."""
    import torch

    distance = z.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * z @ table.T
    indices = distance.argmin(1)
    selected = table[indices]
    loss = 0.25 * (selected.detach() - z).square().mean() + (selected - z.detach()).square().mean()
    to_codes = z.detach().square().sum(1, keepdim=True) + table.square().sum(1) - 2 * z.detach() @ table.T
    weight = torch.softmax(-to_codes.detach() / 0.35, 1).scatter(1, indices[:, None], 0.0)
    return loss + 0.1 * (weight * to_codes).sum() / z.numel()


def floor(num_codes: int, dim: int, count: int) -> float:
    """Seconds of 6 N K d FLOP at the rate of torch.mm, plus N K exponentials."""
    import torch

    rows = min(count, 1024)
    z, e, pairs = torch.randn(rows, dim), torch.randn(dim, num_codes), torch.rand(rows, 4096)
    mm = min(_timed(lambda: torch.mm(z, e)) for _ in range(3)) / (rows * num_codes)
    exponential = min(_timed(lambda: torch.exp(pairs)) for _ in range(5)) / pairs.numel()
    return count * num_codes * (3 * mm + exponential)


def _timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-codes", type=int, default=65536)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--count", type=int, default=8192)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--json", help="also write the numbers here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    k, d, n = arguments.num_codes, arguments.dim, arguments.count
    if arguments.child == "floor":
        print(json.dumps({"seconds": floor(k, d, n)}))
        return
    if arguments.child:
        print(json.dumps(step(arguments.child, k, d, n)))
        return
    size = ["--num-codes", str(k), "--dim", str(d), "--count", str(n)]
    matrix = 4 * n * k
    base, bound = (in_fresh_process(__file__, what, *size) for what in ("none", "floor"))
    assert base is not None, "the process without the call failed"
    assert bound is not None, "the process that times the floor failed"
    least = bound["seconds"]
    print(f"N={n} K={k} d={d}; one N x K float32 matrix is {matrix / 1e6:.0f} MB; floor {least:.2f} s")
    results = {}
    for form in arguments.forms:
        measured = in_fresh_process(__file__, form, *size)
        if measured is None:
            print(f"{form:6s} did not finish (out of memory?)")
            continue
        extra = measured["peak_bytes"] - base["peak_bytes"]
        results[form] = {"extra_bytes": extra, "of_matrix": extra / matrix, "seconds": measured["seconds"]}
        times = f"{measured['seconds']:8.2f} s ({measured['seconds'] / least:5.1f} x floor)" if form != "cdist" else ""
        times = times or f"{measured['seconds']:8.2f} s (search only)"
        print(f"{form:6s} {extra / 1e6:8.0f} MB beyond parameters = {extra / matrix:.3f} x (N x K)   {times}")
    if "nsvq" in results and "dense" in results:
        ratio = {key: results["dense"][key] / results["nsvq"][key] for key in ("extra_bytes", "seconds")}
        print(f"dense / nsvq: {ratio['extra_bytes']:.0f} x the memory, {ratio['seconds']:.1f} x the time")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"num_codes": k, "dim": d, "count": n, "floor_seconds": least, "forms": results}, file, indent=1)


if __name__ == "__main__":
    main()
