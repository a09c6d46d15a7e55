# SPDX-License-Identifier: Apache-2.0
"""`steadyvq transplant` and `steadyvq train --train`: which weights move, and which do not move by a bit."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_recipe
from runs import assert_same, log, state

from steadyvq.cli import main
from steadyvq.data import open_photographs
from steadyvq.experiments.tables import evidence
from steadyvq.experiments.transplant import first_arms, gaps
from steadyvq.interop import export_tokenizer
from steadyvq.models import AutoencoderConfig, Tokenizer, save_autoencoder
from steadyvq.models.rectifier import Rectifier
from steadyvq.quantizers import build_quantizer
from steadyvq.training.checkpoint import load_checkpoint
from steadyvq.training.config import RunConfig, resolve
from steadyvq.training.photographs import training_crops
from steadyvq.training.run import RunFolder
from steadyvq.training.stages import Schedule
from steadyvq.training.tokenizer_task import TokenizerTask
from steadyvq.training.transplant import plan, read_source
from steadyvq.training.weights import averaged_weights

SMALL = {
    "batch_size": 6,
    "epochs": 4,
    "eval_every": 2,
    "keep_checkpoints": 9,
    "quantizer.init_samples": 12,
    "log_every": 2,
}
SETS = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
ENCODER, DECODER = ("encoder.", "pre_quant."), ("decoder.", "post_quant.")


def command(*words):
    return main([str(word) for word in words])


def differ(a, b, starts):
    """Names of the weights that differ between two states, of the parts whose names start so."""
    names = sorted(name for name in a if name.startswith(starts))
    assert names
    assert names == sorted(name for name in b if name.startswith(starts))
    return [name for name in names if not torch.equal(a[name], b[name])]


def trained_after(run, epoch, steps=4):
    return load_checkpoint(run / "checkpoints" / f"step-{epoch * steps:08d}.safetensors")["module"]


@pytest.fixture(scope="module")
def source(photos, tmp_path_factory):
    """A trained tokenizer with 1x1 convolutions around its 32 codes."""
    folder = tmp_path_factory.mktemp("source")
    recipe = tiny_recipe(photos, quantizer={"name": "vq", "num_codes": 32, "dim": 6})
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert command("train", folder / "tiny.yaml", "--out", folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def transplanted(source):
    out = source.parent / "new"
    assert command("transplant", source, "--codes", 48, "--out", out, "--set", "optim.lr=1e-2", *SETS) == 0
    return out


class TestTransplant:
    def test_the_encoder_does_not_move_and_the_decoder_only_in_the_second_stage(self, source, transplanted):
        before, after = averaged_weights(source), averaged_weights(transplanted)
        first, last = trained_after(transplanted, 2), trained_after(transplanted, 4)
        for state_ in (first, last, after):
            assert differ(before, state_, ENCODER) == []
        assert differ(before, first, DECODER) == []
        # The 1x1 convolution behind the codes included.
        assert set(differ(before, last, DECODER)) >= {"decoder.conv_in.weight", "post_quant.weight"}
        assert differ(trained_after(transplanted, 1), first, ("quantizer.codes",)), "the first stage trains the codes"
        assert [row["stage"] for row in log(transplanted) if row["kind"] == "stage"] == ["transplant", "refine"]

    def test_codes_start_at_centres_of_the_latents(self, source):
        config, notes = plan(source, num_codes=5, sets=["quantizer.init_samples=12", "batch_size=6"])
        assert notes == []
        task = TokenizerTask(config)
        task.prepare()
        crops = training_crops(config, task.photographs)
        latents = task.tokenizer.latents(crops.batch(0, 0, 12)).movedim(1, -1).reshape(-1, 6)
        codes = task.quantizer.codebook()
        nearest = (latents[:, None] - codes).square().sum(-1).argmin(1)
        error = (latents - codes[nearest]).square().sum(-1).mean()
        assert error < 0.6 * (latents - latents.mean(0)).square().sum(-1).mean()

    def test_the_result_evaluates_encodes_and_decodes(self, photos, transplanted, tmp_path):
        assert command("encode", transplanted, "--data", photos, "--size", 16, "--out", tmp_path / "t.npz") == 0
        with np.load(tmp_path / "t.npz") as file:
            tokens = file["tokens"]
        assert tokens.min() >= 0
        assert tokens.max() < 48
        assert len(np.unique(tokens)) > 5
        assert command("decode", transplanted, tmp_path / "t.npz", "--out", tmp_path / "images") == 0
        assert len(list((tmp_path / "images").glob("*.png"))) == 8
        assert command("eval", transplanted, "--lpips", "none", "--out", tmp_path / "e.json") == 0
        assert json.loads((tmp_path / "e.json").read_text())["metrics"]["num_codes"] == 48

    @pytest.mark.parametrize("epochs", [1, 2, 3])
    def test_a_run_that_was_stopped_in_either_stage_resumes_to_the_same_bits(self, transplanted, tmp_path, epochs):
        again = tmp_path / "again"
        shutil.copytree(transplanted, again)
        for path in (again / "checkpoints").glob("step-*.safetensors"):
            if int(path.stem.removeprefix("step-")) > 4 * epochs:
                path.unlink()
        assert command("train", "--resume", again) == 0
        assert_same(state(again), state(transplanted))

    def test_what_the_source_says_is_taken_over(self, source, transplanted):
        old, new = RunFolder.open(source).config, RunFolder.open(transplanted).config
        assert (new.data, new.model) == (old.data, old.model)
        assert (new.quantizer.name, new.quantizer.num_codes, new.quantizer.dim) == ("nsvq", 48, 6)
        assert new.init_from == str(source)
        checkpoint = max((source / "checkpoints").glob("step-*.safetensors"))
        assert read_source(checkpoint).model == read_source(source / "tokenizer").model == old.model

    @pytest.mark.parametrize(
        ("name", "sets", "stages", "note"),
        [
            ("simvq", [], 2, None),
            ("ema", [], 1, "ema has nothing that a gradient trains"),
            ("fsq", ["quantizer.options.levels=[2, 2, 2, 2, 2, 2]"], 1, "fsq has no codes to place"),
            (
                "projected",
                ["quantizer.options.inner=lfq", "quantizer.options.inner_dim=5"],
                2,
                "projected has no codes",
            ),
        ],
    )
    def test_every_kind_of_method_goes_in(self, source, tmp_path, capsys, name, sets, stages, note):
        more = [word for pair in sets for word in ("--set", pair)]
        codes = 64 if name == "fsq" else 32
        words = ["transplant", source, "--quantizer", name, "--codes", codes, "--out", tmp_path / "run", *SETS, *more]
        assert command(*words) == 0
        told = capsys.readouterr().err
        assert note is None or note in told
        before, after = averaged_weights(source), averaged_weights(tmp_path / "run")
        assert differ(before, after, ENCODER) == []
        assert differ(before, after, DECODER)
        assert len(RunFolder.open(tmp_path / "run").config.stages) == stages
        if name == "projected":
            fresh = TokenizerTask(RunFolder.open(tmp_path / "run").config).tokenizer.state_dict()
            assert differ(fresh, trained_after(tmp_path / "run", 2), ("quantizer.",)), "the latent loss trains the maps"

    def test_a_continuous_autoencoder_gets_its_first_quantizer(self, photos, tmp_path):
        """Post-hoc quantisation: latents of an autoencoder that was trained without any."""
        size = AutoencoderConfig(8, (1, 2), 1, 0, 8)
        data = {"source": str(photos), "crop_size": 16, "epoch_samples": 24, "eval_crops": 8}
        crops = training_crops(
            resolve({"data": data}, ["batch_size=8"]), open_photographs(photos, False, 16, None, 0.0)
        )
        torch.manual_seed(0)
        encoder, decoder = size.build()
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 3e-3)
        for step in range(12):
            images = crops.batch(0, step * 2, 2)
            optimizer.zero_grad()
            (decoder(encoder(images)) - images).square().mean().backward()
            optimizer.step()
        save_autoencoder(tmp_path / "ae", size, encoder, decoder)
        own = [word for key, value in data.items() if key != "source" for word in ("--set", f"data.{key}={value}")]
        words = ["transplant", tmp_path / "ae", "--codes", 32, "--data", photos, "--out", tmp_path / "run", *SETS, *own]
        assert command(*words) == 0
        after = averaged_weights(tmp_path / "run")
        assert all(torch.equal(after[f"encoder.{name}"], value) for name, value in encoder.state_dict().items())
        with pytest.raises(ValueError, match="do not fit"):
            save_autoencoder(tmp_path / "no", AutoencoderConfig(8, (1, 2), 1, 1, 8), encoder, decoder)
        assert not (tmp_path / "no").exists()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("SOURCE", "--set", "quantizer.dim=8"), "pass --set quantizer.dim=6"),
            (("SOURCE", "--quantizer", "lfq", "--codes", "1024"), "--set quantizer.dim= cannot change"),
            (("SOURCE", "--quantizer", "nsvvq"), "did you mean 'nsvq'"),
            (("SOURCE", "--codes", "0"), "the number of codes is 0, but a codebook needs at least 1"),
            (("SOURCE", "--codes", "-4"), "the number of codes is -4"),
            (("SOURCE", "--data", "nowhere"), "nowhere"),
            (("SOURCE/tokenizer",), "pass --data DIR"),
            (("nothing",), "nothing does not exist"),
            (("notes.txt",), "steadyvq import"),
            (("headless", "--data", "PHOTOS"), "has no encoder"),
            (("SOURCE", "--out", "SOURCE"), "already holds a run"),
            (("SOURCE", "--recipe", "transplantt"), "did you mean 'transplant'"),
            (("SOURCE", "--set", "latent=-1"), "latent is -1"),
        ],
    )
    def test_refusals_are_one_line_with_code_2_and_leave_nothing(
        self, words, message, source, photos, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "notes.txt").write_text("no tokenizer")
        headless(source, tmp_path / "headless")
        before = sorted(tmp_path.rglob("*"))
        words = [word.replace("SOURCE", str(source)).replace("PHOTOS", str(photos)) for word in words]
        assert command("transplant", *words) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before


def headless(source, folder):
    """A saved tokenizer whose encoder is missing."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source / "tokenizer", folder)
    kept = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in kept.items() if not n.startswith("encoder.")}, folder / "model.safetensors")


class TestRectifier:
    def test_a_fresh_one_changes_nothing_and_a_trained_one_does(self):
        rectifier = Rectifier(6, 16, 2)
        codes = torch.randn(2, 6, 4, 4)
        assert torch.equal(rectifier(codes), codes)
        torch.nn.init.normal_(rectifier.conv_out.weight)
        assert not torch.allclose(rectifier(codes), codes)

    def test_the_first_stage_trains_it_by_the_error_of_the_latents_alone(self, source):
        """ReVQ (arXiv 2507.10547): |z - r(sg z_q)|^2 moves the rectifier, and only the codes' own loss the codes."""
        sets = ["model.rectifier=1", "quantizer.init_samples=12", "batch_size=6", "quantizer.name=vq"]
        config, _ = plan(source, num_codes=16, sets=sets)
        task = TokenizerTask(config)
        task.prepare()
        task.module.train()
        task.on_stage(Schedule(config.planned_stages))
        torch.nn.init.normal_(task.tokenizer.rectifier.conv_out.weight, std=0.1)
        images = training_crops(config, task.photographs).batch(0, 0, 6)
        task.begin_step(0)
        out = task.loss("tokenizer", task.module, images, {})
        out.loss.backward()
        with torch.no_grad():
            z = task.tokenizer.latents(images)
            codes, dim = task.quantizer.codebook(), z.shape[1]
            z_q, pulled = torch.zeros_like(z), torch.zeros_like(codes)
            for b, y, x in np.ndindex(len(z), *z.shape[2:]):
                nearest = int((codes - z[b, :, y, x]).square().sum(1).argmin())
                z_q[b, :, y, x] = codes[nearest]
                pulled[nearest] += 2 * (codes[nearest] - z[b, :, y, x]) / (z.numel() / dim)
        found = task.tokenizer.rectifier(z_q)
        pairs = zip(found.flatten().tolist(), z.flatten().tolist(), strict=True)
        error = sum((a - b) ** 2 for a, b in pairs) / z.numel()
        assert float(out.logs["loss/latent"]) == pytest.approx(error, rel=1e-4)
        weight = task.tokenizer.rectifier.conv_out.weight
        own = torch.autograd.grad((found - z).square().mean(), weight)[0]
        assert torch.allclose(weight.grad, own, rtol=1e-3, atol=1e-6)
        grad = next(p.grad for p in task.quantizer.parameters() if p.shape == codes.shape)
        scale = float((grad * pulled).sum() / pulled.square().sum())
        assert torch.allclose(grad, scale * pulled, rtol=1e-3, atol=1e-6)
        assert all(p.grad is None for p in task.tokenizer.decoder.parameters())

    def test_it_is_trained_saved_and_used_by_decode(self, source, tmp_path):
        out = tmp_path / "run"
        frozen = "stages=[{name: only, frozen: [encoder, decoder], weights: {reconstruction: 0.0}}]"
        assert (
            command(
                "transplant", source, "--codes", 16, "--out", out, *SETS, "--set", "model.rectifier=1", "--set", frozen
            )
            == 0
        )
        assert differ(averaged_weights(source), averaged_weights(out), (*ENCODER, *DECODER)) == []
        tokenizer = Tokenizer.from_pretrained(out / "tokenizer")
        assert tokenizer.rectifier.conv_out.weight.abs().sum() > 0
        tokens = torch.arange(16).reshape(1, 4, 4)
        z = tokenizer.rectifier(tokenizer.quantizer.decode(tokens))
        expected = tokenizer.decoder(tokenizer.post_quant(z)).clamp(-1, 1)
        assert torch.equal(tokenizer.decode(tokens), expected)

    def test_other_projects_have_none(self, tmp_path):
        size = AutoencoderConfig(32, (1,), 1, 1, 4, layout="vqgan", rectifier=1)
        tokenizer = Tokenizer.build(size, build_quantizer("vq", num_codes=8, dim=4, channel_axis=1))
        with pytest.raises(ValueError, match="rectifier behind its codes"):
            export_tokenizer(tokenizer, tmp_path / "file", "taming")


class TestPartialTraining:
    @pytest.mark.parametrize(("part", "moves"), [("decoder", DECODER), ("codebook", ("quantizer.codes",))])
    def test_nothing_but_the_part_moves(self, source, tmp_path, part, moves):
        recipe = source.parent / "tiny.yaml"
        words = ["train", recipe, "--init-from", source, "--train", part, "--out", tmp_path / "run"]
        assert command(*words, "--set", "optim.lr=1e-2", "--set", "optim.codebook_lr=1e-2") == 0
        before, after = averaged_weights(source), averaged_weights(tmp_path / "run")
        assert differ(before, after, moves)
        still = {"decoder": (*ENCODER, "quantizer.codes"), "codebook": (*ENCODER, *DECODER)}[part]
        assert differ(before, after, still) == []

    def test_it_is_added_to_what_stages_freeze(self):
        sets = [
            "init_from=runs/x",
            "train=codebook",
            "stages=[{name: a, frozen: [discriminator]}, {name: b, frozen: [encoder]}]",
        ]
        stages = resolve({}, sets).planned_stages
        assert [stage.frozen for stage in stages] == [("discriminator", "encoder", "decoder"), ("encoder", "decoder")]
        assert RunConfig().planned_stages == RunConfig().stages

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("train", "RECIPE", "--train", "decoder"), "no weights to start from"),
            (("train", "RECIPE", "--set", "init_parts=autoencoder"), "no weights to start from"),
            (("train", "transplant"), "use `steadyvq transplant`"),
            (("train", "--resume", "SOURCE", "--train", "decoder"), "no weights to start from"),
            (
                ("train", "RECIPE", "--init-from", "SOURCE", "--train", "codebook", "--quantizer", "ema"),
                "freezes everything there is for a gradient to train",
            ),
        ],
    )
    def test_refusals(self, words, message, source, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        names = {"RECIPE": str(source.parent / "tiny.yaml"), "SOURCE": str(source)}
        assert command(*(names.get(word, word) for word in words)) == 2
        told = capsys.readouterr().err
        (sentence,) = (line for line in told.splitlines() if line.startswith("steadyvq"))
        assert message in sentence
        assert not (tmp_path / "runs").exists()


def test_the_record_is_of_the_settings_of_today(tmp_path):
    """Three seeds, from commits, of configurations that the recipe still gives, within the 0.3 dB that the bar is."""
    record = evidence("transplant")
    runs = {(run["arm"], run["seed"]): run for run in record["runs"]}
    assert set(runs) == {(arm, seed) for arm in ("source", "scratch", "transplant") for seed in (0, 1, 2)}
    for seed in range(3):
        for arm in first_arms(tmp_path, seed, epochs=5):
            assert runs[arm.config.title, seed]["config_hash"] == arm.config.hash()
        assert 4 * runs["transplant", seed]["steps"] == runs["scratch", seed]["steps"]
    assert all(re.fullmatch(r"[0-9a-f]{40}", run["commit"]) for run in record["runs"])
    assert record["gap_db"] == {"transplant": gaps(record["runs"], "transplant")}
    assert all(gap > -0.3 for gap in record["gap_db"]["transplant"])
