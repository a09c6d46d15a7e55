# SPDX-License-Identifier: Apache-2.0
"""The doctor: every rule on both sides of its threshold, real runs, bad input, and the evidence."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import steadyvq
from steadyvq.diagnosis import Record, diagnose, read_log
from steadyvq.diagnosis import thresholds as at
from steadyvq.diagnosis.doctor import CAUSES
from steadyvq.diagnosis.logs import of_rows

EVIDENCE = Path(__file__).parent.parent / "docs" / "evidence"
K = 100


def row(step: int, **changes: object) -> dict[str, object]:
    """A row of a healthy run."""
    return {
        "kind": "monitor",
        "step": step,
        "num_codes": K,
        "tokens": 1000 * step,
        "tokens_per_step": 1000.0,
        "window_tokens": 10_000,
        "alive": 95,
        "peak_alive": 98,
        "died": 0.03,
        "active": 95,
        "utilization": 0.95,
        "ceiling": 1.0,
        "perplexity": 80.0,
        "duplicates": 0.0,
        "norm_ratio": 1.0,
        "code_step": 0.01,
        "drift_per_step": 0.01,
        "drift_per_hit": 0.01,
        "distance_rms": 0.3,
        "latent_spread": 2.0,
        "missed": 0.0,
        "dtypes": {"latents": "float32", "codebook": "float32", "autocast": None},
        "winner_mass": 0.3,
        "effective_losers": 16.0,
        "trained": True,
        "values": {"reconstruction": 0.1},
        **changes,
    }


def named(rows: list[dict[str, object]]) -> list[str]:
    return [finding.cause for finding in diagnose(of_rows(rows)).findings]


def run(**changes: object) -> list[dict[str, object]]:
    return [row(step, **changes) for step in (1, 10, 20, 30, 40, 50)]


HALF = {"latents": "bfloat16", "codebook": "float32", "autocast": None}
ILL = {"alive": 40, "peak_alive": 90, "died": 0.56}
CASES = {
    "too few tokens for K": ({"tokens": 49 * K}, {"tokens": 51 * K}),
    "half-precision look-ups": ({"missed": 0.02, "dtypes": HALF}, {"missed": 0.005, "dtypes": HALF}),
    "duplicate codes": ({"duplicates": 0.06}, {"duplicates": 0.04}),
    "scale mismatch at init": ({"norm_ratio": 0.1, **ILL}, {"norm_ratio": 0.1}),
    "starved codebook": ({"code_step": 0.001, **ILL}, {"code_step": 0.001}),
    "dying": (ILL, {"alive": 70, "peak_alive": 90, "died": 0.22}),
}


def test_a_healthy_log_is_healthy():
    found = diagnose(of_rows(run()))
    assert found.healthy
    assert str(found).splitlines()[1] == "healthy"
    assert not found.unknown


@pytest.mark.parametrize("cause", CASES)
def test_both_sides_of_every_threshold(cause):
    ill, well = CASES[cause]
    assert named(run(**ill)) == [cause]
    assert named(run(**well)) == []


def test_large_codes_and_missed_look_ups_in_full_precision():
    assert named(run(norm_ratio=9.0, **ILL)) == ["scale mismatch at init"]
    assert named(run(missed=0.5)) == []


def test_tau_on_both_sides():
    assert named(run(winner_mass=0.99, effective_losers=1.0)) == ["tau out of scale"]
    assert named(run(winner_mass=0.02, effective_losers=90.0)) == ["tau out of scale"]
    assert "too small" in str(diagnose(of_rows(run(winner_mass=0.99))))
    assert "too large" in str(diagnose(of_rows(run(effective_losers=90.0))))
    assert named([{k: v for k, v in r.items() if k not in ("winner_mass", "effective_losers")} for r in run()]) == []


def test_a_freeze_is_judged_by_the_drift_before_it():
    def frozen(pace: float, steps: tuple[int, ...] = (40, 50)) -> list[dict[str, object]]:
        rows = run(drift_per_step=2.0 * pace)
        return [{**r, "trained": False, "drift_per_step": 0.0} if r["step"] in steps else r for r in rows]

    assert named(frozen(0.05)) == ["untrained encoder frozen"]
    assert named(frozen(0.005)) == []
    assert named(frozen(0.05, (1, 10, 20, 30, 40, 50))) == [], "an encoder that never learned here came trained"


def test_a_discriminator_is_judged_by_the_reconstruction_around_its_start():
    def pushed(after: float) -> list[dict[str, object]]:
        rows = run()
        return [{**r, "values": {"reconstruction": after, "adversarial": 1.0}} if r["step"] >= 30 else r for r in rows]

    assert named(pushed(0.13)) == ["discriminator start"]
    assert named(pushed(0.11)) == []
    one = pushed(0.11)
    one[3]["values"] = {"reconstruction": 0.13, "adversarial": 1.0}
    assert named(one) == [], "one noisy row is no shock"


def test_several_causes_are_named_together_and_dying_only_alone():
    assert named(run(norm_ratio=0.01, code_step=1e-5, **ILL)) == ["scale mismatch at init", "starved codebook"]


def test_what_cannot_be_judged_is_said():
    rows = [{k: v for k, v in r.items() if not k.startswith("drift")} for r in run()]
    found = diagnose(of_rows(rows[1:]))
    assert set(found.unknown) == {"starved codebook"}
    assert "not judged: starved codebook" in str(found)
    late = diagnose(of_rows([row(step) for step in (500, 600)]))
    assert "scale mismatch at init" in late.unknown


def test_drift_of_our_probe_rows_reaches_the_monitors_rows():
    rows = [{k: v for k, v in r.items() if not k.startswith("drift")} for r in run()]
    probes = [{"kind": "probe", "step": s, "drift": 0.1, "drift_rms": 0.5, "churn": 0.2} for s in (25, 50)]
    log = of_rows([*rows, *probes])
    assert [r.get("drift_per_step") for r in log.rows] == [None, None, None, 0.02, 0.02, 0.02]


def test_a_real_bfloat16_look_up_is_found_and_a_real_float32_one_is_not():
    """The module itself flips indices; the monitor compares them with float64 and the doctor reads its log."""
    torch.manual_seed(0)
    for dtype, expected in ((torch.bfloat16, ["half-precision look-ups"]), (torch.float32, [])):
        rows: list[dict[str, object]] = []
        monitor = steadyvq.Monitor(nn.Identity(), rows.append, every=5, attach=False, warn=False)
        codes = torch.randn(64, 8)
        for _ in range(20):
            z = torch.randn(512, 8).to(dtype)
            table = codes.to(dtype)
            distance = z.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * z @ table.T
            monitor.observe(Record(z, distance.argmin(1), lambda codes=codes: codes))
            monitor.step()
        assert named(rows) == expected


def test_the_command_reads_our_runs_and_foreign_logs(tiny, steadyvq_command, tmp_path):
    assert steadyvq_command("train", tiny, "--out", "run").returncode == 0
    done = steadyvq_command("doctor", "run")
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d+ of 32 codes alive after 3,840 tokens \(10 steps\)", done.stdout)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["kind"] == "monitor"] == [1, 10]
    (tmp_path / "monitor.jsonl").write_text("".join(json.dumps(r) + "\n" for r in run(**ILL)))
    found = json.loads(steadyvq_command("doctor", "monitor.jsonl", "--json").stdout)
    assert not found["healthy"]
    assert found["findings"][0]["cause"] == "dying"
    assert found["findings"][0]["knob"]


def test_bad_input_is_told_in_a_sentence(tmp_path, steadyvq_command):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.jsonl").write_text('{"kind": "train", "step": 1}\n')
    (tmp_path / "broken.jsonl").write_text("nonsense\n" + json.dumps(row(1)) + "\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe\x00")
    for name, said in (
        ("nowhere", "does not exist"),
        ("empty", "holds neither log.jsonl nor monitor.jsonl"),
        ("other.jsonl", "has no rows of a monitor"),
        ("broken.jsonl", "line 1 is no JSON"),
        ("picture.png", "is no text file"),
    ):
        with pytest.raises(ValueError, match=said):
            read_log(tmp_path / name)
    done = steadyvq_command("doctor", "nowhere")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    whole = "".join(json.dumps(r) + "\n" for r in run())
    (tmp_path / "cut.jsonl").write_text(whole + '{"kind": "mon')
    assert len(read_log(tmp_path / "cut.jsonl").rows) == 6, "a killed run's last line may be half of one"


def test_the_evidence_is_that_of_the_frozen_thresholds_and_of_these_runs():
    from steadyvq.experiments.doctor import DYING, HEALTHY, test, thresholds_hash

    record = json.loads((EVIDENCE / "doctor.json").read_text())
    assert record["thresholds"] == thresholds_hash(), "thresholds have changed since the runs were made"
    planned = [(p.disease, p.hash(), p.seed) for p in test()]
    assert [(r["planted"], r["config_hash"], r["seed"]) for r in record["runs"]] == planned
    assert {p for p, *_ in planned} == {*CAUSES, HEALTHY, DYING}
    assert all(re.fullmatch(r"[0-9a-f]{40}", r["commit"]) for r in record["runs"])
    healthy = [r for r in record["runs"] if r["planted"] == HEALTHY]
    assert len(healthy) == 10


def test_thresholds_are_in_one_file():
    """The doctor and the warnings hold no number of their own that decides."""
    for name in ("doctor.py", "early.py"):
        text = (Path(steadyvq.__file__).parent / "diagnosis" / name).read_text()
        compared = re.findall(r"[<>]=?\s*(-?\d+\.?\d*)", text)
        assert set(compared) <= {"0", "2"}, f"{name} compares with {compared}"
    assert at.DYING < at.HOPELESS
