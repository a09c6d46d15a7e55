# SPDX-License-Identifier: Apache-2.0
"""Reading other people's checkpoint files without running anything that they name.

A .ckpt or .pt file is a pickle, which may name any Python function and have it called. Files are read with torch's restricted
unpickler, which builds tensors and plain containers alone. What training frameworks leave beside the tensors (settings,
arguments, names of callbacks) is on a list here: objects of these classes become empty stand-ins, nothing of theirs is
imported or called, and they are dropped. A file that names anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from steadyvq.files import read_tensors


class Inert:
    """Stands for an object of a class that is not wanted: made from anything, holds nothing, does nothing."""

    def __new__(cls, *_: object, **__: object) -> Inert:
        """An empty object, whatever it was to be made from."""
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        """Keeps nothing."""


def _empty_mapping(*_: object) -> dict[object, object]:
    """Stands for a defaultdict: the unpickler fills a plain dict instead."""
    return {}


def _numpy(*names: str) -> tuple[str, ...]:
    """Names of numpy's internals before and since its version 2."""
    return tuple(f"numpy.{core}.{name}" for core in ("core", "_core") for name in names)


INERT_GLOBALS = (
    "argparse.Namespace",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "typing.Any",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("bool", "dict", "float", "int")),
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in ("list", "object", "set", "str", "tuple")
    ),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.dtypes.{name}DType" for name in ("Float64", "Float32", "Int64", "Int32", "Bool")),
    *_numpy("multiarray.scalar", "multiarray._reconstruct"),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata", "Node")),
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Boolean", "Float", "Integer", "String")),
    *(
        f"{package}.callbacks.{name}"
        for package in ("pytorch_lightning", "lightning.pytorch")
        for name in (
            "model_checkpoint.ModelCheckpoint",
            "early_stopping.EarlyStopping",
            "lr_monitor.LearningRateMonitor",
            "base.Callback",
        )
    ),
    *(f"{package}.utilities.parsing.AttributeDict" for package in ("pytorch_lightning", "lightning.pytorch")),
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
)
"""Classes and functions whose objects become stand-ins, by the name that a pickle has for them."""

CONTAINERS = ("ema", "model", "state_dict")
"""Keys that training scripts keep a model's tensors under; averaged ones first."""

_WRAPPERS = ("module.", "_orig_mod.", "first_stage_model.")
"""Prefixes that data-parallel wrappers, compilers and latent diffusion models put before a tokenizer's names."""


@dataclass
class Checkpoint:
    """The tensors of a file, those of the tokenizer apart.

    Attributes:
        path: The file.
        tensors: By name, floating-point ones in float32.
        weights: Which weights these are, in words.
        ignored: Number of tensors that are no part of the tokenizer, by the first part of their name.
    """

    path: Path
    tensors: dict[str, Tensor]
    weights: str
    ignored: dict[str, int] = field(default_factory=dict)

    def ignore(self, prefixes: Iterable[str]) -> None:
        """Moves the tensors whose names begin with these words to `ignored`."""
        for prefix in prefixes:
            names = [name for name in self.tensors if name.startswith(prefix)]
            for name in names:
                del self.tensors[name]
            if names:
                self.ignored[prefix] = self.ignored.get(prefix, 0) + len(names)


def read_checkpoint(path: Path, weights: str = "auto") -> Checkpoint:
    """Reads a checkpoint of any of the known kinds.

    Args:
        path: A .safetensors file, a file of `torch.save`, or a folder with one of diffusers.
        weights: `ema` for the moving average of the weights, `model` for the last ones, `auto` for the average if the file
            has one.

    Raises:
        ValueError: There is no such file, it cannot be read or has no such weights.
    """
    if weights not in ("auto", "ema", "model"):
        raise ValueError(f"weights is {weights!r}, but it must be 'auto', 'ema' or 'model'")
    path = _file_of(path)
    tensors, found = _tensors_of(_load(path), path, weights)
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    checkpoint = Checkpoint(path, tensors, found)
    _unwrapped(checkpoint)
    _average(checkpoint, weights)
    return checkpoint


def _file_of(path: Path) -> Path:
    if path.is_dir():
        inside = [path / f"diffusion_pytorch_model{suffix}" for suffix in (".safetensors", ".bin")]
        found = [file for file in inside if file.is_file()]
        if not found:
            raise ValueError(f"{path} is a folder without {inside[0].name}: name the checkpoint file in it")
        return found[0]
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give a checkpoint")
    return path


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    stand_ins: list[Any] = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in INERT_GLOBALS]
    stand_ins.append((_empty_mapping, "collections.defaultdict"))
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        UnpicklingError,
        RuntimeError,
        EOFError,
        AttributeError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
    ) as error:
        named = re.search(r"GLOBAL (\S+)|Unsupported (?:class|global):? (\S+)|function (\S+)", str(error))
        if isinstance(error, UnpicklingError) and named and "." in (name := next(filter(None, named.groups()))):
            raise ValueError(
                f"{path} names the Python object {name}, which is not on the list of what is left out, and nothing that a "
                "file names is run here: save the tensors of its state_dict with safetensors where it was made"
            ) from error
        # What torch advises after this, to load without the check, is never the right advice for a file of others.
        reason = "it is no archive of tensors" if isinstance(error, UnpicklingError) else str(error).strip()
        first = (reason or type(error).__name__).splitlines()[0][:200]
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({first}): give a .safetensors or torch.save file"
        ) from error


def _tensors_of(data: Any, path: Path, weights: str) -> tuple[dict[str, Tensor], str]:
    """The one mapping of tensors in a file, and which weights they are."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} holds a {type(data).__name__}, but a checkpoint is a mapping from names to tensors")
    kept = {key: data[key] for key in CONTAINERS if isinstance(data.get(key), Mapping) and _has_tensors(data[key])}
    if not kept:
        if not _has_tensors(data):
            raise ValueError(f"{path} holds no tensors by name, neither itself nor under {', '.join(CONTAINERS)}")
        return {
            str(name): value for name, value in data.items() if isinstance(value, Tensor)
        }, "the file's only weights"
    if weights == "model":
        kept.pop("ema", None)
    if not kept:
        raise ValueError(f"{path} holds averaged weights alone: leave out the choice of weights, or ask for 'ema'")
    key = next(iter(kept))
    return {str(name): value for name, value in kept[key].items() if isinstance(value, Tensor)}, f"those under {key!r}"


def _has_tensors(mapping: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in mapping.values())


def _unwrapped(checkpoint: Checkpoint) -> None:
    """Takes the prefixes of wrappers off the names; what lies outside of the wrapped model is ignored."""
    for prefix in _WRAPPERS:
        inside = [name for name in checkpoint.tensors if name.startswith((f"{prefix}encoder.", f"{prefix}quantize"))]
        if inside:
            outside = [name for name in checkpoint.tensors if not name.startswith(prefix)]
            checkpoint.ignore(dict.fromkeys(f"{name.partition('.')[0]}." if "." in name else name for name in outside))
            checkpoint.tensors = {name.removeprefix(prefix): value for name, value in checkpoint.tensors.items()}


def _average(checkpoint: Checkpoint, weights: str) -> None:
    """Puts the averages that Lightning models keep as `model_ema.NAMEWITHOUTDOTS` in the place of the weights."""
    tensors = checkpoint.tensors
    averages = {name: f"model_ema.{name.replace('.', '')}" for name in tensors if not name.startswith("model_ema.")}
    averages = {name: average for name, average in averages.items() if average in tensors}
    if weights != "model" and averages:
        for name, average in averages.items():
            tensors[name] = tensors[average]
        checkpoint.weights = f"moving averages ({len(averages)} tensors)"
    elif weights == "ema" and checkpoint.weights != "those under 'ema'":
        raise ValueError(
            f"{checkpoint.path} holds no averaged weights: leave out the choice of weights, or ask for 'model'"
        )
