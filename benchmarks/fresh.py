# SPDX-License-Identifier: Apache-2.0
"""Measuring peak memory: every form of a benchmark runs in a process of its own, whose peak is read at its end.

What a process allocates before the call that is measured (libraries, parameters, gradients, latents) is taken off by a second
process that does the same except for the call.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_fresh_process(script: str, *arguments: object) -> dict[str, Any] | None:
    """What `script --child ARGUMENTS` printed as JSON; None if it did not finish (most likely for want of memory)."""
    command = [sys.executable, script, "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stderr, end="", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def extra_bytes(script: str, form: str, *sizes: int) -> int:
    """Peak memory of `once(form, *sizes)` of a script in a fresh process, less that of `once("none", *sizes)`."""
    folder, module = str(Path(script).parent), Path(script).stem
    peaks = []
    for what in ("none", form):
        arguments = ", ".join(map(repr, (what, *sizes)))
        code = f"import sys; sys.path.insert(0, {folder!r})\nimport {module}, fresh\n{module}.once({arguments})\n"
        command = [sys.executable, "-c", code + "print(fresh.peak_bytes())"]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))
    return peaks[1] - peaks[0]
