# SPDX-License-Identifier: Apache-2.0
"""The streamed forms never hold an N x K matrix, and equal the dense forms that do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def numbers(tmp_path: Path, benchmark: str, *arguments: object) -> dict:
    """What a benchmark measured."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{benchmark}.py", *map(str, arguments), "--json", "out.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.slow
def test_a_step_of_nsvq_at_65536_codes_stays_far_below_one_n_by_k_matrix(tmp_path):
    """K = 65,536, N = 8,192: a share of N x K x 4 bytes beyond parameters, gradients and optimiser state."""
    found = numbers(tmp_path, "quantizer_memory", "--forms", "nsvq")
    assert 0 < found["forms"]["nsvq"]["of_matrix"] < 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("case", "most"), [("lfq", 0.1), ("ibq", 0.2), ("cvq", 0.1), ("cvq-probabilistic", 0.1)])
def test_a_step_at_65536_codes_stays_far_below_one_n_by_k_matrix(tmp_path, case, most):
    found = numbers(tmp_path, "streamed_memory", "--cases", case, "--no-dense")["cases"][case]
    assert 0 < found["streamed"]["of_matrix"] < most


@pytest.mark.parametrize(("case", "count", "most"), [("ibq", 8192, 0.5), ("cvq", 8192, 0.5)])
def test_a_step_at_16384_codes_stays_below_one_n_by_k_matrix(tmp_path, case, count, most):
    arguments = ("--bits", 14, "--dim", 8, "--count", count, "--cases", case, "--no-dense")
    found = numbers(tmp_path, "streamed_memory", *arguments)["cases"][case]
    assert 0 < found["streamed"]["of_matrix"] < most


@pytest.mark.slow
def test_a_step_equals_its_dense_form(tmp_path):
    """Losses, gradients and new codes; and a dense form is what holds several such matrices."""
    arguments = ("--bits", 12, "--count", 1024, "--dense-count", 1024)
    for case, found in numbers(tmp_path, "streamed_memory", *arguments)["cases"].items():
        assert found["differences"]["streamed float64"] < 1e-5, case
        assert found["dense"]["of_matrix"] > 2, case
