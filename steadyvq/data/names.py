# SPDX-License-Identifier: Apache-2.0
"""Names of photographs in compact form, and what folders say about them: splits and classes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "val", "test")


class PackedNames(Sequence[str]):
    """Many strings in two arrays.

    Worker processes share them. A list of a million strings would be copied into each of them piece by piece, since
    looking at an object changes its reference count.

    Args:
        names: Any strings, undecodable file names included.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        start = int(self._ends[position - 1]) if position else 0
        return self._bytes[start : int(self._ends[position])].decode("utf-8", "surrogateescape")


@runtime_checkable
class Store(Protocol):
    """Encoded image files by number.

    Attributes:
        names: Their relative names with forward slashes.
    """

    @property
    def names(self) -> PackedNames:
        """One per file."""

    def __len__(self) -> int:
        """Number of files."""

    def read(self, row: int) -> bytes:
        """The bytes of a file; ValueError with the reason alone where they cannot be had."""


@dataclass(frozen=True)
class Listing:
    """A store with what is known of its files.

    Attributes:
        store: The files.
        splits: The split of each, as one of ``SPLITS``; None where nothing says so.
        classes: Names of the classes; empty where there are none.
        labels: For each file the number of its class; -1 where it has none.
    """

    store: Store
    splits: Sequence[str] | None
    classes: tuple[str, ...]
    labels: NDArray[np.int32]


def split_by_folder(names: Sequence[str]) -> tuple[str, ...] | None:
    """The split of each photograph where the folders at the top are ``train`` and ``val`` or ``test``; None elsewhere.

    Args:
        names: Relative paths with forward slashes.
    """
    tops = [name.partition("/")[0] for name in names]
    found = set(tops) if all("/" in name for name in names) else set()
    return tuple(tops) if "train" in found and len(found) > 1 and found <= set(SPLITS) else None


def classes_of(names: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """The classes that folders name, sorted, and the number of each photograph's class.

    The class is the first folder, or the one below a folder called train, val or test. Unless every photograph lies in
    such a folder there are no classes, and each number is -1.

    Args:
        names: Relative paths with forward slashes.
    """
    folders = [name.split("/")[:-1] for name in names]
    if all(parts and parts[0] in SPLITS for parts in folders):
        folders = [parts[1:] for parts in folders]
    if not all(folders):
        return (), np.full(len(names), -1, np.int32)
    classes = tuple(sorted({parts[0] for parts in folders}))
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[parts[0]] for parts in folders], np.int32)
