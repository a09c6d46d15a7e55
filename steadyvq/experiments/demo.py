# SPDX-License-Identifier: Apache-2.0
"""The demo: a plain codebook dies and an NSVQ codebook lives, same photographs, same budget, same code path.

    steadyvq demo                      # four arms, minutes on a laptop
    steadyvq demo --data my_photos/

The arms differ from the base recipe in the keys that `recipes/demo.yaml` names, and in nothing else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steadyvq.data import load_collection
from steadyvq.experiments.arms import Arm, arm_configs, train_arms
from steadyvq.training.run import check_free

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
    """
    overrides: dict[str, Any] = {"seed": seed}
    if data:
        # A folder has no test split: its held-out photographs are the val split.
        overrides["data"] = {"source": data, "eval_split": "val"}
    configs = arm_configs("demo", arms, overrides, sets)
    jobs = [Arm(c, out / c.title, f"steadyvq demo --arms {c.title} --seed {seed}") for c in configs]
    for job in jobs:
        check_free(job.path)
    # Bad data is refused here, in one sentence, before any process starts.
    load_collection(configs[0].data.source, min_side=configs[0].data.crop_size, max_side=configs[0].data.max_side)
    train_arms(jobs)
    return [job.path for job in jobs]
