# SPDX-License-Identifier: Apache-2.0
"""Photographs of Hugging Face `datasets`: a set saved on disk, a local folder or file that it reads, or a name of its hub.

Its Arrow files are read at any row; images stay encoded until they are wanted. Nothing that a data set brings is run:
version 4 of the library has given up data sets that are programs.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steadyvq.data.addresses import Address
from steadyvq.data.names import Listing, PackedNames

_OURS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}
"""What splits are called there and here."""

_FILES = {".parquet": "parquet", ".arrow": "arrow"}


def extra(library: str, data: str) -> ModuleType:
    """Imports a library of the extra `data`; ValueError that names the extra if it is missing."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ValueError(
            f"{data!r} needs the library {library}, which is not installed: pip install 'steadyvq[data]'"
        ) from error


class HubStore:
    """The encoded images of one column, by number.

    Args:
        tables: By the name of their split, data sets of that one column, whose images are not decoded.
        column: Its name.

    Attributes:
        names: Split and row of each.
    """

    def __init__(self, tables: Mapping[str, Any], column: str) -> None:
        self.tables, self.column = list(tables.values()), column
        self.names = PackedNames(f"{split}/{row:09d}" for split, table in tables.items() for row in range(len(table)))
        self._ends = np.cumsum([len(table) for table in self.tables])

    def __len__(self) -> int:
        return len(self.names)

    def read(self, row: int) -> bytes:
        """The bytes of an image; ValueError with the reason alone where they cannot be had."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        table = self.tables[number]
        try:
            value = table[int(row - self._ends[number] + len(table))][self.column]
            if isinstance(value, bytes):
                return value
            if value is None:
                raise ValueError("the row holds no image")
            content = value["bytes"]
            return bytes(content) if content is not None else Path(value["path"]).read_bytes()
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from error


def list_hub(address: Address) -> Listing:
    """Opens a data set.

    Splits called train, validation (or valid, val, dev) and test are the splits, and others are left out; a single split is
    divided by a hash of the rows' numbers. Labels keep their numbers.

    Raises:
        ValueError: The library is missing, the set cannot be had, or it does not say which column holds images.
    """
    library = extra("datasets", address.text)
    found = _chosen_splits(_load(library, address), address)
    first = next(iter(found.values()))
    column = _image_column(library, first, address)
    label = _label_column(library, first, address)
    tables = {split: _undecoded(library, table, column) for split, table in found.items()}
    ours = [_OURS.get(split, split) for split in found]
    lengths = [len(table) for table in found.values()]
    splits = np.repeat(ours, lengths).tolist() if len(found) > 1 else None
    classes, labels = _labels(library, list(found.values()), label, sum(lengths))
    if not sum(lengths):
        raise ValueError(f"{address.text!r} has no rows: give a data set with images")
    return Listing(HubStore(tables, column), splits, classes, labels)


def _load(library: ModuleType, address: Address) -> Any:
    """What the library loads: one data set, or several by the names of their splits."""
    path, settings = Path(address.place).expanduser(), address.settings
    more = {key: settings[name] for name, key in (("config", "name"), ("revision", "revision")) if name in settings}
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            if more or "[" in settings.get("split", ""):
                raise ValueError("it was saved on disk, which knows neither config nor revision nor parts of splits")
            return library.load_from_disk(str(path))
        if path.is_file():
            if path.suffix not in _FILES:
                raise ValueError(f"it is a file that ends neither in {' nor in '.join(_FILES)}")
            return library.load_dataset(_FILES[path.suffix], data_files=str(path), split=settings.get("split", "train"))
        return library.load_dataset(str(path) if path.exists() else address.place, split=settings.get("split"), **more)
    # The library and those below it raise errors of dozens of types for what is missing, damaged or out of reach.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"the data set {address.place!r} cannot be loaded ({reason}): give a folder written by save_to_disk, a folder or "
            "file that datasets reads, or a name of the Hugging Face hub with a connection to it"
        ) from error


def _chosen_splits(loaded: Any, address: Address) -> dict[str, Any]:
    """The data sets that are wanted, by the names of their splits."""
    asked = address.settings.get("split")
    if not isinstance(loaded, Mapping):
        held = str(loaded.split or "train")
        if asked is not None and "[" not in asked and held != asked:
            raise ValueError(f"{address.text!r} has no split {asked!r}: it has {held!r} alone")
        return {asked or held: loaded}
    if asked is not None:
        if asked not in loaded:
            raise ValueError(f"{address.text!r} has no split {asked!r}: use one of {', '.join(loaded)}")
        return {asked: loaded[asked]}
    known = {split: table for split, table in loaded.items() if split in _OURS}
    if len(loaded) > 1 and "train" not in known:
        raise ValueError(
            f"{address.text!r} has the splits {', '.join(loaded)}, none of which is called train: choose one with "
            f"{address.text}:split=NAME"
        )
    return known or dict(loaded)


def _image_column(library: ModuleType, table: Any, address: Address) -> str:
    asked = address.settings.get("column")
    if asked is not None:
        if asked not in table.features:
            raise ValueError(f"{address.text!r} has no column {asked!r}: use one of {', '.join(table.features)}")
        feature = table.features[asked]
        if not isinstance(feature, library.Image) and getattr(feature, "dtype", None) not in ("binary", "large_binary"):
            raise ValueError(f"the column {asked!r} of {address.text!r} is {feature}, but it must hold images")
        return asked
    found = [name for name, feature in table.features.items() if isinstance(feature, library.Image)]
    if len(found) != 1:
        what = f"the columns of images {', '.join(found)}" if found else "no column of images"
        raise ValueError(
            f"{address.text!r} has {what} (its columns are {', '.join(table.features)}): choose one with "
            f"{address.text}:column=NAME"
        )
    return str(found[0])


def _label_column(library: ModuleType, table: Any, address: Address) -> str | None:
    asked = address.settings.get("label")
    if asked is not None and asked not in table.features:
        raise ValueError(f"{address.text!r} has no column {asked!r}: use one of {', '.join(table.features)}")
    found = [str(name) for name, feature in table.features.items() if isinstance(feature, library.ClassLabel)]
    return asked or (found[0] if len(found) == 1 else None)


def _undecoded(library: ModuleType, table: Any, column: str) -> Any:
    """That column alone, as bytes."""
    chosen = table.with_format(None).select_columns([column])
    feature = chosen.features[column]
    return chosen.cast_column(column, library.Image(decode=False)) if isinstance(feature, library.Image) else chosen


def _labels(
    library: ModuleType, tables: Sequence[Any], column: str | None, count: int
) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """The classes and the number of each row's; -1 where a split has none, as test splits often."""
    if column is None:
        return (), np.full(count, -1, np.int32)
    columns = [
        np.asarray(table.select_columns([column]).with_format("numpy")[:][column])
        if column in table.features
        else np.full(len(table), -1)
        for table in tables
    ]
    feature = tables[0].features[column]
    if isinstance(feature, library.ClassLabel):
        return tuple(feature.names), np.concatenate(columns).astype(np.int32)
    values = np.concatenate(columns)
    classes, numbers = np.unique(values, return_inverse=True)
    return tuple(str(value) for value in classes), numbers.astype(np.int32)
