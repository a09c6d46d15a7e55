# SPDX-License-Identifier: Apache-2.0
"""Stages, configurations, checkpoints, the moving average, and the loop itself on real photographs."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe

import steadyvq
from steadyvq.training.average import WeightAverage
from steadyvq.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from steadyvq.training.config import RunConfig, read_recipe, recipe_names, resolve
from steadyvq.training.loop import Diverged, Engine, Interrupted
from steadyvq.training.run import RunFolder
from steadyvq.training.stages import Schedule, Stage, Until, nsvq_stages
from steadyvq.training.tokenizer_task import TokenizerTask
from steadyvq.training.weights import averaged_weights


def ends(until: Until, curve: list[float], total: int = 100) -> int | None:
    """The epoch at whose end the first stage ends, on a scripted curve."""
    schedule = Schedule([Stage("first", until), Stage("second")])
    for epoch, value in enumerate(curve, 1):
        if schedule.step(epoch, total, {"commitment": float(value), "relative_error": float(value)}):
            return epoch
    return None


class TestStages:
    def test_plateau(self):
        falling = [1 / epoch for epoch in range(1, 50)]
        assert ends(Until(plateau="commitment", patience=10), falling) is None
        assert ends(Until(plateau="commitment", patience=10), falling[:20] + [1.0] * 20) == 30
        assert ends(Until(plateau="commitment", patience=3), [5, 4, 3, 3.5, 2.9, 3, 3, 3]) == 8

    def test_the_rule_is_armed_late_and_its_best_is_reset_then(self):
        # Small at first (small latents), then rising and falling: unarmed, the rule would fire at epoch 4.
        curve = [0.1, 0.5, 0.9, 1.0, 0.9, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6]
        assert ends(Until(plateau="commitment", patience=3), curve) == 4
        assert ends(Until(plateau="commitment", patience=3, min_epochs=4), curve) == 11

    def test_min_delta_is_relative(self):
        curve = [1.0 * 0.999**epoch for epoch in range(40)]
        assert ends(Until(plateau="commitment", patience=5), curve) is None
        assert ends(Until(plateau="commitment", patience=5, min_delta=0.005), curve) is not None

    def test_other_metrics_other_ends(self):
        assert ends(Until(plateau="relative_error", patience=2), [1, 1, 1]) == 3
        assert ends(Until(max_epochs=7), [1] * 20) == 7
        assert ends(Until(at_fraction=0.8), [1] * 20, total=10) == 8
        assert ends(Until(plateau="commitment", patience=9, at_fraction=0.5), [1] * 20, total=10) == 5
        assert ends(Until(), [1] * 20) is None

    def test_nan_counts_as_no_improvement(self):
        assert ends(Until(plateau="commitment", patience=3), [1.0, math.nan, math.nan, math.nan]) == 4

    def test_state_survives(self):
        curve = [1.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
        for cut in range(1, 6):
            schedule = Schedule(nsvq_stages(Until(plateau="commitment", patience=4)))
            changes = [schedule.step(i, 9, {"commitment": v}) for i, v in enumerate(curve[:cut], 1)]
            state = json.loads(json.dumps(schedule.state_dict()))
            schedule = Schedule(nsvq_stages(Until(plateau="commitment", patience=4)))
            schedule.load_state_dict(state)
            changes += [schedule.step(i, 9, {"commitment": v}) for i, v in enumerate(curve[cut:], cut + 1)]
            assert changes == [False] * 5 + [True, True]

    def test_what_the_user_froze_stays_frozen(self):
        vq = steadyvq.build_quantizer("ema", num_codes=8, dim=2)
        own, other = torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 2)
        parts = {"encoder": [own, other], "quantizer": [vq]}
        schedule = Schedule([Stage("a", Until(max_epochs=1), frozen=("encoder", "quantizer")), Stage("b")])
        schedule.apply(parts, vq)
        assert not other.weight.requires_grad
        before = vq.codebook()
        vq.update(vq(torch.randn(9, 2)))
        assert torch.equal(vq.codebook(), before), "a frozen codebook rests, averages included"
        schedule.step(1, 2, {})
        schedule.apply(parts, vq)
        assert other.weight.requires_grad
        assert not own.weight.requires_grad
        vq.update(vq(torch.randn(9, 2)))
        assert not torch.equal(vq.codebook(), before)

    def test_wrong_settings_are_refused(self):
        with pytest.raises(ValueError, match="patience=0"):
            Until(plateau="x", patience=0)
        with pytest.raises(ValueError, match="at_fraction is 2"):
            Until(at_fraction=2.0)
        with pytest.raises(ValueError, match="watches 'comitment', but the metrics of this epoch are commitment"):
            Schedule([Stage("a", Until(plateau="comitment"))]).step(1, 2, {"commitment": 1.0})
        vq = steadyvq.build_quantizer("vq", num_codes=4, dim=2)
        with pytest.raises(ValueError, match="freezes 'encodr', but the parts are decoder, encoder"):
            Schedule([Stage("a", frozen=("encodr",))]).apply({"encoder": [], "decoder": []}, vq)

    def test_a_loop_of_your_own(self):
        """NSVQ's three stages around fifteen lines that know nothing of our trainer."""
        torch.manual_seed(0)
        encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(4, 8)
        vq = steadyvq.build_quantizer("nsvq", num_codes=32, dim=4)
        parts = {"encoder": [encoder], "decoder": [decoder], "quantizer": [vq]}
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), *vq.parameters()], 1e-2)
        schedule = Schedule(nsvq_stages(Until(plateau="commitment", patience=2, min_epochs=2, max_epochs=6)))
        schedule.apply(parts, vq)
        frozen, seen = None, []
        for epoch in range(10):
            total = 0.0
            for _ in range(5):
                x = torch.randn(64, 8)
                out = vq(encoder(x))
                optimizer.zero_grad()
                ((decoder(out.z_q) - x).square().mean() + out.loss).backward()
                optimizer.step()
                vq.update(out, optimizer)
                total += out.losses["commitment"].item() if "commitment" in out.losses else math.nan
            seen.append((schedule.stage.name, set(out.losses)))
            if schedule.stage.name != "joint":
                frozen = encoder.weight.clone() if frozen is None else frozen
                assert torch.equal(frozen, encoder.weight)
            if schedule.step(epoch + 1, 10, {"commitment": total / 5}):
                schedule.apply(parts, vq)
        names = [name for name, _ in seen]
        assert names[0] == "joint"
        assert names[-1] == "refine"
        assert names.count("warmup") == 1
        assert seen[0][1] == {"commitment", "codebook", "ns"}
        assert seen[-1][1] == {"codebook"}


class TestConfig:
    def test_every_recipe_resolves(self):
        for name in recipe_names():
            data = dict(read_recipe(name))
            arms = data.pop("arms", {})
            for key in ("search", "budgets"):  # of `steadyvq compare`; tests/test_compare.py reads them
                data.pop(key, None)
            assert isinstance(resolve(data), RunConfig)
            assert all(arms.values())

    def test_yaml_round_trip_keeps_the_hash(self, tmp_path):
        config = resolve(read_recipe("quickstart"), ["stages=[{name: a, until: {at_fraction: 0.5}}, {name: b}]"])
        (tmp_path / "c.yaml").write_text(config.to_yaml())
        again = resolve(read_recipe(str(tmp_path / "c.yaml")))
        assert again == config
        assert again.hash() == config.hash()
        assert resolve(read_recipe("quickstart")).hash() != config.hash()

    @pytest.mark.parametrize(
        ("sets", "message"),
        [
            (["optim.lrr=1"], "unknown key in optim 'lrr'.*did you mean 'lr'"),
            (["epoch=3"], "unknown key 'epoch'.*did you mean 'epochs'"),
            (["epochs=many"], "epochs is 'many', but it needs an integer"),
            (["epochs=2.5"], "epochs is 2.5, but it needs an integer"),
            (["epochs=true"], "epochs is True, but it needs an integer"),
            (["epochs=0"], "epochs is 0, but it must be at least 1"),
            (["optim.lr=fast"], "optim.lr is 'fast', but it needs a number"),
            (["optim.lr=-1"], "learning rates are positive"),
            (["optim=3"], "optim is 3, but it needs a mapping"),
            (["precision=fp8"], "precision is 'fp8', but it must be one of '32-true', 'bf16-mixed'"),
            (["optim.betas=[0.9]"], "Adam needs two numbers"),
            (["model.multipliers=[1, x]"], r"model.multipliers\[1\] is 'x', but it needs an integer"),
            (["stages=[{nam: a}]"], r"unknown key in stages\[0\] 'nam'"),
            (["stages=[{until: {}}]"], r"stages\[0\].name is missing"),
            (["epochs"], "needs key=value"),
            (["epochs=[1"], "the value of epochs is not valid YAML"),
            (["batch_size=100000"], "an epoch needs at least one batch"),
        ],
    )
    def test_mistakes_are_named(self, sets, message):
        with pytest.raises(ValueError, match=message):
            resolve(read_recipe("quickstart"), sets)

    def test_numbers_written_as_people_write_them(self):
        config = resolve({}, ["optim.lr=1e-4", "optim.codebook_lr=3e-2", "data.max_side=null", "optim.grad_clip=1"])
        assert (config.optim.lr, config.optim.codebook_lr, config.data.max_side) == (1e-4, 3e-2, None)

    def test_unknown_recipes(self, tmp_path):
        with pytest.raises(ValueError, match="did you mean 'quickstart'"):
            read_recipe("quikstart")
        with pytest.raises(ValueError, match="there is no recipe file"):
            read_recipe("no/such.yaml")
        (tmp_path / "bad.yaml").write_text("a: [1\nb: 2")
        with pytest.raises(ValueError, match="is not valid YAML at line"):
            read_recipe(str(tmp_path / "bad.yaml"))


class TestCheckpoint:
    def test_round_trip(self, tmp_path):
        state = {
            "a": {"w": torch.randn(3), 0: {"x": torch.arange(2), "none": None, "flag": True}},
            "list": [1, 2.5, "text", torch.ones(1, dtype=torch.bfloat16)],
            "empty": {},
        }
        save_checkpoint(tmp_path / "step-00000001.safetensors", state)
        back = load_checkpoint(tmp_path / "step-00000001.safetensors")
        assert torch.equal(back["a"]["w"], state["a"]["w"])
        assert back["a"][0]["flag"] is True
        assert back["a"][0]["none"] is None
        assert back["list"][:3] == [1, 2.5, "text"]
        assert back["list"][3].dtype == torch.bfloat16
        assert back["empty"] == {}
        assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001.safetensors"
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.safetensors"], "no temporary file is left"

    def test_other_files_are_refused(self, tmp_path):
        bad = tmp_path / "step-00000001.safetensors"
        bad.write_bytes(b"nonsense")
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            load_checkpoint(bad)


class TestAverage:
    def test_against_the_definition(self):
        layer = torch.nn.Linear(2, 2)
        average = WeightAverage(layer, 0.9)
        expected = layer.weight.detach().clone()
        for step in range(30):
            with torch.no_grad():
                layer.weight += 1
            average.update()
            decay = min(0.9, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * layer.weight.detach()
        torch.testing.assert_close(average.shadow["weight"], expected)
        live = layer.weight.detach().clone()
        with average.applied():
            torch.testing.assert_close(layer.weight.detach(), expected)
        assert torch.equal(layer.weight.detach(), live)

    def test_codebooks_of_averages_are_averaged_too(self):
        vq = steadyvq.build_quantizer("ema", num_codes=4, dim=2)
        assert "codes.base" in WeightAverage(vq, 0.9).shadow


def train(photos: Path, path: Path, **changes: object) -> RunFolder:
    config = resolve(tiny_recipe(photos, **changes))
    run = RunFolder.create(path, config, "test")
    Engine(TokenizerTask(config), run, quiet=True).fit()
    return run


def rows(run: RunFolder, kind: str | None = None) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in run.log_path.read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k != "seconds"} for row in lines]
    return [row for row in kept if kind in (None, row["kind"])]


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


class TestLoop:
    def test_a_run_leaves_everything(self, photos, tmp_path):
        run = train(photos, tmp_path / "run")
        assert [r["step"] for r in rows(run, "train")] == [2, 4, 6, 8, 10, 12]
        assert [r["step"] for r in rows(run, "eval")] == [4, 8, 12]
        assert [r["step"] for r in rows(run, "probe")] == [4, 8, 12]
        first = rows(run, "train")[0]
        for key in ("loss", "loss/reconstruction", "loss/commitment", "loss/codebook", "loss/ns", "vq/winner_mass"):
            assert math.isfinite(first[key])
        weighted = first["loss/reconstruction"] + 0.25 * first["loss/commitment"] + first["loss/codebook"]
        assert first["loss"] == pytest.approx(weighted + 0.1 * first["loss/ns"], rel=1e-5)
        assert rows(run, "train")[-1]["loss"] < first["loss"]
        record = json.loads((run.path / "evaluations" / "step-00000012.json").read_text())
        assert record["metrics"]["tokens"] == 16 * 8 * 8
        assert record["config_hash"] == run.config.hash()
        assert json.loads((run.path / "run.json").read_text())["status"] == "done"
        from PIL import Image

        with Image.open(run.path / "codes.png") as picture:
            # 16 grids of 8x8 tokens in rows of 8, a gap of one between them, 8 pixels per token
            assert picture.size == (8 * 9 * 8, 2 * 9 * 8)
        tokenizer = steadyvq.Tokenizer.from_pretrained(run.tokenizer)
        images = torch.rand(2, 3, 16, 16) * 2 - 1
        assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape

    @pytest.mark.parametrize("name", ["vq", "ema", "simvq"])
    def test_every_quantizer_trains(self, photos, tmp_path, name):
        run = train(photos, tmp_path / "run", quantizer={"name": name, "num_codes": 32, "dim": 8, "init": "kmeans"})
        losses = [r["loss/reconstruction"] for r in rows(run, "train")]
        assert losses[-1] < losses[0]

    def test_bf16(self, photos, tmp_path):
        run = train(photos, tmp_path / "run", precision="bf16-mixed")
        losses = [r["loss/reconstruction"] for r in rows(run, "train")]
        assert losses[-1] < losses[0]

    def test_the_same_run_twice_is_the_same(self, photos, tmp_path):
        assert rows(train(photos, tmp_path / "a")) == rows(train(photos, tmp_path / "b"))

    def test_resume_continues_bit_for_bit_across_a_freeze(self, photos, tmp_path):
        stages = [
            {"name": "joint", "until": {"max_epochs": 2}},
            {
                "name": "warmup",
                "until": {"max_epochs": 1},
                "frozen": ["encoder"],
                "weights": {"ns": 0.0},
                "paused": ["replace"],
            },
            {"name": "refine", "frozen": ["encoder"], "estimator": "direct"},
        ]
        changes = {"epochs": 5, "stages": stages, "keep_checkpoints": 9}
        whole = train(photos, tmp_path / "whole", **changes)
        assert [r["stage"] for r in rows(whole, "stage")] == ["joint", "warmup", "refine"]
        for step in (4, 8, 12, 16):
            part = train(photos, tmp_path / f"part{step}", **changes)
            for path in part.checkpoints.glob("*.safetensors"):
                if int(path.stem.removeprefix("step-")) > step:
                    path.unlink()
            Engine(TokenizerTask(part.config), part, resume=True, quiet=True).fit()
            assert rows(part) == rows(whole)
            a, b = (load_checkpoint(latest_checkpoint(run.checkpoints)) for run in (part, whole))
            del a["seconds"], b["seconds"]
            assert same(a, b)

    def test_a_frozen_encoder_stays_and_its_average_with_it(self, photos, tmp_path):
        stages = [{"name": "joint", "until": {"max_epochs": 1}}, {"name": "refine", "frozen": ["encoder"]}]
        run = train(photos, tmp_path / "run", stages=stages, keep_checkpoints=9)
        states = [load_checkpoint(path) for path in sorted(run.checkpoints.glob("*.safetensors"))]
        for key in states[0]["module"]:
            moved = not torch.equal(states[0]["module"][key], states[2]["module"][key])
            if key.startswith("encoder."):
                assert not moved
                assert torch.equal(states[2]["average"]["shadow"][key], states[0]["module"][key])
            elif key.startswith("decoder.") and key.endswith("weight"):
                assert moved
        drifts = [r["drift"] for r in rows(run, "probe")]
        assert drifts[1:] == [0.0, 0.0]

    def test_a_checkpoint_of_another_configuration_is_refused(self, photos, tmp_path):
        run = train(photos, tmp_path / "run")
        other = resolve(run.config.to_dict(), ["optim.lr=0.5"])
        with pytest.raises(ValueError, match=r"another configuration \(differs in optim.lr\)"):
            Engine(TokenizerTask(other), RunFolder(run.path, other), resume=True)

    def test_a_run_stopped_before_its_first_checkpoint_begins_anew(self, photos, tmp_path):
        whole = train(photos, tmp_path / "whole")
        cut = train(photos, tmp_path / "cut")
        for path in cut.checkpoints.iterdir():
            path.unlink()
        Engine(TokenizerTask(cut.config), cut, resume=True, quiet=True).fit()
        assert rows(cut) == rows(whole)

    def test_a_broken_step_changes_nothing_and_is_counted(self, photos, tmp_path):
        config = resolve(tiny_recipe(photos))
        task = TokenizerTask(config)
        run = RunFolder.create(tmp_path / "run", config, "test")
        good = task.batch

        def batch(epoch: int, positions: range) -> torch.Tensor:
            images = good(epoch, positions)
            return images * math.nan if (epoch, positions.start) == (1, 6) else images

        task.batch = batch
        Engine(task, run, quiet=True).fit()
        assert [r.get("skipped") for r in rows(run, "train")] == [None, None, 1, None, None, None]
        state = load_checkpoint(latest_checkpoint(run.checkpoints))["module"]
        assert all(value.isfinite().all() for value in state.values())

    def test_an_infinite_gradient_of_a_finite_loss_is_skipped(self, photos, tmp_path):
        config = resolve(tiny_recipe(photos))
        task = TokenizerTask(config)
        good, weight = task.loss, task.tokenizer.decoder.conv_in.weight
        steps: list[dict[str, torch.Tensor]] = []

        def loss(*arguments: object) -> object:
            output = good(*arguments)
            steps.append({name: value.clone() for name, value in task.module.state_dict().items()})
            if len(steps) == 6:
                # |0|^(1/2) is 0, and its slope is infinite.
                output.loss = output.loss + (weight - weight.detach()).abs().sqrt().sum()
                assert output.loss.isfinite()
            return output

        task.loss = loss
        run = RunFolder.create(tmp_path / "run", config, "test")
        Engine(task, run, quiet=True).fit()
        assert [r.get("skipped") for r in rows(run, "train")] == [None, None, 1, None, None, None]
        assert same(steps[5], steps[6]), "the step changed nothing, the quantizer's statistics included"
        assert not same(steps[6], steps[7])

    def test_latents_that_are_not_finite_are_noticed_where_no_loss_shows_them(self, photos, tmp_path):
        stages = [{"name": "only", "weights": {"commitment": 0.0, "codebook": 0.0, "ns": 0.0}}]
        config = resolve(tiny_recipe(photos, stages=stages))
        task = TokenizerTask(config)
        with torch.no_grad():
            task.tokenizer.encoder.conv_out.bias[0] = math.inf
        run = RunFolder.create(tmp_path / "run", config, "test")
        with pytest.raises(Diverged, match="latents, loss or gradients were not finite in 10 steps in a row"):
            Engine(task, run, quiet=True).fit()
        assert [r.get("skipped") for r in rows(run, "train")] == [2, 2, 2, 2]

    @pytest.mark.parametrize("name", ["nsvq", "ema", "simvq"])
    def test_after_a_freeze_evaluated_tokens_never_change(self, photos, tmp_path, name):
        """At every step, under the averaged weights, while the decoder goes on learning."""
        stages = [
            {"name": "joint", "until": {"max_epochs": 1}},
            {"name": "refine", "frozen": ["encoder", "quantizer"]},
        ]
        quantizer = {
            "name": name,
            "num_codes": 32,
            "dim": 8,
            "options": {"maintenance": {"replace": {"patience": 2.0}}},
        }
        config = resolve(tiny_recipe(photos, stages=stages, quantizer=quantizer))
        task = TokenizerTask(config)
        engine = Engine(task, RunFolder.create(tmp_path / "run", config, "test"), quiet=True)
        images = next(task.val_crops.batches(8))
        tokens, pictures = [], []
        update = engine.average.update

        def watched() -> None:
            update()
            with engine.average.applied(), torch.no_grad():
                tokens.append(task.tokenizer.encode(images))
                pictures.append(task.tokenizer.decode(tokens[-1]))

        engine.average.update = watched
        engine.fit()
        assert len(tokens) == 12
        # The step that ends the epoch is averaged before the freeze.
        assert all(torch.equal(tokens[4], later) for later in tokens[5:])
        assert not torch.equal(tokens[0], tokens[3])
        assert all(not torch.equal(a, b) for a, b in pairwise(pictures[4:]))

    def test_frozen_parts_are_in_evaluation_mode(self, photos, tmp_path):
        stages = [{"name": "joint", "until": {"max_epochs": 1}}, {"name": "refine", "frozen": ["encoder"]}]
        config = resolve(tiny_recipe(photos, stages=stages))
        task = TokenizerTask(config)
        Engine(task, RunFolder.create(tmp_path / "run", config, "test"), quiet=True).fit()
        tokenizer = task.tokenizer
        assert [m.training for m in (tokenizer.encoder, tokenizer.pre_quant)] == [False, False]
        assert [m.training for m in (tokenizer.decoder, tokenizer.quantizer)] == [True, True]

    def test_a_stage_that_freezes_everything_is_refused(self, photos, tmp_path):
        stages = [{"name": "nothing", "frozen": ["encoder", "quantizer", "decoder"]}]
        config = resolve(tiny_recipe(photos, stages=stages))
        with pytest.raises(ValueError, match="stage 'nothing' freezes everything there is"):
            Engine(TokenizerTask(config), RunFolder(tmp_path, config))

    def test_micro_batches_of_a_loss_that_couples_them_are_refused(self, photos, tmp_path):
        coupled = {"losses": {"ns": {"per_code": True}}}
        quantizer = {"name": "nsvq", "num_codes": 32, "dim": 8, "options": coupled}
        config = resolve(tiny_recipe(photos, quantizer=quantizer, micro_batch_size=2))
        with pytest.raises(ValueError, match="the loss 'ns' of this quantizer couples all latents of a batch"):
            Engine(TokenizerTask(config), RunFolder(tmp_path, config))
        off = [{"name": "a", "weights": {"ns": 0.0}}]
        config = resolve(tiny_recipe(photos, quantizer=quantizer, micro_batch_size=2, stages=off))
        Engine(TokenizerTask(config), RunFolder(tmp_path, config))

    def test_a_stage_whose_loss_reaches_nothing_is_told_in_words(self, photos, tmp_path):
        stages = [{"name": "a", "frozen": ["encoder", "decoder"], "weights": {"codebook": 0.0, "ns": 0.0}}]
        config = resolve(tiny_recipe(photos, stages=stages))
        engine = Engine(TokenizerTask(config), RunFolder.create(tmp_path / "run", config, "test"), quiet=True)
        with pytest.raises(ValueError, match="the loss of 'tokenizer' reaches no parameter in this stage"):
            engine.fit()

    def test_no_checkpoint_and_no_best_evaluation_while_steps_are_skipped(self, photos, tmp_path):
        config = resolve(tiny_recipe(photos, epochs=9, keep_checkpoints=1))
        task = TokenizerTask(config)
        run = RunFolder.create(tmp_path / "run", config, "test")
        engine = Engine(task, run, quiet=True)
        good = task.batch
        task.batch = lambda epoch, positions: good(epoch, positions) * (math.nan if engine.step >= 9 else 1.0)
        with pytest.raises(Diverged, match=r"in 10 steps in a row \(step 19\)"):
            engine.fit()
        assert latest_checkpoint(run.checkpoints).stem == "step-00000008"
        assert json.loads((run.checkpoints / "best.json").read_text())["step"] <= 8

    def test_asked_to_stop_at_the_end_of_an_epoch_it_evaluates_after_the_resume(self, photos, tmp_path):
        whole = train(photos, tmp_path / "whole")
        config = resolve(tiny_recipe(photos))
        task = TokenizerTask(config)
        run = RunFolder.create(tmp_path / "run", config, "test")
        good = task.batch

        def batch(epoch: int, positions: range) -> torch.Tensor:
            if (epoch, positions.start) == (0, 18):
                os.kill(os.getpid(), signal.SIGTERM)
            return good(epoch, positions)

        task.batch = batch
        with pytest.raises(Interrupted):
            Engine(task, run, quiet=True).fit()
        assert not rows(run, "eval"), "an evaluation may take longer than a cluster waits"
        Engine(TokenizerTask(config), run, resume=True, quiet=True).fit()
        assert rows(run) == rows(whole)

    def test_killed_as_it_began(self, photos, tmp_path):
        whole = train(photos, tmp_path / "whole")
        run = RunFolder.create(tmp_path / "run", whole.config, "test")
        run.log_path.unlink()
        (run.path / "tokenizer").mkdir()
        (run.path / "tokenizer" / ".model.17.tmp.safetensors").touch()
        Engine(TokenizerTask(run.config), run, resume=True, quiet=True).fit()
        assert rows(run) == rows(whole)
        assert not list(run.path.rglob(".*.tmp*"))

    def test_the_best_checkpoint_is_kept(self, photos, tmp_path):
        # A learning rate that soon spoils what was learned.
        optim = {"lr": 1e-3, "codebook_lr": 1e-3, "ema_decay": 0.0}
        config = resolve(tiny_recipe(photos, epochs=8, keep_checkpoints=2, optim=optim))
        task = TokenizerTask(config)
        run = RunFolder.create(tmp_path / "run", config, "test")
        engine = Engine(task, run, quiet=True)
        end_epoch = task.end_epoch

        def spoil(epoch: int) -> object:
            if epoch == 4:
                with torch.no_grad():
                    task.tokenizer.decoder.conv_out.weight.mul_(-9)
            return end_epoch(epoch)

        task.end_epoch = spoil
        engine.fit()
        psnr = {r["step"]: r["psnr"] for r in rows(run, "eval")}
        best = max(psnr, key=psnr.get)
        assert best <= 16, "spoiled after that, or the test shows nothing"
        pointer = json.loads((run.checkpoints / "best.json").read_text())
        assert pointer == {"step": best, "metric": "psnr", "mode": "max", "value": psnr[best]}
        kept = sorted(int(path.stem.removeprefix("step-")) for path in run.checkpoints.glob("*.safetensors"))
        assert kept == [best, 28, 32]
        saved = steadyvq.Tokenizer.from_pretrained(run.best).state_dict()
        weights = averaged_weights(run.checkpoints / f"step-{best:08d}.safetensors")
        assert same(saved, weights)
        assert not same(saved, steadyvq.Tokenizer.from_pretrained(run.tokenizer).state_dict())

    @pytest.mark.parametrize("source", ["", "checkpoints/step-00000012.safetensors", "tokenizer"])
    def test_init_from_takes_weights_and_nothing_else(self, photos, tmp_path, source):
        first = train(photos, tmp_path / "first")
        config = resolve(tiny_recipe(photos, init_from=str(first.path / source), seed=5))
        task = TokenizerTask(config)
        engine = Engine(task, RunFolder(tmp_path / "second", config))
        state, weights = dict(task.module.state_dict()), averaged_weights(first.path)
        counted = [name for name in state if ".maintenance." in name or name.endswith((".updates", ".temperature"))]
        assert same(*({n: v for n, v in given.items() if n not in counted} for given in (state, weights)))
        assert state["quantizer.updates"] == 0 < weights["quantizer.updates"]
        assert same(engine.average.shadow, {n: state[n] for n in engine.average.shadow})
        assert engine.step == 0
        assert not engine.optimizers["tokenizer"].optimizer.state

    def test_init_from_heeds_the_new_settings(self, photos, tmp_path):
        """An annealed temperature and counts of hits belong to the old run; averages start from the loaded codes."""
        for name, options in (("nsvq", {"temperature": 5.0}), ("ema", {"maintenance": {"replace": {}}})):
            quantizer = {"name": name, "num_codes": 32, "dim": 8}
            first = train(photos, tmp_path / name, quantizer=quantizer)
            changed = {**quantizer, "options": options}
            config = resolve(tiny_recipe(photos, init_from=str(first.path), quantizer=changed))
            task = TokenizerTask(config)
            Engine(task, RunFolder(tmp_path / "new", config))
            vq = task.quantizer
            assert vq.temperature == options.get("temperature", 0.35)
            assert same({"base": vq.codes.base}, {"base": averaged_weights(first.path)["quantizer.codes.base"]})
            if name == "ema":
                assert torch.equal(vq.maintenance["ema"].sums, vq.codes.base)

    def test_init_from_says_what_is_wrong(self, photos, tmp_path):
        first = train(photos, tmp_path / "first")
        quantizer = {"name": "nsvq", "num_codes": 64, "dim": 8}
        other = resolve(tiny_recipe(photos, init_from=str(first.path), quantizer=quantizer))
        with pytest.raises(ValueError, match=r"do not fit this tokenizer: .*base is \(32, 8\) instead of \(64, 8\)"):
            Engine(TokenizerTask(other), RunFolder(tmp_path, other))
        nothing = resolve(tiny_recipe(photos, init_from=str(photos)))
        with pytest.raises(ValueError, match=r"holds neither checkpoints nor model.safetensors"):
            Engine(TokenizerTask(nothing), RunFolder(tmp_path, nothing))

    def test_plateaus_watch_what_there_is(self, photos):
        stages = [{"name": "a", "until": {"plateau": "comitment"}}, {"name": "b"}]
        config = resolve(tiny_recipe(photos, stages=stages))
        with pytest.raises(ValueError, match=r"plateau of stage 'a' 'comitment'.*did you mean 'commitment'"):
            Engine(TokenizerTask(config), RunFolder(Path("unused"), config))


# Settings of later versions, at values that leave the runs of before what they were.
ADDED = {
    "data": {"streaming": False, "workers": None, "min_scale": 1.0},
    "model": {
        "layout": "simvq",
        "decoder_res_blocks": None,
        "attention": [],
        "mid_attention": False,
        "groups": None,
        "projection": None,
        "adaptive": False,
        "rectifier": 0,
    },
    "optim": {"encoder_lr": None, "encoder_decay": None},
    "quantizer": {"sharded": False},
}


def test_the_defaults_are_those_that_the_evidence_was_made_with():
    """A changed default changes runs whose hash does not show it: make the evidence anew, then change this line."""
    plain = RunConfig().to_dict()
    for part, added in ADDED.items():
        assert {name: plain[part].pop(name) for name in added} == added
    assert plain.pop("adversarial")["discriminator"] == "none"
    assert [plain["stages"][0].pop(name) for name in ("ramp", "place")] == [{}, ""]
    assert [plain.pop(name) for name in ("train", "init_parts", "latent")] == ["all", "all", 0.0]
    assert [plain.pop(name) for name in ("perceptual", "perceptual_net", "perceptual_weights")] == [0.0, "vgg", None]
    assert [plain.pop(name) for name in ("compile", "activation_checkpointing", "strategy")] == [False, False, "ddp"]
    text = json.dumps(plain, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == "fde532dc0a13"


@pytest.mark.slow
def test_a_diverged_run_stops_with_exit_code_3(tiny, steadyvq_command, tmp_path):
    done = steadyvq_command("train", tiny, "--out", "run", "--set", "optim.lr=1e30", "--set", "epochs=9")
    assert done.returncode == 3, done.stderr
    assert "not finite in 10 steps in a row" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_an_interrupted_command_saves_and_resumes(tiny, tmp_path, number, code):
    command = [sys.executable, "-m", "steadyvq", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    sets = ["--set", "epochs=40", "--set", "eval_every=20", "--set", "checkpoint_every=20"]
    whole = subprocess.run([*command, tiny, "--out", "whole", *sets], cwd=tmp_path, env=environment)
    assert whole.returncode == 0
    process = subprocess.Popen(
        [*command, tiny, "--out", "cut", *sets],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "cut" / "log.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not log.exists() or '"step": 20' not in log.read_text()):
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert "resume with: steadyvq train --resume cut" in error
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["status"] == "interrupted"
    resumed = subprocess.run([*command, "--resume", "cut"], cwd=tmp_path, env=environment)
    assert resumed.returncode == 0
    a, b = (RunFolder.open(tmp_path / name) for name in ("whole", "cut"))
    assert rows(a) == rows(b)
