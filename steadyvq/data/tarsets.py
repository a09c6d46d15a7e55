# SPDX-License-Identifier: Apache-2.0
"""Sets of tar files in the convention of webdataset, read at any position.

Such a set has no index. Each tar is read through once, and where its images lie is kept, with their CRC-32, in
`$XDG_CACHE_HOME/steadyvq/webdataset` (`~/.cache/steadyvq/webdataset`); the tars themselves are left alone. Which files
belong to one sample, and what braces in a pattern mean, is webdataset's own code.
"""

import fcntl
import glob
import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steadyvq.data.addresses import Address, parse_address
from steadyvq.data.hub import extra
from steadyvq.data.names import Listing
from steadyvq.data.shards import Table, TarStore, header_before, parse_table
from steadyvq.files import write_text

FORMAT, VERSION = "steadyvq-webdataset", 1
IMAGES = ("jpg", "jpeg", "png", "webp")
"""Endings of images; the first of them that a sample has is its image."""

LABEL = "cls"
_NO_SAMPLE = re.compile(r"__[^/]*__($|/)")
"""Names that webdataset passes over."""

Tell = Callable[[int], None]


@dataclass(frozen=True)
class TarIndex:
    """What lies in one tar.

    Attributes:
        table: Its images.
        labels: The class of each; -1 where its sample has none.
    """

    table: Table
    labels: NDArray[np.int32]


class TarSet:
    """The tar files of a set and the cache of where their images lie.

    Args:
        address: Patterns and endings.

    Attributes:
        paths: The tar files.
        splits: The split of each; None where there is one pattern alone.

    Raises:
        ValueError: webdataset is missing, or a pattern fits no file.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        library = extra("webdataset", address.text)
        self._key_and_ending = library.tariterators.base_plus_ext
        given = {"train": address.place} | {n: address.settings[n] for n in ("val", "test") if n in address.settings}
        found = {split: _matching(library, pattern, address) for split, pattern in given.items()}
        self.paths = [path for paths in found.values() for path in paths]
        self.splits = [split for split, paths in found.items() for _ in paths] if len(found) > 1 else None
        if len(set(self.paths)) < len(self.paths):
            twice = next(path for path in self.paths if self.paths.count(path) > 1)
            raise ValueError(f"{address.text!r} names {twice} twice: every tar belongs to one split, once")
        self.image = address.settings.get("image", "").lower().lstrip(".")
        self.label = address.settings.get("label", LABEL).lower().lstrip(".")

    def unread(self) -> list[Path]:
        """The tars that were not read through yet, or have changed since."""
        return [path for path in self.paths if self._cached(path) is None]

    def index(self, tell: Tell = lambda size: None) -> list[TarIndex]:
        """What lies in each tar, read where it is not known yet.

        Args:
            tell: Is called with the size of every tar that was read through, in bytes.

        Raises:
            ValueError: A tar cannot be read, or holds no images.
        """
        return [self._indexed(path, tell) for path in self.paths]

    def _indexed(self, path: Path, tell: Tell) -> TarIndex:
        known = self._cached(path)
        if known is not None:
            return known
        cache = self._cache(path)
        with _locked(cache.with_suffix(".lock")):
            # Processes of one run wait for each other instead of reading the same tar.
            known = self._cached(path)
            if known is None:
                before = path.stat()
                known = self._read_through(path)
                write_text(cache, _sealed(_identity(before), known))
            tell(path.stat().st_size)
        return known

    def _cache(self, path: Path) -> Path:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steadyvq" / "webdataset"
        key = "\0".join((str(path), self.image, self.label)).encode("utf-8", "surrogateescape")
        return folder / f"{hashlib.sha256(key).hexdigest()[:24]}.json"

    def _cached(self, path: Path) -> TarIndex | None:
        """What is known of a tar; None if that is nothing, damaged, or of another tar of this name."""
        try:
            seal, _, text = self._cache(path).read_text(encoding="utf-8").partition("\n")
            status = path.stat()
        except (OSError, ValueError):
            return None
        if hashlib.sha256(text.encode()).hexdigest() != seal:
            return None
        value = json.loads(text)
        if {key: value[key] for key in _identity(status)} != _identity(status):
            return None
        table = parse_table(value)
        # The same size and time do not make the same tar: look at what stands before its first and last image.
        with path.open("rb") as file:
            for row in (0, -1):
                held = header_before(file.fileno(), int(table.offsets[row]))
                if held is None or held[1] != int(table.sizes[row]):
                    return None
        return TarIndex(table, np.array(value["labels"], np.int32))

    def _read_through(self, path: Path) -> TarIndex:
        names, offsets, sizes, crcs, labels = [], [], [], [], []
        with path.open("rb") as file:
            for members in self._samples(path):
                image = next((e for e in ((self.image,) if self.image else IMAGES) if e in members), None)
                if image is None:
                    continue
                member = members[image]
                content = os.pread(file.fileno(), member.size, member.offset_data)
                if len(content) != member.size:
                    raise ValueError(f"{path} ends in the middle of {member.name!r}: copy it again")
                names.append(member.name)
                offsets.append(member.offset_data)
                sizes.append(member.size)
                crcs.append(zlib.crc32(content))
                labels.append(self._label(path, file.fileno(), members.get(self.label)))
        if not names:
            raise ValueError(
                f"no sample of {path} has an image ending in {self.image or ', '.join(IMAGES)}: say how they end with "
                f"{self.address.text}:image=ENDING"
            )
        table = Table(names, np.array(offsets, np.int64), np.array(sizes, np.int64), np.array(crcs, np.uint32))
        return TarIndex(table, np.array(labels, np.int32))

    def _samples(self, path: Path) -> Iterator[dict[str, tarfile.TarInfo]]:
        """The files of each sample by their endings: neighbours whose names agree up to the first dot."""
        current, members = None, dict[str, tarfile.TarInfo]()
        try:
            # "r:" refuses compressed tars, in which nothing has a place of its own.
            with tarfile.open(path, "r:") as opened:
                for member in opened:
                    key, ending = self._key_and_ending(member.name)
                    if not member.isreg() or _NO_SAMPLE.match(member.name) or key is None:
                        continue
                    if key != current and members:
                        yield members
                        members = {}
                    current = key
                    members[ending.lower()] = member
                end = opened.offset
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(
                f"{path} cannot be read as a tar ({error}): a whole tar that is not compressed is needed"
            ) from error
        with path.open("rb") as file:
            # A tar ends with zeros; tarfile takes half of a header for the end too.
            if os.pread(file.fileno(), 512, end).strip(b"\0"):
                raise ValueError(f"{path} ends in the middle of a file header, at byte {end}: copy it again")
        if members:
            yield members

    def _label(self, path: Path, file: int, member: tarfile.TarInfo | None) -> int:
        if member is None:
            return -1
        text = os.pread(file, member.size, member.offset_data).decode("utf-8", "replace").strip()
        if not text.isdecimal():
            raise ValueError(
                f"{member.name!r} in {path} holds {text[:30]!r}, but a class is a whole number: name the ending of the files "
                "that hold classes with :label=ENDING, or one that no file has"
            )
        return int(text)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Inside this context no other process is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise ValueError(
            f"what lies in tar files is kept in {path.parent}, which cannot be written ({error.strerror}): set "
            "XDG_CACHE_HOME to a folder that can"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _matching(library: Any, pattern: str, address: Address) -> list[Path]:
    """The files that a pattern names, with braces as webdataset has them and wildcards as shells do."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(
            f"{pattern!r} is not on a disk, but samples are read at any position: copy the tars to one, and name them there"
        )
    found = list[Path]()
    for each in library.shardlists.expand_urls(str(Path(pattern).expanduser())):
        matches = sorted(glob.glob(each)) if glob.has_magic(each) else [each]
        missing = [path for path in matches if not Path(path).is_file()]
        if missing or not matches:
            raise ValueError(f"{address.text!r} names no file {(missing or [each])[0]!r}: give tar files that exist")
        found += [Path(path).absolute() for path in matches]
    return found


def _identity(status: os.stat_result) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "bytes": status.st_size, "modified": status.st_mtime_ns}


def _sealed(identity: dict[str, Any], index: TarIndex) -> str:
    """The text of a cache file, behind its own SHA-256."""
    table = index.table
    arrays = {"offsets": table.offsets, "sizes": table.sizes, "crc32": table.crc32, "labels": index.labels}
    plain = {key: np.asarray(array).tolist() for key, array in arrays.items()}
    text = json.dumps({**identity, "names": table.names, **plain})
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def unread_tars(data: str | Path) -> int:
    """Bytes of the tars of a set that were not read through yet; 0 for other data sets."""
    address = parse_address(data)
    if address is None or address.kind != "wds":
        return 0
    return sum(path.stat().st_size for path in TarSet(address).unread())


def read_tars(data: str | Path, tell: Tell) -> None:
    """Reads through what `unread_tars` counted.

    Args:
        data: The set.
        tell: Is called with the size of each tar once it is done.
    """
    address = parse_address(data)
    assert address is not None
    TarSet(address).index(tell)


def list_tars(address: Address) -> Listing:
    """Opens a set.

    Patterns for `val` and `test` make splits; one pattern alone is divided by a hash of the names. A file ending in `.cls`
    beside an image is the number of its class.

    Raises:
        ValueError: webdataset is missing, a pattern fits no file, or a tar is not as it should be.
    """
    tars = TarSet(address)
    indices = tars.index()
    splits = None
    above = os.path.commonpath([path.parent for path in tars.paths])
    begins = [f"{path.relative_to(above).with_suffix('').as_posix()}/" for path in tars.paths]
    if tars.splits is not None:
        begins = [f"{split}/{begin}" for split, begin in zip(tars.splits, begins, strict=True)]
        splits = np.repeat(tars.splits, [len(index.labels) for index in indices]).tolist()
    labels = np.concatenate([index.labels for index in indices])
    classes = tuple(str(number) for number in range(int(labels.max()) + 1))
    return Listing(TarStore(tars.paths, [index.table for index in indices], begins), splits, classes, labels)
