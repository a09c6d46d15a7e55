# SPDX-License-Identifier: Apache-2.0
"""The contest: its statistics against references, its rates against the search, its judge on a real run."""

import itertools
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from steadyvq.cli import main
from steadyvq.experiments.claims import Results, holm, p_value, student_tail
from steadyvq.experiments.contest import CONTROLS, METHODS, RATES, everybody
from steadyvq.experiments.runner import read_results, run_config
from steadyvq.experiments.studies.steady import STUDY, ahead_somewhere, arms, family, not_behind, pictures
from steadyvq.experiments.studies.steady_search import best_rate
from steadyvq.report.intervals import Dot, intervals_svg
from steadyvq.training.config import read_recipe

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "experiments"


def test_the_tail_of_students_t_is_that_of_the_tables():
    # Two-sided 5 % and 1 % points for 1, 4 and 9 degrees of freedom, and for 1 and 2 the closed forms.
    for freedom, at_5, at_1 in ((1, 12.706, 63.657), (4, 2.776, 4.604), (9, 2.262, 3.250)):
        assert 2 * student_tail(at_5, freedom) == pytest.approx(0.05, rel=1e-3)
        assert 2 * student_tail(at_1, freedom) == pytest.approx(0.01, rel=1e-3)
    assert student_tail(0.7, 1) == pytest.approx(0.5 - math.atan(0.7) / math.pi, rel=1e-6)
    assert student_tail(1.3, 2) == pytest.approx(0.5 - 1.3 / (2 * math.sqrt(2 + 1.3**2)), rel=1e-6)


def test_p_values_under_no_difference_are_even():
    """Of many experiments without any difference about one in twenty has p < 0.05: not many more."""
    rng = np.random.default_rng(0)
    found = [p_value(rng.normal(size=(5, 1)).tolist()) for _ in range(2000)]
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.015)


def test_the_spread_over_photographs_counts():
    """Five seeds that agree closely prove nothing where the photographs disagree."""
    agreeing = [[1.0, -1.0, 1.0, -1.0, 0.4 + 0.01 * i] for i in range(5)]
    assert p_value(agreeing) > 0.5
    assert p_value([[sum(own) / 5] for own in agreeing]) < 0.01
    assert p_value([[1.0 + 0.01 * i, 1.1, 0.9] for i in range(5)]) < 1e-4


def naive_holm(p_values: list[float]) -> list[float]:
    """The definition: of the hypotheses with a p at most as large, the largest (m - number below) p."""
    m = len(p_values)
    ranked = sorted(p_values)
    return [max(min(1.0, (m - i) * ranked[i]) for i in range(m) if ranked[i] <= p) for p in p_values]


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_its_definition(seed):
    p_values = np.random.default_rng(seed).uniform(0, 0.2, size=7).tolist()
    assert holm(p_values) == pytest.approx(naive_holm(p_values))
    assert all(corrected >= p for corrected, p in zip(holm(p_values), p_values, strict=True))


def made(offsets: dict[str, float]) -> Results:
    """Results in which the preset leads everybody by 1 dB and 0.1 LPIPS, less the offset."""
    rng = np.random.default_rng(0)
    settings = STUDY.settings("tiny")
    cells: dict[str, dict[int, dict[str, object]]] = {}
    for name in arms(settings):
        method = name.split(",")[0] if "late" not in name else name.rsplit(", K", 1)[0]
        lead = 0.0 if method == "steady" else 1.0 - offsets.get(method, 0.0)
        cells[name] = {
            seed: {
                "photographs": {
                    "test_psnr": {p: 20 - lead + 0.01 * rng.normal() for p in "abcd"},
                    "test_lpips": {p: 0.3 + 0.1 * lead + 0.001 * rng.normal() for p in "abcd"},
                }
            }
            for seed in range(5)
        }
    return Results(cells, list(cells))


def test_the_contest_is_won_and_lost_by_the_numbers():
    won = made({})
    assert all(one.sure and one.gain > 0 for one in family(won, tuple(METHODS)))
    assert len(family(won, tuple(METHODS))) == 96
    assert not_behind("fvq")(won).verdict == "reproduced"
    assert ahead_somewhere(won).verdict == "reproduced"
    lost = made({"fvq": 1.5, "nsvq": 1.0})
    assert not_behind("fvq")(lost).verdict == "not reproduced"
    assert "behind in 12" in not_behind("fvq")(lost).found
    assert not_behind("simvq")(lost).verdict == "reproduced"
    assert not_behind("nsvq")(lost).verdict == "reproduced"
    assert ahead_somewhere(lost).verdict == "undecided"


def test_everybody_has_the_same_effort():
    """The same photographs, autoencoder, steps, batch, decay and averages; method, stages and searched rates differ."""
    plans = arms(STUDY.settings("tiny"))
    assert len(plans) == 3 * 2 * (1 + len(METHODS)) + 2 * len(CONTROLS)
    configs = {name: run_config(plan, 0).to_dict() for name, plan in plans.items() if "K=4096, 450" in name}
    for first, second in itertools.pairwise(configs.values()):
        for own in (first, second):
            own["optim"] = {key: value for key, value in own["optim"].items() if key not in ("lr", "codebook_lr")}
        same = [key for key in first if key not in ("quantizer", "stages", "title")]
        assert {key: first[key] for key in same} == {key: second[key] for key in same}
    assert set(RATES) == set(everybody())


def test_the_rates_are_the_best_of_the_recorded_search():
    record = json.loads((EVIDENCE / "steady-search.json").read_text())
    results = read_results(record)
    assert {method: best_rate(results, method) for method in RATES} == RATES
    assert read_recipe("steady")["optim"]["lr"] == RATES["steady"]


def test_the_picture_shows_every_difference_with_its_interval(tmp_path):
    """Read back from the SVG by the ticks of its own axis."""
    dots = [
        Dot("K = 1", "a", "few", 0.5, 0.2, 0.8),
        Dot("K = 1", "b", "few", -1.0, -1.5, 1.0),
        Dot("K = 2", "b", "many", 2.0, 1.0, 3.0),
    ]
    root = ElementTree.fromstring(intervals_svg("title", "unit", dots))
    ns = "{http://www.w3.org/2000/svg}"
    panels = [group for group in root.findall(f"{ns}g") if group.findall(f"{ns}text") and group.findall(f"{ns}line")]
    shown = [group for group in root.findall(f"{ns}g") if group.findall(f"{ns}polyline")]
    assert len(panels) == 2
    assert len(shown) == len(dots)
    for dot, group in zip(dots, shown, strict=True):
        texts = panels[int(dot.panel[-1]) - 1].findall(f"{ns}text")[1:-1]
        (x0, v0), (x1, v1) = ((float(t.get("x")), float(t.text)) for t in (texts[0], texts[-1]))
        ends = [float(end.split(",")[0]) for end in group.find(f"{ns}polyline").get("points").split()]
        found = [v0 + (at - x0) * (v1 - v0) / (x1 - x0) for at in (float(group.find(f"{ns}circle").get("cx")), *ends)]
        assert found == pytest.approx([dot.value, dot.low, dot.high], abs=0.02)
    results = made({})
    drawn = pictures(tmp_path / "plots", {}, results)
    assert [path.name for path in drawn] == ["lead-psnr.svg", "lead-lpips.svg"]
    assert drawn[0].read_text().count("<polyline") == len(results.arms) - sum("steady," in arm for arm in results.arms)
    assert not pictures(tmp_path / "plots", {}, Results({}, [])), "nothing to draw where nothing is done"


def test_without_the_corpus_there_is_one_sentence_and_nothing_is_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("STEADYVQ_HOME", str(tmp_path / "home"))
    assert main(["experiment", "steady", "--out", str(tmp_path / "e")]) == 2
    said = capsys.readouterr().err
    assert "run `steadyvq data fetch corpus`" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("e/**/*.json"))
