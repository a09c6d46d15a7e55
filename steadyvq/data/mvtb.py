# SPDX-License-Identifier: Apache-2.0
"""The built-in photographs: the colour photographs of the PyPI package mvtb-data, listed by scene.

The list is checked in (``mvtb_scenes.json``). It leaves out what is no colour photograph (grey series, binary shapes,
drawings, calibration targets, a painting) and the second file of one picture. Every scene, and every pair of scenes
with overlapping content, lies in one split: the whole campus walk is one scene because each frame overlaps the next.
"""

import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path


@dataclass(frozen=True)
class Scene:
    """Photographs of one place: its name, its split, and its files relative to the package's image folder."""

    name: str
    split: str
    files: tuple[str, ...]


@cache
def mvtb_scenes() -> tuple[Scene, ...]:
    """Return the checked-in list of scenes; it needs no package."""
    text = resources.files("steadyvq.data").joinpath("mvtb_scenes.json").read_text(encoding="utf-8")
    return tuple(Scene(entry["scene"], entry["split"], tuple(entry["files"])) for entry in json.loads(text)["scenes"])


def mvtb_files() -> list[tuple[str, Path, str]]:
    """Return (name, path, split) of every built-in photograph, sorted by name.

    Raises:
        ValueError: The package mvtb-data is not installed.
    """
    # find_spec locates the package without running its code.
    spec = importlib.util.find_spec("mvtbdata")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the built-in photographs come from the package mvtb-data: pip install mvtb-data "
            "(or pip install 'steadyvq[photos]'), or pass --data FOLDER"
        )
    folder = Path(spec.submodule_search_locations[0]) / "images"
    return sorted((name, folder / name, scene.split) for scene in mvtb_scenes() for name in scene.files)
