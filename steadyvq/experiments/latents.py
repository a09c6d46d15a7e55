# SPDX-License-Identifier: Apache-2.0
"""Latents of a real training run, kept for experiments without an encoder.

A cell leaves, in float16:

    stream.npy   (steps, N, d)     latents of every training batch, in their order
    probe.npy    (looks, M, d)     latents of fixed training photographs every few steps: those to fit k-means to
    judge.npy    (looks, M', d)    latents of other fixed crops, to judge on
    looks.npy    (looks,)          the step after which each look was taken
    best.npy     (looks,)          mean squared distance of `judge` to k-means codes fitted to `probe`
    kmeans.npy   (looks, K, d)     these codes
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from steadyvq.experiments.runner import fresh_run, run_config
from steadyvq.experiments.study import Cell, Computed, Trained, Values
from steadyvq.experiments.tracking import best_codes, distortion_of, explained, spread
from steadyvq.training.average import WeightAverage
from steadyvq.training.loop import Engine
from steadyvq.training.task import StepOutput
from steadyvq.training.tokenizer_task import TokenizerTask

_PROBES: dict[str, Any] = {
    "recipe": "quickstart",
    "probe": 160,
    "judge": 96,
    "codes": 1024,
    "iterations": 8,
    "source_cost": 10,
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {**_PROBES, "config": {"epochs": 3, "eval_every": 3}, "every": 25},
    "small": {
        **_PROBES,
        "config": {"epochs": 20, "eval_every": 20},
        "every": 50,
        "probe": 512,
        "judge": 256,
        "iterations": 15,
    },
    "full": {
        **_PROBES,
        "config": {
            "epochs": 50,
            "eval_every": 50,
            "data": {"epoch_samples": 6400},
            "batch_size": 32,
            "quantizer": {"num_codes": 4096},
        },
        "every": 50,
        "probe": 2048,
        "judge": 1024,
        "codes": 4096,
        "iterations": 20,
    },
}
"""Settings of the run whose latents are kept, by profile."""

PROBE_EPOCH = 1_000_000
"""Crops of an epoch that no run reaches."""


class DumpingTask(TokenizerTask):
    """A tokenizer's training that keeps the latents of its batches, and looks at a probe every few steps.

    Args:
        settings: `recipe`, its `config`, `every`, and `probe` and `judge`, crops to look at.
        seed: Of the run.
    """

    def __init__(self, settings: Mapping[str, Any], seed: int) -> None:
        super().__init__(run_config(Trained(settings["recipe"], settings["config"]), seed))
        self.every = settings["every"]
        count = settings["probe"] + settings["judge"]
        self._crops = self.train_crops.batch(PROBE_EPOCH, 0, min(count, len(self.train_crops)))
        if len(self._crops) < count:
            raise ValueError(f"probe and judge need {count} crops, but an epoch has {len(self._crops)}")
        self._fit = settings["probe"]
        self.stream: list[np.ndarray] = []
        self.looks: list[tuple[int, np.ndarray, np.ndarray]] = []

    def after_step(
        self, objective: str, outputs: Sequence[StepOutput], optimizer: Optimizer, average: WeightAverage
    ) -> Mapping[str, float | Tensor]:
        """Keeps the latents that the quantizer was shown."""
        z = torch.cat([output.extra.quantized.assignment.z for output in outputs])
        self.stream.append(z.detach().half().numpy())
        if len(self.stream) % self.every == 0:
            self._look()
        return super().after_step(objective, outputs, optimizer, average)

    @torch.no_grad()
    def _look(self) -> None:
        parts = [self.tokenizer.latents(batch).movedim(1, -1) for batch in torch.split(self._crops, 32)]
        latents = torch.cat(parts).half()
        fit, judge = (part.flatten(0, 2).numpy() for part in (latents[: self._fit], latents[self._fit :]))
        self.looks.append((len(self.stream), fit, judge))


def dump(cell: Cell) -> Values:
    """Trains, keeps the latents, and fits k-means to every look; tells how far and how linearly the encoder moved."""
    s = cell.settings
    task = DumpingTask(s, cell.seed)
    Engine(task, fresh_run(cell.folder, task.config), quiet=True).fit()
    steps, probes, judges = zip(*task.looks, strict=True)
    dumped = {"stream": np.stack(task.stream), "probe": np.stack(probes), "judge": np.stack(judges)}
    looks = [torch.from_numpy(probe).float() for probe in probes]
    codes = [best_codes(probe, s["codes"], cell.seed, iterations=s["iterations"]) for probe in looks]
    best = [distortion_of(torch.from_numpy(j).float(), table) for j, table in zip(judges, codes, strict=True)]
    dumped |= {"looks": np.array(steps), "best": np.array(best), "kmeans": torch.stack(codes).numpy()}
    for name, array in dumped.items():
        np.save(cell.folder / f"{name}.npy", array)
    moves = [movement(a, b) for a, b in pairwise(looks)]
    curve = {name: [[step, move[name]] for step, move in zip(steps[1:], moves, strict=True)] for name in moves[0]}
    means = {name: round(sum(move[name] for move in moves) / len(moves), 4) for name in moves[0]}
    return {**means, "curves": curve}


def movement(before: Tensor, after: Tensor) -> dict[str, float]:
    """How far a probe moved (in its spread), and how much of that a shift, a scale about the mean, an affine map explain."""
    moved = float((after - before).square().sum(1).mean())
    shift = after.mean(0) - before.mean(0)
    return {
        "drift": round((moved / max(spread(before), 1e-12)) ** 0.5, 4),
        "shift_r2": round(float(shift.square().sum()) / max(moved, 1e-12), 4),
        "affine_r2": round(explained(before, after), 4),
    }


def source(settings: Mapping[str, Any]) -> Computed:
    """The arm that makes the latents."""
    keys = ("recipe", "config", "every", "probe", "judge", "codes", "iterations")
    steps = settings["source_cost"]
    return Computed(dump, {key: settings[key] for key in keys}, hidden=True, steps=steps)


@dataclass(frozen=True)
class Dump:
    """Latents as a cell left them.

    Attributes:
        stream: (steps, N, d), read on demand.
        probe: (looks, M, d).
        judge: (looks, M', d).
        looks: Steps of the looks.
        best: Distortion of k-means at each look.
        kmeans: Its codes (looks, K, d).
    """

    stream: np.ndarray
    probe: np.ndarray
    judge: np.ndarray
    looks: list[int]
    best: list[float]
    kmeans: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "Dump":
        """Opens what `dump` wrote."""
        mapped = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("stream", "probe", "judge", "kmeans")
        }
        looks, best = (np.load(folder / f"{name}.npy").tolist() for name in ("looks", "best"))
        return cls(looks=looks, best=best, **mapped)

    def batch(self, step: int) -> Tensor:
        """The latents of a training batch (N, d)."""
        return as_tensor(self.stream[step])


def as_tensor(array: np.ndarray) -> Tensor:
    """Stored latents as float32."""
    return torch.from_numpy(np.array(array, dtype=np.float32))
