# SPDX-License-Identifier: Apache-2.0
"""The streamed form never holds an N x K matrix, at the paper's size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "quantizer_memory.py"


@pytest.mark.slow
def test_a_training_step_at_65536_codes_stays_far_below_one_n_by_k_matrix(tmp_path):
    """K = 65,536, d = 128, N = 8,192: below 0.3 x (N x K x 4 bytes) beyond parameters, gradients and optimiser state."""
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--forms", "nsvq", "--json", "out.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    share = json.loads((tmp_path / "out.json").read_text())["forms"]["nsvq"]["of_matrix"]
    assert 0 < share < 0.3, done.stdout
