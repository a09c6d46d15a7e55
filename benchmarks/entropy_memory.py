# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of LFQ's entropies, forward and backward, beside the dense form with its N x K matrices.

    OMP_NUM_THREADS=1 python benchmarks/entropy_memory.py                 # K = 65,536, N = 8,192
    OMP_NUM_THREADS=1 python benchmarks/entropy_memory.py --forms lfq --json out.json

Every form runs in a fresh process. Its peak is `ru_maxrss` less that of a process that does the same except for the call.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

FORMS = ("lfq", "dense")


def step(form: str, bits: int, count: int) -> dict[str, float]:
    """One forward and backward of a form; `none` does everything but the call."""
    import torch

    import steadyvq

    latents = (0.05 * torch.randn(count, bits, generator=torch.Generator().manual_seed(0))).requires_grad_()
    latents.grad = torch.zeros_like(latents)
    vq = steadyvq.build_quantizer("lfq", num_codes=2**bits, dim=bits, losses={"commitment": None})
    # The libraries' own start-up (thread pools, code caches) is no part of the form.
    small = steadyvq.build_quantizer("lfq", num_codes=64, dim=6, losses={"commitment": None})
    small(torch.zeros(64, 6, requires_grad=True)).loss.backward()
    value, start = 0.0, time.perf_counter()
    if form != "none":
        loss = vq(latents).loss if form == "lfq" else dense(latents, bits)
        loss.backward()
        value = loss.item()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak, "seconds": seconds, "loss": value, "grad_norm": latents.grad.norm().item()}


def dense(z, bits: int):
    """The same losses from the softmax over all codes, by autograd."""
    import torch

    codes = 2.0 * (torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1) - 1
    log_p = torch.log_softmax(2 * z @ codes.T / 0.01, 1)
    p = log_p.exp()
    mean = p.mean(0)
    return 0.1 * (mean * (mean + 1e-5).log()).sum() - 0.1 * (p * log_p).sum(1).mean()


def in_fresh_process(form: str, bits: int, count: int) -> dict[str, float] | None:
    """The numbers of a form, measured in a process of its own; None if it did not finish."""
    command = [sys.executable, __file__, "--child", form, "--bits", str(bits), "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=16, help="log2 of the number of codes")
    parser.add_argument("--count", type=int, default=8192)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--json", help="also write the numbers here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    bits, count = arguments.bits, arguments.count
    if arguments.child:
        print(json.dumps(step(arguments.child, bits, count)))
        return
    matrix = 4 * count * 2**bits
    base = in_fresh_process("none", bits, count)
    assert base is not None, "the process without the call failed"
    print(f"N={count} K={2**bits}; one N x K float32 matrix is {matrix / 1e6:.0f} MB")
    results = {}
    for form in arguments.forms:
        measured = in_fresh_process(form, bits, count)
        if measured is None:
            print(f"{form:6s} did not finish (out of memory?)")
            continue
        extra = measured.pop("peak_bytes") - base["peak_bytes"]
        results[form] = {"extra_bytes": extra, "of_matrix": extra / matrix, **measured}
        print(
            f"{form:6s} {extra / 1e6:8.0f} MB = {extra / matrix:.3f} x (N x K)   {measured['seconds']:8.2f} s   "
            f"loss {measured['loss']:.6f}, gradient {measured['grad_norm']:.6e}"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"num_codes": 2**bits, "count": count, "forms": results}, file, indent=1)


if __name__ == "__main__":
    main()
