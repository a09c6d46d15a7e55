# SPDX-License-Identifier: Apache-2.0
"""`steadyvq compare`: the plan is fair, numbers are those of the runs, failures are rows, an interrupted one goes on."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import tiny_recipe

from steadyvq.cli import main
from steadyvq.data.collection import load_collection, split_by_name
from steadyvq.experiments.arms import Arm, is_done, train_arms
from steadyvq.experiments.compare import Comparison, Settings, label_of, with_lengths
from steadyvq.experiments.verdict import Failure, Finding, Trial, as_json, as_markdown, orders, ranked, short_table
from steadyvq.quantizers import list_quantizers
from steadyvq.training.config import resolve

TINY = {
    "data.crop_size": 16,
    "data.epoch_samples": 24,
    "data.eval_crops": 16,
    "model": "{channels: 8, multipliers: [1, 2], num_res_blocks: 1, num_mid_blocks: 0, z_channels: 8, patch: 1}",
    "quantizer.dim": 8,
    "quantizer.num_codes": 32,
    "batch_size": 6,
    "log_every": 2,
    "probe_images": 4,
}
EVIDENCE = Path(__file__).parent.parent / "docs" / "evidence"
SETS = [f"{key}={value}" for key, value in TINY.items()]

OWN = """
from steadyvq.quantizers import compose

class Raises:
    weight = 1.0
    def __call__(self, a):
        raise RuntimeError("no luck | today")

def raises(num_codes, dim, **overrides):
    return compose(num_codes, dim, {"losses": {"commitment": 0.25, "raises": Raises()}}, overrides)

def unbuildable(num_codes, dim, **overrides):
    raise KeyError("a part")
"""


def test_every_method_has_settings_that_fit_it(tmp_path):
    """At about 10 bits each, one rate searched, the same model, data, steps and crops for all."""
    plan = Comparison(Settings(tmp_path / "out"))
    assert [f.name for f in plan.findings] == list_quantizers()
    assert {f.label: str(f.failures[0]) for f in plan.findings if f.failures} == {}
    assert {f.label: f.bits for f in plan.findings if not 9.9 < f.bits < 10.1} == {}
    names = {f.label: f.rate_name for f in plan.findings}
    assert names["vq"] == names["nsvq"] == names["residual"] == "codebook_lr"
    assert names["simvq"] == names["ema"] == names["fsq"] == "lr"
    assert next(f for f in plan.findings if f.name == "vq").extra_parameters == 0
    # 32 x 32 of the map and 32 of its bias, and no free codebook.
    assert next(f for f in plan.findings if f.name == "simvq").extra_parameters == 32 * 33 - 1024 * 32
    arms = plan.search_arms()
    assert len(arms) == 3 * len(plan.findings)
    for part in ("data", "model", "stages", "batch_size", "epochs", "seed", "reconstruction"):
        assert len({json.dumps(arm.config.to_dict()[part]) for arm in arms}) == 1, part
    assert {(arm.config.data.eval_split, arm.config.seed) for arm in arms} == {("val", 1000)}
    gumbel = next(arm for arm in arms if arm.config.title == "gumbel")
    assert gumbel.config.quantizer.options["maintenance"]["anneal"]["period"] == plan.steps == 200
    assert not (tmp_path / "out").exists()


def test_a_length_is_a_part_of_the_run():
    assert with_lengths({"a": {"b": "steps/15"}, "c": "steps"}, 200) == {"a": {"b": 13}, "c": "steps"}
    assert with_lengths("steps/15", 3) == 1


def test_photographs_to_judge_on_are_nobody_elses(photos):
    names = [f"holiday/{i:05d}.jpg" for i in range(4000)]
    plain, split = split_by_name(names, 0.1), split_by_name(names, 0.1, 0.2)
    assert [part == "val" for part in plain] == [part == "val" for part in split]
    assert 0.17 < split.count("test") / 4000 < 0.23
    assert split_by_name([*names, "new.jpg"], 0.1, 0.2)[:-1] == split
    for count in range(3, 12):
        assert set(split_by_name(names[:count], 0.1, 0.1)) == {"train", "val", "test"}
    assert split_by_name(names[:1], 0.1, 0.1) == ("train",)
    assert set(split_by_name(names[:2], 0.1, 0.1)) == {"train", "val"}
    folder = load_collection(photos, test_fraction=0.1)
    parts = [set(folder.split(name).names) for name in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(folder)


def test_the_label_of_a_file_changes_with_it(tmp_path):
    file = tmp_path / "my file.py"
    file.write_text(OWN)
    first = label_of(f"{file}:raises")
    assert re.fullmatch(r"my_file\.raises-[0-9a-f]{6}", first)
    file.write_text(OWN + "\n# changed")
    assert label_of(f"{file}:raises") != first
    assert label_of("vq") == "vq"


def test_memory_counts_what_came_after():
    """In a process of its own, as arms are: one with a past has freed memory that new blocks fill unseen."""
    code = (
        "from steadyvq.experiments.memory import PeakMemory\n"
        "before = bytearray(b'x') * (200 << 20)\n"
        "del before\n"
        "memory = PeakMemory()\n"
        "block = bytearray(b'x') * (64 << 20)\n"
        "del block\n"
        "print(memory.read())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 60 << 20 < int(done.stdout) < 100 << 20


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["--methods", "nsqv"], "did you mean 'nsvq'"),
        (["--methods", "vq, nsvq,vq"], "'vq' is named 2 times"),
        (["--methods", "gone.py:f"], "gone.py"),
        (["--methods", "OWN:raise"], "did you mean 'raises'"),
        (["--methods", "OWN:unbuildable"], "no method can be built"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--budget", "tinny"], "did you mean 'tiny'"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "two"], "at least 3"),
        (["--out", "OWN"], "below"),
        (["--set", "optim.lrr=1"], "did you mean 'lr'"),
        (["--set", "data.crop_size=30"], "30"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(words, needed, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "two").mkdir()
    for path in sorted(photos.glob("*.*"))[:2]:
        (tmp_path / "two" / path.name).write_bytes(path.read_bytes())
    words = [word.replace("OWN", "own.py") for word in words]
    base = {"--data": str(photos), "--methods": "vq", "--out": "out"}
    rest = [word for key, value in base.items() if key not in words for word in (key, value)]
    assert main(["compare", *words, *rest]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert needed in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """Three finished runs of two methods."""
    folder = tmp_path_factory.mktemp("runs")
    wanted = [("vq", 0), ("vq", 1), ("nsvq", 0)]
    arms = []
    for name, seed in wanted:
        recipe = tiny_recipe(photos, title=name, seed=seed, quantizer={"name": name, "num_codes": 32, "dim": 8})
        arms.append(Arm(resolve(recipe), folder / f"{name}-{seed}", "test"))
    assert train_arms(arms, workers=2, keep_going=True) == {}
    return {pair: arm.path for pair, arm in zip(wanted, arms, strict=True)}


def findings(runs):
    some = Finding("vq", "vq", "codebook_lr", 32, 5.0, 1000, 0)
    trials = [Trial(0.01, 12.0, runs["vq", 1]), Trial(0.03, 13.0, runs["vq", 0]), Trial(0.1, None, Path("gone"))]
    failures = [Failure("search", 0.1, "latents were not finite"), Failure("final", 2, "full | disk")]
    vq = replace(some, trials=trials, rate=0.03, runs=[runs["vq", 0], runs["vq", 1]], failures=failures)
    edge = [Trial(0.01, 14.0, runs["nsvq", 0]), Trial(0.03, 13.0, runs["vq", 0])]
    nsvq = replace(some, name="nsvq", label="nsvq", trials=edge, rate=0.01, runs=[runs["nsvq", 0]])
    lost = Finding("my.py:f", "my.f", failures=[Failure("build", None, "no such part")])
    return [lost, vq, nsvq]


FACTS = {
    "photographs": {"train": 6, "val": 1, "test": 1},
    "search": {"seed": 1000, "rates": {"lr": [1, 2, 3]}},
    "data": "photos",
    "steps": 12,
    "batch_size": 6,
    "budget": "tiny",
    "command": "steadyvq compare",
}


def test_rows_are_means_over_the_runs(runs):
    rows = {row["method"]: row for row in ranked(findings(runs))}
    assert list(rows)[-1] == "my.f"
    values = []
    for seed in (0, 1):
        record = max((runs["vq", seed] / "evaluations").glob("step-*.json"))
        values.append(json.loads(record.read_text())["metrics"])
    for name in ("psnr", "ssim", "relative_error", "utilization", "perplexity"):
        assert rows["vq"][name] == pytest.approx(mean(value[name] for value in values))
        assert rows["vq"][f"{name}_spread"] == pytest.approx(stdev(value[name] for value in values))
    assert rows["nsvq"]["psnr_spread"] is None
    seconds = [json.loads((runs["vq", seed] / "run.json").read_text())["seconds"] for seed in (0, 1)]
    assert rows["vq"]["search_seconds"] == pytest.approx(sum(seconds))
    assert 0 < rows["vq"]["step_ms"] < 1000 * max(seconds)
    assert 0 < rows["vq"]["peak_mb"] < 2000
    assert rows["my.f"]["psnr"] is None
    best = [row["psnr"] for row in rows.values() if row["psnr"] is not None]
    assert best == sorted(best, reverse=True)


def test_tables_say_what_the_rows_say(runs):
    rows = ranked(findings(runs))
    page = as_markdown(FACTS, rows)
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert len({line.count("|") for line in lines.values()}) == 1, "a reason does not break the table"
    vq = next(row for row in rows if row["method"] == "vq")
    assert f"| {vq['psnr']:.2f} ± {vq['psnr_spread']:.2f} |" in lines["vq"]
    assert "0.03 (codebook_lr)" in lines["vq"]
    assert "search at 0.1: latents were not finite; seed 2: full / disk" in lines["vq"]
    assert "0.01* (codebook_lr)" in lines["nsvq"]
    assert "`*`" in page
    assert "failed: no such part" in lines["my.f"]
    assert "Do not rank" not in page
    assert short_table(rows)[-1]["PSNR, dB"] == "-"
    written = json.loads(as_json(FACTS, rows, findings(runs)))
    runs_of_vq = next(row for row in written["methods"] if row["method"] == "vq")["runs"]
    assert {run["seed"] for run in runs_of_vq} == {0, 1}
    for run in runs_of_vq:
        info = json.loads((Path(run["path"]) / "run.json").read_text())
        assert (run["config_hash"], run["commit"]) == (info["config_hash"], info["commit"])


def test_other_images_are_not_ranked_in_silence(runs):
    rows = ranked(findings(runs))
    rows[0]["runs"][0]["pixels_hash"] = "another"
    assert "Do not rank" in as_markdown(FACTS, rows)


def test_the_order_of_the_first_three_is_that_of_disjoint_seeds(runs):
    rows = ranked(findings(runs))
    assert [o["seeds"] for o in orders(rows)] == [[0], [1]]
    psnr = {"a": [9, 9, 7, 8], "b": [8, 8, 9, 7], "c": [7, 7, 8, 9], "d": [1, 2, 3, 4]}
    template = rows[0]
    made = [
        {
            **template,
            "method": name,
            "runs": [{**template["runs"][0], "seed": i, "psnr": v} for i, v in enumerate(values)],
        }
        for name, values in psnr.items()
    ]
    assert orders(made) == [{"seeds": [0, 1], "first": ["a", "b", "c"]}, {"seeds": [2, 3], "first": ["c", "b", "a"]}]
    assert "**not stable** over disjoint sets of seeds (seeds 0, 1: a, b, c; seeds 2, 3: c, b, a)" in as_markdown(
        FACTS, made
    )
    for row in made:
        row["runs"] = row["runs"][:2]
    assert "three is stable over" in as_markdown(FACTS, made)
    for row in made:
        row["runs"] = row["runs"][:1]
    assert orders(made) == []


def compare(folder: Path, *words: object) -> "subprocess.Popen[str]":
    sets = [word for pair in SETS for word in ("--set", pair)]
    command = [sys.executable, "-m", "steadyvq", "compare", *map(str, words), *sets, "--out", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("log.jsonl") if is_done(path.parent)}


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_and_failures_are_rows(photos, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    methods = "vq,own.py:raises,own.py:unbuildable"
    words = ["--data", photos, "--methods", methods, "--seeds", 2, "--set", "epochs=30", "--set", "eval_every=10"]
    process = compare(tmp_path, *words)
    log = tmp_path / "out" / "search" / "vq-lr0.1-seed1000" / "log.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.is_file() and '"step": 8,' in log.read_text()):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "go on with: steadyvq compare" in error
    assert json.loads((log.parent / "run.json").read_text())["status"] == "interrupted"
    done = stamps(tmp_path)
    assert done, "the first run of the search had finished"
    _, error = (process := compare(tmp_path, *words)).communicate(timeout=120)
    assert process.returncode == 0, error
    assert {path: path.stat().st_mtime_ns for path in done} == done, "finished runs are kept"
    steps = [row["step"] for row in map(json.loads, log.read_text().splitlines()) if row["kind"] == "train"]
    assert steps == list(range(2, 121, 2)), "the interrupted run went on where it was"
    rows = {row["method"]: row for row in json.loads((tmp_path / "out" / "compare.json").read_text())["methods"]}
    assert [rows[name]["seeds"] for name in rows] == [2, 0, 0]
    raises = next(row for name, row in rows.items() if name.startswith("own.raises"))
    assert raises["failed"] == [f"search at {rate}: RuntimeError: no luck | today" for rate in ("0.01", "0.03", "0.1")]
    assert "no luck / today" in (tmp_path / "out" / "compare.md").read_text()
    best = max(rows["vq"]["search"], key=lambda trial: trial["psnr"])
    assert rows["vq"]["rate"] == best["rate"]
    assert {run["split"] for run in rows["vq"]["runs"]} == {"test"}
    assert {run["codebook_lr"] for run in rows["vq"]["runs"]} == {best["rate"]}
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png;base64,") >= 2
    assert "left out: calling" in error or "left out: quantizer" in error
    # Once more: nothing is left to do, and other settings are refused.
    before = stamps(tmp_path)
    again = compare(tmp_path, "--data", photos, "--methods", "vq", "--seeds", 2, "--set", "batch_size=4")
    assert again.wait(60) == 2
    assert "trained with other settings" in again.communicate()[1]
    assert stamps(tmp_path) == before


def test_the_comparison_is_of_the_methods_and_settings_of_today(tmp_path):
    """Every registered method is in it, six runs each, of configurations that the recipe still gives, from commits."""
    record = json.loads((EVIDENCE / "compare.json").read_text())
    assert shlex.split(record["command"])[:2] == ["steadyvq", "compare"]
    rows = {row["method"]: row for row in record["methods"]}
    plan = Comparison(Settings(tmp_path / "out", seeds=len(next(iter(rows.values()))["runs"])))
    plan.findings = [replace(f, rate=rows[f.label]["rate"]) for f in plan.findings]
    expected = {(arm.config.title, arm.config.seed): arm.config.hash() for arm in plan.final_arms()}
    found = {(name, run["seed"]): run["config_hash"] for name, row in rows.items() for run in row["runs"]}
    assert found == expected
    assert [f.label for f in plan.findings] == sorted(rows)
    assert len(expected) == 6 * len(rows)
    for row in rows.values():
        for run in row["runs"]:
            assert re.fullmatch(r"[0-9a-f]{40}", run["commit"]), "evidence comes from a commit, not from a changed tree"
        assert row["psnr"] == pytest.approx(mean(run["psnr"] for run in row["runs"]))
        values = {trial["rate"]: trial["psnr"] for trial in row["search"] if trial["psnr"] is not None}
        assert row["rate"] == max(values, key=values.__getitem__)
