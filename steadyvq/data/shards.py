# SPDX-License-Identifier: Apache-2.0
"""Indexed shards: plain tar files, and an index that says where in them every photograph lies.

    index.json            the shards with their sizes and SHA-256, written last
    shard-00000.tar       the files as they were, under their relative names
    shard-00000.json      its table: names, offsets, sizes, CRC-32
    plan.json             what is being written, so that an interrupted writer goes on

Any program reads the tars. Here a photograph is one positioned read, in any order and from any number of processes.
"""

import hashlib
import json
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steadyvq.data.names import PackedNames

INDEX, PLAN = "index.json", "plan.json"
FORMAT, VERSION = "steadyvq-shards", 1
_OPEN_FILES = 256


@dataclass(frozen=True)
class Shard:
    """One tar file as the index has it.

    Attributes:
        file: Its name.
        bytes: Its size.
        samples: Photographs in it.
        sha256: Of its bytes.
        table_sha256: Of the bytes of its table.
    """

    file: str
    bytes: int
    samples: int
    sha256: str
    table_sha256: str

    @property
    def table(self) -> str:
        """Name of its table."""
        return table_name(self.file)


@dataclass(frozen=True)
class Table:
    """Where the photographs of one shard lie: one entry of each field per photograph, in the order of the tar."""

    names: list[str]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    crc32: NDArray[np.uint32]


def table_name(shard: str) -> str:
    """The name of a shard's table."""
    return Path(shard).with_suffix(".json").name


def is_shard_set(data: str | Path) -> bool:
    """Whether a folder holds shards, complete or not."""
    if not str(data):
        return False
    # Other data sets have files of these names too, perhaps large ones.
    paths = [path for name in (INDEX, PLAN) if (path := Path(data) / name).is_file()]
    return any(FORMAT.encode() in _beginning(path) for path in paths)


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(100)


def read_index(folder: Path) -> list[Shard]:
    """The shards of a set.

    Raises:
        ValueError: There is no index, or it is none of ours.
    """
    path = folder / INDEX
    if not is_shard_set(folder):
        raise ValueError(f"{str(folder)!r} holds no shards: give a folder written by `steadyvq data shard`")
    if not path.is_file():
        raise ValueError(
            f"the shards in {str(folder)!r} are not complete (no {INDEX}): run the same `steadyvq data shard` again, "
            "and it goes on"
        )
    index = read_json(path)
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise ValueError(
            f"{path} is no index of version {VERSION} written by `steadyvq data shard`: give the folder of a shard set"
        )
    try:
        return [Shard(**entry) for entry in index["shards"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): {_AGAIN}") from error


_AGAIN = "delete it and run the same `steadyvq data shard` again, which writes what is missing"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: The file is something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {_AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: {_AGAIN}")
    return value


def parse_table(value: dict[str, Any]) -> Table:
    """The table in a JSON object; KeyError, TypeError, OverflowError or ValueError if there is none."""
    return Table(
        [str(name) for name in value["names"]],
        np.array(value["offsets"], np.int64),
        np.array(value["sizes"], np.int64),
        np.array(value["crc32"], np.uint32),
    )


def read_table(folder: Path, shard: Shard) -> Table:
    """The table of a shard, checked against the index.

    Raises:
        ValueError: It is missing, or not the one that the index names.
    """
    path = folder / shard.table
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"the table {path} cannot be read ({error.strerror}): {_AGAIN}") from error
    if hashlib.sha256(content).hexdigest() != shard.table_sha256:
        raise ValueError(
            f"{path} is not the table that {INDEX} names (its SHA-256 differs): put the right one back, or delete both it "
            f"and {shard.file} and run the same `steadyvq data shard` again"
        )
    table = parse_table(json.loads(content))
    lengths = {len(table.names), len(table.offsets), len(table.sizes), len(table.crc32), shard.samples}
    if len(lengths) != 1 or (table.sizes < 0).any() or (table.offsets + table.sizes > shard.bytes).any():
        raise ValueError(f"{path} does not describe {shard.samples} photographs within {shard.bytes} bytes: {_AGAIN}")
    return table


def check_tar(folder: Path, shard: Shard, table: Table) -> None:
    """Looks whether the tar is the one that its table describes: its size, and the headers of its first and last file.

    Raises:
        ValueError: It is missing or another one.
    """
    path = folder / shard.file
    if not path.is_file():
        raise ValueError(f"the shard {path} is missing: run the same `steadyvq data shard` again, which writes it anew")
    size = path.stat().st_size
    if size != shard.bytes:
        raise ValueError(
            f"{path} has {size} bytes, but the index says {shard.bytes} (cut short, or the index of another tar): {_AGAIN}"
        )
    with path.open("rb") as file:
        for row in {0, len(table.names) - 1} if table.names else ():
            held = header_before(file.fileno(), int(table.offsets[row]))
            wanted = (table.names[row], int(table.sizes[row]))
            # Other names stand in a header of their own before it; this one has a makeshift.
            plain = wanted[0].isascii() and len(wanted[0]) <= 100
            if held is None or held[1] != wanted[1] or (plain and held[0] != wanted[0]):
                raise ValueError(
                    f"the index does not match {path}: before byte {int(table.offsets[row])} the tar has {_told(held)}, the "
                    f"index {_told(wanted)}: put the right tar back, or {_AGAIN}"
                )


def header_before(file: int, offset: int) -> tuple[str, int] | None:
    """Name and size in the tar header that ends at this byte; None if there is none."""
    try:
        info = tarfile.TarInfo.frombuf(os.pread(file, 512, max(0, offset - 512)), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return info.name, info.size


def _told(entry: tuple[str, int] | None) -> str:
    return "no file header" if entry is None else f"{entry[0]!r} of {entry[1]} bytes"


class TarStore:
    """Files inside of tar files, by number; each is one positioned read, checked against its CRC-32.

    Args:
        paths: The tar files.
        tables: Where in each of them the files lie.
        prefixes: What the names of each begin with.

    Attributes:
        names: One per file.
    """

    def __init__(self, paths: Sequence[Path], tables: Sequence[Table], prefixes: Sequence[str] | None = None) -> None:
        self.paths = [path.absolute() for path in paths]
        begins = [""] * len(tables) if prefixes is None else prefixes
        self.names = PackedNames(
            begin + name for begin, table in zip(begins, tables, strict=True) for name in table.names
        )
        self._tar = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table.names) for table in tables])
        self._offset = np.concatenate([np.zeros(0, np.int64), *(table.offsets for table in tables)])
        self._size = np.concatenate([np.zeros(0, np.int64), *(table.sizes for table in tables)])
        self._crc32 = np.concatenate([np.zeros(0, np.uint32), *(table.crc32 for table in tables)])
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def read(self, row: int) -> bytes:
        """The bytes of a file.

        Raises:
            ValueError: They are not those that were written; the message is the reason alone.
        """
        tar, size = int(self._tar[row]), int(self._size[row])
        name = self.paths[tar].name
        try:
            content = os.pread(self._file(tar), size, int(self._offset[row]))
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error.strerror})") from error
        if len(content) != size:
            raise ValueError(f"{name} ends before it")
        if zlib.crc32(content) != int(self._crc32[row]):
            raise ValueError(f"its bytes in {name} are not those of the index (CRC-32 differs)")
        return content

    def _file(self, tar: int) -> int:
        """A descriptor of a tar; no more than a few hundred stay open."""
        if tar not in self._open:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[tar] = os.open(self.paths[tar], os.O_RDONLY)
        self._open.move_to_end(tar)
        return self._open[tar]

    def close(self) -> None:
        """Closes the tar files; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


class ShardStore(TarStore):
    """The files in a set of shards, by number.

    Args:
        folder: Where index, tables and tars lie.

    Raises:
        ValueError: Index, tables and tars do not belong together.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        shards = read_index(self.folder)
        tables = [read_table(self.folder, shard) for shard in shards]
        for shard, table in zip(shards, tables, strict=True):
            check_tar(self.folder, shard, table)
        super().__init__([self.folder / shard.file for shard in shards], tables)
