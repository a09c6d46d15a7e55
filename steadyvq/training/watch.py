# SPDX-License-Identifier: Apache-2.0
"""A monitor inside our own trainer: what it measures becomes rows of the run's log, which `steadyvq doctor` reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steadyvq.diagnosis import Monitor, Record
from steadyvq.quantizers import Quantized, VectorQuantizer

LONGEST, SHORTEST = 100, 10
"""Bounds of the steps between two rows; within them there is one row per epoch."""


class CodebookWatch:
    """Watches the one table of a vector quantizer; drift is measured at the end of epochs, by the task's probe.

    Args:
        quantizer: What is trained.
        steps_per_epoch: Optimiser steps of an epoch.
    """

    def __init__(self, quantizer: VectorQuantizer, steps_per_epoch: int) -> None:
        self.quantizer = quantizer
        self._rows: list[dict[str, Any]] = []
        self.monitor = Monitor(
            quantizer,
            self._rows.append,
            every=min(LONGEST, max(SHORTEST, steps_per_epoch)),
            reduce=lambda tensor: quantizer.reduce(tensor),
            attach=False,
            warn=False,
        )

    def step(self, made: Sequence[Quantized], logs: Sequence[Mapping[str, Tensor]], *, encoder_learns: bool) -> None:
        """Shows the monitor the micro-batches of an optimiser step, with the losses that the doctor reads."""
        base = self.quantizer.codes.base
        parameter = base if isinstance(base, nn.Parameter) else None
        for out in made:
            seen, table = out.assignment, self.quantizer.codebook
            self.monitor.observe(
                Record(seen.z, seen.indices, table, parameter=parameter, trained=encoder_learns, stats=seen.stats)
            )
        names = {name: f"loss/{name}" for name in ("reconstruction", "adversarial") if f"loss/{name}" in logs[0]}
        self.monitor.step({name: torch.stack([log[key] for log in logs]).mean() for name, key in names.items()})

    def rows(self) -> list[dict[str, Any]]:
        """Rows since the last call."""
        rows, self._rows[:] = list(self._rows), []
        return rows
