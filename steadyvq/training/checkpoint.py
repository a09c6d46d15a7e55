# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one safetensors file each, tensors by path and everything else as JSON in its metadata.

No pickle is written or read. A file is written under a temporary name and renamed, so that a crash never leaves half of
one where the next start would look for it.
"""

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steadyvq.files import write_atomically

FORMAT = "steadyvq-checkpoint-2"
_TENSOR = "__tensor__"


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Moves the tensors of a nested state into `tensors` and leaves their paths behind."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().contiguous()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        return {"keys": [_split_key(key) for key in value], "values": _split_all(value.values(), path, value, tensors)}
    if isinstance(value, list | tuple):
        return [_split(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _split_key(key: Any) -> Any:
    if not isinstance(key, str | int):
        raise TypeError(f"checkpoint keys are str or int, got {key!r}")
    return key


def _split_all(values: Any, path: str, keys: Any, tensors: dict[str, Tensor]) -> list[Any]:
    return [
        _split(value, f"{path}.{key}" if path else str(key), tensors) for key, value in zip(keys, values, strict=True)
    ]


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _join(item, tensors) for key, item in zip(value["keys"], value["values"], strict=True)}
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    return value


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}.safetensors"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a nested state of tensors, numbers, strings, lists and mappings."""
    tensors: dict[str, Tensor] = {}
    skeleton = _split(state, "", tensors)
    # Tied tensors would be refused by safetensors; a clone costs little beside the write.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "state": json.dumps(skeleton)}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            # A full disk among others: the caller of a write expects an OSError.
            raise OSError(f"{path} could not be written: {error}") from error
        with temporary.open("rb") as file:
            os.fsync(file.fileno())

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote.

    Raises:
        ValueError: Not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is no checkpoint of steadyvq train: give a file from RUN/checkpoints")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({error}): give a file from RUN/checkpoints"
        ) from error
    state: dict[str, Any] = _join(json.loads(metadata["state"]), tensors)
    return state


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step, if there is one."""
    found = [path for path in folder.glob("step-*.safetensors") if re.fullmatch(r"step-\d+", path.stem)]
    return max(found, default=None)


def prune_checkpoints(folder: Path, keep: int, kept: Collection[Path] = ()) -> None:
    """Deletes all checkpoints but the newest `keep` and those in `kept`."""
    for path in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        if path not in kept:
            path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Deletes files that a killed process had begun to write, in a run folder and below."""
    for path in folder.rglob(".*.tmp*"):
        path.unlink()
