# SPDX-License-Identifier: Apache-2.0
"""One of two real processes that train with a table cut between them; test_sharded.py starts it.

python tests/sharded_process.py RANK COUNT PORT_FILE METHOD OUT
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import steadyvq
from steadyvq.quantizers.processes import process_shards
from steadyvq.quantizers.sharded import ShardedQuantizer

CODES, DIM, LATENTS, STEPS = 27, 5, 48, 14
OPTIONS: dict[str, dict[str, Any]] = {
    "vq": {},
    "nsvq": {"maintenance": {"replace": {"patience": 1.5, "cap": 0.2}}, "temperature": {"effective_losers": 4.0}},
    "per_code": {
        "maintenance": {"replace": {"patience": 1.5, "cap": 0.2}},
        "losses": {"ns": {"weight": 0.1, "per_code": True}},
    },
}


def data(step: int) -> tuple[Tensor, Tensor]:
    """Inputs (N, d) and a mask of unequal halves."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(LATENTS, DIM, generator=generator, dtype=torch.float64)
    return x, torch.rand(LATENTS, generator=generator) < torch.linspace(0.4, 1.0, LATENTS)


def method(name: str) -> str:
    return "vq" if name == "vq" else "nsvq"


def train(
    vq: steadyvq.Quantizer, rows: slice, mean: Callable[[list[nn.Parameter], Tensor], None], steps: range
) -> dict[str, Any]:
    """Trains an encoder of one matrix with the quantizer; returns what there is at the end."""
    encoder = nn.Linear(DIM, DIM).double()
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(DIM) * 0.5)
        encoder.bias.fill_(0.1)
    vq.double().train()
    optimizer = torch.optim.Adam([*encoder.parameters(), *vq.parameters()], lr=3e-2)
    replaced, tokens = [], []
    for step in steps:
        x, mask = (part[rows] for part in data(step))
        out = vq(encoder(x), mask)
        loss = out.loss + ((out.z_q - x).square() * mask[:, None]).sum() / (out.num_valid * DIM)
        optimizer.zero_grad()
        loss.backward()
        mean(list(encoder.parameters()), out.num_valid)
        optimizer.step()
        replaced.append(vq.update(out, optimizer=optimizer).get("replaced", 0.0))
        tokens.append(out.indices)
    return {"encoder": encoder.state_dict(), "replaced": replaced, "tokens": tokens, "optimizer": optimizer, "vq": vq}


def weighted_mean(parameters: list[nn.Parameter], valid: Tensor) -> None:
    """The gradient of the mean over the latents of all processes, as the training loop takes it."""
    total = valid.clone()
    dist.all_reduce(total)
    for parameter in parameters:
        parameter.grad.mul_(valid / total)
        dist.all_reduce(parameter.grad)


def main() -> None:
    rank, count = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=count)
    name, out = sys.argv[4], sys.argv[5]
    shards = process_shards()
    vq = ShardedQuantizer(method(name), CODES, DIM, shards, init="normal", **OPTIONS[name])
    share = LATENTS // 3  # unequal parts
    rows = slice(0, share) if rank == 0 else slice(share, LATENTS)
    found = train(vq, rows, weighted_mean, range(STEPS))
    optimizer = found.pop("optimizer")
    found |= {"state": vq.whole_state(), "moments": vq.whole_optimizer_state(optimizer), "own": len(vq.base)}
    del found["vq"]
    x, mask = (part[rows] for part in data(99))
    indices = vq.eval().encode(x, mask)
    found |= {"encoded": indices, "decoded": vq.decode(indices.clamp_min(0))}
    torch.save(found, f"{out}.{rank}")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo may abort at exit after a correct run


if __name__ == "__main__":
    main()
