# SPDX-License-Identifier: Apache-2.0
"""Fabric as runs use it. Importing it takes longer than torch itself, so only what trains imports this module."""

import logging
from datetime import timedelta
from typing import Any

from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn

# The others wait this long while the first process evaluates or writes a checkpoint.
PATIENCE = timedelta(hours=4)


class _CutAlready(DDPStrategy):
    """The same processes, without a wrapper: see `steadyvq.training.sharding`."""

    def setup_module(self, module: nn.Module) -> Any:
        return module


class _Wrapping(DDPStrategy):
    """A wrapper around what it has gradients to average of: not where all that is trained is a table cut among processes."""

    def setup_module(self, module: nn.Module) -> Any:
        trained = [p for p in module.parameters() if p.requires_grad and not getattr(p, "_ddp_ignored", False)]
        return super().setup_module(module) if trained else module


def make_fabric(precision: Any, devices: int, nodes: int, *, cuts: bool) -> Fabric:
    """Finds the devices of this process and the other processes.

    Args:
        precision: Of the forward, as Fabric names it.
        devices: Processes on this machine.
        nodes: Machines.
        cuts: Networks are cut up among several processes instead of copied.

    Raises:
        ValueError: More processes than devices.
    """
    options: dict[str, Any] = {}
    if devices * nodes > 1:
        kind = _CutAlready if cuts else _Wrapping
        options = {"strategy": kind(timeout=PATIENCE), "num_nodes": nodes}
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    try:
        fabric = Fabric(accelerator="auto", devices=devices, precision=precision, **options)
    except MisconfigurationException as error:
        raise ValueError(
            f"{devices} processes on this machine do not fit its devices ({error}): start as many as it has GPUs"
        ) from error
    fabric.launch()
    return fabric
