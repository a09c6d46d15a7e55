# SPDX-License-Identifier: Apache-2.0
"""The report page, the comparison table and the pictures, from run folders as training writes them."""

import base64
import io
import json
import math
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from steadyvq.report import code_map, comparison_table, picture_grid, write_report
from steadyvq.report.scales import Scale, tick_label, value_scale

HOSTILE = "lr: 1.0e-3  # <script src='https://x.example/a.js'></script> & \"quotes\" \x00\x1b"


def log_rows(psnr: float = 24.0, steps: int = 400) -> list[dict]:
    """A run of three stages: a curve with a hole, curves that end, values that are null or NaN."""
    rows: list[dict] = [{"kind": "stage", "step": 0, "epoch": 0, "stage": "joint", "reason": "start", "seconds": 0.0}]
    for step in range(2, steps + 1, 2):
        stage = "joint" if step <= 200 else "warmup" if step <= 300 else "refine"
        decay = math.exp(-step / 80)
        row = {"kind": "train", "step": step, "epoch": (step - 1) // 50, "stage": stage, "seconds": step * 0.02}
        row |= {"loss": 0.02 + 0.4 * decay, "loss/reconstruction": 0.015 + 0.3 * decay, "loss/codebook": 0.1 * decay}
        if stage == "joint":
            row |= {"loss/ns": 0.1 * decay, "vq/temperature": 0.3 * decay, "vq/winner_mass": 1 - decay}
            row |= {"vq/effective_losers": 900 * decay, "vq/ns_grad_over_eps": 5e3 * decay**2, "vq/my_number": decay}
        if step == 120:
            row["loss/codebook"] = float("nan")
        if step == 130:
            row["loss/codebook"] = None
        rows.append(row)
        if step % 50 == 0:
            moved = {"drift": decay, "drift_rms": 3 * decay, "churn": min(1.0, 2 * decay)}
            moved = dict.fromkeys(moved) if step == 50 else moved
            row = {"kind": "probe", "step": step, "epoch": step // 50 - 1, "relative_error": 0.1 + decay, **moved}
            rows.append(row | {"commitment": 0.2 * decay if step <= 200 else None})
        if step % 100 == 0:
            value = psnr - 6 * decay
            rows.append(
                {"kind": "eval", "step": step, "epoch": step // 50 - 1, "seconds": step * 0.02, "psnr": value}
                | {"psnr_low": value - 1, "psnr_high": value + 1, "ssim": 0.7, "utilization": 0.75, "ceiling": 0.98}
                | {"active": 48, "num_codes": 64, "tokens": 256, "perplexity": 40.0, "relative_error": 0.1 + decay}
            )
    rows.append({"kind": "stage", "step": 200, "epoch": 4, "stage": "warmup", "reason": "plateau of commitment"})
    rows.append({"kind": "stage", "step": 300, "epoch": 6, "stage": "refine", "reason": "2 epochs"})
    return rows


def write_run(folder: Path, title: str = "nsvq", psnr: float = 24.0, pixels: str = "abc") -> list[dict]:
    """Write a whole run folder whose log ends in the middle of a line, and return the log's whole rows."""
    rows = log_rows(psnr)
    (folder / "evaluations").mkdir(parents=True)
    (folder / "pictures").mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "step": 41')
    info = {"steadyvq": "0.1.0", "config_hash": "0123abc", "command": "steadyvq train x --set 'a<b'", "status": "done"}
    (folder / "run.json").write_text(json.dumps({**info, "started": "2026-01-02T03:04:05+00:00", "title": title}))
    (folder / "config.yaml").write_text(HOSTILE)
    (folder / "usage.json").write_text(json.dumps({"num_codes": 64, "counts": [9] * 8 + [4] * 40 + [0] * 16}))
    record = {
        "metrics": {"psnr": psnr},
        "step": 400,
        "data": "photos",
        "split": "val",
        "crop": 32,
        "count": 4,
        "pixels_hash": pixels,
    }
    (folder / "evaluations" / "step-00000400.json").write_text(json.dumps(record))
    rng = np.random.default_rng(0)
    code_map(rng.integers(0, 64, (8, 8)), 64).save(folder / "codes.png")
    images = rng.integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    for step in (100, 200, 300, 400):
        picture_grid(images, images, columns=4).save(folder / "pictures" / f"step-{step:08d}.png")
    return rows


def parse(page: Path) -> ElementTree.Element:
    """The page as a tree; it is well-formed XML below its doctype, so a lost tag or a bare `<` cannot hide."""
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text.split("\n", 1)[1])


def report(*folders: Path, **options: str) -> ElementTree.Element:
    return parse(write_report(folders, folders[0] / "report.html", **options))


def charts(tree: ElementTree.Element) -> dict[str, ElementTree.Element]:
    found = {}
    for figure in tree.iter("figure"):
        if figure.get("class") == "chart":
            found["".join(figure.find("figcaption/span").itertext())] = figure.find("svg")
    return found


def drawn(svg: ElementTree.Element) -> dict[str, int]:
    """Number of points by curve."""
    curves = [group for group in svg.iter("g") if group.get("class", "").startswith("curve")]
    return {c.get("data-label"): sum(len(line.get("points").split()) for line in c.iter("polyline")) for c in curves}


def finite(rows: list[dict], kind: str, key: str) -> int:
    return sum(row["kind"] == kind and row.get(key) is not None and math.isfinite(row[key]) for row in rows)


def rows_of(tree: ElementTree.Element, table: str) -> list[list[str]]:
    """The text of each cell of a table's body, its heads of rows included."""
    body = next(found for found in tree.iter("table") if found.get("class") == table).find("tbody")
    return [[text_of(cell) for cell in row] for row in body]


def text_of(tree: ElementTree.Element) -> str:
    return " ".join("".join(tree.itertext()).split())


def test_every_row_is_a_point_of_its_curve(tmp_path):
    rows = write_run(tmp_path)
    found = charts(report(tmp_path))
    expected = {
        "Codes used": {"held out": ("eval", "utilization"), "ceiling": ("eval", "ceiling")},
        "PSNR": {"held out": ("eval", "psnr")},
        "SSIM": {"held out": ("eval", "ssim")},
        "Perplexity": {"held out": ("eval", "perplexity")},
        "Relative error": {"held out": ("eval", "relative_error"), "probe": ("probe", "relative_error")},
        "Losses": {
            "total": ("train", "loss"),
            "reconstruction": ("train", "loss/reconstruction"),
            "codebook": ("train", "loss/codebook"),
            "ns": ("train", "loss/ns"),
        },
        "Encoder drift": {"probe": ("probe", "drift")},
        "Encoder drift, absolute": {"probe": ("probe", "drift_rms")},
        "Commitment": {"mean of the epoch": ("probe", "commitment")},
        "Churn": {"probe": ("probe", "churn")},
        "Temperature": {"temperature": ("train", "vq/temperature")},
        "Winner mass": {"winner mass": ("train", "vq/winner_mass")},
        "Effective losers": {"effective losers": ("train", "vq/effective_losers")},
        "NS gradient over eps": {"largest entry": ("train", "vq/ns_grad_over_eps")},
        "vq/my_number (train)": {"vq/my_number": ("train", "vq/my_number")},
    }
    assert set(found) == set(expected)
    for title, curves in expected.items():
        assert drawn(found[title]) == {label: finite(rows, *key) for label, key in curves.items()}, title


def test_a_value_that_is_missing_breaks_the_line(tmp_path):
    rows = write_run(tmp_path)
    group = next(g for g in charts(report(tmp_path))["Losses"].iter("g") if g.get("data-label") == "codebook")
    lines = [line.get("points").split() for line in group.iter("polyline")]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    runs = ([s for s in steps if s < 120], [s for s in steps if 120 < s < 130], [s for s in steps if s > 130])
    assert [len(line) for line in lines] == [len(run) for run in runs]


def test_points_lie_where_their_values_say(tmp_path):
    rows = [{"kind": "eval", "step": step, "utilization": value} for step, value in ((50, 0.25), (100, 1.0))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    svg = charts(report(tmp_path))["Codes used"]
    first, last = (tuple(map(float, p.split(","))) for p in next(svg.iter("polyline")).get("points").split())
    texts = {"".join(text.itertext()): text for text in svg.iter("text")}
    assert last[1] == pytest.approx(float(texts["100 %"].get("y")))
    zero = float(texts["0 %"].get("y"))
    assert (zero - first[1]) / (zero - last[1]) == pytest.approx(0.25, abs=1e-3)
    origin = float(texts["0"].get("x"))
    assert (first[0] - origin) / (last[0] - origin) == pytest.approx(0.5, abs=1e-3)


def test_the_interval_of_psnr_is_shaded_around_the_curve(tmp_path):
    write_run(tmp_path)
    svg = charts(report(tmp_path))["PSNR"]
    curve, band = (
        [tuple(map(float, point.split(","))) for point in next(svg.iter(name)).get("points").split()]
        for name in ("polyline", "polygon")
    )
    upper, lower = band[: len(curve)], band[len(curve) :][::-1]
    assert len(upper) == len(lower) == len(curve) == 4
    for high, mean, low in zip(upper, curve, lower, strict=True):
        assert high[0] == mean[0] == low[0]
        assert mean[1] - high[1] == pytest.approx(low[1] - mean[1], abs=0.03)
        assert mean[1] - high[1] > 1


def test_stages_are_labelled_lines_and_a_table(tmp_path):
    write_run(tmp_path)
    tree = report(tmp_path)
    for title, svg in charts(tree).items():
        marks = [group for group in svg.iter("g") if group.get("class", "").startswith("mark")]
        assert [mark.findtext("text") for mark in marks] == ["warmup", "refine"], title
    assert ["warmup", "200", "100 steps, 2 epochs", "", "", "plateau of commitment"] in rows_of(tree, "text stages")


def test_svgs_are_named_images(tmp_path):
    write_run(tmp_path)
    figures = [figure.find("svg") for figure in report(tmp_path).iter("figure") if figure.find("svg") is not None]
    assert len(figures) == 17
    for svg in figures:
        assert svg.get("role") == "img"
        assert svg.find("title").text
        for element in svg.iter():
            for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
                assert math.isfinite(float(element.get(name, 0)))
                assert -1 <= float(element.get(name, 0)) <= 401


class Loads(HTMLParser):
    """Collects what a browser would run or fetch, as a browser reads the page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "link", "iframe", "object", "base"):
            self.found.append(tag)
        self.found += [
            value for name, value in attrs if name in ("src", "href", "srcset") and not value.startswith("data:")
        ]
        self.found += [name for name, _ in attrs if name.startswith("on")]


def test_the_page_loads_nothing_and_shows_hostile_text_as_text(tmp_path):
    write_run(tmp_path, title="<script>alert(1)</script> & co")
    tree = report(tmp_path, note="a <b>note</b>")
    page = (tmp_path / "report.html").read_text()
    loads = Loads()
    loads.feed(page)
    assert loads.found == []
    assert "url(" not in page
    assert "@import" not in page
    assert "a <b>note</b>" in text_of(tree)
    assert tree.find("body/main/header/h1").text == "<script>alert(1)</script> & co"
    config = next(tree.iter("pre")).text
    assert config == HOSTILE.replace("\x00", "�").replace("\x1b", "�")
    assert "steadyvq train x --set 'a<b'" in text_of(tree)


def embedded(tree: ElementTree.Element) -> list[bytes]:
    sources = [image.get("src") for image in tree.iter("img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    return [base64.b64decode(source.partition(",")[2], validate=True) for source in sources]


def test_pictures_are_embedded_whole_newest_first(tmp_path):
    write_run(tmp_path)
    (tmp_path / "pictures" / "step-00000500.png").write_bytes(b"\x89PNG cut off")
    contents = embedded(report(tmp_path))
    assert contents[:2] == [(tmp_path / name).read_bytes() for name in ("pictures/step-00000400.png", "codes.png")]
    assert len(contents) == 2 + 4
    for content in contents:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            assert image.format == "PNG"


def test_several_runs_side_by_side(tmp_path):
    names = ("vq", "nsvq", "ema")
    for name, psnr in zip(names, (20.0, 26.0, 23.0), strict=True):
        write_run(tmp_path / name, title=name, psnr=psnr)
    tree = report(*(tmp_path / name for name in names), title="Three")
    assert tree.find("body/main/header/h1").text == "Three"
    table = next(tree.iter("table"))
    best = {
        row.find("th").find("svg").tail: [cell.get("class") for cell in row.iter("td")] for row in table.find("tbody")
    }
    assert {name: cells[0] for name, cells in best.items()} == {"vq": None, "nsvq": "best", "ema": None}
    assert [cells[1] for cells in best.values()] == [None] * 3, "equal values are not told apart"
    assert "not measured on the same images" not in text_of(tree)
    found = charts(tree)
    assert {"PSNR", "Codes used", "Total loss", "Loss: ns"} <= set(found)
    assert all(set(drawn(svg)) == set(names) for svg in found.values())
    assert embedded(tree) == [
        (tmp_path / name / picture).read_bytes()
        for name in names
        for picture in ("pictures/step-00000400.png", "codes.png")
    ]
    assert sum(figure.get("class") == "chart usage" for figure in tree.iter("figure")) == 2 * 3


def test_runs_measured_on_different_images_are_not_ranked_silently(tmp_path):
    write_run(tmp_path / "a", "a")
    write_run(tmp_path / "b", "b", pixels="other")
    assert "not measured on the same images (pixels_hash differ)" in text_of(report(tmp_path / "a", tmp_path / "b"))


def test_many_runs_have_different_looks(tmp_path):
    folders = [tmp_path / f"run{i}" for i in range(13)]
    for folder in folders:
        write_run(folder, folder.name)
    groups = [group for group in charts(report(*folders))["PSNR"].iter("g") if group.get("data-label")]
    assert len({group.get("class") for group in groups}) == 13


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    tree = report(tmp_path)
    assert "The log holds no numbers yet." in text_of(tree)
    assert tree.find("body/main/header/h1").text == tmp_path.name
    assert set(comparison_table([tmp_path])[0].values()) == {tmp_path.name, "–"}


def test_odd_values_do_not_stop_a_report(tmp_path):
    rows = [
        {"kind": "train", "step": 1, "loss": 1e-12, "loss/a": -3.0, "vq/flag": True, "vq/word": "x"},
        {"kind": "train", "step": 2, "loss": 1e12, "loss/a": -3.0, "vq/list": [1], "loss/huge": 10**400},
        {"kind": "train", "loss": 3.0},
        {"kind": "eval", "step": 2, "psnr": "inf", "utilization": 0.0, "num_codes": 4},
        {"kind": "stage", "step": 2, "stage": None, "epoch": None},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n[1, 2]\nnull\n")
    (tmp_path / "usage.json").write_text("{")
    (tmp_path / "run.json").write_text("[]")
    found = charts(report(tmp_path))
    assert drawn(found["Losses"]) == {"total": 2, "a": 2}
    assert set(found) == {"Losses", "Codes used"}
    assert comparison_table([tmp_path])[0]["codes used"] == "0 of 4"


def test_comparison_table(tmp_path):
    write_run(tmp_path / "one", "same")
    write_run(tmp_path / "two", "same", psnr=30.0)
    rows = comparison_table([tmp_path / "one", tmp_path / "two"])
    final = 30 - 6 * math.exp(-5)
    assert [row["run"] for row in rows] == ["same (one)", "same (two)"]
    assert rows[1] == {
        "run": "same (two)",
        "PSNR (dB)": f"{final:.2f} [{final - 1:.2f}, {final + 1:.2f}]",
        "SSIM": "0.700",
        "codes used": "48 of 64",
        "utilization": "75.0 %",
        "ceiling": "98.0 %",
        "perplexity": "40",
        "relative error": f"{0.1 + math.exp(-5):.3f}",
        "time": "8.0 s",
    }


def test_wrong_folders_are_refused_before_anything_is_written(tmp_path):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "log.jsonl").write_text("")
    out = tmp_path / "report.html"
    with pytest.raises(ValueError, match=r"holds no log\.jsonl: give a folder written by steadyvq train"):
        write_report([tmp_path / "good", tmp_path / "bad"], out)
    with pytest.raises(ValueError, match="no run folders given"):
        write_report([], out)
    assert not out.exists()


def test_writing_leaves_no_other_file(tmp_path):
    write_run(tmp_path / "run")
    write_report([tmp_path / "run"], tmp_path / "pages" / "report.html")
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.0, 3e-5), (19.2, 26.9), (-3.5, 2.0), (0.0, 50_000.0), (0.997, 0.9991), (1e5, 3e7)]
)
def test_linear_ticks_are_few_round_and_inside(low, high):
    ticks = Scale(low, high, 0, 1).ticks(4)
    assert 2 <= len(ticks) <= 6
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0])
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert round(mantissa, 6) in (1, 2, 5)
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(1e-12, 1e12), (0.004, 0.3), (3.0, 95.0), (0.9, 1100.0)])
def test_wide_ranges_are_logarithmic_with_few_ticks(low, high):
    scale = value_scale([low, high], 100, 0, None)
    assert scale.log
    ticks = scale.ticks(4)
    assert 2 <= len(ticks) <= 9
    assert scale(math.sqrt(scale.low * scale.high)) == pytest.approx(50)


def test_tick_labels():
    shown = {0.0: "0", 0.2: "0.2", 1500.0: "1,500", 20000.0: "20k", 2.5e6: "2.5M", 1e-5: "10⁻⁵", 2e-4: "2·10⁻⁴"}
    assert {value: tick_label(value) for value in shown} == shown
    assert tick_label(0.30000000000000004) == "0.3"
    assert tick_label(0.55, percent=True) == "55 %"
