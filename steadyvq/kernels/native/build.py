# SPDX-License-Identifier: Apache-2.0
"""Compiles the C files beside it for this processor, once per machine, with the C compiler that is there.

The library lies in `$XDG_CACHE_HOME/steadyvq` (`~/.cache/steadyvq`), under a name made of the source, the compiler and the
processor, so that a home shared between machines holds one for each. Without a compiler, or with `STEADYVQ_NATIVE=0`,
everything runs in torch. `CC` names another compiler.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
SOURCES = ("search.c", "softmax.c")
HEADERS = ("lanes.h",)
# No option that changes a result: sums of float64 scores have one order, and products are rounded before they are added.
FLAGS = ("-O3", "-march=native", "-std=c11", "-ffp-contract=off", "-fPIC", "-shared")
_COMPILERS = ("cc", "gcc", "clang")
_SECONDS = 120

_log = logging.getLogger(__name__)


class Library(NamedTuple):
    """The compiled kernels, or why there is none.

    Attributes:
        functions: the loaded library, or None.
        bfloat16: whether this processor multiplies bfloat16 numbers.
        rows: latents per tile.
        groups: groups of 16 codes per panel; a bundle is a multiple of it.
        reason: why there is none, or where it lies.
    """

    functions: ctypes.CDLL | None
    bfloat16: bool
    rows: int
    groups: int
    reason: str

    def call(self, name: str, *arguments: object) -> int:
        """Calls a function of the library."""
        assert self.functions is not None, self.reason
        return int(getattr(self.functions, name)(*arguments))


@functools.cache
def library(*extra: str) -> Library:
    """The compiled kernels of this processor; the first call may compile them, which takes a second.

    Args:
        extra: further options of the compiler, to try what other processors get.
    """
    try:
        path = _compiled(extra)
        functions = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        reason = str(error)
        _log.info("kernels run in torch: %s", reason)
        return Library(None, False, 0, 0, reason)
    functions.bfloat16_width.restype = ctypes.c_int64
    rows, groups = int(functions.rows_per_tile()), int(functions.groups_per_panel())
    return Library(functions, bool(functions.has_bfloat16()), rows, groups, str(path))


def _compiled(extra: tuple[str, ...]) -> Path:
    if os.environ.get("STEADYVQ_NATIVE", "1") == "0":
        raise RuntimeError("switched off by STEADYVQ_NATIVE=0")
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), *_COMPILERS)))), None)
    if compiler is None:
        raise RuntimeError("there is no C compiler (cc, gcc, clang or what CC names)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS).stdout
    texts = ((FOLDER / name).read_text() for name in (*SOURCES, *HEADERS))
    parts = (*texts, " ".join((*FLAGS, *extra)), compiler, version, _processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steadyvq"
    path = folder / f"kernels-{key}.so"
    if not path.exists():
        _compile(compiler, path, extra)
    return path


def _compile(compiler: str, path: Path, extra: tuple[str, ...]) -> None:
    """Writes the library under a temporary name and renames it: several processes may start at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, *extra, *(str(FOLDER / source) for source in SOURCES), "-o", name, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
            raise RuntimeError(
                f"{compiler} could not compile the kernels: {lines[0].strip() if lines else 'no message'}"
            )
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _processor() -> str:
    """What `-march=native` depends on."""
    flags = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
        flags += next((line for line in lines if line.lower().startswith("model name")), "")
    return f"{platform.machine()} {platform.processor()} {platform.system()} {flags}"
