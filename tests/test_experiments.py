# SPDX-License-Identifier: Apache-2.0
"""`steadyvq experiment`: cells are run once, verdicts follow intervals, records are of today's settings."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from conftest import tiny_recipe
from runs import heed_interrupts

from steadyvq.cli import main
from steadyvq.experiments import tables
from steadyvq.experiments.claims import Claim, Missing, Results, above, below, every, interval, one_each
from steadyvq.experiments.outcome import steps_to
from steadyvq.experiments.pages import as_html, as_markdown, plots
from steadyvq.experiments.runner import Experiment, read_results
from steadyvq.experiments.study import PROFILES, Cell, Computed, Curve, Measure, Study, Trained, studies, study_of

EVIDENCE = Path(__file__).parent.parent / "docs" / "evidence" / "experiments"


def base(cell: Cell) -> dict[str, Any]:
    (cell.folder / "noise.txt").write_text(str(random.Random(cell.seed).random()))
    return {}


def shifted(cell: Cell) -> dict[str, Any]:
    if cell.settings.get("fails"):
        raise RuntimeError("no luck")
    with (cell.folder / "ran.txt").open("a") as file:
        file.write("once\n")
    value = float((cell.inputs["base"] / "noise.txt").read_text()) + cell.settings["shift"]
    return {"value": value, "curves": {"value": [[step, value * step] for step in range(3)]}}


def arms(settings: Mapping[str, Any]) -> dict[str, Computed]:
    made = {f"shift {s}": Computed(shifted, {"shift": s}, needs=["base"]) for s in settings["shifts"]}
    made["broken"] = Computed(shifted, {"fails": True}, needs=["base"])
    return {"base": Computed(base, hidden=True), **made}


def study(**changes: Any) -> Study:
    claims = (
        Claim("one is more", "a paper, Table 1", lambda r: above(r.gains("shift 1", "shift 0", "value"), 0.5, "gain")),
        Claim("broken works", "a paper", lambda r: above(one_each(r.values("broken", "value")), 0, "value")),
    )
    given: dict[str, Any] = {
        "name": "shifts",
        "title": "Shifts",
        "question": "Is one more than none?",
        "protocol": "Shifts by {shifts}.",
        "profiles": {"tiny": {"shifts": [0, 1]}},
        "arms": arms,
        "claims": claims,
        "measures": (Measure("value", "value", ".1f"),),
        "curves": (Curve("value", "Value"),),
    }
    return Study(**given | changes)


def test_cells_are_run_once_and_again_where_settings_change(tmp_path):
    first = Experiment(study(), "tiny", 2, tmp_path)
    first.run(workers=2)
    assert {cell[0] for cell in first.failed} == {"broken"}
    assert "no luck" in first.failed["broken", 0]
    ran = first.jobs["shift 1", 1].path / "ran.txt"
    again = Experiment(study(), "tiny", 2, tmp_path)
    assert {job.arm for job in again.missing()} == {"broken"}
    again.run(workers=1)
    assert ran.read_text() == "once\n"
    assert again.jobs["shift 1", 1].key != again.jobs["shift 1", 0].key != again.jobs["shift 0", 0].key
    changed = Experiment(study(profiles={"tiny": {"shifts": [0, 2]}}), "tiny", 2, tmp_path)
    assert {(job.arm, job.seed) for job in changed.missing() if job.arm != "broken"} == {("shift 2", 0), ("shift 2", 1)}
    record = first.record()
    assert [c["verdict"] for c in record["claims"]] == ["reproduced", "undecided"]
    assert record["claims"][0]["estimate"] == pytest.approx(1)
    assert read_results(record).values("shift 0", "value") == first.results().values("shift 0", "value")
    assert str(tmp_path) not in json.dumps(record)
    first.write()
    page = (tmp_path / "experiment.html").read_text()
    assert "not reproduced" not in page
    assert "<svg" in page
    assert "http" not in re.sub(r'xmlns="[^"]*"|http-equiv', "", page)
    assert "`shift 1`" in (tmp_path / "experiment.md").read_text()
    assert "`base`" not in (tmp_path / "experiment.md").read_text()
    assert (tmp_path / "plots" / "value.svg").read_text().startswith("<svg")


def test_a_cell_that_others_need_decides_their_key():
    one, two = (
        Experiment(study(arms=lambda s, b=b: {**arms(s), "base": Computed(base, b)}), "tiny", 1, Path("nowhere"))
        for b in ({}, {"more": 1})
    )
    assert one.jobs["shift 0", 0].key != two.jobs["shift 0", 0].key


def test_what_needs_a_broken_cell_fails_with_it(tmp_path):
    def plan(settings: Mapping[str, Any]) -> dict[str, Computed]:
        return {**arms(settings), "after": Computed(shifted, {"shift": 0}, needs=["broken"])}

    found = Experiment(study(arms=plan), "tiny", 1, tmp_path)
    found.run(workers=2)
    assert found.failed["after", 0] == "it needs broken, which failed"


@pytest.mark.slow
def test_a_training_run_is_measured_and_another_starts_from_it(photos, tmp_path):
    """Its PSNR by photograph has the mean of its evaluation, and the second begins where the first ended."""
    data = tiny_recipe(photos)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(data))

    def plan(settings: Mapping[str, Any]) -> dict[str, Trained]:
        still = {"init_parts": "all", "optim": {"lr": 1e-12, "codebook_lr": 1e-12}, "epochs": 1}
        return {"first": Trained(str(recipe)), "second": Trained(str(recipe), still, start="first")}

    found = Experiment(study(arms=plan, claims=()), "tiny", 1, tmp_path / "out")
    found.run(workers=1)
    assert found.failed == {}
    first, second = (found.results().cells[arm][0] for arm in ("first", "second"))
    assert first["steps_to_95"] in (4, 8, 12)
    assert set(first["photographs"]["psnr"])
    low, high = min(first["photographs"]["psnr"].values()), max(first["photographs"]["psnr"].values())
    assert low <= first["psnr"] <= high
    assert second["curves"]["psnr"][0][0] == 4
    assert second["psnr"] == pytest.approx(first["psnr"], abs=0.05)
    (gains,) = found.results().gains("first", "second", "psnr")
    assert len(gains) == len(first["photographs"]["psnr"])


def test_intervals_cover_what_they_should():
    """Three seeds of a normal: the interval holds the true mean in 95 % of experiments, where the range holds it in 75 %."""
    draw = random.Random(0)
    held = ranges = 0
    for _ in range(200):
        values = [draw.gauss(1, 1) for _ in range(3)]
        _, low, high = interval(one_each(values))
        held += low <= 1 <= high
        ranges += min(values) <= 1 <= max(values)
    assert held >= 184
    assert ranges <= 170
    middle, low, high = interval([[1.0, 2.0], [3.0, 4.0], [2.0, 3.0], [0.0, 1.0]])
    assert middle == 2
    assert low < 1 < 3 < high
    assert interval([[1.0]])[1:] == (-math.inf, math.inf)


def test_verdicts_follow_the_interval():
    far, near = one_each([2.0, 2.1, 1.9]), one_each([2.0, 3.0, -1.0])
    assert above(far, 1, "x").verdict == below(far, 3, "x").verdict == "reproduced"
    assert above(far, 3, "x").verdict == below(far, 1, "x").verdict == "not reproduced"
    assert above(near, 1, "x").verdict == below(near, 1, "x").verdict == "undecided"
    assert above(one_each([2.0]), 1, "x").verdict == "undecided"
    yes, no, open_ = above(far, 1, "x"), above(far, 3, "y"), above(near, 1, "z")
    assert every(yes, open_).verdict == "undecided"
    assert every(yes, no, open_).verdict == "not reproduced"
    assert every(yes, yes).verdict == "reproduced"
    assert above(far, 1, "use", ".0f", 100).found.startswith("use: 200 [")


def test_pairs_are_of_one_seed_and_one_photograph():
    cells = {
        "a": {0: {"p": 3.0, "photographs": {"p": {"x": 4.0, "y": 2.0}}}, 1: {"p": 1.0}, 2: {"p": None}},
        "b": {0: {"p": 1.0, "photographs": {"p": {"y": 1.5, "x": 0.5}}}, 1: {"p": 4.0}, 2: {"p": 1.0}},
    }
    results = Results(cells)
    del cells["a"][2]
    assert results.gains("a", "b", "p") == [[3.5, 0.5], [-3.0]]
    assert mean(results.values("b", "p")) == 2
    with pytest.raises(Missing, match="c"):
        results.gains("a", "c", "p")


def test_steps_to_a_share_of_the_last_value():
    assert steps_to([(10, 0.1), (20, 0.5), (30, 0.96), (40, 0.9), (50, 1.0)]) == 30
    assert steps_to([]) is None


def test_every_study_can_be_planned_in_every_profile():
    for name, one in studies().items():
        assert set(one.profiles) == set(PROFILES), name
        assert name == one.name
        assert one.seeds >= 3
        assert one.claims
        for profile in PROFILES:
            plan = Experiment(one, profile, 1, Path("nowhere"))
            assert len({job.key for job in plan.jobs.values()}) == len(plan.jobs), f"two cells of {name} are one"
            one.protocol.format(**one.settings(profile))


class Anything(dict[str, object]):
    """What a cell found, with a number for whatever is asked."""

    def __missing__(self, name: str) -> float:
        return 1.0 + len(name) / 10

    def get(self, name: str, default: object = None) -> object:
        return {} if name in ("photographs", "curves") else self[name]


@pytest.mark.parametrize("profile", ["tiny", "small", "full"])
def test_every_claim_can_be_decided_in_every_profile(profile):
    """No claim asks for an arm that the profile has not."""
    for name, study in studies().items():
        plans = study.arms(study.settings(profile))
        cells = {arm: {seed: Anything() for seed in range(3)} for arm in plans}
        for verdict in study.judge(Results(cells, list(cells))):
            assert "has results of" not in verdict["found"], (
                f"{name}, {profile}: {verdict['claim']}: {verdict['found']}"
            )


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("*.json")), ids=lambda path: path.stem)
def test_evidence_is_of_the_settings_of_today_and_says_what_its_cells_say(path):
    record = json.loads(path.read_text())
    one = study_of(path.stem)
    plan = Experiment(one, record["profile"], record["seeds"], Path("nowhere"))
    assert record["seeds"] >= 3
    assert {(c["arm"], c["seed"]): c["key"] for c in record["cells"]} == {k: job.key for k, job in plan.jobs.items()}
    assert all(re.fullmatch(r"[0-9a-f]{40}", commit) for commit in record["commits"]), "made from a changed tree"
    for said, now in zip(record["claims"], one.judge(read_results(record)), strict=True):
        assert said == json.loads(json.dumps(now))
    assert f"experiment-{path.stem}" in tables.TABLES
    assert as_html(one, record)
    assert as_markdown(one, record)
    assert all(svg.startswith("<svg") for svg in plots(one, record).values())


def test_the_command_refuses_what_is_not_there(tmp_path, capsys):
    assert main(["experiment", "toy-drft"]) == 2
    assert "toy-drift" in capsys.readouterr().err
    assert main(["experiment"]) == 2
    assert "--list" in capsys.readouterr().err
    assert main(["experiment", "toy-drift", "--seeds", "0", "--out", str(tmp_path / "o")]) == 2
    assert "--seeds is 0" in capsys.readouterr().err
    assert main(["experiment", "toy-drift", "--workers", "0", "--out", str(tmp_path / "o")]) == 2
    (tmp_path / "file").write_text("")
    assert main(["experiment", "toy-drift", "--out", str(tmp_path / "file")]) == 2
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_an_interrupted_experiment_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "steadyvq", "experiment", "two-samples", "--seeds", "1", "--out", "e"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=heed_interrupts,
    )
    deadline = time.monotonic() + 100
    while not any((tmp_path / "e" / "cells").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with: steadyvq experiment two-samples" in said
    assert not (tmp_path / "e" / "experiment.json").exists()
