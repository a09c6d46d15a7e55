# SPDX-License-Identifier: Apache-2.0
"""Photo collections: a folder of the user's pictures, or the built-in photographs, decoded and split by photograph."""

import difflib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from steadyvq.data.built_in import BUILT_IN
from steadyvq.data.decode import decode_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""File name endings, in any letter case, that make a file a candidate."""

SINGLE = "val (= train: there is only one photograph)"
"""What a record calls the held-out split of a source with a single photograph."""


@dataclass(frozen=True)
class Collection:
    """Decoded photographs with their names and their splits.

    Attributes:
        data: Where they come from, as the user named it: ``"mvtb"`` or a folder.
        names: One name per photograph: its path relative to the folder, with forward slashes.
        images: One 8-bit RGB tensor per photograph, each (3, H, W) of its own size.
        splits: The split of each photograph: ``"train"``, ``"val"`` or ``"test"``.
        skipped: (path, reason) for each file that could not be read.
        split_label: Which split this collection is, in the words a record should use; ``"all"`` for every photograph.
    """

    data: str
    names: tuple[str, ...]
    images: tuple[UInt8[Tensor, "3 _ _"], ...] = field(repr=False)
    splits: tuple[str, ...]
    skipped: list[tuple[str, str]]
    split_label: str = "all"

    def __len__(self) -> int:
        return len(self.names)

    def split(self, name: str) -> "Collection":
        """Return the photographs of one split (they share memory with this collection).

        Args:
            name: ``"train"``, ``"val"``, ``"test"`` (where there is one), or ``"all"``. With a single
                photograph, ``"val"`` is that photograph and ``split_label`` says so.

        Raises:
            ValueError: There is no such split here.
        """
        if name == "all":
            return self
        if name == "val" and len(self) == 1 and self.splits == ("train",):
            return replace(self, split_label=SINGLE)
        chosen = [i for i, split in enumerate(self.splits) if split == name]
        if not chosen:
            raise no_split(self.data, self.splits, name)
        return replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            images=tuple(self.images[i] for i in chosen),
            splits=(name,) * len(chosen),
            split_label=name,
        )


def no_split(data: str, splits: Iterable[str], name: str) -> ValueError:
    """The error for a split that a source does not have."""
    known = [*sorted(set(splits)), "all"]
    near = difflib.get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"{data!r} has no split {name!r}{hint}: use one of {', '.join(known)}")


def load_collection(
    data: str | Path,
    min_side: int = 1,
    max_side: int | None = None,
    val_fraction: float = 0.1,
    max_bytes: int = 8 << 30,
    test_fraction: float = 0.0,
) -> Collection:
    """Decode every photograph of a source into memory.

    A folder is read as ``image_files`` lists it; its photographs are split into train and val by a hash of the
    relative path, so adding a file never moves another. Files that cannot be read are skipped and listed.

    Args:
        data: ``"mvtb"`` for the built-in photographs (split by scene into train, val and test), or a folder.
        min_side: Shorter side in pixels that every photograph must have, normally the crop size; smaller ones are
            enlarged.
        max_side: Longer side in pixels to which larger photographs are shrunk; None keeps them.
        val_fraction: Expected fraction of a folder's photographs held out, at least one of two or more.
        max_bytes: Memory the decoded photographs may take.
        test_fraction: Expected fraction of a folder's photographs that become a test split, at least one of three or more;
            0: there is none. The val split stays what it is.

    Raises:
        ValueError: The folder is missing or holds no readable image, the package of the built-in photographs is
            not installed, or the photographs need more memory than ``max_bytes``.
    """
    names, images, skipped = _read(image_files(data), str(data), min_side, max_side, max_bytes)
    if str(data) in BUILT_IN:
        split_of = {name: split for name, _, split in BUILT_IN[str(data)]()}
        return Collection(str(data), names, images, tuple(split_of[name] for name in names), skipped)
    return Collection(str(data), names, images, split_by_name(names, val_fraction, test_fraction), skipped)


def image_files(data: str | Path) -> list[tuple[str, Path]]:
    """List the image files of a source as (name, path), sorted by name.

    A folder is searched recursively. Hidden folders below it are left out, and so are the folders of runs (those that
    hold a ``config.yaml`` and a ``log.jsonl``): the pictures that a run leaves are no photographs.

    Args:
        data: ``"mvtb"`` for the built-in photographs, or a folder.

    Raises:
        ValueError: The folder is missing or holds no image file, or the package of the built-in photographs is not
            installed.
    """
    if str(data) in BUILT_IN:
        return [(name, path) for name, path, _ in BUILT_IN[str(data)]()]
    folder = existing_folder(data)
    return [(name, folder / name) for name in image_names(folder)]


def read_images(
    files: Iterable[tuple[str, Path]], read: Callable[[Path], Tensor], data: str, skipped: list[tuple[str, str]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, pixels) of the files that can be read, one at a time.

    Args:
        files: (name, path) of each file.
        read: Turns a path into pixels; its ValueError is the reason why a file is skipped.
        data: The source, named in the error.
        skipped: Takes (path, reason) of each file that cannot be read.

    Raises:
        ValueError: At the end, if none could be read.
    """
    found = False
    for name, path in files:
        try:
            image = read(path)
        except ValueError as error:
            skipped.append((str(path), str(error)))
            continue
        found = True
        yield name, image
    if not found:
        raise ValueError(
            f"none of the {len(skipped)} images in {data!r} could be read (the first: {skipped[0][1]}): "
            "put readable .png, .jpg or .webp files in it"
        )


def existing_folder(data: str | Path) -> Path:
    """The folder that a source names; ValueError if there is none."""
    folder = Path(data)
    # Path("") is the current folder, which an empty setting does not mean.
    if str(data) and folder.is_dir():
        return folder
    if str(data) and folder.exists():
        raise ValueError(f"{str(data)!r} is a file, not a folder: give the folder that holds the images")
    raise ValueError(
        f"no folder {str(data)!r}: give an existing folder and put .png, .jpg or .webp files in it, "
        "or give 'mvtb' for the built-in photographs"
    )


def image_names(folder: Path) -> list[str]:
    """List the image files below a folder by their relative names, sorted (see ``image_files``).

    Raises:
        ValueError: There are none.
    """
    found: list[str] = []
    visited: set[str] = set()
    # Data sets are often assembled from links to other disks; the set of visited folders stops a link to a parent.
    for root, below, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited or (Path(root) != folder and {"config.yaml", "log.jsonl"} <= set(files)):
            below.clear()
            continue
        visited.add(real)
        below[:] = [name for name in below if not name.startswith(".")]
        # Strings: a path object for each of a million files would take most of a gigabyte.
        above = Path(root).relative_to(folder).as_posix()
        prefix = "" if above == "." else f"{above}/"
        found += [prefix + file for file in files if file.lower().endswith(SUFFIXES)]
    if not found:
        raise ValueError(f"the folder {str(folder)!r} has no images: put .png, .jpg or .webp files in it")
    return sorted(found)


def _read(
    paths: Iterable[tuple[str, Path]], data: str, min_side: int, max_side: int | None, max_bytes: int
) -> tuple[tuple[str, ...], tuple[Tensor, ...], list[tuple[str, str]]]:
    names: list[str] = []
    images: list[Tensor] = []
    skipped: list[tuple[str, str]] = []
    used = 0
    for name, image in read_images(paths, lambda path: decode_image(path, min_side, max_side), data, skipped):
        used += image.numel()
        if used > max_bytes:
            raise ValueError(
                f"the photographs of {data!r} need more than {max_bytes / 2**30:.3g} GiB of memory once decoded "
                f"(reached at photograph {len(names) + 1}): shrink them with max_side, or use fewer"
            )
        names.append(name)
        images.append(image)
    return tuple(names), tuple(images), skipped


def split_by_name(names: Sequence[str], val_fraction: float, test_fraction: float = 0.0) -> tuple[str, ...]:
    """Assign each photograph to train, val or test by a hash of its name alone.

    Args:
        names: Relative paths.
        val_fraction: Expected fraction in val; of two or more photographs at least one is in val and one in train.
        test_fraction: Expected fraction in test, taken from what would be train; unless it is 0, at least one of three or
            more photographs. One stays in train.
    """
    keys = [_unit_hash(name) for name in names]
    held_out = {key for key in keys if key < val_fraction}
    if len(names) == 1:
        held_out = set()
    elif not held_out:
        held_out = {min(keys)}
    elif len(held_out) == len(names):
        held_out.remove(max(keys))
    rest = sorted(key for key in keys if key not in held_out)
    wanted = sum(key < val_fraction + test_fraction for key in rest)
    test = set(rest[: min(max(1, wanted), len(rest) - 1)]) if test_fraction and rest else set()
    return tuple("val" if key in held_out else "test" if key in test else "train" for key in keys)


def _unit_hash(name: str) -> float:
    """Map a name to [0, 1), evenly and the same on every machine."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6], "big") / 2**48
