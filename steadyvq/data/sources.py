# SPDX-License-Identifier: Apache-2.0
"""Photographs that stay on disk: folders of files and indexed shards, read one at a time.

A store holds encoded files by number. A source is a store with what the names say: splits and classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from steadyvq.data.addresses import HUB, parse_address
from steadyvq.data.built_in import BUILT_IN
from steadyvq.data.collection import (
    SINGLE,
    Collection,
    existing_folder,
    image_names,
    load_collection,
    no_split,
    split_by_name,
)
from steadyvq.data.crops import uniforms
from steadyvq.data.decode import decode_image
from steadyvq.data.hub import list_hub
from steadyvq.data.names import SPLITS, Listing, PackedNames, Store, classes_of, split_by_folder
from steadyvq.data.shards import ShardStore, is_shard_set
from steadyvq.data.tarsets import list_tars


class FolderStore:
    """The image files below a folder.

    Args:
        folder: The folder.
        names: Their relative names with forward slashes.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        # A relative folder would be another one after a change of the working directory.
        self.folder, self.names = folder.absolute(), PackedNames(names)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, row: int) -> bytes:
        """The bytes of a file; ValueError with the reason alone where they cannot be had."""
        try:
            return (self.folder / self.names[row]).read_bytes()
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from error


def folder_store(data: str | Path) -> FolderStore:
    """The image files of a folder, or of the built-in photographs.

    Raises:
        ValueError: The folder is missing or holds no image file, or the package of the built-in photographs is not
            installed.
    """
    if str(data) not in BUILT_IN:
        folder = existing_folder(data)
        return FolderStore(folder, image_names(folder))
    files = BUILT_IN[str(data)]()
    name, path, _ = files[0]
    return FolderStore(path.parents[name.count("/")], [name for name, _, _ in files])


@dataclass(frozen=True)
class ImageSource:
    """Photographs on disk with their splits and classes; nothing is decoded before it is asked for.

    Attributes:
        data: Where they come from, as the user named it.
        store: Their files.
        rows: Numbers in the store of the photographs of this source.
        split_codes: For each file of the store the position of its split in ``SPLITS``.
        labels: For each file of the store the number of its class; -1 where there are no classes.
        classes: Names of the classes; empty where there are none. Those that folders name are sorted.
        min_side: Smaller photographs are enlarged to this shorter side when they are decoded.
        max_side: Larger ones are shrunk to this longer side (None: they are not).
        split_label: Which split this is, in the words that a record should use.
    """

    data: str
    store: Store = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    split_codes: NDArray[np.uint8] = field(repr=False)
    labels: NDArray[np.int32] = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)
    min_side: int = 1
    max_side: int | None = None
    split_label: str = "all"

    def __len__(self) -> int:
        return len(self.rows)

    def split(self, name: str) -> "ImageSource":
        """Return the photographs of one split, as ``Collection.split`` does.

        Raises:
            ValueError: There is no such split here.
        """
        if name == "all":
            return self
        codes = self.split_codes[self.rows]
        found = [SPLITS[code] for code in np.unique(codes).tolist()]
        if name == "val" and len(self) == 1 and found == ["train"]:
            return replace(self, split_label=SINGLE)
        if name not in found:
            raise no_split(self.data, found, name)
        return replace(self, rows=self.rows[codes == SPLITS.index(name)], split_label=name)

    @property
    def splits(self) -> tuple[str, ...]:
        """The split of each photograph."""
        return tuple(SPLITS[code] for code in self.split_codes[self.rows].tolist())

    def name(self, number: int) -> str:
        """The relative name of a photograph of this source."""
        return self.store.names[int(self.rows[number])]

    def decode(self, number: int, planes: bool = True) -> UInt8[Tensor, "3 H W"]:
        """Read and decode a photograph.

        Args:
            number: Which one.
            planes: As in ``decode_image``.

        Raises:
            ValueError: It cannot be read or decoded; the message is the reason alone.
        """
        content = self.store.read(int(self.rows[number]))
        return decode_image(BytesIO(content), self.min_side, self.max_side, planes)

    def images(self, numbers: Sequence[int], skipped: list[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, pixels) of the photographs that can be read, one at a time.

        Args:
            numbers: Which ones.
            skipped: Takes (name, reason) of each that cannot be read.
        """
        for number in numbers:
            try:
                yield self.name(number), self.decode(number)
            except ValueError as error:
                skipped.append((self.name(number), str(error)))

    def load(self, count: int, max_bytes: int = 8 << 30) -> Collection:
        """Decode some photographs into memory: all, or an even choice of ``count`` that depends on their number alone.

        Args:
            count: Most photographs wanted.
            max_bytes: Memory that they may take.

        Raises:
            ValueError: None of them can be read, or they need more memory.
        """
        chosen = np.sort(np.argsort(uniforms(len(self), len(self)), kind="stable")[:count]).tolist()
        skipped: list[tuple[str, str]] = []
        names, images, used = [], [], 0
        for name, image in self.images(chosen, skipped):
            names.append(name)
            images.append(image)
            used += image.numel()
            if used > max_bytes:
                raise ValueError(
                    f"{len(chosen)} held-out photographs of {self.data!r} need more than {max_bytes / 2**30:.3g} GiB once "
                    f"decoded (reached at number {len(names)}): shrink them with max_side, or use fewer crops"
                )
        if not names:
            raise ValueError(
                f"none of {len(skipped)} photographs of {self.data!r} could be read (the first, {skipped[0][0]!r}: "
                f"{skipped[0][1]}): check the files, or the shards with `steadyvq data verify`"
            )
        code = self.split_codes[self.rows[0]]
        splits = (SPLITS[code],) * len(names)
        return Collection(self.data, tuple(names), tuple(images), splits, skipped, self.split_label)


def open_source(
    data: str | Path,
    min_side: int = 1,
    max_side: int | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
) -> ImageSource:
    """Open photographs that stay on disk.

    Folders called ``train`` and ``val`` (and ``test``) at the top are the splits; where they are missing, photographs
    are split by a hash of their names as ``load_collection`` does it. A folder and the shards made from it have the same
    splits and classes.

    Args:
        data: A folder of shards, a folder of images, ``"mvtb"``, or an address (``steadyvq.data.addresses``).
        min_side: Smaller photographs are enlarged to this shorter side.
        max_side: Larger ones are shrunk to this longer side; None keeps them.
        val_fraction: Expected share held out where no folder says so.
        test_fraction: Expected share of a test split where no folder says so.

    Raises:
        ValueError: There are no photographs, the shards do not fit their index, or a library is missing.
    """
    listing = _listing(data)
    names = listing.store.names[:]
    splits = listing.splits or split_by_name(names, val_fraction, test_fraction)
    codes = np.array([SPLITS.index(split) for split in splits], np.uint8)
    rows = np.arange(len(names))
    return ImageSource(str(data), listing.store, rows, codes, listing.labels, listing.classes, min_side, max_side)


def _listing(data: str | Path) -> Listing:
    """The files of a source and what its names, or columns, say of them."""
    address = parse_address(data)
    if address is not None:
        return list_hub(address) if address.kind == HUB else list_tars(address)
    store: Store = ShardStore(data) if is_shard_set(data) else folder_store(data)
    names = store.names[:]
    if str(data) in BUILT_IN:
        return Listing(
            store, tuple(split for _, _, split in BUILT_IN[str(data)]()), (), np.full(len(names), -1, np.int32)
        )
    return Listing(store, split_by_folder(names), *classes_of(names))


def always_streamed(data: str | Path) -> bool:
    """Whether the photographs of a source stay on disk in any case: shards, and what is neither a folder nor `mvtb`."""
    return parse_address(data) is not None or is_shard_set(data)


def open_photographs(
    data: str | Path, streaming: bool, min_side: int, max_side: int | None, test_fraction: float
) -> Collection | ImageSource:
    """The photographs of a source: decoded into memory, or left on disk where asked for or where they always are.

    Args:
        data: As in ``open_source``.
        streaming: Leave the photographs of a folder on disk.
        min_side: Smaller photographs are enlarged to this shorter side.
        max_side: Larger ones are shrunk to this longer side; None keeps them.
        test_fraction: Expected share of a test split.

    Raises:
        ValueError: There are no photographs, or they cannot be read.
    """
    if streaming or always_streamed(data):
        return open_source(data, min_side, max_side, test_fraction=test_fraction)
    return load_collection(data, min_side, max_side, test_fraction=test_fraction)
