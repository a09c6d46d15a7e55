#!/usr/bin/env bash
# The Triton kernels without a card: in Triton's interpreter under the kernels' contract, then compiled for real cards.
#   pip install --no-deps triton && scripts/test_triton.sh [options of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
if ! python -c "import triton" 2>/dev/null; then
    echo "there is no Triton: pip install --no-deps triton" >&2
    exit 2
fi
export OMP_NUM_THREADS=1
TRITON_INTERPRET=1 python -m pytest tests/test_triton.py "$@"
TRITON_INTERPRET=0 python -m pytest tests/test_triton_compile.py "$@"
