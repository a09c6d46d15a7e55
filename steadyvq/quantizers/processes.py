# SPDX-License-Identifier: Apache-2.0
"""Codebooks of data-parallel training: statistics, placement and replacement are functions of the global batch.

    model = DistributedDataParallel(model, broadcast_buffers=False)
    steadyvq.across_processes(model)

Gradients are the wrapper's business. What `update` and `init_from` do is ours: counts and sums are added over processes,
noise is drawn from (seed, number of updates), so that every process computes the same codebook bit for bit and nothing
need be broadcast; `broadcast_buffers=False` lets a missing sum show instead of hiding it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from steadyvq.quantizers.base import Quantizer, alone
from steadyvq.quantizers.shards import Shards


def across_processes(module: nn.Module, group: dist.ProcessGroup | None = None) -> int:
    """Lets every quantizer inside `module` count the latents of all processes; call it in each of them.

    Args:
        module: A model, wrapped or not.
        group: The processes that train together (None: all).

    Returns:
        How many processes these are.

    Raises:
        ValueError: torch.distributed was not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "across_processes was called in a process that belongs to no group: call torch.distributed.init_process_group "
            "first, or leave it out in a run of one process"
        )

    def reduce(tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    def gather(rows: Tensor) -> Tensor:
        return _concatenate(rows, group)

    for quantizer in _quantizers(module):
        quantizer.reduce, quantizer.gather = reduce, gather
    return dist.get_world_size(group)


def process_shards(group: dist.ProcessGroup | None = None) -> Shards:
    """The processes of a group as those that share a table; see `ShardedQuantizer`.

    Raises:
        ValueError: torch.distributed was not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "process_shards was called in a process that belongs to no group: call torch.distributed.init_process_group "
            "first, or leave `shards` out in a run of one process"
        )

    def reduced(tensor: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        total = tensor.detach().clone()
        dist.all_reduce(total, how, group=group)
        return total

    return Shards(
        rank=dist.get_rank(group),
        count=dist.get_world_size(group),
        sum=lambda tensor: reduced(tensor, dist.ReduceOp.SUM),
        minimum=lambda tensor: reduced(tensor, dist.ReduceOp.MIN),
        gather=lambda rows: _parts(rows, group),
        to_first=lambda rows: _at_first(rows, group),
    )


def in_one_process(module: nn.Module) -> None:
    """Undoes `across_processes`: what follows is done by one process, or by each for itself."""
    for quantizer in _quantizers(module):
        quantizer.reduce, quantizer.gather = alone, alone


def noise_from(module: nn.Module, position: int) -> None:
    """Tells every quantizer inside `module` where in the global batch the samples of its next forward begin.

    Noise is a function of that position, so it is the same for every cutting of the batch.
    """
    for quantizer in _quantizers(module):
        quantizer.first_item = position


def _quantizers(module: nn.Module) -> list[Quantizer]:
    return [part for part in module.modules() if isinstance(part, Quantizer)]


def _concatenate(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows (n, ...) of all processes, in the order of their ranks; n may differ between them."""
    return torch.cat(_parts(rows, group))


def _parts(rows: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Rows (n, ...) of each process."""
    sizes, padded = _padded(rows, group)
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def _at_first(rows: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Rows (n, ...) of each process, in the first one alone."""
    sizes, padded = _padded(rows, group)
    first = dist.get_rank(group) == 0
    parts = [torch.zeros_like(padded) for _ in sizes] if first else None
    dist.gather(padded, parts, dst=0 if group is None else dist.get_global_rank(group, 0), group=group)
    return [part[:size] for part, size in zip(parts or [], sizes, strict=first)]


def _padded(rows: Tensor, group: dist.ProcessGroup | None) -> tuple[list[int], Tensor]:
    """How many rows each process has, and this one's, as many as the largest number, which collectives want to be equal."""
    count = torch.tensor([rows.shape[0]], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, count, group=group)
    sizes = [int(c) for c in counts]
    padded = torch.zeros(max(sizes), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    padded[: rows.shape[0]] = rows.detach()
    return sizes, padded
