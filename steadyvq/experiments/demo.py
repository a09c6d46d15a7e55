# SPDX-License-Identifier: Apache-2.0
"""The demo: a plain codebook dies and an NSVQ codebook lives, same photographs, same budget, same code path.

    steadyvq demo                      # five arms, minutes on a laptop
    steadyvq demo --data my_photos/

The arms differ from the base recipe in the keys that `recipes/demo.yaml` names, and in nothing else.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steadyvq.experiments.arms import Arm, arm_configs, check_place, train_arms
from steadyvq.training.config import with_absolute_paths
from steadyvq.training.loop import Engine
from steadyvq.training.photographs import load_photographs
from steadyvq.training.run import RunFolder, check_free
from steadyvq.training.tokenizer_task import TokenizerTask

NOTE = (
    "Every arm sees the same crops in the same order for the same number of steps, and is measured on photographs of "
    "scenes that none of them saw. What differs is named in the recipe (steadyvq/recipes/demo.yaml)."
)


def run_demo(
    out: Path, *, data: str | None, arms: Sequence[str] | None, seed: int, sets: Sequence[str] = ()
) -> list[Path]:
    """Trains the arms of the demo; returns their run folders.

    Args:
        out: Folder for the runs.
        data: A folder of images (None: the built-in photographs).
        arms: Which arms (None: all).
        seed: Of every arm.
        sets: Settings for all arms.

    Raises:
        ValueError: A setting, the data or the folder is not right; nothing was written.
        ArmFailed: An arm failed.
    """
    overrides: dict[str, Any] = {"seed": seed}
    if data is not None:
        # A folder has no test split: its held-out photographs are the val split.
        overrides["data"] = {"source": data, "eval_split": "val"}
    configs = [with_absolute_paths(config) for config in arm_configs("demo", arms, overrides, sets)]
    rest = [*(["--data", data] if data is not None else []), *(word for pair in sets for word in ("--set", pair))]
    jobs = [
        Arm(c, out / c.title, shlex.join(["steadyvq", "demo", "--arms", c.title, "--seed", str(seed), *rest]))
        for c in configs
    ]
    for job in jobs:
        check_place(job.path)
        check_free(job.path)
    _build_once(jobs)
    train_arms(jobs)
    return [job.path for job in jobs]


def _build_once(jobs: Sequence[Arm]) -> None:
    """Builds what every arm will build: what is wrong is said here, in one sentence, before any process starts."""
    photographs = load_photographs(jobs[0].config)
    for job in jobs:
        Engine(TokenizerTask(job.config, photographs), RunFolder(job.path, job.config), quiet=True)
