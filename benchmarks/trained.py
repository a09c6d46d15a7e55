# SPDX-License-Identifier: Apache-2.0
"""Latents and codes as after training: of a small tokenizer trained on photographs, with codes placed on its latents."""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from steadyvq import Tokenizer
from steadyvq.data import EvaluationCrops, load_collection, to_float


@functools.cache
def _tokenizer(dim: int) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        sets = [f"quantizer.dim={dim}", "epochs=3", "eval_every=3", "checkpoint_every=3"]
        words = ["train", "quickstart", "--quantizer", "nsvq", "--out", str(out)]
        command = [sys.executable, "-c", "from steadyvq.cli import main; raise SystemExit(main())", *words]
        subprocess.run([*command, *(w for s in sets for w in ("--set", s))], check=True, capture_output=True)
        return Tokenizer.from_pretrained(out / "tokenizer").eval()


@functools.cache
def _latents(dim: int, count: int) -> Tensor:
    """(count, dim) latents of crops of the built-in photographs, shuffled."""
    side = 32
    tokenizer = _tokenizer(dim)
    per_crop = (side // tokenizer.downsampling) ** 2
    crops = EvaluationCrops(load_collection("mvtb"), side, -(-count // per_crop)).images
    with torch.no_grad():
        parts = [tokenizer.latents(to_float(part)) for part in crops.split(64)]
    rows = torch.cat(parts).movedim(1, -1).reshape(-1, dim)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def trained_latents(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """N latents and K codes of d dimensions; the codes are latents of other positions."""
    rows = _latents(d, n + k)
    return rows[:n].contiguous(), rows[n : n + k].contiguous()
