# SPDX-License-Identifier: Apache-2.0
"""Measuring peak memory: every form of a benchmark runs in a process of its own, whose peak is read at its end.

What a process allocates before the call that is measured (libraries, parameters, gradients, latents) is taken off by a second
process that does the same except for the call.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
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
    """Peak memory of the call `prepared(form, *sizes)` of a script in a fresh process, beyond what that held before it.

    Linux counts the peak anew once asked to.
    """
    folder, module = str(Path(script).parent), Path(script).stem
    arguments = ", ".join(map(repr, (form, *sizes)))
    code = f"import sys; sys.path.insert(0, {folder!r}); import {module}, fresh; fresh.report({module}.prepared({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def report(call: Callable[[], object]) -> None:
    """Prints the peak of a call beyond what is held now, in bytes."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))
