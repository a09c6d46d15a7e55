# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of one training step of methods that couple all latents with all codes, beside their dense forms.

    OMP_NUM_THREADS=1 python benchmarks/streamed_memory.py                  # K = 65,536; N = 8,192, dense N = 1,024
    OMP_NUM_THREADS=1 python benchmarks/streamed_memory.py --cases ibq --no-dense --json out.json

A step is forward, backward and `update`. The dense form is written out below with N x K matrices and autograd, as papers' codes
have it; it runs with fewer latents, because it holds several such matrices. Memory is beyond what a process holds that does
everything except for the call. Results (loss, gradients, new codes) are compared in float64, where both forms must agree, and
those of float32 with the dense form in float64: there, rounding alone tells them apart, which the dense form in float32 shows.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from fresh import in_fresh_process, peak_bytes

CASES = {
    "lfq": ("lfq", {"losses": {"commitment": None}}),
    "ibq": ("ibq", {}),
    "cvq": ("cvq", {"init": "normal"}),
    "cvq-probabilistic": ("cvq", {"init": "normal", "maintenance": {"anchor": {"anchors": "probabilistic"}}}),
}
"""Name -> the method and its options."""


def step(case: str, form: str, num_codes: int, dim: int, count: int, dtype: str, results: str) -> dict[str, float]:
    """One training step of a form (`streamed` or `dense`); `none` does everything but the call."""
    import torch

    import steadyvq

    def run(form, num_codes, dim, z):
        vq = steadyvq.build_quantizer(CASES[case][0], num_codes=num_codes, dim=dim, **CASES[case][1]).to(z.dtype)
        parameters = [z, *vq.parameters()]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        start = time.perf_counter()
        found = FORMS[form](vq, z, case) if form != "none" else {}
        seconds = time.perf_counter() - start
        return seconds, {**found, **{f"gradient {n}": p.grad for n, p in enumerate(parameters)}}

    torch.manual_seed(0)
    z = (SCALE.get(case, 1.0) * torch.randn(count, dim)).to(getattr(torch, dtype)).requires_grad_()
    # The libraries' own start-up (thread pools, code caches) is no part of the form.
    run("streamed", 64, 6, torch.randn(64, 6, dtype=z.dtype, requires_grad=True))
    seconds, found = run(form, num_codes, dim, z)
    peak = peak_bytes()
    if results != "-":
        torch.save({name: tensor.detach().double() for name, tensor in found.items()}, results)
    return {"peak_bytes": peak, "seconds": seconds}


def streamed(vq, z, case):
    """The method of the package."""
    out = vq(z)
    (out.loss + (out.z_q * upstream(z)).sum()).backward()
    vq.update(out)
    return {"loss": out.loss, "codes": vq.codebook()} if CASES[case][0] == "cvq" else {"loss": out.loss}


def upstream(z):
    """A gradient of z_q, as a decoder would send it."""
    import torch

    return torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z) / z.shape[0]


def dense(vq, z, case):
    """The same step with N x K matrices."""
    return DENSE[CASES[case][0]](vq, z, case)


def dense_lfq(vq, z, case):
    import torch

    bits = z.shape[1]
    codes = 2.0 * (torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1).to(z) - 1
    log_p = torch.log_softmax(2 * z @ codes.T / 0.01, 1)
    p = log_p.exp()
    mean = p.mean(0)
    loss = 0.1 * (mean * (mean + 1e-5).log()).sum() - 0.1 * (p * log_p).sum(1).mean()
    z_q = z + (z.sign() - z).detach()
    (loss + (z_q * upstream(z)).sum()).backward()
    return {"loss": loss}


def dense_ibq(vq, z, case):
    import torch

    (table,) = vq.parameters()
    logits = z @ table.T
    p = logits.softmax(1)
    hard = torch.zeros_like(p).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    z_q, picked = (hard + p - p.detach()) @ table, hard @ table
    loss = (
        (z_q - z).square().mean() + (picked.detach() - z).square().mean() + 0.25 * (picked - z.detach()).square().mean()
    )
    log_p = (logits / 0.01).log_softmax(1)
    p = log_p.exp()
    mean = p.mean(0)
    loss = loss + 0.05 * (torch.xlogy(mean, mean.clamp_min(1e-37)).sum() - (p * log_p).sum(1).mean())
    (loss + (z_q * upstream(z)).sum()).backward()
    return {"loss": loss}


def dense_cvq(vq, z, case):
    import torch

    (table,) = vq.parameters()
    num_codes = table.shape[0]
    with torch.no_grad():
        distance = z.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * z @ table.T
        indices = distance.argmin(1)
        use = 0.01 * torch.nn.functional.one_hot(indices, num_codes).to(z).mean(0)
        share = (-use * num_codes * 10 / 0.01 - 1e-3).exp()[:, None]
        if case == "cvq-probabilistic":
            distance = distance - gumbel(vq, z, num_codes)
        codes = (1 - share) * table + share * z[distance.argmin(0)]
    selected = table[indices]
    loss = 0.25 * (selected.detach() - z).square().mean() + (selected - z.detach()).square().mean()
    z_q = z + (selected - z).detach()
    (loss + (z_q * upstream(z)).sum()).backward()
    return {"loss": loss, "codes": codes}


def gumbel(vq, z, num_codes):
    """The noise (N, K) that the streamed draw of anchors meets: the same numbers, all at once."""
    import torch

    from steadyvq.quantizers import noise

    rows = torch.arange(num_codes).split(1024)
    parts = [
        noise.Noise.at(vq.seed, vq.updates + 1, r).gumbel(z.shape[0], noise.MAINTENANCE, dtype=z.dtype) for r in rows
    ]
    return torch.cat(parts).T


FORMS = {"streamed": streamed, "dense": dense}
DENSE = {"lfq": dense_lfq, "ibq": dense_ibq, "cvq": dense_cvq}
SCALE = {"lfq": 0.05}


def difference(a: str, b: str) -> float:
    """The largest relative difference of two files of results: of each tensor, |a - b| / |b| in the Euclidean norm."""
    import torch

    found, expected = torch.load(a), torch.load(b)
    assert found.keys() == expected.keys()
    return max(float((found[k] - expected[k]).norm() / expected[k].norm()) for k in found)


def measure(
    case: str, form: str, size: tuple[int, int, int], dtype: str = "float32", results: str = "-"
) -> dict | None:
    """Memory and time of a form, and the share of memory in one N x K float32 matrix; None if it did not finish."""
    found = in_fresh_process(__file__, case, form, *size, dtype, results)
    base = in_fresh_process(__file__, case, "none", *size, dtype, "-")
    assert base is not None, "the process without the call failed"
    if found is None:
        return None
    extra = found["peak_bytes"] - base["peak_bytes"]
    matrix = 4 * size[0] * size[2]
    return {"count": size[2], "extra_bytes": extra, "of_matrix": extra / matrix, "seconds": found["seconds"]}


def compare(case: str, size: tuple[int, int, int], folder: Path) -> tuple[dict[str, float], dict | None]:
    """Differences from the dense form in float64, and the memory of the dense form in float32."""
    files = {}
    for form in ("streamed", "dense"):
        for dtype in ("float64", "float32"):
            files[form, dtype] = str(folder / f"{form}-{dtype}.pt")
    memory = measure(case, "dense", size, "float32", files["dense", "float32"])
    rest = [key for key in files if key != ("dense", "float32")]
    if memory is None or None in [in_fresh_process(__file__, case, f, *size, t, files[f, t]) for f, t in rest]:
        return {}, memory
    exact = files.pop(("dense", "float64"))
    return {f"{form} {dtype}": difference(file, exact) for (form, dtype), file in files.items()}, memory


def report(case: str, name: str, measured: dict | None) -> None:
    """One line of a form."""
    if measured is None:
        print(f"{case:18s} {name:9s} did not finish (out of memory?)")
        return
    megabytes, share = measured["extra_bytes"] / 1e6, measured["of_matrix"]
    n, seconds = measured["count"], measured["seconds"]
    print(f"{case:18s} {name:9s} N={n:5d} {megabytes:8.0f} MB = {share:7.3f} x (N x K)  {seconds:8.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=16, help="log2 of the number of codes")
    parser.add_argument("--dim", type=int, default=32, help="features (LFQ has one per bit)")
    parser.add_argument("--count", type=int, default=8192)
    parser.add_argument("--dense-count", type=int, default=1024)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--no-dense", action="store_true", help="the streamed form alone")
    parser.add_argument("--json", help="also write the numbers here")
    arguments = parser.parse_args()
    num_codes = 2**arguments.bits
    print(
        f"K={num_codes}; one N x K float32 matrix at N={arguments.count} is {4 * arguments.count * num_codes / 1e6:.0f} MB"
    )
    results = {}
    for case in arguments.cases:
        dim = arguments.bits if case == "lfq" else arguments.dim
        results[case] = {"streamed": measure(case, "streamed", (num_codes, dim, arguments.count))}
        report(case, "streamed", results[case]["streamed"])
        if arguments.no_dense:
            continue
        with tempfile.TemporaryDirectory() as folder:
            differences, dense = compare(case, (num_codes, dim, arguments.dense_count), Path(folder))
        report(case, "dense", dense)
        print(
            f"{case:18s} from dense float64: " + ", ".join(f"{k} {v:.1e}" for k, v in differences.items()), flush=True
        )
        results[case] |= {"dense": dense, "differences": differences}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"num_codes": num_codes, "cases": results}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        case, form, *size, dtype, results = sys.argv[2:]
        print(json.dumps(step(case, form, *map(int, size), dtype, results)))
    else:
        main()
