# SPDX-License-Identifier: Apache-2.0
"""A corpus of 385 photographs for searches: those of mvtb-data and of six Debian packages, split by photograph.

The list of files is checked in (``corpus.json``), the photographs are not: `steadyvq data fetch corpus` fetches the packages
from Debian's archive, checks them, and leaves every photograph as a PNG of at most 720 pixels a side. Landscapes are the most
of it. The packages' own licences hold for their photographs (`/usr/share/doc/PACKAGE/copyright` in each).

The *test* photographs lie in a folder of their own, and the name ``corpus`` stands for the others alone: a search that is
given ``corpus`` cannot see them (`steadyvq.experiments.held_out`).
"""

import hashlib
import json
import os
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from io import BytesIO
from pathlib import Path

from PIL import Image

from steadyvq.data.decode import decode_image
from steadyvq.data.mvtb import mvtb_files
from steadyvq.files import write_atomically

ARCHIVE = "http://deb.debian.org/debian/"
MVTB = "mvtb-data"
SIDE = 720
"""Longest side in pixels; most of the photographs are no larger."""
HELD_OUT = "test"


@dataclass(frozen=True)
class Package:
    """A package of Debian: its name, version, place in the archive, checksum, and its photographs by split."""

    package: str
    version: str
    path: str
    sha256: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def deb(self) -> str:
        """Name of its file."""
        return self.path.rpartition("/")[2]

    def names(self) -> dict[str, tuple[str, str]]:
        """By member of the package, (name in the corpus, split)."""
        by_split = {"train": self.train, "val": self.val, "test": self.test}
        return {file: (f"{self.package}/{_flat(file)}", split) for split, files in by_split.items() for file in files}


@cache
def corpus_packages() -> tuple[Package, ...]:
    """The checked-in list of packages and photographs."""
    text = resources.files("steadyvq.data").joinpath("corpus.json").read_text(encoding="utf-8")
    return tuple(
        Package(**{**entry, **{split: tuple(entry[split]) for split in ("train", "val", "test")}})
        for entry in json.loads(text)["packages"]
    )


def corpus_home() -> Path:
    """Where the corpus lies: ``corpus`` in STEADYVQ_HOME, which is ``~/.cache/steadyvq`` unless it is set."""
    return Path(os.environ.get("STEADYVQ_HOME") or Path.home() / ".cache" / "steadyvq") / "corpus"


def corpus_files(held_out: bool = False) -> list[tuple[str, Path, str]]:
    """Return (name, path, split) of the photographs of train and val, or of those of test, sorted by name.

    Raises:
        ValueError: The corpus has not been fetched, or not whole.
    """
    folder = corpus_home() / ("held-out" if held_out else "open")
    chosen = [(name, split) for name, split in sorted(corpus_names().items()) if (split == HELD_OUT) == held_out]
    files = [(f"{name}.png", folder / f"{name}.png", split) for name, split in chosen]
    missing = [path for _, path, _ in files if not path.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(files)} photographs of the corpus are not in {folder}: run `steadyvq data fetch "
            "corpus` (263 MB from Debian's archive), or pass --data FOLDER"
        )
    return files


def fetch_corpus(debs: Path | None = None, advance: Callable[[int], object] = lambda count: None) -> Path:
    """Fetches the packages and leaves their photographs, and those of mvtb-data; what is there already is kept.

    Args:
        debs: A folder that holds the packages' .deb files (None: they are fetched).
        advance: Told how many more photographs are done.

    Returns:
        The folder of the corpus.

    Raises:
        ValueError: A package cannot be had or is not the one that was listed, or mvtb-data is not installed.
    """
    for package in corpus_packages():
        wanted = {file: name for file, (name, _) in package.names().items() if not _place(name).is_file()}
        advance(len(package.names()) - len(wanted))
        if wanted:
            for file, content in _members(_package(package, debs), set(wanted)):
                _keep(wanted.pop(file), BytesIO(content))
                advance(1)
        if wanted:
            raise ValueError(f"{package.deb} does not hold {sorted(wanted)[0]}: the list of the corpus does not fit it")
    # Last: a package that cannot be had is told before anything is written.
    for name, path, _ in mvtb_files():
        _keep(f"{MVTB}/{_flat(name)}", path)
        advance(1)
    return corpus_home()


def corpus_names() -> dict[str, str]:
    """The split of every photograph by its name in the corpus, without the ending of its file."""
    own = {f"{MVTB}/{_flat(name)}": split for name, _, split in mvtb_files()}
    return own | {name: split for package in corpus_packages() for name, split in package.names().values()}


def _flat(file: str) -> str:
    """A name without folders: wallpapers are called by their size, and the folder above says which they are."""
    stem = file.rpartition(".")[0]
    above, _, last = stem.partition("/contents/images/")
    return above.rpartition("/")[2] if last else stem.rpartition("/")[2]


def _place(name: str) -> Path:
    return corpus_home() / ("held-out" if corpus_names()[name] == HELD_OUT else "open") / f"{name}.png"


def _keep(name: str, source: Path | BytesIO) -> None:
    """Writes a photograph, unless it is there; hardly compressed, so that reading it costs next to nothing."""
    target = _place(name)
    if target.is_file():
        return
    pixels = decode_image(source, max_side=SIDE).permute(1, 2, 0).contiguous().numpy()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, lambda path: Image.fromarray(pixels).save(path, format="PNG", compress_level=0))


def _package(package: Package, debs: Path | None) -> bytes:
    """The bytes of a package, whose checksum is that of the list."""
    if debs is None:
        address = ARCHIVE + package.path
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            raise ValueError(
                f"{address} could not be fetched ({error}): fetch it elsewhere, also from snapshot.debian.org, and run "
                "`steadyvq data fetch corpus --from DIR` with the folder that holds it"
            ) from error
    else:
        # apt writes the colon of an epoch as %3a.
        found = [path for path in sorted(debs.glob("*.deb")) if _is(path, package)]
        if not found:
            raise ValueError(f"{debs} does not hold {package.deb}: get it from {ARCHIVE}{package.path}")
        content = found[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != package.sha256:
        raise ValueError(
            f"{package.deb} is not the file of the list (another SHA-256): get it from {ARCHIVE}{package.path}"
        )
    return bytes(content)


def _is(path: Path, package: Package) -> bool:
    name, _, version = path.name.partition("_")
    return (
        name == package.package and version.partition("_")[0].rpartition("%3a")[2] == package.version.rpartition(":")[2]
    )


def _members(deb: bytes, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """The wanted files of a package. A .deb is an `ar` archive whose member data.tar.* holds the files."""
    place = 8
    while place < len(deb):
        name, size = deb[place : place + 16].decode().strip(" /"), int(deb[place + 48 : place + 58])
        place += 60
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=BytesIO(deb[place : place + size])) as files:
                for entry in files:
                    file = entry.name.removeprefix("./")
                    if file in wanted and entry.isfile() and (content := files.extractfile(entry)):
                        yield file, content.read()
        place += size + size % 2
