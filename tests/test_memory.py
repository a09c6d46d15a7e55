# SPDX-License-Identifier: Apache-2.0
"""The streamed form never holds an N x K matrix, at the paper's size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "form", "most"), [("quantizer_memory", "nsvq", 0.3), ("entropy_memory", "lfq", 0.1)]
)
def test_a_training_step_at_65536_codes_stays_far_below_one_n_by_k_matrix(tmp_path, benchmark, form, most):
    """K = 65,536, N = 8,192: a share of N x K x 4 bytes beyond parameters, gradients and optimiser state."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{benchmark}.py", "--forms", form, "--json", "out.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    share = json.loads((tmp_path / "out.json").read_text())["forms"][form]["of_matrix"]
    assert 0 < share < most, done.stdout
