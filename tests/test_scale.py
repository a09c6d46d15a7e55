# SPDX-License-Identifier: Apache-2.0
"""Compiled networks, activations computed twice, networks cut up among processes: the same run as without."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe
from runs import assert_same, log, state, toy
from torch import Tensor, nn

from steadyvq import Tokenizer
from steadyvq.experiments.memory import KeptForBackward
from steadyvq.models import autoencoder_config, load_lpips
from steadyvq.models.blocks import Blocks
from steadyvq.models.discriminator import build_discriminator
from steadyvq.training.config import resolve
from steadyvq.training.loop import Engine
from steadyvq.training.networks import recompute
from steadyvq.training.run import RunFolder
from steadyvq.training.sharding import Shards
from steadyvq.training.stages import Schedule
from steadyvq.training.tokenizer_task import TokenizerTask

CLUSTERS = Path(__file__).parent.parent / "docs" / "clusters.md"
GROUP = {"discriminator": "patch", "options": {"channels": 8, "layers": 2, "norm": "group"}}
VQGAN = {
    "channels": 8,
    "multipliers": [1, 2],
    "num_res_blocks": 1,
    "z_channels": 8,
    "layout": "vqgan",
    "attention": [1],
    "mid_attention": True,
}
ADAPTIVE = {
    "channels": 8,
    "multipliers": [1, 2],
    "num_res_blocks": 2,
    "num_mid_blocks": 1,
    "z_channels": 8,
    "adaptive": True,
}


def begun(recipe: dict[str, object]) -> tuple[TokenizerTask, Tensor]:
    """A task as it is in its first step, and a batch."""
    config = resolve(recipe)
    task = TokenizerTask(config)
    task.on_stage(Schedule(config.stages))
    task.begin_step(0)
    return task, task.batch(0, range(config.batch_size))


def gradients(task: TokenizerTask, batch: Tensor, precision: torch.dtype | None) -> dict[str, Tensor]:
    """Of both objectives by every parameter, as a step computes them."""
    done, found = {}, {}
    for name in task.objectives:
        task.module.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision is not None):
            output = task.loss(name, task.trained(name), batch, done)
        output.loss.backward()
        found |= {f"{name}/{key}": p.grad for key, p in task.trained(name).named_parameters() if p.grad is not None}
        done[name] = output
    return found


def kept(function, x: Tensor, *known: nn.Module) -> int:
    found = KeptForBackward(*known)
    with found:
        function(x)
    return found.bytes


class TestRecompute:
    @pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize(
        ("model", "adversarial"),
        [
            (ADAPTIVE, {**GROUP, "options": {**GROUP["options"], "norm": "batch"}}),
            (VQGAN, {"discriminator": "stylegan", "options": {"width": 0.05}}),
        ],
        ids=["simvq and patch", "vqgan and stylegan"],
    )
    def test_gradients_are_the_same_bits(self, photos, model, adversarial, precision):
        task, batch = begun(tiny_recipe(photos, model=model, adversarial=adversarial))
        expected = gradients(task, batch, precision)
        assert recompute(task.networks) >= 5
        found = gradients(task, batch, precision)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert sum(bool(g.any()) for g in found.values()) > 0.9 * len(found)

    def test_of_lpips_too(self, photos, lpips_files):
        """By the images, since its weights are fixed; and it keeps less for it."""
        batch = begun(tiny_recipe(photos, data={**tiny_recipe(photos)["data"], "crop_size": 32}))[1]
        images = (batch * 0.9).requires_grad_()
        lpips, found, sizes = load_lpips("vgg", str(lpips_files)), [], []
        for on in (False, True):
            recompute([lpips], on)
            sizes.append(kept(lambda x: lpips(x, batch), images, lpips))
            found.append(torch.autograd.grad(lpips(images, batch).sum(), images)[0])
        assert torch.equal(*found)
        assert sizes[1] < 0.8 * sizes[0], sizes

    @pytest.mark.parametrize(("size", "side"), [("simvq_f8", 128), ("vqgan_f16", 256)])
    def test_what_the_published_networks_keep(self, size, side):
        """Of a residual block its input instead of six tensors, of a layer of the discriminator one instead of three."""
        found = {}
        with torch.device("meta"):
            encoder, decoder = autoencoder_config(size).build()
            critic = build_discriminator("patch", side)
            images = torch.empty(1, 3, side, side)
            for on in (False, True):
                recompute([encoder, decoder, critic], on)
                latents = torch.empty_like(encoder(images)).requires_grad_()
                parts = [(encoder, images), (decoder, latents), (critic, images)]
                found[on] = [kept(network, x, network) for network, x in parts]
        whole, less = found[False], found[True]
        assert all(b < 0.45 * a for a, b in zip(whole, less, strict=True)), found
        row = [f"{sum(sizes[:2]) / 1e6:,.0f} MB" for sizes in (whole, less)]
        assert f"| `{size}`, {side}x{side} | {row[0]} | {row[1]} |" in CLUSTERS.read_text(), row
        # float32: x, norm, swish, convolution, norm, swish of a block of the first level.
        assert whole[0] > 4 * 2 * 6 * 128 * side**2

    def test_nothing_is_kept_without_gradients(self):
        row = Blocks(nn.Linear(4, 4), nn.Linear(4, 4))
        row.recompute = True
        with torch.no_grad():
            assert kept(row, torch.ones(2, 4), row) == 0
        assert kept(row, torch.ones(2, 4), row) == 2 * 2 * 4 * 4, "what enters the pieces"

    def test_pieces_of_a_row(self):
        """The inside is computed once without gradients and twice with them, piece by piece."""
        calls = []

        class Layer(nn.Linear):
            def forward(self, x):
                calls.append(self)
                return super().forward(x)

        row = Blocks(*(Layer(3, 3) for _ in range(5)), starts=(0, 2, 3))
        row.recompute = True
        with torch.no_grad():
            row(torch.ones(3))
        assert calls == list(row)
        row(torch.ones(3)).sum().backward()
        assert calls[5:] == [*row, row[3], row[4], row[2], row[0], row[1]]

    def test_a_run_is_the_same_bits_under_the_same_name(self, photos, tmp_path):
        runs = [
            trained(photos, tmp_path / str(on), activation_checkpointing=on, adversarial=GROUP) for on in (False, True)
        ]
        assert_same(*(state(run.path) for run in runs))
        assert log(runs[0].path) == log(runs[1].path)
        assert runs[0].config.hash() == runs[1].config.hash()


def trained(photos: Path, path: Path, resume: bool = False, **changes: object) -> RunFolder:
    config = resolve(tiny_recipe(photos, **changes))
    run = RunFolder(path, config) if resume else RunFolder.create(path, config, "test")
    Engine(TokenizerTask(config), run, resume=resume, quiet=True).fit()
    return run


class TestCompile:
    @pytest.mark.slow
    def test_a_run_that_goes_on_compiled(self, photos, tmp_path):
        """The same numbers and names as without: a resume switches it on, with all that changes no result."""
        torch._dynamo.reset()
        graphs = torch._dynamo.utils.counters["stats"]
        graphs.clear()
        eager = trained(photos, tmp_path / "eager", adversarial=GROUP, keep_checkpoints=3)
        assert not graphs["unique_graphs"]
        shutil.copytree(eager.path, tmp_path / "run")
        first, *rest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
        assert first.stem == "step-00000004"
        assert len(rest) == 2
        for path in rest:
            path.unlink()
        changes = {"compile": True, "activation_checkpointing": True, "adversarial": GROUP, "keep_checkpoints": 3}
        run = trained(photos, tmp_path / "run", resume=True, **changes)
        assert graphs["unique_graphs"] >= 5, "levels of both sides and the discriminator"
        assert graphs["unique_graphs"] <= 16, "not compiled anew in every step, and not for evaluations"
        assert_same(state(eager.path), state(run.path), 1e-4)
        assert not any("_orig_mod" in name for name in state(run.path))
        for name in ("tokenizer", "best"):
            saved, plain = (Tokenizer.from_pretrained(path / name).state_dict() for path in (run.path, eager.path))
            assert saved.keys() == plain.keys()
        assert [row.keys() for row in log(eager.path)] == [row.keys() for row in log(run.path)]

    @pytest.mark.slow
    def test_a_machine_without_a_compiler(self, tiny, tmp_path):
        variables = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "steadyvq", "train", str(tiny), "--out", "run", "--set", "compile=true"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, **variables},
            timeout=120,
        )
        assert done.returncode == 2, done.stderr
        assert "compile is true, but torch.compile does not work here" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()


SETS = ("--set", "epochs=4", "--set", "adversarial.adaptive=true")
CUT = ("--set", "strategy=fsdp", "--set", "micro_batch_size=2", "--set", "activation_checkpointing=true")


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """An uninterrupted run of one process: joint, a warmup with the encoder frozen, and refine."""
    path = tmp_path_factory.mktemp("shards") / "whole"
    toy("adversarial", path, photos, *SETS)
    return path


@pytest.mark.recovery
class TestShards:
    @pytest.mark.slow
    def test_begun_in_two_and_ended_in_one(self, whole, photos, tmp_path):
        """A checkpoint of cut networks is an ordinary one."""
        toy("adversarial", tmp_path / "run", photos, *SETS, *CUT, "--harm", "die", 25, processes=2, code=-9)
        assert state(tmp_path / "run").keys() == state(whole).keys()
        toy("adversarial", tmp_path / "run", photos, *SETS, "--resume")
        assert_same(state(whole), state(tmp_path / "run"), 1e-9)

    @pytest.mark.slow
    def test_begun_in_one_and_ended_in_two(self, whole, photos, tmp_path):
        """Moments, averages, clipping, two freezes and the adaptive weight, each process with its part of the weights."""
        toy("adversarial", tmp_path / "run", photos, *SETS, "--harm", "die", 25, code=-9)
        toy("adversarial", tmp_path / "run", photos, *SETS, *CUT, "--resume", processes=2)
        assert_same(state(whole), state(tmp_path / "run"), 1e-9)
        assert [row["stage"] for row in log(tmp_path / "run") if row["kind"] == "stage"] == [
            "joint",
            "warmup",
            "refine",
        ]

    def test_nothing_to_cut(self):
        with pytest.raises(ValueError, match="names no networks to cut: leave it with strategy=ddp"):
            Shards([], [], torch.device("cpu"))
