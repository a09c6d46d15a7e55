# SPDX-License-Identifier: Apache-2.0
"""The tables of a report: stages, every evaluation, and where configurations differ."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from test_report import embedded, report, rows_of, text_of, write_run

from steadyvq.report.configuration import ABSENT, compact, differences

FROZEN = {"frozen": ["encoder"], "weights": {"ns": 0.0, "commitment": 0.0}, "paused": ["replace"], "estimator": None}
RULE = {"plateau": None, "patience": 10, "min_epochs": 0, "min_delta": 0.0, "max_epochs": None, "at_fraction": None}
STAGES = [
    {"name": "joint", "until": {**RULE, "plateau": "commitment", "min_delta": 0.005}, "frozen": [], "weights": {}},
    {"name": "warmup", "until": {**RULE, "max_epochs": 2}, **FROZEN},
    {"name": "refine", "until": RULE, **FROZEN, "estimator": "direct"},
]


def write_settings(folder: Path, **settings: object) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump({"title": folder.name, **settings}, sort_keys=False))


def write_evaluation(folder: Path, name: str, **changes: object) -> None:
    metrics = {"psnr": 21.5, "psnr_low": 20.25, "psnr_high": 22.75, "ssim": 0.5, "utilization": 0.25, "ceiling": 0.5}
    metrics |= {"active": 16, "num_codes": 64, "perplexity": 12.25, "relative_error": 0.125}
    record = {"metrics": metrics, "data": "photos", "split": "val", "crop": 32, "count": 1200, "photographs": 9}
    record |= {"tokens": 4096, "pixels_hash": "abc", "config_hash": "0123abc", "step": 100, "version": "0.1.0"}
    record |= {"protocol": "the mean over images", **changes}
    (folder / "evaluations" / f"{name}.json").write_text(json.dumps(record))


def test_lpips_has_a_column_where_it_was_measured(tmp_path):
    write_run(tmp_path)
    write_evaluation(tmp_path, "eval-a")
    assert "LPIPS alex" not in text_of(report(tmp_path))
    metrics = {"psnr": 21.5, "lpips_alex": 0.12345, "lpips_alex_weights": "0123abc"}
    write_evaluation(tmp_path, "eval-b", metrics=metrics)
    tree = report(tmp_path)
    assert "LPIPS alex" in text_of(tree)
    assert "LPIPS vgg" not in text_of(tree)
    assert "0.1235" in text_of(tree)


def test_stages_tell_their_length_and_what_they_change(tmp_path):
    write_run(tmp_path)
    write_settings(tmp_path, stages=STAGES)
    frozen = "frozen encoder; weights ns: 0, commitment: 0; paused replace"
    assert rows_of(report(tmp_path), "text stages") == [
        [
            "joint",
            "0",
            "200 steps, 4 epochs",
            "",
            "plateau commitment, patience 10, min_epochs 0, min_delta 0.005",
            "start",
        ],
        ["warmup", "200", "100 steps, 2 epochs", frozen, "max_epochs 2", "plateau of commitment"],
        ["refine", "300", "100 steps, 2 epochs", f"{frozen}; estimator direct", "", "2 epochs"],
    ]


def test_a_stage_that_has_not_begun_is_listed(tmp_path):
    write_run(tmp_path)
    write_settings(tmp_path, stages=[*STAGES, {"name": "polish", "until": RULE, "ramp": 3}])
    assert rows_of(report(tmp_path), "text stages")[-1] == ["polish", "–", "not reached", "ramp 3", "", ""]


def test_a_single_stage_is_listed_if_it_sets_anything(tmp_path):
    write_run(tmp_path)
    (tmp_path / "log.jsonl").write_text(json.dumps({"kind": "stage", "step": 0, "stage": "warmup", "reason": "start"}))
    write_settings(tmp_path, stages=STAGES[1:2])
    assert [row[0] for row in rows_of(report(tmp_path), "text stages")] == ["warmup"]
    write_settings(tmp_path, stages=[{"name": "warmup", "until": RULE, "frozen": []}])
    assert "Stages" not in headings(report(tmp_path))


def headings(tree: ElementTree.Element) -> list[str]:
    return [heading.text for heading in tree.iter("h2")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "stages: 3",
        "stages: [1, {until: x}, {name: [a], until: 4}]",
        "a: &a {b: *a}",
        "? [1]\n: 2",
        "\t- x: :",
        "[" * 2000,
    ],
)
def test_odd_configurations_are_shown_and_stop_nothing(tmp_path, text):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    (tmp_path / "a" / "config.yaml").write_text(text)
    assert (next(report(tmp_path / "a").iter("pre")).text or "") == text
    rows = rows_of(report(tmp_path / "a", tmp_path / "b"), "text stages")
    assert rows[1] == ["nsvq (a)", "warmup", "200", "100 steps, 2 epochs", "", "", "plateau of commitment"]


def test_every_evaluation_is_a_row_newest_first(tmp_path):
    write_run(tmp_path)
    write_evaluation(tmp_path, "step-00000100")
    write_evaluation(tmp_path, "eval-photos-test-64", step=400, split="test", crop=64, pixels_hash="def")
    tree = report(tmp_path)
    rows = rows_of(tree, "records")
    assert [row[0] for row in rows] == ["400", "400 eval", "100"]
    assert rows[1] == [
        "400 eval",
        "photos",
        "test",
        "64",
        "1,200 of 9 photos",
        "21.50 [20.25, 22.75]",
        "0.500",
        "25.0 % 16 of 64",
        "50.0 % 4,096 tokens",
        "12",
        "0.125",
        "2",
    ]
    assert rows[2][2:4] == ["val", "32"]
    details = next(found for found in tree.iter("details") if "How they were measured" in text_of(found))
    kinds = [text_of(item) for item in details.iter("li")]
    assert [row[-1] for row in rows] == ["1", "2", "3"]
    assert kinds[1] == "the mean over images.pixels defSteadyVQ 0.1.0configuration 0123abc"


def test_evaluations_measured_alike_share_a_protocol(tmp_path):
    for name in "ab":
        write_run(tmp_path / name)
        (tmp_path / name / "evaluations" / "step-00000400.json").unlink()
        write_evaluation(tmp_path / name, "step-00000100", config_hash=f"hash-{name}")
        write_evaluation(tmp_path / name, "step-00000200", step=200, config_hash=f"hash-{name}")
    tree = report(tmp_path / "a", tmp_path / "b")
    rows = rows_of(tree, "records")
    assert [row[:2] for row in rows] == [[f"nsvq ({name})", step] for name in "ab" for step in ("200", "100")]
    assert {row[-1] for row in rows} == {"1"}
    assert "configuration hash-a (nsvq (a)), hash-b (nsvq (b))" in text_of(tree)


def test_the_best_evaluation_of_training_is_marked(tmp_path):
    write_run(tmp_path)
    write_evaluation(tmp_path, "step-00000100")
    write_evaluation(tmp_path, "eval-photos-val-32")
    (tmp_path / "checkpoints").mkdir()
    best = tmp_path / "checkpoints" / "best.json"
    best.write_text(json.dumps({"step": 100, "metric": "psnr", "mode": "max", "value": 21.5}))
    tree = report(tmp_path)
    assert [row[0] for row in rows_of(tree, "records")] == ["400", "100 best psnr", "100 eval"]
    marked = [text_of(cell) for cell in tree.iter("td") if cell.get("class") == "best"]
    assert marked == ["100 best psnr"]
    assert "best psnr 21.50 at step 100" in text_of(tree.find("body/main/header"))
    for odd in ("[]", '{"step": "x"}', "{"):
        best.write_text(odd)
        assert "best" not in {cell.get("class") for cell in report(tmp_path).iter("td")}


def test_odd_records_stop_nothing(tmp_path):
    write_run(tmp_path)
    folder = tmp_path / "evaluations"
    for i, content in enumerate(
        ("[]", "{", "null", '{"metrics": 3, "step": "x"}', '{"metrics": {"psnr": "inf"}, "step": 7}')
    ):
        (folder / f"odd{i}.json").write_text(content)
    rows = rows_of(report(tmp_path), "records")
    assert [row[0] for row in rows] == ["400", "7 eval", "– eval"]
    assert rows[1][5] == "inf"


def test_final_numbers_are_those_of_training(tmp_path):
    """A later evaluation of other images is a row of its own, and not what the runs are ranked by."""
    for name in "ab":
        write_run(tmp_path / name, name)
    write_evaluation(tmp_path / "a", "zoo", step=400, split="train", pixels_hash="other")
    assert "not measured on the same images" not in text_of(report(tmp_path / "a", tmp_path / "b"))


def test_settings_that_differ_are_named_with_every_value(tmp_path):
    for name, k, stages in (("a", 1024, STAGES), ("b", 64, STAGES[:1]), ("c", 1024, STAGES)):
        write_run(tmp_path / name, name)
        quantizer = {"name": "nsvq", "num_codes": k, "options": {}}
        write_settings(tmp_path / name, quantizer=quantizer, optim={"lr": 0.002, "betas": [0.9, 0.99]}, stages=stages)
    write_settings(
        tmp_path / "c",
        quantizer={"name": "nsvq", "num_codes": 1024, "options": {}},
        optim={"lr": 1e-5, "betas": [0.5, 0.99]},
        stages=[{**STAGES[0], "weights": {"ns": 0.5}}, *STAGES[1:]],
    )
    tree = report(*(tmp_path / name for name in "abc"))
    frozen = "frozen: [encoder], weights: {ns: 0, commitment: 0}, paused: [replace]"
    rule = "until: {patience: 10, min_epochs: 0, min_delta: 0"
    assert rows_of(tree, "text settings") == [
        ["quantizer.num_codes", "1024", "64", "1024"],
        ["optim.lr", "0.002", "0.002", "1e-05"],
        ["optim.betas", "0.9, 0.99", "0.9, 0.99", "0.5, 0.99"],
        ["stages.joint.weights.ns", "–", "–", "0.5"],
        ["stages.warmup", f"{rule}, max_epochs: 2}}, {frozen}", "–", f"{rule}, max_epochs: 2}}, {frozen}"],
        [
            "stages.refine",
            *(2 * [f"{rule}}}, {frozen}, estimator: direct"])[:1],
            "–",
            f"{rule}}}, {frozen}, estimator: direct",
        ],
    ]


def test_equal_and_unreadable_configurations(tmp_path):
    for name in "ab":
        write_run(tmp_path / name, name)
    heading = "Where the configurations differ"
    assert heading not in headings(report(tmp_path / "a", tmp_path / "b")), "neither can be read"
    for name in "ab":
        write_settings(tmp_path / name, epochs=3)
    assert heading not in headings(report(tmp_path / "a"))
    tree = report(tmp_path / "a", tmp_path / "b")
    assert heading in headings(tree)
    assert "made with the same settings" in text_of(tree)


def test_differences_of_odd_settings():
    assert list(differences([{"a": 1, "b": {"c": None}}, {"a": 1, "b": 2}])) == [("b", [{"c": None}, 2])]
    assert list(differences([{"a": [{"name": "x", "k": 1}]}, {"a": [{"name": "x", "k": 2}]}])) == [("a.x.k", [1, 2])]
    twice = [{"name": "x", "k": 1}, {"name": "x", "k": 2}]
    assert list(differences([{"a": twice}, {"a": twice[:1]}])) == [("a", [twice, twice[:1]])]
    assert [compact(value) for value in (None, True, {}, [], "", ABSENT)] == ["null", "true", "{}", "[]", "", "–"]


def test_the_code_map_stands_beside_the_reconstructions(tmp_path):
    write_run(tmp_path)
    tree = report(tmp_path)
    pair = next(box for box in tree.iter("div") if box.get("class") == "pictures")
    assert [figure.find("img").get("alt").split(".")[0].split(",")[0] for figure in pair] == [
        "Held-out images above",
        "Map of codes",
    ]
    (tmp_path / "codes.png").write_bytes(b"\x89PNG cut off")
    assert len(embedded(report(tmp_path))) == 1 + 3
    for path in (tmp_path / "pictures").iterdir():
        path.unlink()
    assert "Pictures" not in headings(report(tmp_path))
