# SPDX-License-Identifier: Apache-2.0
"""Tables that are cut up among the processes of a run (`quantizer.sharded`): each has a part of codes, moments and averages.

Everything else of a tokenizer is whole in every process. For measuring and saving, the first process gets the ordinary
quantizer with the whole table, so files do not know how a run was cut.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from steadyvq.quantizers import Quantizer, ShardedQuantizer, process_shards
from steadyvq.quantizers.base import alone
from steadyvq.quantizers.sharded import check_shardable
from steadyvq.quantizers.shards import bytes_per_process
from steadyvq.training.config import RunConfig
from steadyvq.training.sharding import Cut

PLANNED = (1, 2, 4, 8, 16)
"""Numbers of processes of a plan where no launcher says how many there are."""


class Tables(Cut):
    """The cut tables of a run, in one of its processes.

    Args:
        homes: Modules, and the names of the sharded quantizers that are children of theirs.
    """

    def __init__(self, homes: list[tuple[nn.Module, str, ShardedQuantizer]]) -> None:
        self._homes = homes
        self._by_codes = {id(quantizer.base): quantizer for _, _, quantizer in homes}
        self.is_first = homes[0][2].shards.rank == 0
        here = sum(len(quantizer.base) for _, _, quantizer in homes)
        everywhere = sum(quantizer.num_codes for _, _, quantizer in homes)
        self.held = f"{here:,} of {everywhere:,} codes"
        self.elsewhere = sum(q.num_codes * q.dim - q.base.numel() for _, _, q in homes)

    def parts(self, optimizer: Optimizer) -> list[tuple[int, Tensor, Tensor]]:
        """See `Cut.parts`; the part that is stepped is the parameter itself."""
        own = [p for group in optimizer.param_groups for p in group["params"]]
        return [(i, p, p) for i, p in enumerate(own) if id(p) in self._by_codes]

    def gathered(self, like: Tensor, part: Tensor) -> Tensor:
        """See `Cut.gathered`; in memory of the CPU if it was cut."""
        quantizer = self._by_codes.get(id(like))
        if quantizer is None:
            return part
        rows = quantizer.shards.to_first(part)
        return torch.cat([own.cpu() for own in rows]) if rows else part.new_empty(0)

    def part(self, like: Tensor, all_of_it: Tensor) -> Tensor:
        """See `Cut.part`; needs no other process."""
        quantizer = self._by_codes.get(id(like))
        return all_of_it if quantizer is None else quantizer.codes.part(all_of_it)

    @contextmanager
    def put_together(self) -> Iterator[None]:
        """See `Cut.put_together`."""
        for parent, name, quantizer in self._homes:
            table = self.gathered(quantizer.base, quantizer.base.detach())
            if self.is_first:
                setattr(parent, name, quantizer.replicated({**quantizer.state_dict(), "codes.base": table}))
        try:
            yield
        finally:
            for parent, name, quantizer in self._homes:
                setattr(parent, name, quantizer)


def cut_tables(module: nn.Module) -> Tables | None:
    """The tables inside a module that are cut among processes; None if there are none."""
    children = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]
    homes = [(parent, name, child) for parent, name, child in children if isinstance(child, ShardedQuantizer)]
    return Tables(homes) if homes else None


def shard(whole: Quantizer, config: RunConfig) -> Quantizer:
    """The quantizer that this process trains: a part of `whole` where several processes train, else all of it.

    Raises:
        ValueError: It has parts that need the whole table in one place, or there are more processes than codes.
    """
    check_shardable(whole)
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return whole
    assert whole.spec is not None
    overrides = {key: value for key, value in whole.spec.items() if key not in ("name", "num_codes", "dim")}
    settings = config.quantizer
    part = ShardedQuantizer(settings.name, settings.num_codes, settings.dim, process_shards(), **overrides)
    part.weighed = True
    # Before training every process places the codes on the same latents.
    part.reduce, part.gather = alone, alone
    return part


def plan(config: RunConfig, processes: int) -> list[str]:
    """What every process will hold of a table that is cut up, one line for each number of processes.

    Args:
        config: Of the run.
        processes: How many there are; 1: nobody knows yet.
    """
    settings = config.quantizer
    latents = config.batch_size * (config.data.crop_size // config.model.downsampling) ** 2
    whole = settings.num_codes * settings.dim * 4 / 1e6
    lines = [
        f"{settings.num_codes:,} codes of dimension {settings.dim} cut among processes, {latents:,} latents in a step; MB in "
        f"each (the first also holds the whole table, {whole:,.0f}, while it evaluates and saves):"
    ]
    for count in (processes,) if processes > 1 else PLANNED:
        if count <= settings.num_codes:
            held = bytes_per_process(settings.num_codes, settings.dim, count, latents, averaged=True)
            parts = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in held.items())
            noun = "process" if count == 1 else "processes"
            lines.append(f"{count} {noun}: {sum(held.values()) / 1e6:,.0f} ({parts})")
    return lines
