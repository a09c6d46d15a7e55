# SPDX-License-Identifier: Apache-2.0
"""What a monitor costs: a training loop with one beside the same loop without, in blocks of 100 steps that take turns.

On a busy machine two blocks of seconds differ by more than a monitor costs, so the time inside its calls is counted as well.

    OMP_NUM_THREADS=1 python benchmarks/monitor_cost.py
    OMP_NUM_THREADS=1 python benchmarks/monitor_cost.py --json docs/evidence/monitor_cost.json

CPU time counts. A block holds one row of the log with its close look and its probe of one batch, and twenty looks at the ages.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pairs import compared, machine
from speed import commit

import steadyvq
from steadyvq import Tokenizer, build_quantizer
from steadyvq.models.autoencoder import AutoencoderConfig

STEPS = 100
# (method, images in a step, side, K, d)
SIZES = [("vq", 16, 32, 512, 16), ("nsvq", 32, 32, 1024, 32), ("simvq", 8, 32, 16384, 64)]


class Timed(steadyvq.Monitor):
    """A monitor that counts the CPU time of its own calls."""

    spent = 0.0

    def _called(self, *arguments: Any) -> None:
        start = time.process_time()
        super()._called(*arguments)
        self.spent += time.process_time() - start

    def step(self, values: Any = None) -> Any:
        """One step; the probe's forward passes `_called` within it, which is counted once."""
        start, before = time.process_time(), self.spent
        row = super().step(values)
        self.spent = before + time.process_time() - start
        return row


def block(method: str, count: int, side: int, num_codes: int, dim: int, *, watched: bool) -> Callable[[], float]:
    """100 training steps of a small tokenizer."""
    torch.manual_seed(0)
    quantizer = build_quantizer(method, num_codes=num_codes, dim=dim, channel_axis=1)
    networks = AutoencoderConfig(16, (1, 2), num_res_blocks=1, num_mid_blocks=0, z_channels=dim, patch=2)
    model = Tokenizer.build(networks, quantizer)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images = torch.rand(256, 3, side, side) * 2 - 1
    monitor = Timed(quantizer, probe=(model, images[:count]), warn=False) if watched else None

    def run() -> float:
        start = time.process_time()
        spent = 0.0 if monitor is None else monitor.spent
        for step in range(STEPS):
            batch = images[torch.arange(step * count, (step + 1) * count) % len(images)]
            optimizer.zero_grad()
            reconstruction, out = model(batch)
            loss = (reconstruction - batch).square().mean()
            (loss + out.loss).backward()
            optimizer.step()
            quantizer.update(out, optimizer=optimizer)
            if monitor is not None:
                monitor.step({"reconstruction": loss})
        inside = 0.0 if monitor is None else monitor.spent - spent
        return inside / (time.process_time() - start - inside)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--pairs", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows = []
    for size in SIZES:
        inside: list[float] = []
        watched = block(*size, watched=True)
        row = compared(
            block(*size, watched=False),
            lambda own=inside, run=watched: own.append(run()),
            arguments.pairs,
            most_seconds=130,
        )
        row["inside"] = statistics.median(inside[1:])
        names = dict(zip(("method", "images", "side", "num_codes", "dim"), size, strict=True))
        rows.append({**names, "tokens": size[1] * (size[2] // 4) ** 2, **row})
        print(
            f"{size}: {row['ours_ms'] / STEPS:.1f} ms a step, with a monitor {100 * (row['ratio'] - 1):+.2f} % "
            f"[{100 * (row['low'] - 1):+.2f}, {100 * (row['high'] - 1):+.2f}] over {row['pairs']} pairs of {STEPS} steps; "
            f"inside its calls {100 * row['inside']:.2f} %",
            flush=True,
        )
    if arguments.json:
        record = {"experiment": "monitor_cost", "commit": commit(), "machine": machine(), "steps": STEPS, "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
