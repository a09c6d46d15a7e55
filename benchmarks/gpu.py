# SPDX-License-Identifier: Apache-2.0
"""Speed on an NVIDIA card: search, the dense loss and whole steps, against what others use and the card's own limit.

    pip install -e '.[train,gpu]'                  # and what is to be compared: pykeops, flash-kmeans, cuvs, ...
    python benchmarks/gpu.py                       # everything
    python benchmarks/gpu.py --only search --quick
    python benchmarks/gpu.py --tune                # which tiles are the quickest on this card
    python benchmarks/gpu.py --json gpu.json

KeOps, flash-kmeans, RAFT, cuVS and vector-quantize-pytorch take part where they are installed; one that fails is told and
passed over. Both sides run in turns in one process and are timed by the card's own events; results are compared in the same
run. RAFT and cuVS wait for the card in every call, which is in their time; memory that torch did not hand out is not seen. The
floor is the time of the products alone, by torch.mm in bfloat16. Without a card it says so and ends.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import speed_dense
import torch
from pairs import interval
from speed import commit
from speed_search import cdist, expanded
from torch import Tensor
from torch.nn.functional import pad

import steadyvq
from steadyvq import kernels
from steadyvq.kernels import choice, reference, streaming, triton
from steadyvq.kernels.triton import tiles

DEVICE = "cuda"
Call = Callable[[], Any]
SEARCHES = [(32768, 65536, 128), (32768, 16384, 8), (32768, 1024, 32), (8192, 1 << 20, 128)]
DENSE = [(32768, 65536, 128), (8192, 16384, 64)]
# (images, side, K, d) of the whole step.
WHOLE = (16, 128, 65536, 128)
QUICK = [(2048, 4096, 64)]


def milliseconds(call: Call) -> float:
    """Time of one call on the card."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def compared(ours: Call, rival: Call, pairs: int) -> dict[str, Any]:
    """Median times, and how many times longer the rival takes, with 95 % of the medians of resamples."""
    for call in (ours, rival, ours, rival):
        call()
    times = []
    for i in range(pairs):
        # Whoever goes second finds the other's data in the caches: they take turns.
        first = milliseconds(ours) if i % 2 == 0 else 0.0
        other = milliseconds(rival)
        times.append((first or milliseconds(ours), other))
    ratios = [b / a for a, b in times]
    low, high = interval(ratios)
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    row = {"ours_ms": medians[0], "rival_ms": medians[1], "ratio": statistics.median(ratios), "low": low, "high": high}
    return {**row, "ours_mb": extra_mb(ours), "rival_mb": extra_mb(rival)}


def extra_mb(call: Call) -> float:
    """Peak memory of a call beyond what is held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def total_bytes() -> int:
    """Memory of the card."""
    return torch.cuda.get_device_properties(0).total_memory


def floor_ms(n: int, k: int, d: int) -> float:
    """Time of an N x d by d x K product by torch.mm in bfloat16, taken on at most 8,192 columns."""
    columns = min(k, 8192)
    a, b = (torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) for shape in ((n, d), (d, columns)))
    out = torch.empty(n, columns, device=DEVICE, dtype=torch.bfloat16)
    product = partial(torch.mm, a, b, out=out)
    product()
    return min(milliseconds(product) for _ in range(10)) * k / columns


class Rival(NamedTuple):
    """Another search.

    Attributes:
        name: For the table.
        make: (z, codes) -> a call that returns indices (N,); what can be prepared once is not timed.
        in_matrix: Holds N x K numbers at least.
        counted: Its memory is torch's, which alone is measured.
    """

    name: str
    make: Callable[[Tensor, Tensor], Call]
    in_matrix: bool = False
    counted: bool = True


def _streamed(z: Tensor, codes: Tensor) -> Call:
    return lambda: streaming.nearest(z, codes)[0]


def _cdist(z: Tensor, codes: Tensor) -> Call:
    return lambda: cdist(z, codes)


def _expanded(z: Tensor, codes: Tensor) -> Call:
    return lambda: expanded(z, codes)


def _compiled(z: Tensor, codes: Tensor) -> Call:
    search = torch.compile(expanded, dynamic=False)
    return lambda: search(z, codes)


def _keops(z: Tensor, codes: Tensor) -> Call:
    from pykeops.torch import LazyTensor

    pairs = ((LazyTensor(z[:, None]) - LazyTensor(codes[None])) ** 2).sum(2)
    return lambda: pairs.argmin(1)[:, 0]


def _flash_kmeans(z: Tensor, codes: Tensor) -> Call:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    # Its tiles hold all columns, in powers of two, and tensor cores take 16 at least: columns of zeros change no distance.
    width = max(16, 1 << (z.shape[1] - 1).bit_length())
    x, c = (pad(rows, (0, width - rows.shape[1]))[None].bfloat16().contiguous() for rows in (z, codes))
    squares = x.float().square().sum(-1)
    return lambda: euclid_assign_triton(x, c, squares)[0].long()


def _raft(z: Tensor, codes: Tensor) -> Call:
    # Until it moved to cuVS.
    from pylibraft.distance import fused_l2_nn_argmin

    return lambda: torch.as_tensor(fused_l2_nn_argmin(z, codes), device=DEVICE).reshape(-1).long()


def _cuvs(z: Tensor, codes: Tensor) -> Call:
    from cuvs.neighbors import brute_force

    index = brute_force.build(codes, metric="sqeuclidean")
    return lambda: torch.as_tensor(brute_force.search(index, z, 1)[1], device=DEVICE).reshape(-1).long()


RIVALS = (
    Rival("streamed torch tiles", _streamed),
    Rival("torch.cdist + argmin", _cdist, in_matrix=True),
    Rival("expanded matrix + argmin", _expanded, in_matrix=True),
    Rival("torch.compile of the expanded matrix", _compiled, in_matrix=True),
    Rival("KeOps argmin", _keops, counted=False),
    Rival("flash-kmeans assign, bfloat16", _flash_kmeans),
    Rival("RAFT fused L2 argmin", _raft, counted=False),
    Rival("cuVS brute force", _cuvs, counted=False),
)


def problem(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    made = (torch.randn(rows, d, device=DEVICE, generator=generator) / d**0.5 for rows in (n, k))
    z, codes = made
    return z, codes


def check(z: Tensor, codes: Tensor, indices: Tensor) -> None:
    """Ends the run if the search is not exact on 64 latents."""
    for part in torch.arange(0, len(z), max(1, len(z) // 64), device=DEVICE)[:64]:
        expected = reference.squared_distance(z[part], codes).min(0)
        assert int(indices[part]) == int(
            (reference.squared_distance(z[part], codes) == expected.values).nonzero()[0, 0]
        )


def search(quick: bool) -> Iterator[dict[str, Any]]:
    """One row for every size and rival that is installed and fits; a rival that fails has its reason in it."""
    for n, k, d in QUICK if quick else SEARCHES:
        z, codes = problem(n, k, d)
        found = kernels.nearest(z, codes)[0]
        check(z, codes, found)
        floor = floor_ms(n, k, d)
        # The expanded form holds three of these matrices at once.
        too_large = 3 * n * k * 4 > total_bytes() // 2
        for rival in RIVALS:
            if rival.in_matrix and too_large:
                continue
            row = {"what": "search", "size": [n, k, d], "rival": rival.name, "floor_ms": floor}
            try:
                theirs = rival.make(z, codes)
                indices = theirs()
                row |= compared(partial(kernels.nearest, z, codes), theirs, 5 if quick else 30)
            except ImportError:
                continue
            except Exception as error:
                # Other people's code on a card of any kind must not take the rows of all others along.
                yield {**row, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
                torch.cuda.empty_cache()
                continue
            if not rival.counted:
                row["rival_mb"] = None
            yield {**row, "agree": (indices == found).double().mean().item()}


def dense(quick: bool) -> Iterator[dict[str, Any]]:
    """Search, the non-stationary loss and its gradient of the codes."""
    for n, k, d in QUICK if quick else DENSE:
        z, codes = problem(n, k, d)
        leaf = codes.clone().requires_grad_()

        def ours(z: Tensor = z, leaf: Tensor = leaf) -> Tensor:
            indices, _ = kernels.nearest(z, leaf)
            return speed_dense.ours(z, leaf, indices)

        def matrices(z: Tensor = z, leaf: Tensor = leaf) -> Tensor:
            return speed_dense.on_matrices(z, leaf, cdist(z, leaf.detach()))

        # Eight matrices in float64.
        few = slice(0, max(1, min(n, total_bytes() // (4 * 64 * k))))
        exact = speed_dense.on_matrices(z[few].double(), leaf.double(), kernels.nearest(z[few], codes)[0])
        error = float((ours(z[few]) - exact).abs().max() / exact.abs().max())
        fits = 8 * n * k * 4 <= total_bytes()
        row = compared(ours, matrices if fits else ours, 3 if quick else 15)
        rival = "autograd on N x K" if fits else "itself: N x K does not fit"
        yield {
            "what": "search + NS",
            "size": [n, k, d],
            "rival": rival,
            **row,
            "floor_ms": floor_ms(n, k, d),
            "error": error,
        }


def steps(quick: bool) -> Iterator[dict[str, Any]]:
    """A whole step of a tokenizer with `nsvq` beside the same with `simvq`, and moving averages beside another library's."""
    from speed_step import quantizer_step, whole_step

    count, side, k, d = (1, 32, 64, 128) if quick else WHOLE
    images = torch.rand(count, 3, side, side, device=DEVICE) * 2 - 1
    ours, rival = whole_step("simvq", images, k, d), whole_step("nsvq", images, k, d)
    yield {
        "what": "whole step simvq",
        "size": [count, side, k],
        "rival": "nsvq",
        **compared(ours, rival, 5 if quick else 20),
    }
    with contextlib.suppress(ImportError):
        from vector_quantize_pytorch import VectorQuantize

        n, k, d = QUICK[0] if quick else (32768, 1024, 64)
        z = torch.randn(n, d, device=DEVICE, requires_grad=True)
        mine = quantizer_step(steadyvq.build_quantizer("ema", num_codes=k, dim=d).to(DEVICE), z)
        other = VectorQuantize(dim=d, codebook_size=k).to(DEVICE)

        def theirs() -> None:
            z_q, _, loss = other(z[None])
            (z_q.sum() + loss.sum()).backward()

        yield {
            "what": "ema",
            "size": [n, k, d],
            "rival": "vector-quantize-pytorch",
            **compared(mine, theirs, 5 if quick else 30),
        }


def tune(quick: bool) -> Iterator[dict[str, Any]]:
    """Times of the search for all candidates of tiles."""
    for n, k, d in QUICK if quick else SEARCHES:
        z, codes = problem(n, k, d)
        for candidate in tiles.SEARCH_CANDIDATES:
            for products in (1, 3):
                call = partial(triton.nearest, z, codes, tiles=candidate, products=products)
                row = {"what": "tiles", "size": [n, k, d], "tiles": list(candidate), "products": products}
                try:
                    call()
                    yield {**row, "ours_ms": min(milliseconds(call) for _ in range(10))}
                except Exception as error:
                    # Most likely more shared memory than this card has.
                    yield {**row, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


GROUPS = {"search": search, "dense": dense, "step": steps}


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    text = f"{row['what']} {' x '.join(map(str, row['size']))}: "
    if "failed" in row:
        return f"{text}{row.get('rival') or row['tiles']} did not run ({row['failed']})"
    text += f"{row['ours_ms']:.3f} ms"
    if "floor_ms" in row:
        text += f" = {row['ours_ms'] / row['floor_ms']:.2f} x floor"
    if "tiles" in row:
        return f"{text}, tiles {row['tiles']}, products {row['products']}"
    theirs = "memory not torch's" if row["rival_mb"] is None else f"{row['rival_mb']:.0f} MB"
    text += f", {row['ours_mb']:.0f} MB; {row['rival']} {row['rival_ms']:.3f} ms, {theirs}"
    text += f" = {row['ratio']:.3f} x [{row['low']:.3f}, {row['high']:.3f}]"
    extra = {"agree": "same codes {:.2%}", "error": "error of the gradient {:.1e}"}
    return text + "".join(", " + form.format(row[name]) for name, form in extra.items() if name in row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=GROUPS, help="one group instead of all")
    parser.add_argument("--quick", action="store_true", help="small sizes and few pairs: does it run at all?")
    parser.add_argument("--tune", action="store_true", help="time the candidates of tiles instead")
    parser.add_argument("--json", type=Path, help="write the record here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device here: run this where torch.cuda.is_available() is true", file=sys.stderr)
        return 2
    chosen = choice.search_choice(1, 1, 1, device=DEVICE)
    machine = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "kernel": chosen.backend}
    print(machine, chosen.reason, triton.failed(torch.device(DEVICE, 0)), flush=True)
    if arguments.tune and chosen.backend != "triton":
        print(f"there are no tiles to tune: {chosen.reason}", file=sys.stderr)
        return 2
    groups = [tune] if arguments.tune else [GROUPS[arguments.only]] if arguments.only else list(GROUPS.values())
    record = {"machine": machine, "commit": commit(), "quick": arguments.quick, "rows": []}
    for group in groups:
        for row in group(arguments.quick):
            print(line(row), flush=True)
            record["rows"].append(row)
            if arguments.json:
                arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
