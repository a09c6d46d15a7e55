# SPDX-License-Identifier: Apache-2.0
"""Reports of real runs in a real browser: STEADYVQ_BROWSER=1 pytest tests/test_report_browser.py, with Chromium installed.

The page is opened as it is, and once more as a copy with a script that says what the browser has made of it.
"""

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_recipe

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None or os.environ.get("STEADYVQ_BROWSER") != "1",
        reason="opens a browser: install Chromium and set STEADYVQ_BROWSER=1",
    ),
]

FROZEN = {"frozen": ["encoder"], "weights": {"ns": 0.0, "commitment": 0.0}, "paused": ["replace"]}
STAGES = [{"name": "joint", "until": {"max_epochs": 2}}, {"name": "refine", **FROZEN}]
PHONE, DESK = 360, 1200
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
SCRIPT = """
<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(details => details.open = true);
  const root = document.documentElement;
  const curves = [...document.querySelectorAll("figure.chart g.curve")].map(curve => [
    curve.closest("figure").querySelector(".name").textContent,
    curve.dataset.label,
    [...curve.querySelectorAll("polyline")].reduce((sum, line) => sum + line.points.numberOfItems, 0),
  ]);
  const figures = [...document.querySelectorAll("figure.chart > svg")].map(svg => svg.getBoundingClientRect());
  parent.postMessage({
    width: innerWidth,
    overflow: Math.max(root.scrollWidth, document.body.scrollWidth) - root.clientWidth,
    pictures: [...document.images].map(image => image.complete ? image.naturalWidth : 0),
    figures: figures.map(box => [box.left, box.right, box.height]),
    curves: curves,
  }, "*");
});
</script>
"""
FRAME = """<!DOCTYPE html><meta charset="utf-8"><title>frame</title>
<iframe src="{page}" style="width:{width}px;height:800px;border:0"></iframe><pre></pre>
<script>
addEventListener("message", event => document.querySelector("pre").textContent = JSON.stringify(event.data));
</script>
"""
# What is drawn as part of another curve, or is said in words.
NOT_CURVES = {"step", "epoch", "seconds", "psnr_low", "psnr_high", "active", "tokens", "num_codes"}
NAMES = {
    "Codes used/held out": "eval/utilization",
    "Codes used/training": "train/usage/train",
    "Codes used/ceiling": "eval/ceiling",
    "PSNR/held out": "eval/psnr",
    "SSIM/held out": "eval/ssim",
    "Perplexity/held out": "eval/perplexity",
    "Relative error/held out": "eval/relative_error",
    "Relative error/probe": "probe/relative_error",
    "Losses/total": "train/loss",
    "Encoder drift/probe": "probe/drift",
    "Encoder drift, absolute/probe": "probe/drift_rms",
    "Churn/probe": "probe/churn",
    "Commitment/mean of the epoch": "probe/commitment",
    "Temperature/temperature": "train/vq/temperature",
    "Winner mass/winner mass": "train/vq/winner_mass",
    "Effective losers/effective losers": "train/vq/effective_losers",
    "NS gradient over eps/largest entry": "train/vq/ns_grad_over_eps",
}


def steadyvq(folder: Path, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "steadyvq", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory) -> Path:
    """Two runs, `a` with stages and an evaluation of its own, and the reports of `a`, of both, and of names too long."""
    folder = tmp_path_factory.mktemp("browser")
    for name, quantizer, stages in (("a", "nsvq", STAGES), ("b", "vq", None)):
        changes = {"title": name, "epochs": 4, "quantizer": {"name": quantizer, "num_codes": 32, "dim": 8}}
        changes |= {"stages": stages} if stages else {}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tiny_recipe(photos, **changes)))
        steadyvq(folder, "train", f"{name}.yaml", "--out", name)
    steadyvq(folder, "eval", "a", "--split", "train", "--count", 4)
    steadyvq(folder, "report", "a", "--out", "one.html")
    steadyvq(folder, "report", "a", "b", "--out", "two.html")
    for name in ("c", "d"):
        shutil.copytree(folder / "a", folder / name)
        info = json.loads((folder / name / "run.json").read_text())
        (folder / name / "run.json").write_text(json.dumps({**info, "title": "unbroken" * 20 + name}))
        config = yaml.safe_load((folder / name / "config.yaml").read_text())
        config["data"]["source"] = f"/{name}" * 100
        (folder / name / "config.yaml").write_text(yaml.safe_dump(config))
    steadyvq(folder, "report", "c", "d", "--out", "long.html")
    return folder


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """Return the document as the browser has it in the end, and what it wrote to the console."""
    options = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1300,900",
        "--virtual-time-budget=10000",
    )
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={profile}", "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def inspect(text: str, width: int, folder: Path) -> dict:
    """Return what the browser makes of a page at a width that it has no windows for, in a frame."""
    page, unguarded = folder / f"copy-{width}.html", POLICY.sub("", text)
    assert unguarded != text
    page.write_text(unguarded.replace("</body>", f"{SCRIPT}</body>"))
    frame = folder / f"frame-{width}.html"
    frame.write_text(FRAME.format(page=page.name, width=width))
    document, console = browse(frame, folder / "profile")
    findings = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", document, re.DOTALL)[1]))
    assert findings["width"] == width
    return {**findings, "console": console}


def logged(folder: Path) -> dict[str, int]:
    """The number of rows with a finite value, by kind and key."""
    counts: dict[str, int] = {}
    for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
        for key, value in row.items():
            if row["kind"] != "stage" and isinstance(value, int | float) and key not in NOT_CURVES:
                name = f"{row['kind']}/{key}"
                counts[name] = counts.get(name, 0) + math.isfinite(value)
    return counts


def source(title: str, label: str) -> str:
    """The kind and key of the rows behind a curve."""
    if title == "Losses" and label != "total":
        return f"train/loss/{label}"
    key, _, kind = title.rpartition(" (")
    return f"{kind.removesuffix(')')}/{key}" if key else NAMES[f"{title}/{label}"]


@pytest.mark.parametrize("name", ["one", "two", "long"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_is_whole_and_fits(folder, tmp_path, name, width):
    found = inspect((folder / f"{name}.html").read_text(), width, tmp_path)
    assert found["console"] == []
    assert found["overflow"] == 0
    assert len(found["pictures"]) >= {"one": 5, "two": 4, "long": 4}[name]
    assert min(found["pictures"]) > 0
    assert len(found["figures"]) > 12
    for left, right, height in found["figures"]:
        assert 0 <= left < right <= width
        assert height > 100


def test_every_logged_number_is_a_point_of_a_curve(folder, tmp_path):
    curves = inspect((folder / "one.html").read_text(), DESK, tmp_path)["curves"]
    drawn = {source(title, label): points for title, label, points in curves}
    expected = {name: count for name, count in logged(folder / "a").items() if count}
    assert len(drawn) == len(curves)
    assert drawn == expected


def test_every_run_has_all_its_points_in_a_comparison(folder, tmp_path):
    curves = inspect((folder / "two.html").read_text(), DESK, tmp_path)["curves"]
    drawn = {(title, label): points for title, label, points in curves}
    for run in "ab":
        counts = logged(folder / run)
        for title, key in (("PSNR", "eval/psnr"), ("Churn", "probe/churn"), ("Total loss", "train/loss")):
            assert drawn[title, run] == counts[key]
        for key in counts:
            if key.startswith("train/loss/"):
                assert drawn[f"Loss: {key.removeprefix('train/loss/')}", run] == counts[key]


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_page_itself_keeps_the_browser_quiet(folder, tmp_path, name):
    document, console = browse(folder / f"{name}.html", tmp_path / "profile")
    assert console == []
    assert "<h2>Evaluations</h2>" in document


def test_the_browser_sees_what_is_broken(folder, tmp_path):
    text = (folder / "one.html").read_text()
    broken = text.replace("</main>", '<img src="data:image/png;base64,AAAA"><div style="width:900px">wide</div></main>')
    found = inspect(broken.replace("</main>", "<script>console.error('loud')</script></main>"), PHONE, tmp_path)
    assert found["overflow"] > 500
    assert min(found["pictures"]) == 0
    assert "loud" in " ".join(found["console"])
    guarded = tmp_path / "guarded.html"
    guarded.write_text(text.replace("</main>", "<script>document.title = 'run'</script></main>"))
    _, console = browse(guarded, tmp_path / "profile")
    assert "Content Security Policy" in " ".join(console)
