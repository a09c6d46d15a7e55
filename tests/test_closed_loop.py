# SPDX-License-Identifier: Apache-2.0
"""Experiments with whole training runs: shared cells, rates of the encoder, decisions over arms."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_recipe

from steadyvq.cli import main
from steadyvq.experiments.claims import Missing, Results
from steadyvq.experiments.closed import (
    EMA,
    NSVQ,
    PLACEBO,
    REPLACEMENT,
    SIMVQ,
    VQ,
    ahead,
    at_least,
    close,
    encoder_rate,
    freeze,
    profiles,
    rank_correlation,
    smallest_gain,
    trained,
)
from steadyvq.experiments.runner import Experiment, run_config
from steadyvq.experiments.study import Study, Trained, study_of
from steadyvq.experiments.unquantized import unquantized
from steadyvq.training.config import resolve
from steadyvq.training.strict import merge
from steadyvq.training.tokenizer_task import TokenizerTask

CLOSED = [
    "annealing",
    "causes",
    "codebook-scale",
    "components",
    "drift-stress",
    "dynamics",
    "freeze-controls",
    "freeze-time",
    "kmeans-init",
    "phases",
    "qualitative",
    "resolution256",
    "sensitivity",
    "table1",
    "training-length",
]


def results(**arms: dict[str, list[float]]) -> Results:
    """Cells from lists over seeds."""
    return Results(
        {
            arm: {
                seed: {name: values[seed] for name, values in measures.items()}
                for seed in range(len(next(iter(measures.values()))))
            }
            for arm, measures in arms.items()
        }
    )


def test_experiments_in_one_place_share_the_runs_of_equal_settings(tmp_path):
    """Whatever an arm is called: a cell that one has made is done for all others."""
    stress, causes = (
        Experiment(study_of(n), "tiny", 2, tmp_path / n, tmp_path / "cells") for n in ("drift-stress", "causes")
    )
    same = {
        ("vq x0.1", "uniform start, fast codes, encoder x0.1"),
        ("vq x1", "uniform start, fast codes, encoder x1"),
        ("vq, data start x5", "data start, fast codes, encoder x5"),
    }
    for one, other in same:
        job = stress.jobs[one, 1]
        assert job.key == causes.jobs[other, 1].key
        assert job.key != causes.jobs[other, 0].key
        job.path.mkdir(parents=True)
        (job.path / "result.json").write_text(json.dumps({"found": {"of_ceiling": 0.5}}))

    def again() -> Experiment:
        return Experiment(study_of("causes"), "tiny", 2, tmp_path / "causes", tmp_path / "cells")

    assert {again().jobs[other, 1].path for _, other in same} == {stress.jobs[one, 1].path for one, _ in same}
    assert len(again().missing()) == 24, "the run is there, but not what `causes` measures beside it"
    for _, other in same:
        (again().jobs[other, 1].path / "result-speed_ratio.json").write_text(json.dumps({"found": {}}))
    done = {(job.arm, job.seed) for job in again().jobs.values()} - {(job.arm, job.seed) for job in again().missing()}
    assert done == {(other, 1) for _, other in same}


def test_the_rate_of_the_encoder_moves_the_encoder_alone(photos):
    """In the first step Adam moves every weight by its rate, so the movement tells the rate of each part."""

    def moved(**optim: Any) -> dict[str, float]:
        given = {"lr": 1e-3, "codebook_lr": 1e-3, "grad_clip": None, "eps": 1e-30, **optim}
        task = TokenizerTask(resolve(tiny_recipe(photos, optim=given)))
        before = {name: [p.detach().clone() for m in ms for p in m.parameters()] for name, ms in task.parts().items()}
        optimizer = task.optimizer("tokenizer")
        task.loss("tokenizer", task.tokenizer, task.batch(0, range(6)), {}).loss.backward()
        optimizer.step()
        after = {name: [p.detach() for m in ms for p in m.parameters()] for name, ms in task.parts().items()}
        return {
            part: max(float((a - b).abs().max()) for a, b in zip(after[part], before[part], strict=True))
            for part in ("encoder", "decoder", "quantizer")
        }

    assert moved() == pytest.approx({"encoder": 1e-3, "decoder": 1e-3, "quantizer": 1e-3}, rel=1e-2)
    fast = moved(encoder_lr=5e-3, codebook_lr=2e-3)
    assert fast == pytest.approx({"encoder": 5e-3, "decoder": 1e-3, "quantizer": 2e-3}, rel=1e-2)


def test_the_encoder_alone_falls_along_a_cosine(photos):
    config = resolve(tiny_recipe(photos, optim={"encoder_decay": "cosine"}))
    total = config.epochs * config.steps_per_epoch
    for step in range(total):
        assert config.lr_factor(step) == 1
        assert config.lr_factor(step, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi * step / total)))
    groups = TokenizerTask(config).optimizer("tokenizer").param_groups
    assert [group.get("decay") for group in groups] == [None, "cosine", None]
    assert len({id(p) for group in groups for p in group["params"]}) == sum(len(g["params"]) for g in groups)
    with pytest.raises(ValueError, match=r"optim\.encoder_lr is 0"):
        resolve({"optim": {"encoder_lr": 0.0}})


@pytest.mark.slow
def test_a_run_with_an_encoder_of_its_own_goes_on_where_it_stopped(photos, tmp_path):
    from steadyvq.training.loop import Engine
    from steadyvq.training.run import RunFolder

    config = resolve(tiny_recipe(photos, optim={"encoder_lr": 1e-2, "encoder_decay": "cosine"}))

    def run(path: Path, resume: bool, **changes: Any) -> Engine:
        folder = RunFolder(path, config)
        engine = Engine(TokenizerTask(config), folder, resume=resume, quiet=True)
        if not resume:
            folder.begin("test")
        engine.fit()
        return engine

    whole = run(tmp_path / "whole", False)
    for later in sorted((tmp_path / "whole" / "checkpoints").iterdir())[-1:]:
        assert later.exists()
    again = run(tmp_path / "whole", True)
    (one, other) = (engine.optimizers["tokenizer"].param_groups for engine in (whole, again))
    assert [g.get("decay") for g in one] == [g.get("decay") for g in other] == [None, "cosine", None]
    assert [g["lr"] for g in one] == pytest.approx([g["lr"] for g in other])


def test_arms_have_the_rates_of_their_method_and_nothing_of_the_recipes():
    tiny, full = (profiles(200)[name] for name in ("tiny", "full"))
    assert run_config(trained(tiny, SIMVQ), 0).optim.lr == 8e-3
    assert run_config(trained(tiny, VQ), 0).optim.lr == run_config(trained(tiny, NSVQ), 0).optim.lr == 2e-3
    for own in (VQ, EMA, SIMVQ, REPLACEMENT, PLACEBO):
        config = run_config(trained(full, own), 0)
        assert config.quantizer.options == own["quantizer"].get("options", {})
        assert (config.optim.lr, config.quantizer.num_codes, config.batch_size) == (1e-4, 65536, 128)
        assert config.stages[0].frozen == ()
        assert config.data.source == "celeba"
    assert run_config(trained(full, NSVQ), 0).quantizer.options["temperature"] == 0.35
    frozen = run_config(trained(full, NSVQ, freeze()), 0)
    assert [stage.frozen for stage in frozen.stages] == [(), ("encoder",)]
    assert run_config(trained(tiny, VQ, encoder_rate(tiny, 5)), 0).optim.encoder_lr == pytest.approx(1e-2)
    assert run_config(trained(full, VQ, encoder_rate(full, 0.1)), 0).optim.encoder_lr == pytest.approx(1e-5)
    assert run_config(trained(tiny, VQ, encoder_rate(tiny, 1)), 0).optim.encoder_lr is None


def test_tiny_profiles_are_judged_on_test_and_small_enough():
    """All together below three hours on two cores."""
    seconds = 0.0
    for name in CLOSED:
        study = study_of(name)
        plan = Experiment(study, "tiny", 1, Path("nowhere"))
        for job in plan.jobs.values():
            assert isinstance(job.plan, Trained)
            assert run_config(job.plan, 0).data.eval_split == "test"
        expected = plan.expected_seconds()
        assert expected is not None
        seconds += expected * study.seeds
    assert seconds < 3 * 3600 * 2, "three hours on two cores, and equal runs are counted twice here"


def test_decisions_over_arms():
    r = results(
        a={"of_ceiling": [0.9, 0.8, 0.85], "psnr": [25.0, 25.2, 25.1]},
        b={"of_ceiling": [0.5, 0.5, 0.5], "psnr": [24.0, 24.2, 24.2]},
        c={"of_ceiling": [0.86, 0.84, 0.88], "psnr": [25.0, 25.1, 25.1]},
    )
    assert ahead("a", "b")(r).verdict == "reproduced"
    assert ahead("b", "a")(r).verdict == "not reproduced"
    assert ahead("a", "c")(r).verdict == "undecided"
    found = ahead("a", "b", "of_ceiling", 0.1)(r)
    assert found.estimate == pytest.approx(0.35)
    assert found.found.startswith("use, points: `a` less `b`: +35.0 [")
    assert at_least("a", "of_ceiling", 0.5)(r).verdict == "reproduced"
    assert at_least("b", "of_ceiling", 0.6)(r).verdict == "not reproduced"
    assert close(["a", "b", "c"], "of_ceiling", 0.1)(r).estimate == pytest.approx(mean([0.4, 0.34, 0.38]))
    assert close(["a", "c"], "psnr", 0.5)(r).verdict == "reproduced"
    smallest = smallest_gain(["a", "c"], ["b", "b"], "of_ceiling", 0.1)(r)
    assert smallest.estimate == pytest.approx(mean([0.36, 0.3, 0.35]))
    with pytest.raises(Missing):
        close(["a", "missing"], "psnr", 1)(r)


def test_ranks_are_correlated_over_arms_for_each_seed():
    """Against the definition, Pearson's correlation of ranks, and with ties."""
    r = results(
        a={"x": [1.0, 1.0], "y": [9.0, 3.0]},
        b={"x": [2.0, 2.0], "y": [5.0, 3.0]},
        c={"x": [3.0, 3.0], "y": [6.0, 1.0]},
        d={"x": [4.0, 4.0], "y": [1.0, 2.0]},
    )

    def pearson(first: list[float], second: list[float]) -> float:
        return float(torch.corrcoef(torch.tensor([first, second], dtype=torch.float64))[0, 1])

    expected = [pearson([0, 1, 2, 3], [3, 1, 2, 0]), pearson([0, 1, 2, 3], [2.5, 2.5, 0, 1])]
    assert rank_correlation(r, ["a", "b", "c", "d"], "x", "y") == pytest.approx(expected)


def test_an_autoencoder_without_a_quantizer_hands_its_latents_through():
    layer = unquantized(8, 4).train()
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = layer(z)
    assert torch.equal(out.z_q, z)
    assert float(out.loss.detach()) == 0
    (out.z_q * torch.arange(20.0).reshape(5, 4)).sum().backward()
    assert torch.equal(z.grad, torch.arange(20.0).reshape(5, 4))


def test_a_dry_run_prints_all_settings_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["experiment", "drift-stress", "--profile", "full", "--data", "my/faces", "--dry-run"]
    assert main(words) == 0
    plan = yaml.safe_load(capsys.readouterr().out)
    assert plan["cells"] == {"all": 45, "to_do": 45}
    assert plan["arms"]["nsvq x10"]["settings"]["data"]["source"] == "my/faces"
    assert plan["arms"]["nsvq x10"]["settings"]["optim"] == {"encoder_lr": pytest.approx(1e-3)}
    assert plan["arms"]["nsvq x10"]["recipe"] == "nsvq_celeba128"
    assert not list(tmp_path.iterdir())


TRAINED = [
    ("phases", "all phases"),
    ("dynamics", "nsvq, all phases"),
    ("qualitative", "nsvq"),
    ("sensitivity", "weight 0.5, calibrated"),
    ("freeze-controls", "simvq, encoder to 0"),
    ("freeze-controls", "ema, freeze"),
    ("freeze-time", "plateau"),
    ("components", "placebo"),
    ("causes", "data start, slow codes, encoder x5"),
    ("table1", "fsq"),
    ("table1", "vqgan_lc"),
    ("table1", "simvq + NS + freeze"),
    ("annealing", "fvq, annealed"),
]
"""Arms with a part of the configuration that no other has."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arm"), TRAINED)
def test_arms_train_and_are_measured(photos, tmp_path, name, arm):
    """Their own configuration on a smaller model: stages, freezes, rates and measures work together."""
    study = study_of(name)
    plan = Experiment(study, "tiny", 1, tmp_path).plans[arm]
    assert isinstance(plan, Trained)
    small: dict[str, Any] = tiny_recipe(photos, epochs=5)
    del small["title"]
    codes = {"num_codes": 64, "dim": 8, "init_samples": 12}
    small["quantizer"] = {**codes, **plan.settings["quantizer"]}
    small["data"]["eval_split"] = "val"
    smaller = replace(plan, settings=merge(plan.settings, small))
    job = Experiment(replace(study, arms=lambda settings: {arm: smaller}), "tiny", 1, tmp_path).jobs[arm, 0]
    job.run()
    result = job.result()
    assert result is not None
    found = result["found"]
    assert 0 < found["of_ceiling"] <= 1
    assert set(found["curves"]) >= {"utilization", "psnr", "drift"}
    own = {measure.name for measure in study.measures} - {"steps_to_95"}
    assert all(math.isfinite(found[name]) for name in own)
    if study.draw is not None:
        drawn = study.draw(tmp_path / "plots", {(arm, 0): job.path}, Results({}, []))
        assert [path.suffix for path in drawn] == [".png"]


def arms(settings: dict[str, Any]) -> dict[str, Trained]:
    """Two arms of the tiny recipe, one from the other."""
    start = {"init_parts": "autoencoder", "quantizer": {"init": "kmeans", "init_samples": 24}, "epochs": 1}
    first = {"quantizer": {"name": "steadyvq.experiments.unquantized:unquantized"}, "epochs": 1}
    return {"alone": Trained(settings["recipe"], first, hidden=True), "vq": Trained(settings["recipe"], start, "alone")}


@pytest.mark.slow
def test_codes_are_placed_in_an_autoencoder_that_was_trained_without(photos, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(tiny_recipe(photos)))
    one = {"tiny": {"recipe": str(recipe)}}
    study = Study("pair", "Pair", "?", "", one, arms, claims=())
    plan = Experiment(study, "tiny", 1, tmp_path / "out", tmp_path / "cells")
    plan.run(workers=1)
    assert plan.failed == {}
    found = plan.results().cells["vq"][0]
    assert 0 < found["of_ceiling"] <= 1
    assert found["mean_drift"] is None, "one epoch has no epoch before it"
    plan.write()
    assert "`alone`" not in (tmp_path / "out" / "experiment.md").read_text()
