# SPDX-License-Identifier: Apache-2.0
"""The figures of a codebook: codes by hits, codes by rank, codes by the time since their last hit."""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_report import report, text_of, write_run

from steadyvq.report import write_report
from steadyvq.report.usage import hit_bins, hits_figure, idle_bins, idle_figure, ranks_figure, share_limit

BOTTOM = 234 - 32


def write_usage(folder: Path, **usage: object) -> None:
    write_run(folder, folder.name)
    (folder / "usage.json").write_text(json.dumps(usage))


def figures(tree: ElementTree.Element) -> dict[str, ElementTree.Element]:
    found = [figure for figure in tree.iter("figure") if figure.get("class") == "chart usage"]
    return {figure.findtext("figcaption/span"): figure for figure in found}


def bars(figure: ElementTree.Element) -> dict[str, tuple[float, ElementTree.Element]]:
    """The number of codes of each bar that is drawn, and its rectangle, by what the bar holds."""
    found = {}
    for group in figure.iter("g"):
        if group.get("class", "").startswith("bin"):
            label, _, codes = group.findtext("title").partition(": ")
            found[label] = (int(codes.split(" codes")[0].replace(",", "")), group.find("rect"))
    return found


def test_every_code_is_in_the_bin_of_its_hits():
    counts = np.random.default_rng(0).geometric(0.02, 2000) - 1
    bins = hit_bins(counts.tolist(), int(counts.max()))
    naive = Counter("never" if count == 0 else int(count).bit_length() - 1 for count in counts)
    assert [one.codes for one in bins] == [naive[key] for key in ("never", *range(len(bins) - 1))]
    assert (bins[0].low, bins[0].high) == (0, 1)
    assert all((one.low, one.high) == (2**i, 2 ** (i + 1)) for i, one in enumerate(bins[1:]))
    assert bins[-1].low <= counts.max() < bins[-1].high


@pytest.mark.parametrize(("num_codes", "draws"), [(2, 3), (64, 100), (1024, 20480), (512, 40_000_000)])
def test_chance_is_what_uniform_draws_give(num_codes, draws):
    rng = np.random.default_rng(1)
    trials = [rng.multinomial(draws, np.full(num_codes, 1 / num_codes)) for _ in range(4000 // num_codes + 4)]
    counts = np.concatenate(trials)
    found = hit_bins(trials[0].tolist(), int(counts.max()))
    assert sum(one.expected for one in found) == pytest.approx(1, abs=1e-3)
    for one in found:
        share = float(((counts >= one.low) & (counts < one.high)).mean())
        assert one.expected == pytest.approx(share, abs=4 * math.sqrt(0.25 / len(counts)))
    assert found[0].expected == pytest.approx((1 - 1 / num_codes) ** draws, abs=1e-9), "the complement of the ceiling"


def test_chance_of_idle_codes_is_exponential():
    waits = np.random.default_rng(0).geometric(1 / 256, 100_000) / 256
    for one in idle_bins(waits.tolist(), float(waits.max())):
        assert one.share == pytest.approx(one.expected, abs=0.01)


def test_the_histogram_of_hits_is_drawn_to_scale_with_the_dead_apart():
    counts = [0] * 10 + [1] * 20 + [2] * 5 + [3] * 5 + [9] * 40
    bins = hit_bins(counts, 9)
    figure = ElementTree.fromstring(hits_figure("run", "said", bins, 0, share_limit([bins])))
    drawn = bars(figure)
    assert {label: codes for label, (codes, _) in drawn.items() if codes} == {
        "never hit": 10,
        "1 hit": 20,
        "2 to 3 hits": 10,
        "8 to 15 hits": 40,
    }
    heights = {label: float(bar.get("height")) / codes for label, (codes, bar) in drawn.items() if codes}
    assert max(heights.values()) == pytest.approx(min(heights.values()), abs=0.01)
    never, once = (drawn[label][1] for label in ("never hit", "1 hit"))
    assert float(once.get("x")) - float(never.get("x")) - float(never.get("width")) > 10
    assert "10 never hit" in text_of(figure)
    assert "said" in text_of(figure)


def test_a_single_code_can_be_seen_and_no_code_draws_nothing():
    bins = hit_bins([1] * 60_000 + [5], 5)
    drawn = bars(ElementTree.fromstring(hits_figure("run", "", bins, 0, share_limit([bins]))))
    assert float(drawn["4 to 7 hits"][1].get("height")) >= 1
    assert float(drawn["never hit"][1].get("height")) == 0


def test_the_patience_is_a_mark_between_its_neighbours():
    idle = [0.5, 3.0, 20.0, 21.0, 40.0]
    bins = idle_bins(idle, 40.0)
    figure = ElementTree.fromstring(idle_figure("run", "", idle, bins, 0, share_limit([bins]), 20.5))
    assert "2 beyond patience 20.5" in text_of(figure)
    mark = next(group for group in figure.iter("g") if group.get("class", "").startswith("mark"))
    bar = bars(figure)["16 to 32 missed hits"][1]
    left, right = float(bar.get("x")), float(bar.get("x")) + float(bar.get("width"))
    assert left < float(mark.find("line").get("x1")) < right
    share = (float(mark.find("line").get("x1")) - left) / (right - left)
    assert share == pytest.approx(math.log2(20.5 / 16), abs=0.05)


def test_idle_codes_are_shown_where_the_run_tells_of_them(tmp_path):
    write_usage(tmp_path / "a", num_codes=3, counts=[4, 0, 1], idle=[0.0, 70.0, 2.5], patience=30.0)
    write_usage(tmp_path / "b", num_codes=3, counts=[4, 0, 1], idle=[0.0, 7.0, 2.5], patience=None)
    write_usage(tmp_path / "c", num_codes=3, counts=[4, 0, 1])
    assert list(figures(report(tmp_path / "a"))) == ["Hits per code", "Codes by rank", "Idle codes"]
    assert "1 beyond patience 30" in text_of(figures(report(tmp_path / "a"))["Idle codes"])
    assert not list(figures(report(tmp_path / "b"))["Idle codes"].iter("polyline"))
    assert "beyond" not in text_of(figures(report(tmp_path / "b"))["Idle codes"])
    assert list(figures(report(tmp_path / "c"))) == ["Hits per code", "Codes by rank"]
    tree = report(*(tmp_path / name for name in "abc"))
    assert [heading.text for heading in tree.iter("h3")] == ["Hits per code", "Codes by rank", "Idle codes"]
    assert sum(figure.get("class") == "chart usage" for figure in tree.iter("figure")) == 3 + 3 + 2


@pytest.mark.parametrize("idle", ["many", [], [1.0, None], [-1.0], [True], {}])
def test_odd_idle_times_are_left_out(tmp_path, idle):
    write_usage(tmp_path / "run", num_codes=2, counts=[1, 2], idle=idle, patience="long")
    assert "Idle codes" not in figures(report(tmp_path / "run"))


def test_usage_of_several_runs_has_one_axis(tmp_path):
    for name, count in (("a", 9), ("b", 900)):
        write_usage(tmp_path / name, num_codes=2, counts=[count, 1])
    found = [f for f in report(tmp_path / "a", tmp_path / "b").iter("figure") if f.get("class") == "chart usage"]
    axes = [[text.text for text in figure.iter("text") if "count" not in text.get("class", "")] for figure in found]
    assert axes[0] == axes[1]
    assert "64" in axes[0]
    assert axes[2] == axes[3]
    assert "100" in axes[2]


def test_ranks_count_the_dead_and_draw_every_count():
    counts = [5, 0, 2, 2, 0, 9, 1, 0]
    figure = ElementTree.fromstring(ranks_figure("run", "", counts, 0, 9))
    assert "5 used, 3 dead" in text_of(figure)
    corners = next(figure.iter("polygon")).get("points").split()
    xs, ys = zip(*(map(float, point.split(",")) for point in corners), strict=True)
    unit = (400 - 12 - 48) / 8
    edges = [round((x - 48) / unit) for x in xs]
    assert edges == [0, 0, 1, 1, 2, 2, 4, 4, 5, 5]
    assert ys[1] < ys[3] < ys[5] < ys[7] < ys[9]
    shade = next(figure.iter("rect"))
    assert float(shade.get("width")) == pytest.approx(3 * unit, abs=0.02)


@pytest.mark.parametrize("counts", [[0, 0, 0], [7], [1, 1], [10**9, 1], [10**17] * 3])
def test_usage_of_extreme_codebooks(tmp_path, counts):
    write_usage(tmp_path / "run", num_codes=len(counts), counts=counts, idle=[1e300] * len(counts), patience=1e-9)
    for figure in figures(report(tmp_path / "run")).values():
        for element in figure.iter():
            for name in ("x", "y", "x1", "x2", "y1", "y2", "width", "height"):
                assert -1 <= float(element.get(name, 0)) <= 401


def test_a_large_codebook_makes_a_small_page(tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.multinomial(10**8, rng.dirichlet(np.full(65_536, 0.3))).tolist()
    write_usage(tmp_path / "run", num_codes=65_536, counts=counts, idle=rng.exponential(2, 65_536).tolist(), patience=8)
    (tmp_path / "small").mkdir()
    write_usage(tmp_path / "small" / "run", num_codes=4, counts=[1, 2, 3, 4])
    large, small = (
        write_report([folder / "run"], tmp_path / "page.html").stat().st_size
        for folder in (tmp_path, tmp_path / "small")
    )
    assert len(set(counts)) > 5000
    assert large - small < 200_000
