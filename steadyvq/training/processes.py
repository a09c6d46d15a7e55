# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: how many there are, which part of a batch is whose, and what they do together.

A launcher starts them (torchrun, or srun in a SLURM job); here they find each other. One process needs no launcher.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steadyvq.quantizers import ShardedQuantizer, across_processes
from steadyvq.quantizers.processes import in_one_process

Result = TypeVar("Result")

# Newer versions of torch have another name for it.
_KNOWN = inspect.signature(DistributedDataParallel.__init__).parameters
_BROADCAST = "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers"


class FailedElsewhere(Exception):
    """The first process failed at something that all depend on; it tells what.

    Attributes:
        bad_input: Whether the user can mend it.
    """

    def __init__(self, message: str, bad_input: bool) -> None:
        super().__init__(message, bad_input)  # both, so that a copy can be sent to the other processes
        self.bad_input = bad_input

    def __str__(self) -> str:
        return f"process 0: {self.args[0]}"


class Processes:
    """This process and those that train with it.

    Args:
        precision: Of the forward, as Fabric names it.
        strategy: What they share: all weights (`ddp`), or each a part of them (`fsdp`).

    Attributes:
        fabric: Devices, precision, the data-parallel wrapper.
        cuts: Whether the networks of a task are to be cut up among several processes.
        count: Number of processes.
        rank: Which one this is, from 0.

    Raises:
        ValueError: The environment of the launcher makes no sense.
    """

    def __init__(self, precision: Any = "32-true", strategy: Literal["ddp", "fsdp"] = "ddp") -> None:
        from steadyvq.training.fabric import make_fabric

        devices, nodes = launched(os.environ)
        self.count = devices * nodes
        self.cuts = strategy == "fsdp" and self.count > 1
        self.fabric = make_fabric(precision, devices, nodes, cuts=self.cuts)
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

    def gather(self, item: Result) -> list[Result]:
        """The items of all processes, in order."""
        if self.count == 1:
            return [item]
        items: list[Any] = [None] * self.count
        dist.all_gather_object(items, item)
        return items

    def wrap(self, module: nn.Module, *, all_used: bool = True) -> Any:
        """The module as the loop calls it: with autocast, and in several processes with gradients averaged over them.

        A wrapper waits for the gradient of every parameter that wants one when it is made, so a frozen part needs a new
        one. It leaves out tables that are cut among processes: their gradients are those of all latents already.

        Args:
            module: On its device already.
            all_used: Every such parameter gets a gradient in every step; if not, the wrapper looks for the others at
                each step, which takes time.
        """
        if self.count > 1 and not self.cuts:
            # Nothing is broadcast between steps: a codebook that is no function of the global batch must show.
            options = {_BROADCAST: False, "find_unused_parameters": not all_used}
            self.fabric.strategy._ddp_kwargs = options  # type: ignore[attr-defined]
            quantizers = [name for name, part in module.named_modules() if isinstance(part, ShardedQuantizer)]
            if quantizers:
                cut = [f"{name}.codes.base".removeprefix(".") for name in quantizers]
                leave_out = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
                leave_out(module, cut)  # type: ignore[no-untyped-call]
        return self.fabric.setup_module(module, move_to_device=False)

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
            FailedElsewhere: It failed in the first process, and this is another one.
        """
        if self.count == 1:
            return work()
        outcome: tuple[Any, FailedElsewhere | None] = (None, None)
        cause: Exception | None = None
        if self.is_first:
            try:
                outcome = (work(), None)
            except Exception as error:
                cause, outcome = error, (None, FailedElsewhere(str(error), isinstance(error, ValueError)))
        result, failure = self.fabric.broadcast(outcome)
        if failure is not None:
            raise cause or failure
        return result  # type: ignore[no-any-return]

    def close(self) -> None:
        """Waits for the others, so that none of them fails because this one has gone; see `leave`."""
        if self.count > 1:
            self.fabric.barrier()


def wrapped(model: nn.Module) -> bool:
    """Whether a wrapper averages the gradients of a model that `Processes.wrap` gave over processes."""
    return any(isinstance(part, DistributedDataParallel) for part in model.modules())


def leave(code: int) -> int:
    """Ends a process that belongs to a group; returns the exit code in one that does not.

    The interpreter's own end is skipped: it destroys gloo's threads while they may still wait for the interpreter, which
    aborts or hangs about one process in eight.
    """
    if dist.is_available() and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def launched(environment: Mapping[str, str]) -> tuple[int, int]:
    """How many processes a launcher has started: (per node, nodes); (1, 1) without one."""
    if "TORCHELASTIC_RUN_ID" in environment:
        _check_restarts(environment)
        total, local = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
        return local, total // local
    if "SLURM_NTASKS" in environment and "SLURM_PROCID" in environment:
        return _slurm(environment)
    return 1, 1


def _check_restarts(environment: Mapping[str, str]) -> None:
    """Workers of a restart that meet in the launcher's store find the addresses of dead ones there, and wait for them."""
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"torchrun may restart its workers {restarts} times, but they would look for the dead ones in the store that it "
            "shares with them and hang: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, or leave out --max-restarts"
        )


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
