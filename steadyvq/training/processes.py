# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: how many there are, which part of a batch is whose, and what they do together.

A launcher starts them (torchrun, or srun in a SLURM job); here they find each other. One process needs no launcher.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn

from steadyvq.quantizers import across_processes
from steadyvq.quantizers.processes import in_one_process

Result = TypeVar("Result")

# The others wait this long while the first process evaluates or writes a checkpoint.
PATIENCE = timedelta(hours=4)


class ElsewhereError(OSError):
    """The first process failed at something that all depend on; it tells what."""


class Processes:
    """This process and those that train with it.

    Args:
        precision: Of the forward, as Fabric names it.

    Attributes:
        fabric: Devices, precision, the data-parallel wrapper.
        count: Number of processes.
        rank: Which one this is, from 0.

    Raises:
        ValueError: The environment of the launcher makes no sense.
    """

    def __init__(self, precision: Any = "32-true") -> None:
        devices, nodes = launched(os.environ)
        self.count = devices * nodes
        options: dict[str, Any] = {}
        if self.count > 1:
            # Nothing is broadcast between steps: a codebook that is no function of the global batch must show.
            strategy = DDPStrategy(broadcast_buffers=False, find_unused_parameters=True, timeout=PATIENCE)
            options = {"strategy": strategy, "num_nodes": nodes}
        self.fabric = Fabric(accelerator="auto", devices=devices, precision=precision, **options)
        self.fabric.launch()
        self.rank = self.fabric.global_rank

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def shares(self, total: int, largest: int | None = None) -> list[range]:
        """Positions of a global batch that this process handles, one range per micro-batch, in order.

        Args:
            total: Size of the global batch.
            largest: Most items in one micro-batch (None: no limit).

        Raises:
            ValueError: There are more processes than items.
        """
        if total < self.count:
            raise ValueError(
                f"batch_size is {total}, but {self.count} processes share it: give every process at least one item"
            )
        parts = 1 if largest is None else min(total // self.count, -(-total // (self.count * largest)))
        own = _cut(range(total), self.count)[self.rank]
        return _cut(own, parts)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each."""
        if self.count == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def connect(self, module: nn.Module) -> None:
        """Quantizers inside `module` count the latents of all processes from now on."""
        if self.count > 1:
            across_processes(module)

    @contextmanager
    def alone(self, module: nn.Module) -> Iterator[None]:
        """Inside this context quantizers wait for no other process."""
        in_one_process(module)
        try:
            yield
        finally:
            self.connect(module)

    def first(self, work: Callable[[], Result]) -> Result:
        """Lets the first process do something and gives its result to all; they fail together.

        Raises:
            ElsewhereError: It failed in the first process, and this is another one.
        """
        if self.count == 1:
            return work()
        outcome: tuple[Any, str | None] = (None, None)
        failure: Exception | None = None
        if self.is_first:
            try:
                outcome = (work(), None)
            except Exception as error:
                failure, outcome = error, (None, str(error))
        result, message = self.fabric.broadcast(outcome)
        if failure is not None:
            raise failure
        if message is not None:
            raise ElsewhereError(f"process 0: {message}")
        return result  # type: ignore[no-any-return]

    def close(self) -> None:
        """Leaves the group, so that no process aborts at its end because another one has gone already."""
        if self.count > 1 and dist.is_initialized():
            self.fabric.barrier()
            dist.destroy_process_group()


def launched(environment: Mapping[str, str]) -> tuple[int, int]:
    """How many processes a launcher has started: (per node, nodes); (1, 1) without one."""
    if "TORCHELASTIC_RUN_ID" in environment:
        total, local = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
        return local, total // local
    if "SLURM_NTASKS" in environment and "SLURM_PROCID" in environment:
        return _slurm(environment)
    return 1, 1


def _slurm(environment: Mapping[str, str]) -> tuple[int, int]:
    if environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return 1, 1
    total, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", 1))
    if total % nodes or (total > 1 and "SLURM_NTASKS_PER_NODE" not in environment):
        raise ValueError(
            f"SLURM started {total} tasks on {nodes} nodes, but every node needs the same number: ask for "
            "--nodes and --ntasks-per-node in the job script"
        )
    return total // nodes, nodes


def _cut(positions: range, parts: int) -> list[range]:
    """Consecutive ranges whose sizes differ by one at most, the larger ones first."""
    size, rest = divmod(len(positions), parts)
    bounds = [positions.start + i * size + min(i, rest) for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generator in one step of one process, for what models draw, such as dropout."""
    # Any injective mixing would do; 63 bits is what torch takes without a sign.
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % (1 << 63)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes torch's generators a function of the position in the run."""
    torch.manual_seed(step_seed(seed, step, rank))
