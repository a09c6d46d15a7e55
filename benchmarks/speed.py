# SPDX-License-Identifier: Apache-2.0
"""All speed benchmarks of the CPU, each side against its rival in the same process, with the floor of the machine.

    OMP_NUM_THREADS=1 python benchmarks/speed.py                            # everything: about twenty minutes
    OMP_NUM_THREADS=1 python benchmarks/speed.py --only search --quick      # a small look
    OMP_NUM_THREADS=1 python benchmarks/speed.py --json docs/evidence/performance.json

faiss and KeOps take part where they are installed (`pip install -c constraints/cpu.txt -e '.[bench]'`). `docs/performance.md`
is made from the record. `steadyvq kernels explain N K d --measure` times one size.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

import speed_dense
import speed_memory
import speed_scaling
import speed_search
import speed_step
import torch
from pairs import machine

GROUPS = {
    "search": speed_search.measure,
    "memory": speed_memory.measure,
    "dense": speed_dense.measure,
    "step": speed_step.measure,
    "scaling": speed_scaling.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated groups: " + ", ".join(GROUPS))
    parser.add_argument("--quick", action="store_true", help="small sizes and few pairs: does it run at all?")
    parser.add_argument(
        "--json", type=Path, help="write the record here; groups that did not run keep what stands there"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    names = arguments.only.split(",") if arguments.only else list(GROUPS)
    for name in names:
        if name not in GROUPS:
            parser.error(f"there is no group {name!r}: choose from {', '.join(GROUPS)}")
    record = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    print(machine())
    for name in names:
        rows = GROUPS[name](arguments.quick, lambda text: print(text, flush=True))
        record[name] = {"machine": machine(), "commit": commit(), "quick": arguments.quick, "rows": rows}
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def commit() -> str:
    """The commit that was measured, with a plus where tracked files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../steadyvq", "."]).returncode
    return head + ("+" if changed else "")


if __name__ == "__main__":
    main()
