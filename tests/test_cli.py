# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: whole commands in processes, and every refusal in one to three lines."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_recipe
from PIL import Image

import steadyvq
import steadyvq.data
from steadyvq.data import ShardWriter
from steadyvq.experiments.arms import Arm, ArmFailed, train_arms
from steadyvq.training.config import resolve

pytestmark = pytest.mark.slow

HALF_VQ = """
from steadyvq.quantizers import compose

def half_vq(num_codes, dim, **overrides):
    return compose(num_codes, dim, {"losses": {"commitment": 0.5, "codebook": 0.5}}, overrides)

def not_a_quantizer(num_codes, dim, **overrides):
    return None

def plain(num_codes, dim):
    return compose(num_codes, dim, {})

def raises(num_codes, dim, **overrides):
    return {}["no such part"]
"""


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A run of the tiny recipe through the command line, and its folder."""
    import os
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe(photos)))
    done = subprocess.run(
        [sys.executable, "-m", "steadyvq", "train", "tiny.yaml", "--out", "run"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_train_shows_progress_a_table_and_a_report(trained):
    folder, done = trained
    assert "12/12" in done.stderr
    assert "0 s left" in done.stderr
    assert "PSNR" in done.stdout
    page = (folder / "run" / "report.html").read_text()
    assert "<svg" in page
    assert "data:image/png;base64," in page
    for name in ("config.yaml", "run.json", "log.jsonl", "usage.json"):
        assert (folder / "run" / name).stat().st_size > 0
    assert not list((folder / "run").rglob("*.tmp*"))


def test_eval_encode_decode(trained, photos, steadyvq_command, tmp_path):
    run = trained[0] / "run"
    done = steadyvq_command("eval", run, "--out", "record.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    saved = json.loads(sorted((run / "evaluations").glob("step-*.json"))[-1].read_text())
    for name, value in saved["metrics"].items():
        expected = value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-5)
        assert record["metrics"][name] == expected, f"{name}: a fresh process measures the same"
    assert record["pixels_hash"] == saved["pixels_hash"]

    done = steadyvq_command("encode", run, "--data", photos, "--out", "tokens.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "tokens.npz") as file:
        tokens, names = file["tokens"], file["names"]
    assert tokens.shape == (8, 8, 8)
    assert len(names) == 8
    done = steadyvq_command("decode", run, "tokens.npz", "--out", "decoded")
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "decoded").iterdir())
    assert len(files) == 8
    tokenizer = steadyvq.Tokenizer.from_pretrained(run / "tokenizer").eval()
    image = tokenizer.decode(torch.from_numpy(tokens[:1].astype(np.int64)))[0]
    expected = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open(files[0])).astype(int) - expected).max() <= 1


def test_encode_lists_what_it_skips_and_decode_shortens_names(trained, photos, steadyvq_command, tmp_path):
    run = trained[0] / "run"
    (tmp_path / "mixed").mkdir()
    # 239 bytes; the cut at 100 bytes lies within a letter of two bytes.
    long = "x" + "ä" * 119
    shutil.copy(next(photos.glob("*.png")), tmp_path / "mixed" / f"{long}.png")
    (tmp_path / "mixed" / "broken.jpg").write_bytes(b"\xff\xd8\xff not a photograph")
    done = steadyvq_command("encode", run, "--data", "mixed", "--size", "24", "--out", "tokens.npz")
    assert done.returncode == 0, done.stderr
    assert "skipped mixed/broken.jpg: " in done.stderr
    square = steadyvq.data.load_image(tmp_path / "mixed" / f"{long}.png", 24)
    tokenizer = steadyvq.Tokenizer.from_pretrained(run / "tokenizer").eval()
    with np.load(tmp_path / "tokens.npz") as file:
        assert file["names"].tolist() == [f"{long}.png"]
        assert int(file["num_codes"]) == 32
        assert np.array_equal(file["tokens"], tokenizer.encode(steadyvq.data.to_float(square[None])).numpy())
    done = steadyvq_command("decode", run, "tokens.npz", "--out", "decoded")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "decoded").iterdir()] == ["000000_x" + "ä" * 49 + ".png"]


def test_a_quantizer_in_one_file_trains(tiny, steadyvq_command, tmp_path):
    (tmp_path / "my_file.py").write_text(HALF_VQ)
    done = steadyvq_command("train", tiny, "--quantizer", "my_file.py:half_vq", "--out", "mine")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "mine" / "log.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["kind"] == "train")
    weighted = 0.5 * (row["loss/commitment"] + row["loss/codebook"])
    assert row["loss"] == pytest.approx(row["loss/reconstruction"] + weighted, rel=1e-5)
    assert "loss/ns" not in row
    done = steadyvq_command("eval", "mine")
    assert done.returncode == 0, done.stderr


def test_list_report_dry_run_and_version(trained, steadyvq_command, tmp_path):
    done = steadyvq_command("list")
    assert all(name in done.stdout for name in steadyvq.list_quantizers())
    recipes = steadyvq_command("list", "recipes").stdout
    kinds = {name: kind for name, kind, *_ in (line.replace("│", " ").split() for line in recipes.splitlines()[2:])}
    assert kinds["quickstart"] == "train"
    assert kinds["demo"] == kinds["collapse"] == kinds["tuning"] == "comparison"
    assert steadyvq.__version__ in steadyvq_command("--version").stdout
    done = steadyvq_command("report", trained[0] / "run", "--out", "page.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").stat().st_size > 10_000
    done = steadyvq_command("train", "quickstart", "--dry-run", "--set", "optim.lr=3e-4", "--data", "mvtb")
    assert yaml.safe_load(done.stdout)["optim"]["lr"] == 3e-4
    assert not (tmp_path / "runs").exists()


def test_some_corrupt_files_are_skipped_listed_and_counted(photos, steadyvq_command, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(photos, mixed)
    (mixed / "broken.jpg").write_bytes(b"\xff\xd8\xff not a photograph")
    (mixed / "empty.png").touch()
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tiny_recipe(mixed)))
    done = steadyvq_command("train", "r.yaml", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "2 files skipped" in done.stderr
    assert "broken.jpg" in done.stderr
    assert "empty.png" in done.stderr


def test_an_arm_that_fails_says_so_in_one_line_and_leaves_nothing(photos, tmp_path, capfd):
    arm = Arm(resolve(tiny_recipe(photos), ["data.source=nowhere"]), tmp_path / "arm", "")
    with pytest.raises(ArmFailed, match="exit code 2"):
        train_arms([arm], workers=1)
    lines = [line for line in capfd.readouterr().err.splitlines() if "arms done" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("tiny: ")
    assert "nowhere" in lines[0]
    assert not arm.path.exists()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_bad_tokens(folder: Path) -> None:
    good = {"tokens": np.zeros((1, 4, 4), np.int64), "names": np.array(["a"]), "num_codes": np.array(32)}
    changes: dict[str, dict[str, object]] = {
        "flat": {"tokens": np.zeros((1, 0, 4), np.int64)},
        "floats": {"tokens": np.zeros((1, 4, 4))},
        "others": {"num_codes": np.array(64)},
        "beyond": {"tokens": np.full((1, 4, 4), 32)},
        "good": {},
    }
    for name, change in changes.items():
        np.savez(folder / f"{name}.npz", **{**good, **change})
    whole = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "nonsense.npz").write_bytes(b"nonsense")
    np.save(folder / "array.npy", good["tokens"])


def bad_inputs(folder: Path, photos: Path, run: Path) -> dict[str, tuple[list[object], str]]:
    """name -> (arguments, what the message must hold)."""
    (folder / "empty").mkdir()
    (folder / "dir.npz").mkdir()
    corrupt = folder / "corrupt"
    corrupt.mkdir()
    for i in range(3):
        (corrupt / f"{i}.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (folder / "r.yaml").write_text(yaml.safe_dump(tiny_recipe(photos)))
    (folder / "typo.yaml").write_text("epocs: 3\n")
    (folder / "my_file.py").write_text(HALF_VQ)
    write_bad_tokens(folder)
    ShardWriter(photos, folder / "torn", 4).write()
    tar = folder / "torn" / "shard-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-1000])
    (folder / "begun").mkdir()
    shutil.copyfile(folder / "torn" / "plan.json", folder / "begun" / "plan.json")
    shutil.copytree(run, folder / "other")
    config = yaml.safe_load((folder / "other" / "config.yaml").read_text())
    config["optim"]["lr"] = 0.5
    (folder / "other" / "config.yaml").write_text(yaml.safe_dump(config))
    train = ["train", "r.yaml", "--out", "out"]
    return {
        "missing folder": ([*train, "--data", "nowhere"], "nowhere"),
        "empty folder": ([*train, "--data", "empty"], "put .png, .jpg or .webp files in it"),
        "all corrupt": ([*train, "--data", "corrupt"], "3"),
        "wrong feature dimension": ([*train, "--set", "quantizer.dim=0"], "dim is 0"),
        "no codes": ([*train, "--set", "quantizer.num_codes=0"], "num_codes is 0"),
        "negative codes": ([*train, "--set", "quantizer.num_codes=-5"], "num_codes is -5"),
        "unknown quantizer": ([*train, "--quantizer", "nsqv"], "did you mean 'nsvq'"),
        "unknown recipe": (["train", "quikstart", "--out", "out"], "did you mean 'quickstart'"),
        "unknown command": (["trian", "r.yaml"], "train"),
        "unknown flag": ([*train, "--sett", "a=1"], "did you mean --set"),
        "flag of another command": ([*train, "--seed", "1"], "unrecognized arguments: --seed 1; did you mean --set?"),
        "unknown demo arm": (["demo", "--arms", "nsvk", "--out", "out"], "did you mean 'nsvq'"),
        "demo arm named twice": (["demo", "--arms", "vq, nsvq,vq", "--out", "out"], "'vq' is named 2 times"),
        "demo with a size that does not fit": (["demo", "--set", "data.crop_size=30", "--out", "out"], "30"),
        "demo below a file": (["demo", "--out", "r.yaml/demo"], "lies below"),
        "size that does not fit": ([*train, "--set", "data.crop_size=15"], "15"),
        "no probe images": ([*train, "--set", "probe_images=0"], "probe_images"),
        "a word for a temperature": ([*train, "--set", "quantizer.options.temperature=hot"], "hot"),
        "a list for a part": ([*train, "--set", "quantizer.options.maintenance.replace=[1]"], "replace"),
        "unknown loss of a plateau": (
            [*train, "--set", "stages=[{name: a, until: {plateau: comitment}}, {name: b}]"],
            "comitment",
        ),
        "misspelt key": ([*train, "--set", "optim.lrr=1"], "did you mean 'lr'"),
        "misspelt key in a recipe": (["train", "typo.yaml", "--out", "out"], "did you mean 'epochs'"),
        "misspelt option of a quantizer": ([*train, "--set", "quantizer.options.losses.nss=1"], "did you mean 'ns'"),
        "wrong type": ([*train, "--set", "epochs=many"], "it needs an integer"),
        "unknown key of a stage": ([*train, "--set", "stages=[{name: a, untill: {}}]"], "did you mean 'until'"),
        "unknown frozen part": ([*train, "--set", "stages=[{name: a, frozen: [encodr]}]"], "freezes 'encodr'"),
        "no recipe": (["train"], "no recipe given"),
        "checkpoint of another config": (["train", "--resume", "other"], "another configuration (differs in optim.lr)"),
        "resume with another setting": (["train", "--resume", run, "--set", "seed=7"], "differs in seed"),
        "resume of nothing": (["train", "--resume", "empty"], "holds no run"),
        "folder that holds a run": (["train", "r.yaml", "--out", run], "already holds a run"),
        "output that is a file": (["train", "r.yaml", "--out", "r.yaml"], "is a file"),
        "quantizer file missing": ([*train, "--quantizer", "no.py:f"], "no.py"),
        "quantizer function missing": ([*train, "--quantizer", "my_file.py:half"], "did you mean 'half_vq'"),
        "function that builds nothing": ([*train, "--quantizer", "my_file.py:not_a_quantizer"], "must return"),
        "function without overrides": ([*train, "--quantizer", "my_file.py:plain"], "channel_axis"),
        "function that raises": ([*train, "--quantizer", "my_file.py:raises"], "no such part"),
        "eval of nothing": (["eval", "empty"], "empty"),
        "eval of an unknown split": (["eval", run, "--split", "tset"], "tset"),
        "eval of a size that does not fit": (["eval", run, "--crop", "17"], "multiple"),
        "encode without photographs": (["encode", run, "--data", "empty", "--out", "t.npz"], "put .png"),
        "tokens that are none": (["decode", run, "nonsense.npz", "--out", "d"], "cannot be read as tokens"),
        "half a file of tokens": (["decode", run, "cut.npz", "--out", "d"], "cannot be read as tokens"),
        "tokens that are not there": (["decode", run, "gone.npz", "--out", "d"], "cannot be read as tokens"),
        "tokens in a bare array": (["decode", run, "array.npy", "--out", "d"], "a single array"),
        "tokens without height": (["decode", run, "flat.npz", "--out", "d"], "shape (1, 0, 4)"),
        "tokens that are no integers": (["decode", run, "floats.npz", "--out", "d"], "type float64"),
        "tokens of another tokenizer": (["decode", run, "others.npz", "--out", "d"], "written with 64 codes"),
        "tokens that do not exist": (["decode", run, "beyond.npz", "--out", "d"], "from 32 to 32"),
        "decode into a file": (["decode", run, "good.npz", "--out", "r.yaml"], "is a file"),
        "decode below a file": (["decode", run, "good.npz", "--out", "r.yaml/d"], "lies below"),
        "encode into a folder": (["encode", run, "--data", photos, "--out", "dir.npz"], "is a folder"),
        "encode below a file": (["encode", run, "--data", photos, "--out", "r.yaml/t.npz"], "lies below"),
        "encode only corrupt files": (["encode", run, "--data", "corrupt", "--out", "t.npz"], "none of the 3"),
        "encode at size 0": (["encode", run, "--data", photos, "--size", "0", "--out", "t.npz"], "--size is 0"),
        "eval of size 0": (["eval", run, "--crop", "0"], "--crop is 0"),
        "eval of 0 crops": (["eval", run, "--count", "0"], "--count is 0"),
        "eval of no folder": (["eval", run, "--data", ""], "no folder ''"),
        "eval with an empty quantizer": (["eval", run, "--quantizer", ""], "--quantizer is empty"),
        "eval into a folder": (["eval", run, "--out", "empty"], "is a folder"),
        "eval below a file": (["eval", run, "--out", "r.yaml/x.json"], "lies below"),
        "train on a torn shard": ([*train, "--data", "torn"], "cut short, or the index of another tar"),
        "train on unfinished shards": ([*train, "--data", "begun"], "run the same `steadyvq data shard` again"),
        "stream an empty folder": ([*train, "--data", "empty", "--set", "data.streaming=true"], "put .png"),
        "stream only corrupt files": ([*train, "--data", "corrupt", "--set", "data.streaming=true"], "could be read"),
        "fewer than no workers": ([*train, "--set", "data.workers=-1"], "data.workers is -1"),
        "shard nothing": (["data", "shard", "empty", "shards"], "put .png"),
        "shard into something else": (["data", "shard", photos, "corrupt"], "not empty"),
        "shard into a file": (["data", "shard", photos, "r.yaml"], "is a file"),
        "shard with other settings": (
            ["data", "shard", photos, "begun", "--samples", "7"],
            "begun with something else",
        ),
        "verify what is torn": (["data", "verify", "torn"], "shard-00001.tar"),
        "verify what is no shard set": (["data", "verify", "empty"], "holds no shards"),
        "unknown action": (["data", "shrd"], "did you mean shard"),
        "report into a folder": (["report", run, "--out", "empty"], "is a folder"),
        "report of nothing": (["report", "empty"], "log.jsonl"),
    }


@pytest.fixture(scope="module")
def bad(tmp_path_factory, photos, trained):
    folder = tmp_path_factory.mktemp("bad")
    return folder, bad_inputs(folder, photos, trained[0] / "run")


def test_bad_input_is_refused_in_one_to_three_lines(bad, steadyvq_command, trained):
    folder, cases = bad
    before, run_before = tree(folder), tree(trained[0])
    wrong = []
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda case: steadyvq_command(*case[0], cwd=folder), cases.values()))
    for (name, (_, needed)), done in zip(cases.items(), results, strict=True):
        lines = done.stderr.strip().splitlines()
        clear = (
            done.returncode == 2 and 1 <= len(lines) <= 3 and needed in done.stderr and "Traceback" not in done.stderr
        )
        if not clear:
            wrong.append((name, done.returncode, done.stderr[-600:]))
    assert not wrong
    assert tree(folder) == before, "nothing was written"
    assert tree(trained[0]) == run_before
