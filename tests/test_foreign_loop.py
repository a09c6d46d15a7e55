# SPDX-License-Identifier: Apache-2.0
"""Twenty lines bring NSVQ's schedule into a training loop of another project's shape."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import environment

LOOP = Path(__file__).with_name("foreign_loop.py")
ADDED = "# nsvq"


def run(script: Path, photos: Path, result: Path) -> dict[str, object]:
    command = [sys.executable, str(script), str(photos), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment(0, 1))
    assert done.returncode == 0, done.stderr
    loaded: dict[str, object] = torch.load(result)
    return loaded


def test_the_lines_are_twenty_and_the_loop_is_one_without_them(photos, tmp_path):
    lines = LOOP.read_text().splitlines()
    kept = [line for line in lines if not line.endswith(ADDED)]
    assert 10 <= len(lines) - len(kept) <= 20
    text = "\n".join(kept).replace(
        "EPOCHS, BATCH, SIDE, DIM, CODES, DISC_WEIGHT = 14,", "EPOCHS, BATCH, SIDE, DIM, CODES, DISC_WEIGHT = 2,"
    )
    assert "steadyvq" not in text
    (tmp_path / "plain.py").write_text(text)
    history = run(tmp_path / "plain.py", photos, tmp_path / "plain.pt")["history"]
    assert {row["epoch"] for row in history} == {0, 1}
    assert history[-1]["rec"] < history[0]["rec"]


@pytest.mark.slow
def test_the_three_stages_in_it(photos, tmp_path):
    """Mixed precision, two gradient scalers, a copy as the average: the encoder freezes in all of it, the GAN comes back."""
    result = run(LOOP, photos, tmp_path / "nsvq.pt")
    history = result["history"]
    steps = sum(row["epoch"] == 0 for row in history)
    weights = [row["weight"] for row in history]
    freeze = weights.index(0.0)
    assert freeze % steps == 0
    assert 4 <= freeze // steps <= 8, "not before the rule is armed"
    back = freeze + steps
    ramp = [0.5 * (i + 1) / (2 * steps) for i in range(2 * steps)]
    assert weights[:freeze] == [0.5] * freeze
    assert weights[freeze:back] == [0.0] * steps
    assert weights[back : back + 2 * steps] == pytest.approx(ramp)
    assert set(weights[back + 2 * steps :]) == {0.5}

    def moves(what: str, begin: int, end: int) -> bool:
        return not torch.equal(history[begin][what], history[end][what])

    end = len(history) - 1
    assert moves("live", freeze - 2, freeze - 1)
    assert all(torch.equal(row[kind], history[freeze]["live"]) for row in history[freeze:] for kind in ("live", "ema"))
    assert not moves("discriminator", freeze, back)
    assert moves("discriminator", 0, freeze)
    assert moves("discriminator", back, end)
    assert moves("decoder", freeze, back - 1)
    assert result["used"] >= 40, "of 64 codes, whose rate is ten times that of the rest"
    first, last = ([row["rec"] for row in history[i : i + steps]] for i in (freeze - steps, len(history) - steps))
    assert sum(last) < sum(first), "refine is worth its while"
