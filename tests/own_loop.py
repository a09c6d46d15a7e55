# SPDX-License-Identifier: Apache-2.0
"""A user's own data-parallel loop, as a process of one or several: python tests/own_loop.py RESULT."""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import steadyvq

STEPS, ITEMS = 30, 9


def main(result: str) -> None:
    """Trains on fixed random features; the first of two processes has 6 of the 9 samples of each batch."""
    several = "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    encoder = torch.nn.Linear(6, 4)
    vq = steadyvq.build_quantizer("nsvq", num_codes=24, dim=4, maintenance={"replace": {"patience": 1.0, "cap": 0.1}})
    model = torch.nn.ModuleDict({"encoder": encoder, "vq": vq}).double()
    forward = Forward(model)
    own = slice(None)
    if several:
        dist.init_process_group("gloo")
        own = slice(0, 6) if rank == 0 else slice(6, 9)
        forward = DistributedDataParallel(forward, broadcast_buffers=False)
        out = vq(encoder(features(0)[own]))
        vq.update(out)  # forgets across_processes, and is told
        with torch.no_grad():
            for buffer in vq.maintenance.buffers():
                buffer.zero_()
            vq.updates.zero_()
        steadyvq.across_processes(model)
    vq.init_from(encoder(features(99)[own]), seed=1)
    placed = vq.codebook()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    replaced = 0.0
    for step in range(STEPS):
        out = forward(features(step)[own])
        # The wrapper takes the mean over processes; unequal shares are weighted by what they hold.
        share = out.num_valid * (dist.get_world_size() if several else 1) / vq.reduce(out.num_valid)
        optimizer.zero_grad()
        (out.loss * share + 0 * out.z_q.sum()).backward()
        optimizer.step()
        replaced += vq.update(out, optimizer=optimizer)["replaced"]
    if rank == 0:
        torch.save({"placed": placed, "table": vq.codebook(), "replaced": replaced}, result)
    if several:
        dist.barrier()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that takes its time to end


class Forward(torch.nn.Module):
    """What the wrapper wraps."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        return self.parts["vq"](self.parts["encoder"](x))


def features(step):
    """(ITEMS, 16, 6) normal numbers, the same in every process."""
    return torch.randn(ITEMS, 16, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


if __name__ == "__main__":
    main(sys.argv[1])
