# SPDX-License-Identifier: Apache-2.0
"""The demo: a plain codebook dies and an NSVQ codebook lives, same photographs, same budget, same code path.

    steadyvq demo                      # four arms, minutes on a laptop
    steadyvq demo --data my_photos/

The arms differ from the base recipe in the keys that `recipes/demo.yaml` names, and in nothing else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steadyvq.data import Collection
from steadyvq.quantizers.names import look_up
from steadyvq.training.config import RunConfig, read_recipe, resolve
from steadyvq.training.loop import Engine
from steadyvq.training.run import RunFolder, check_free
from steadyvq.training.strict import merge
from steadyvq.training.tokenizer_task import TokenizerTask, load_photographs


def arm_configs(
    recipe: str, arms: Sequence[str] | None, overrides: dict[str, Any], sets: Sequence[str]
) -> list[RunConfig]:
    """The configurations of the arms of a comparison recipe.

    Args:
        recipe: A recipe with `arms`: name -> the keys in which the arm differs.
        arms: Which of them (None: all).
        overrides: Keys for all arms.
        sets: `key=value` pairs for all arms.
    """
    data = dict(read_recipe(recipe))
    known: dict[str, Any] = data.pop("arms")
    chosen = list(known) if arms is None else list(arms)
    configs = []
    for arm in chosen:
        own = look_up("arm", arm, known)
        configs.append(resolve(merge(merge(data, {"title": arm}), merge(own, overrides)), sets))
    return configs


def train_arm(config: RunConfig, path: Path, photographs: Collection, command: str) -> Path:
    """Trains one configuration into a folder on photographs that are loaded already."""
    task = TokenizerTask(config, photographs)
    run = RunFolder.create(path, config, command)
    Engine(task, run).fit()
    return path


def run_demo(
    out: Path, *, data: str | None, arms: Sequence[str] | None, seed: int, sets: Sequence[str] = ()
) -> list[Path]:
    """Trains the arms of the demo one after the other; returns their run folders.

    Args:
        out: Folder for the runs.
        data: A folder of images (None: the built-in photographs).
        arms: Which arms (None: all).
        seed: Of every arm.
        sets: Settings for all arms.
    """
    overrides: dict[str, Any] = {"seed": seed, **({"data": {"source": data}} if data else {})}
    configs = arm_configs("demo", arms, overrides, sets)
    paths = [out / config.title for config in configs]
    for path in paths:
        check_free(path)
    photographs = load_photographs(configs[0])
    return [
        train_arm(config, path, photographs, f"steadyvq demo --arms {config.title} --seed {seed}")
        for config, path in zip(configs, paths, strict=True)
    ]
