# SPDX-License-Identifier: Apache-2.0
"""How the networks of a task compute and lie in memory: compiled, with activations that are computed twice, or cut up.

Their names stay what they are, and so do checkpoints. All three concern the `Blocks` of a network, where time and memory
go. What lies between them stays eager: first and last convolutions, with the hooks that measure the adaptive weight there,
and the quantizer, whose search and statistics are kernels of their own that a compiler cannot fuse, and whose forward
depends on counters and stages that change in a run.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from steadyvq.models.blocks import Blocks
from steadyvq.training.average import WeightAverage
from steadyvq.training.config import RunConfig
from steadyvq.training.processes import Processes
from steadyvq.training.sharding import Cut, Shards
from steadyvq.training.tables import cut_tables
from steadyvq.training.task import Task


class Networks:
    """The networks of a task as its configuration wants them, with their optimisers and averages.

    Args:
        task: Its module is on its device and has its first weights.
        config: Of the run.
        processes: Those that train together.

    Attributes:
        cut: What is cut up among processes; None: every process has all of it.
        optimizers: Fabric's wrappers, by objective.
        average: Of the weights.

    Raises:
        ValueError: Compiling does not work here, or there is nothing to cut.
    """

    def __init__(self, task: Task, config: RunConfig, processes: Processes) -> None:
        self.task, self._processes = task, processes
        recompute(task.networks, config.activation_checkpointing)
        self._compiled = config.compile
        if config.compile:
            check_compiler(processes.fabric.device)
            compile_blocks(task.networks)
        self.cut: Cut | None = cut_tables(task.module)
        if processes.cuts:
            self.cut = Shards(*task.cuttable(), processes.fabric.device)
        self.optimizers: dict[str, Any] = {name: self._optimizer(name) for name in task.objectives}
        self.average = WeightAverage(task.averaged, config.optim.ema_decay)

    def _optimizer(self, objective: str) -> Any:
        optimizer = self.task.optimizer(objective)
        if self.cut is not None:
            self.cut.adopt(optimizer)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return self._processes.fabric.setup_optimizers(optimizer)

    def eager(self) -> AbstractContextManager[Any]:
        """Inside, what is compiled runs as it is written: evaluations are the same code in every run."""
        # Without a compiler in use it would be imported for nothing.
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    def whole(self) -> AbstractContextManager[None]:
        """Inside, the first process has networks that need no other process; all enter."""
        return nullcontext() if self.cut is None else self.cut.put_together()

    def state_dict(self) -> dict[str, Any]:
        """Modules, moments and averages, all of them whole in the first process; every process calls it."""
        optimizers = {name: optimizer.optimizer for name, optimizer in self.optimizers.items()}
        average = self.average.state_dict()
        if self.cut is None:
            moments = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
            return {"module": self.task.module.state_dict(), "optimizers": moments, "average": average}
        with self.whole():
            module = self.task.module.state_dict() if self._processes.is_first else {}
        moments = {name: self.cut.state_dict(optimizer) for name, optimizer in optimizers.items()}
        tensors, shadow = self.average.tensors, self.average.shadow
        average["shadow"] = {name: self.cut.gathered(tensors[name], own) for name, own in shadow.items()}
        return {"module": module, "optimizers": moments, "average": average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores moments and averages of `state_dict()`; the module has its weights already."""
        for name, optimizer in self.optimizers.items():
            moments = state["optimizers"][name]
            if self.cut is None:
                optimizer.optimizer.load_state_dict(moments)
            else:
                self.cut.load_state_dict(optimizer.optimizer, moments)
        average = state["average"]
        if self.cut is not None:
            tensors, shadow = self.average.tensors, average["shadow"]
            average = {**average, "shadow": {name: self.cut.part(like, shadow[name]) for name, like in tensors.items()}}
        self.average.load_state_dict(average)


def recompute(networks: Iterable[nn.Module], on: bool = True) -> int:
    """Keeps few activations of the blocks of these networks for backward, and computes the others again.

    Returns:
        How many rows of blocks, or networks that know how to do it, there are.
    """
    able: list[Any] = [part for network in networks for part in network.modules() if hasattr(part, "recompute")]
    for part in able:
        part.recompute = on
    return len(able)


def compile_blocks(networks: Iterable[nn.Module]) -> int:
    """Compiles the blocks of these networks in place: no module is wrapped, so no name changes.

    Returns:
        How many rows of blocks there are.
    """
    rows = [part for network in networks for part in network.modules() if isinstance(part, Blocks)]
    for row in rows:
        # A batch has one size, or two that differ by one; evaluations, which have others, are not compiled.
        row.compile(dynamic=False)
    return len(rows)


def check_compiler(device: torch.device) -> None:
    """Compiles one line, to find out whether that works here before anything depends on it.

    Raises:
        ValueError: It does not.
    """
    try:
        torch.compile(_one_line, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        needed = "a C++ compiler" if device.type == "cpu" else "Triton"
        raise ValueError(
            f"compile is true, but torch.compile does not work here ({reason}): install {needed}, or leave it with "
            "--set compile=false"
        ) from error


def _one_line(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x) + 1
