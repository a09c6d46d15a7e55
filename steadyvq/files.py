# SPDX-License-Identifier: Apache-2.0
"""Writing files so that no reader, and no crash, ever meets half of one; reading tensors."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary name in the same folder, then renames it to `path`; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays, since some writers choose their format by it; the name is short, whatever the target's length.
    temporary = path.with_name(f".{path.stem[:40]}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_tensors(path: Path) -> dict[str, "Tensor"]:
    """The tensors of a safetensors file by name.

    Raises:
        ValueError: It is no safetensors file.
    """
    # This module is imported where torch need not be.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error})") from error
    return tensors
