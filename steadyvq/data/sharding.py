# SPDX-License-Identifier: Apache-2.0
"""Writing and verifying indexed shards (see ``shards``).

A shard is written under a temporary name, then renamed; its table follows, and the index comes last. Every byte is a
function of the source and the settings, so a writer that was killed anywhere goes on, and the result is the same.
"""

import fcntl
import hashlib
import json
import os
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from steadyvq.data.built_in import BUILT_IN
from steadyvq.data.decode import decode_image
from steadyvq.data.names import PackedNames
from steadyvq.data.shards import (
    FORMAT,
    INDEX,
    PLAN,
    VERSION,
    Shard,
    Table,
    check_tar,
    is_shard_set,
    parse_table,
    read_index,
    read_json,
    read_table,
    table_name,
)
from steadyvq.data.sources import FolderStore, folder_store
from steadyvq.files import write_atomically, write_text

_RECORD = tarfile.RECORDSIZE
Tell = Callable[[int], object]


@dataclass(frozen=True)
class Written:
    """A finished shard set.

    Attributes:
        folder: Where it lies.
        samples: Photographs in it.
        shards: Number of tar files.
        bytes: Their size.
        skipped: (name, reason) of each file that was left out.
    """

    folder: Path
    samples: int
    shards: int
    bytes: int
    skipped: list[tuple[str, str]]


class ShardWriter:
    """Writes the photographs of a folder into shards, or goes on with it.

    Args:
        data: A folder of images, or ``"mvtb"``.
        out: The folder of the shards.
        samples: Photographs in one shard.
        check: Decode every photograph and leave out those that cannot be decoded. Files that cannot be read are left out
            in any case.
        threads: Files read at the same time; the result does not depend on it.

    Attributes:
        names: Of the files in the shards.
        total: Files of the source.
        done: How many of them lie in finished shards.

    Raises:
        ValueError: The source has no images, or the folder holds something else than these shards.
    """

    def __init__(
        self, data: str | Path, out: str | Path, samples: int = 4000, check: bool = False, threads: int = 8
    ) -> None:
        for name, value in (("samples", samples), ("threads", threads)):
            if value < 1:
                raise ValueError(f"{name} is {value}, but it must be at least 1")
        if is_shard_set(data):
            raise ValueError(f"{str(data)!r} holds shards already: give a folder of images")
        self.folder, self.check, self.threads = Path(out), check, threads
        self.store: FolderStore = folder_store(data)
        # The splits of the built-in photographs are known by scene; as folders at the top they stay with the files.
        own = BUILT_IN.get(str(data))
        splits = [f"{split}/" for _, _, split in own()] if own else [""] * len(self.store)
        self.names = PackedNames(map(str.__add__, splits, self.store.names))
        names = "\0".join(self.names).encode("utf-8", "surrogateescape")
        self.plan = {
            "format": FORMAT,
            "version": VERSION,
            "names_sha256": hashlib.sha256(names).hexdigest(),
            "images": len(self.store),
            "samples": samples,
            "check": check,
        }
        self._agree()
        self.parts = [
            range(start, min(start + samples, len(self.store))) for start in range(0, len(self.store), samples)
        ]
        self._files = [f"shard-{number:05d}.tar" for number in range(len(self.parts))]
        self._finished = [self._read_finished(file) for file in self._files]
        self.total = len(self.store)
        self.done = sum(
            len(part) for part, finished in zip(self.parts, self._finished, strict=True) if finished is not None
        )

    def _agree(self) -> None:
        """Refuses a folder in which other shards, or other things, lie."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"the output {str(self.folder)!r} is a file, but shards need a folder: name another")
        path = self.folder / PLAN
        if not path.is_file():
            if self.folder.is_dir() and any(not entry.name.startswith(".") for entry in self.folder.iterdir()):
                raise ValueError(
                    f"the output {str(self.folder)!r} is not empty and was not begun by `steadyvq data shard`: name a new "
                    "folder"
                )
            return
        begun = read_json(path)
        changed = [name for name in self.plan if begun.get(name) != self.plan[name]]
        if changed:
            what = {"names_sha256": "the list of file names", "images": "the number of images"}
            raise ValueError(
                f"the shards in {str(self.folder)!r} were begun with something else "
                f"({', '.join(what.get(name, name) for name in changed)}): give the same source and options, or a new folder"
            )

    def write(self, tell: Tell = lambda count: None) -> Written:
        """Writes what is missing.

        Args:
            tell: Called with the number of files that are done since the last call.

        Raises:
            ValueError: Another process is writing into the folder.
            OSError: Something could not be written; finished shards are kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder):
            for leftover in self.folder.glob(".*.tmp.*"):
                leftover.unlink(missing_ok=True)
            if not (self.folder / PLAN).is_file():
                write_text(self.folder / PLAN, json.dumps(self.plan, indent=2) + "\n")
            entries = []
            for file, part, finished in zip(self._files, self.parts, self._finished, strict=True):
                entries.append(finished if finished is not None else self._write_shard(file, part, tell))
            return self._write_index(entries)

    def _write_index(self, entries: list[tuple[Shard, list[tuple[str, str]]]]) -> Written:
        shards = [shard for shard, _ in entries]
        skipped = [pair for _, left_out in entries for pair in left_out]
        total, size = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)
        if not total:
            raise ValueError(f"none of the {len(skipped)} files could be used (the first: {skipped[0][1]})")
        facts = {"format": FORMAT, "version": VERSION, "samples": total, "bytes": size, "skipped": skipped}
        text = json.dumps({**facts, "shards": [asdict(shard) for shard in shards]}, indent=1) + "\n"
        path = self.folder / INDEX
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
        return Written(self.folder, total, len(shards), size, skipped)

    def _read_finished(self, file: str) -> tuple[Shard, list[tuple[str, str]]] | None:
        """The entry of a shard that lies there whole, else None."""
        tar, table = self.folder / file, self.folder / table_name(file)
        try:
            content = table.read_bytes()
            value = json.loads(content)
            own = hashlib.sha256(content).hexdigest()
            shard = Shard(file, value["bytes"], len(value["names"]), value["sha256"], own)
            check_tar(self.folder, shard, parse_table(value))
        # Whatever is wrong with it, it is written anew.
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None
        return (shard, [(name, reason) for name, reason in value["skipped"]]) if tar.is_file() else None

    def _write_shard(self, file: str, part: range, tell: Tell) -> tuple[Shard, list[tuple[str, str]]]:
        facts: dict[str, Any] = {}

        def write(path: Path) -> None:
            with path.open("wb") as target:
                facts.update(_write_tar(target, self._contents(part), tell))
                target.flush()
                # The table vouches for the tar, so the tar must be on the disk first.
                os.fsync(target.fileno())

        write_atomically(self.folder / file, write)
        content = json.dumps(facts).encode()
        write_atomically(self.folder / table_name(file), lambda path: path.write_bytes(content))
        own = hashlib.sha256(content).hexdigest()
        return Shard(file, facts["bytes"], len(facts["names"]), facts["sha256"], own), facts["skipped"]

    def _contents(self, part: range) -> Iterator[tuple[str, bytes | str]]:
        """(name, bytes) of these files in order, or (name, reason) of one that is left out; read ahead in threads."""
        waiting: deque[Future[tuple[str, bytes | str]]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            for row in part:
                waiting.append(pool.submit(self._content, row))
                if len(waiting) > 4 * self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _content(self, row: int) -> tuple[str, bytes | str]:
        name = self.names[row]
        try:
            content = self.store.read(row)
            if self.check:
                decode_image(BytesIO(content))
        except ValueError as error:
            return name, str(error)
        return name, content


def _write_tar(target: IO[bytes], contents: Iterable[tuple[str, bytes | str]], tell: Tell) -> dict[str, Any]:
    """Writes a tar and returns its table; owner, time and rights are the same for all files, so bytes repeat."""
    digest, position = hashlib.sha256(), 0
    table: dict[str, Any] = {"names": [], "offsets": [], "sizes": [], "crc32": [], "skipped": []}

    def put(content: bytes) -> None:
        nonlocal position
        target.write(content)
        digest.update(content)
        position += len(content)

    for name, content in contents:
        if isinstance(content, str):
            table["skipped"].append((name, content))
        else:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            put(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
            row = (name, position, len(content), zlib.crc32(content))
            for key, value in zip(("names", "offsets", "sizes", "crc32"), row, strict=True):
                table[key].append(value)
            put(content)
            put(bytes(-len(content) % tarfile.BLOCKSIZE))
        tell(1)
    put(bytes(2 * tarfile.BLOCKSIZE))
    put(bytes(-position % _RECORD))
    return {**table, "bytes": position, "sha256": digest.hexdigest()}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time; the lock goes with the process that holds it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing shards into {str(folder)!r}: wait for it, or end it"
            ) from error
        yield


def verify_shards(folder: str | Path, decode: bool = False, tell: Tell = lambda count: None) -> list[str]:
    """Reads every byte of a shard set and returns what is wrong, a sentence each; nothing if all is well.

    Args:
        folder: The shard set.
        decode: Decode every photograph too.
        tell: Called with the number of bytes that are done since the last call.

    Raises:
        ValueError: There is no index.
    """
    problems: list[str] = []
    path = Path(folder)
    seen: set[str] = set()
    for shard in read_index(path):
        try:
            table = read_table(path, shard)
            check_tar(path, shard, table)
            problems += _verify_tar(path / shard.file, shard, table, decode, tell)
            twice = seen.intersection(table.names)
            problems += [f"{shard.file}: {name!r} is in the set twice" for name in sorted(twice)[:10]]
            seen.update(table.names)
        except (ValueError, tarfile.TarError, OSError) as error:
            problems.append(f"{shard.file}: {error}")
    return problems


def _verify_tar(path: Path, shard: Shard, table: Table, decode: bool, tell: Tell) -> list[str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            tell(len(block))
    problems = [] if digest.hexdigest() == shard.sha256 else [f"{shard.file}: its bytes have changed (SHA-256 differs)"]
    wanted = zip(table.names, table.offsets.tolist(), table.sizes.tolist(), table.crc32.tolist(), strict=True)
    # The tar is read by the standard library, which knows nothing of the table.
    with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar, path.open("rb") as file:
        held = [(member.name, member.offset_data, member.size) for member in tar]
        if held != list(zip(table.names, table.offsets.tolist(), table.sizes.tolist(), strict=True)):
            problems.append(f"{shard.file}: the tar holds other files, or at other places, than the index says")
            return problems
        for name, offset, size, crc32 in wanted:
            content = os.pread(file.fileno(), size, offset)
            if zlib.crc32(content) != crc32:
                problems.append(f"{shard.file}: {name!r} is damaged (CRC-32 differs)")
            elif decode:
                problems += _undecodable(shard.file, name, content)
    return problems


def _undecodable(file: str, name: str, content: bytes) -> list[str]:
    try:
        decode_image(BytesIO(content))
    except ValueError as error:
        return [f"{file}: {name!r} cannot be decoded ({error})"]
    return []
