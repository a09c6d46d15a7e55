# SPDX-License-Identifier: Apache-2.0
"""The benchmark for cards: says so where there is none; its steps run, with a CPU and its clock in the card's place."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_one_sentence_where_there_is_no_card() -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr


@pytest.mark.slow
def test_searches_and_losses_give_rows(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    def clocked(call) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "milliseconds", clocked)
    monkeypatch.setattr(gpu, "extra_mb", lambda call: 0.0)
    monkeypatch.setattr(gpu, "total_bytes", lambda: 1 << 33)
    monkeypatch.setattr(gpu, "QUICK", [(128, 256, 16)])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def broken(z, codes):
        raise RuntimeError("no kernel image\nfor this card")

    monkeypatch.setattr(gpu, "RIVALS", (gpu.Rival("broken", broken), *gpu.RIVALS))
    for name in ("search", "dense"):  # whole steps take a minute on a CPU
        rows = list(gpu.GROUPS[name](True))
        failed = [rows.pop(0)] if name == "search" else []
        for row in failed:
            assert gpu.line(row).endswith("broken did not run (RuntimeError: no kernel image for this card)")
        assert rows, "one that fails does not end the others"
        for row in rows:
            assert "ms" in gpu.line(row)
            assert row.get("agree", 1.0) > 0.9
            assert row.get("error", 0.0) < 1e-4
