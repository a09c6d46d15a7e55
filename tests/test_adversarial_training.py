# SPDX-License-Identifier: Apache-2.0
"""A tokenizer against a discriminator: what each step computes, stages and ramps, broken numbers, what is left behind."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe
from torch import Tensor, nn
from torch.nn import functional as F

import steadyvq
from steadyvq.report import write_report
from steadyvq.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from steadyvq.training.config import RunConfig, resolve
from steadyvq.training.loop import Diverged, Engine
from steadyvq.training.run import RunFolder
from steadyvq.training.stages import Schedule, Stage, Until, nsvq_stages
from steadyvq.training.tokenizer_task import TokenizerTask
from steadyvq.training.weights import averaged_weights

PATCH = {"discriminator": "patch", "options": {"channels": 8, "layers": 2, "norm": "group"}}


def gan_recipe(photos: Path, adversarial: dict[str, object] | None = None, **changes: object) -> dict[str, object]:
    return tiny_recipe(photos, adversarial={**PATCH, **(adversarial or {})}, **changes)


def engine_of(recipe: dict[str, object], path: Path, **options: object) -> Engine:
    config = resolve(recipe)
    run = RunFolder.open(path) if options.get("resume") else RunFolder.create(path, config, "test")
    return Engine(TokenizerTask(config), run, quiet=True, **options)


def begun(recipe: dict[str, object], step: int = 0) -> tuple[TokenizerTask, Tensor]:
    """A task as it is in a step of its first stage, and a batch."""
    config = resolve(recipe)
    task = TokenizerTask(config)
    task.on_stage(Schedule(config.stages))
    task.begin_step(step)
    return task, task.batch(0, range(config.batch_size))


def rows(path: Path, kind: str = "train") -> list[dict[str, object]]:
    return [row for row in map(json.loads, (path / "log.jsonl").read_text().splitlines()) if row["kind"] == kind]


def plain_losses(task: TokenizerTask, batch: Tensor) -> tuple[Tensor, Tensor, object]:
    """(reconstruction, -mean D, what the quantizer returned) in one graph."""
    made, quantized = task.tokenizer(batch)
    return (made - batch).square().mean(), -task.adversary.critic.network(made).mean(), quantized


class TestStep:
    def test_the_adaptive_weight_by_autograd(self, photos):
        """The losses are differentiated by the images alone; weight and all gradients are those of the textbook."""
        task, batch = begun(gan_recipe(photos, {"weight": 0.8}))
        nll, g, quantized = plain_losses(task, batch)
        last = task.tokenizer.decoder.conv_out.weight
        by_nll, by_g = (torch.autograd.grad(x, last, retain_graph=True)[0] for x in (nll, g))
        adaptive = float(by_nll.norm() / (by_g.norm() + 1e-4))
        total = nll + 0.8 * adaptive * g + quantized.loss
        own = list(task.tokenizer.parameters())
        expected = torch.autograd.grad(total, own)
        out = task.loss("tokenizer", task.tokenizer, batch, {})
        assert float(out.logs["adversarial/adaptive_weight"]) == pytest.approx(adaptive, rel=1e-5)
        assert float(out.logs["adversarial/weight"]) == pytest.approx(0.8 * adaptive, rel=1e-5)
        assert float(out.logs["loss/adversarial"]) == pytest.approx(float(g.detach()), rel=1e-5)
        assert float(out.loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
        for got, wanted in zip(torch.autograd.grad(out.loss, own), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)

    def test_a_fixed_weight(self, photos):
        task, batch = begun(gan_recipe(photos, {"weight": 0.3, "adaptive": False}))
        nll, g, quantized = plain_losses(task, batch)
        out = task.loss("tokenizer", task.tokenizer, batch, {})
        assert float(out.loss.detach()) == pytest.approx(float((nll + 0.3 * g + quantized.loss).detach()), rel=1e-5)
        assert "adversarial/adaptive_weight" not in out.logs
        assert float(out.logs["adversarial/weight"]) == pytest.approx(0.3)

    def test_the_discriminator_sees_the_same_fakes(self, photos, tmp_path):
        """After the tokenizer's optimiser has stepped, it is still judged by what it made before."""
        engine = engine_of(gan_recipe(photos, micro_batch_size=3, epochs=1), tmp_path / "run")
        task, by_generator, by_discriminator = engine.task, [], []
        network, original = task.adversary.critic.network, task.adversary.join
        forward = task.adversary.judge

        def join(reconstruction: Tensor, *rest: object) -> object:
            by_generator.append(reconstruction.detach().clone())
            return original(reconstruction, *rest)

        def judge(model: nn.Module, real: Tensor, fake: Tensor) -> object:
            assert not fake.requires_grad
            by_discriminator.append((real, fake))
            return forward(model, real, fake)

        task.adversary.join, task.adversary.judge = join, judge
        before = copy.deepcopy(network.state_dict())
        engine.fit()
        assert len(by_generator) == len(by_discriminator) == 2 * 4
        assert all(torch.equal(a, b) for a, (_, b) in zip(by_generator, by_discriminator, strict=True))
        reals = torch.cat([real for real, _ in by_discriminator])
        assert torch.equal(reals, task.train_crops.batch(0, 0, 24))
        assert not torch.equal(before["layers.0.weight"], network.state_dict()["layers.0.weight"])

    def test_the_discriminators_loss(self, photos):
        task, batch = begun(gan_recipe(photos, {"lecam": 0.5, "discriminator_weight": 0.7}))
        critic = task.adversary.critic
        critic.real_mean.fill_(0.3)
        critic.fake_mean.fill_(-0.2)
        made = task.loss("tokenizer", task.tokenizer, batch, {})
        out = task.loss("discriminator", critic, batch, {"tokenizer": made})
        real, fake = (critic.network(x).detach() for x in (batch, task.tokenizer(batch)[0]))
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        lecam = F.relu(real + 0.2).square().mean() + F.relu(0.3 - fake).square().mean()
        assert float(out.loss.detach()) == pytest.approx(float(0.7 * hinge + 0.5 * lecam), rel=1e-5)
        assert float(out.logs["loss/lecam"]) == pytest.approx(float(lecam), rel=1e-5)
        assert float(out.logs["adversarial/logits_real"]) == pytest.approx(float(real.mean()), abs=1e-6)
        assert float(out.logs["adversarial/logits_fake"]) == pytest.approx(float(fake.mean()), abs=1e-6)

    def test_the_leak_of_simvq(self, photos):
        """Its loop: backward of the tokenizer's whole loss, backward of the discriminator's, one step, zero_grad."""
        settings = {"leak": True, "weight": 0.1, "adaptive": False, "generator_loss": "non_saturating_per_image"}
        task, batch = begun(gan_recipe(photos, settings))
        network = task.adversary.critic.network
        made, quantized = task.tokenizer(batch)
        g = F.softplus(-network(made).mean((1, 2, 3))).mean()
        ((made - batch).square().mean() + quantized.loss + 0.1 * g).backward()
        (0.5 * ((1 - network(batch)).relu().mean() + (1 + network(made.detach())).relu().mean())).backward()
        expected = [p.grad.clone() for p in network.parameters()]
        task.module.zero_grad()
        out = task.loss("tokenizer", task.tokenizer, batch, {})
        judged = task.loss("discriminator", task.adversary.critic, batch, {"tokenizer": out})
        got = torch.autograd.grad(judged.loss, list(network.parameters()))
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)

    def test_bf16(self, photos, tmp_path):
        engine = engine_of(gan_recipe(photos, {"lecam": 0.1}, precision="bf16-mixed", epochs=2), tmp_path / "run")
        engine.fit()
        last = rows(tmp_path / "run")[-1]
        assert last["adversarial/adaptive_weight"] > 0
        assert "skipped" not in last
        assert "adversarial/not_finite" not in last

    @pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
    def test_the_discriminator_learns(self, photos, tmp_path, loss):
        """Against a tokenizer at rest it tells photographs from reconstructions, and the log shows it."""
        stages = [{"name": "only", "frozen": ["encoder", "quantizer", "decoder"], "weights": {"adversarial": 0.0}}]
        recipe = gan_recipe(photos, {"discriminator_loss": loss, "lr": 0.01}, epochs=6, eval_every=6, stages=stages)
        engine = engine_of(recipe, tmp_path / "run")
        before = copy.deepcopy(engine.task.tokenizer.state_dict())
        engine.fit()
        after = engine.task.tokenizer.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before if "maintenance" not in name)
        log = rows(tmp_path / "run")
        assert log[-1]["adversarial/logits_real"] > log[-1]["adversarial/logits_fake"] + 0.5
        assert log[-1]["loss/discriminator"] < log[0]["loss/discriminator"] - 0.1
        assert "loss/reconstruction" not in log[-1]


class TestSchedule:
    def test_start_head_start_and_ramp(self, photos, tmp_path):
        recipe = gan_recipe(
            photos, {"start": 2, "head_start": 3, "ramp_steps": 4, "adaptive": False, "weight": 0.5}, log_every=1
        )
        engine = engine_of(recipe, tmp_path / "run")
        first = copy.deepcopy(engine.task.adversary.critic.state_dict())
        moved = []
        original = engine.task.begin_step

        def begin_step(step: int) -> None:
            moved.append(
                any(not torch.equal(v, first[n]) for n, v in engine.task.adversary.critic.state_dict().items())
            )
            original(step)

        engine.task.begin_step = begin_step
        engine.fit()
        log = rows(tmp_path / "run")
        weights = [row.get("adversarial/weight") for row in log]
        assert weights[:5] == [None] * 5
        assert weights[5:] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5])
        assert ["loss/discriminator" in row for row in log] == [False] * 2 + [True] * 10
        assert moved[-12:] == [False] * 3 + [True] * 9

    def test_the_stages_of_nsvq(self, photos, tmp_path):
        """Joint with the adversarial loss; a warmup without, the discriminator at rest; its return over two epochs."""
        stages = nsvq_stages(Until(max_epochs=1), adversarial_ramp=2.0)
        recipe = gan_recipe(photos, {"adaptive": False, "weight": 0.8}, epochs=5, log_every=1)
        config = RunConfig(**{**vars(resolve(recipe)), "stages": stages})
        engine = Engine(TokenizerTask(config), RunFolder.create(tmp_path / "run", config, "test"), quiet=True)
        states = {}
        original = engine.task.begin_step

        def begin_step(step: int) -> None:
            states[step] = copy.deepcopy(engine.task.module.state_dict())
            original(step)

        engine.task.begin_step = begin_step
        engine.fit()

        def moves(part: str, a: int, b: int) -> bool:
            return any(not torch.equal(v, states[b][n]) for n, v in states[a].items() if n.startswith(part))

        log = rows(tmp_path / "run")
        assert [row["stage"] for row in log] == ["joint"] * 4 + ["warmup"] * 4 + ["refine"] * 12
        assert [row.get("adversarial/weight") for row in log[:8]] == pytest.approx([0.8] * 4 + [None] * 4)
        ramp = [0.8 * (i + 1) / 8 for i in range(8)] + [0.8] * 4
        assert [row["adversarial/weight"] for row in log[8:]] == pytest.approx(ramp)
        for part, moving in (
            ("tokenizer.encoder", (1, 0, 0)),
            ("discriminator", (1, 0, 1)),
            ("tokenizer.decoder", (1, 1, 1)),
        ):
            assert [moves(part, a, b) for a, b in ((0, 4), (4, 8), (8, 19))] == [bool(x) for x in moving], part

    def test_ramps_of_a_loop_of_your_own(self):
        schedule = Schedule(
            [Stage("a", Until(max_epochs=1), weights={"adversarial": 0.0}), Stage("b", ramp={"adversarial": 2.0})]
        )
        assert schedule.weight("adversarial", 0.8, within=0.5) == 0.0
        schedule.step(1, 9, {})
        assert schedule.weight("adversarial", 0.8, within=0.5) == pytest.approx(0.8 / 4)
        schedule.step(2, 9, {})
        assert schedule.weight("adversarial", 0.8, within=0.5) == pytest.approx(0.8 * 3 / 4)
        assert schedule.weight("perceptual", 1.0, within=0.5) == 1.0
        schedule.step(3, 9, {})
        assert schedule.weight("adversarial", 0.8) == 0.8
        assert "discriminator" not in {part for stage in nsvq_stages() for part in stage.frozen}

    def test_turned_off_by_one_setting(self, photos, tmp_path):
        """The stages may go on speaking of it."""
        stages = [
            {"name": "a", "frozen": ["discriminator"], "weights": {"adversarial": 0.0}, "ramp": {"adversarial": 2}}
        ]
        engine = engine_of(gan_recipe(photos, {"discriminator": "none"}, stages=stages, epochs=1), tmp_path / "run")
        assert engine.task.objectives == ("tokenizer",)
        engine.fit()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"adversarial": {**PATCH, "weight": -1}}, "adversarial.weight is -1.0, but it must be at least 0"),
            ({"adversarial": {**PATCH, "lecam_decay": 1}}, "a positive weight and a decay in"),
            ({"adversarial": {**PATCH, "lr": 0}}, "adversarial.lr is 0.0, but a learning rate is positive"),
            ({"adversarial": {**PATCH, "betas": [0.5]}}, "Adam needs two numbers"),
            ({"adversarial": {"discriminator": "patch"}}, "16 pixels wide, but a patch discriminator of 3 layers"),
            ({"adversarial": {"discriminator": "dino"}}, "needs the weights of a DINO"),
            ({"adversarial": {**PATCH, "options": {"norms": "group"}}}, "has no option 'norms'"),
            (
                {"adversarial": {**PATCH, "options": {"layers": 2}}, "micro_batch_size": 2},
                "batch normalisation of the discriminator couples all images.*adversarial.options.norm=group",
            ),
            ({"stages": [{"name": "a", "frozen": ["decoder"]}]}, "freezes the decoder, but the adaptive weight is"),
            (
                {"stages": [{"name": "a", "ramp": {"adverserial": 2}}]},
                "ramps 'adverserial', but the losses that a stage",
            ),
            ({"stages": [{"name": "a", "ramp": {"adversarial": -2}}]}, "over -2.0 epochs, but at least 0"),
        ],
    )
    def test_refusals(self, photos, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            engine_of({**gan_recipe(photos), **changes}, tmp_path / "run")

    def test_hashes_of_runs_without_one_are_what_they_were(self):
        """From the version before adversarial training, of stages with all their keys and of none."""
        stages = [{"name": "a", "until": {"max_epochs": 2}}, {"name": "b", "frozen": ["encoder"]}]
        assert resolve({"stages": stages}).hash() == "81330745f1c4"
        assert resolve({"epochs": 7}).hash() == "dac5d8e053e0"
        stages[1]["ramp"] = {"adversarial": 2}
        assert resolve({"stages": stages}).hash() != "81330745f1c4"
        assert len({resolve({"adversarial": a}).hash() for a in ({}, PATCH, {**PATCH, "weight": 0.1})}) == 3


class TestBroken:
    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_a_discriminator_that_breaks(self, photos, tmp_path, value):
        """For two steps its logits are not finite: the tokenizer goes on without it, weights stay finite, both are counted."""
        recipe = gan_recipe(photos, {"lecam": 0.1}, log_every=1)
        engine = engine_of(recipe, tmp_path / "run")
        network, tokenizers, critics = engine.task.adversary.critic.network, [], []

        def spoil(module: nn.Module, arguments: object, logits: Tensor) -> Tensor:
            return logits * value if engine.step in (3, 4) else logits

        network.register_forward_hook(spoil)
        original = engine.task.begin_step

        def begin_step(step: int) -> None:
            tokenizers.append(engine.task.tokenizer.encoder.conv_in.weight.detach().clone())
            critics.append(copy.deepcopy(engine.task.adversary.critic.state_dict()))
            original(step)

        engine.task.begin_step = begin_step
        engine.fit()
        tokenizers, critics = tokenizers[-12:], critics[-12:]
        assert all(v.isfinite().all() for v in engine.task.module.state_dict().values())
        assert all(v.isfinite().all() for v in engine.average.shadow.values())
        assert not torch.equal(tokenizers[3], tokenizers[4])
        assert not torch.equal(tokenizers[4], tokenizers[5])
        for name, v in critics[3].items():
            assert torch.equal(v, critics[5][name]), name
        assert any(not torch.equal(v, critics[6][name]) for name, v in critics[5].items())
        log = rows(tmp_path / "run")
        assert [row.get("adversarial/not_finite", 0) for row in log] == [0, 0, 0, 1, 1] + [0] * 7
        assert [row.get("skipped", 0) for row in log] == [0, 0, 0, 1, 1] + [0] * 7

    def test_without_the_adaptive_weight_the_step_is_skipped(self, photos, tmp_path):
        engine = engine_of(gan_recipe(photos, {"adaptive": False}, log_every=1), tmp_path / "run")
        engine.task.adversary.critic.network.register_forward_hook(
            lambda module, arguments, logits: logits * (math.nan if engine.step == 3 else 1.0)
        )
        engine.fit()
        assert all(v.isfinite().all() for v in engine.task.module.state_dict().values())
        assert [row.get("skipped", 0) for row in rows(tmp_path / "run")] == [0, 0, 0, 1] + [0] * 8

    def test_one_that_stays_broken_ends_the_run(self, photos, tmp_path):
        engine = engine_of(gan_recipe(photos), tmp_path / "run")
        engine.task.adversary.critic.network.register_forward_hook(lambda module, arguments, logits: logits * math.nan)
        with pytest.raises(Diverged):
            engine.fit()
        assert all(v.isfinite().all() for v in engine.task.module.state_dict().values())


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    path = tmp_path_factory.mktemp("gan") / "run"
    engine_of(gan_recipe(photos, {"lecam": 0.1}, keep_checkpoints=3), path).fit()
    return path


class TestTraces:
    def test_the_checkpoint_holds_both_sides(self, run):
        state = load_checkpoint(latest_checkpoint(run / "checkpoints"))
        assert {"discriminator.real_mean", "discriminator.network.layers.0.weight"} <= state["module"].keys()
        assert float(state["module"]["discriminator.real_mean"]) != 0
        assert state["optimizers"]["discriminator"]["state"]
        assert not any("discriminator" in name for name in state["average"]["shadow"]), "nobody evaluates it"

    def test_resumed_from_the_middle_it_is_the_same(self, photos, run, tmp_path):
        other = tmp_path / "run"
        engine = engine_of(gan_recipe(photos, {"lecam": 0.1}, keep_checkpoints=3), other)
        good = engine.task.batch

        def stop(epoch: int, positions: range) -> Tensor:
            if engine.step == 6:
                raise KeyboardInterrupt
            return good(epoch, positions)

        engine.task.batch = stop
        with pytest.raises(KeyboardInterrupt):
            engine.fit()
        engine_of(gan_recipe(photos, {"lecam": 0.1}, keep_checkpoints=3), other, resume=True).fit()
        ours, theirs = (load_checkpoint(latest_checkpoint(p / "checkpoints")) for p in (run, other))
        for part in ("module", "average", "optimizers"):
            assert json.dumps(ours[part], default=lambda x: x.tolist()) == json.dumps(
                theirs[part], default=lambda x: x.tolist()
            )

    def test_the_tokenizer_alone_is_saved_and_started_from(self, photos, run):
        saved = steadyvq.Tokenizer.from_pretrained(run / "tokenizer").state_dict()
        weights = averaged_weights(run)
        assert saved.keys() == weights.keys()
        assert all(torch.equal(saved[name], weights[name]) for name in saved)
        config = resolve(tiny_recipe(photos, init_from=str(run)))
        task = TokenizerTask(config)
        task.prepare()
        assert torch.equal(task.tokenizer.encoder.conv_in.weight, saved["encoder.conv_in.weight"])

    def test_the_report_shows_both_sides(self, run):
        page = write_report([run], run / "report.html").read_text()
        for text in ("Logits of the discriminator", "Adversarial weight", "Adaptive weight", "adversarial", "lecam"):
            assert text in page
        assert "Adversarial training" in page
        assert "adversarial/weight (train)" not in page, "nothing is shown twice"

    def test_a_checkpoint_from_before_these_settings_is_resumed(self, photos, tmp_path):
        """A setting that its version did not have had its default."""
        engine = engine_of(tiny_recipe(photos), tmp_path / "run")
        engine.fit()
        path = latest_checkpoint(tmp_path / "run" / "checkpoints")
        state = load_checkpoint(path)
        del state["config"]["adversarial"]
        for stage in state["config"]["stages"]:
            del stage["ramp"]
        save_checkpoint(path, state)
        assert engine_of(tiny_recipe(photos), tmp_path / "run", resume=True).step == 12
        state["config"]["adversarial"] = PATCH
        save_checkpoint(path, state)
        with pytest.raises(ValueError, match="written with another configuration"):
            engine_of(tiny_recipe(photos), tmp_path / "run", resume=True)
