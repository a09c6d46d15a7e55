# SPDX-License-Identifier: Apache-2.0
"""Stored tokens as other projects read them.

llamagen      one array (1, views, tokens) and one label (1,) per image, int64, as its extraction script leaves them
bin           one flat file of all tokens, image by image, view by view, and a JSON file that says how to cut it
parquet       a row per image and view: name, split, label, view, tokens
webdataset    tar files with KEY.npy (views, tokens), KEY.cls and KEY.json
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steadyvq.files import write_atomically, write_text
from steadyvq.generation.tokens import TokenSet

Tell = Callable[[int], object]
_BLOCK = 1024
TAR_IMAGES = 10_000


def _blocks(tokens: TokenSet) -> Iterator[tuple[int, NDArray[Any]]]:
    """(first image, tokens (B, views, tokens)) in order."""
    for start in range(0, len(tokens), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(tokens)))
        yield start, np.stack([tokens.read(rows, view) for view in range(tokens.num_views)], axis=1)


def to_llamagen(tokens: TokenSet, out: Path, tell: Tell) -> None:
    """Folders `imagenetSIZE_codes` and `imagenetSIZE_labels` of one file per image.

    Raises:
        ValueError: There are no labels, which LlamaGen needs.
    """
    if (tokens.labels < 0).any():
        raise ValueError(
            f"the tokens in {tokens.folder} have no labels, but LlamaGen needs one for each image: tokenise a folder with one "
            "sub-folder per class"
        )
    for start, block in _blocks(tokens):
        for number, (image, label) in enumerate(zip(block, tokens.labels[start:].tolist(), strict=False), start):
            _save(out / f"imagenet{tokens.size}_codes" / f"{number}.npy", image[None].astype(np.int64))
            _save(out / f"imagenet{tokens.size}_labels" / f"{number}.npy", np.array([label], np.int64))
            tell(1)


def _save(path: Path, values: NDArray[Any]) -> None:
    write_atomically(path, lambda temporary: np.save(temporary, values, allow_pickle=False))


def to_bin(tokens: TokenSet, out: Path, tell: Tell) -> None:
    """`tokens.bin`, `labels.bin` (int32) and `tokens.json`."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            for _, block in _blocks(tokens):
                file.write(np.ascontiguousarray(block, block.dtype.newbyteorder("<")).tobytes())
                tell(len(block))

    write_atomically(out / "tokens.bin", write)
    write_atomically(out / "labels.bin", lambda path: path.write_bytes(tokens.labels.astype("<i4").tobytes()))
    said = {"shape": [len(tokens), tokens.num_views, tokens.num_tokens], "dtype": tokens.dtype.name, **_facts(tokens)}
    write_text(out / "tokens.json", json.dumps(said, indent=2) + "\n")


def _facts(tokens: TokenSet) -> dict[str, Any]:
    return {
        "grid": list(tokens.shape),
        "num_codes": tokens.num_codes,
        "views": tokens.views,
        "classes": tokens.classes,
        "tokenizer": tokens.tokenizer_hash,
    }


def to_parquet(tokens: TokenSet, out: Path, tell: Tell) -> None:
    """`tokens.parquet`; what does not change from row to row is in its metadata.

    Raises:
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError("parquet files are written by pyarrow: pip install 'steadyvq[parquet]'") from error
    names, splits = tokens.names(), [""] * len(tokens)
    for split in tokens.splits:
        for row in tokens.rows(split).tolist():
            splits[row] = split
    kinds = {"name": pa.string(), "split": pa.string(), "label": pa.int32(), "view": pa.int32()}
    columns = {**kinds, "tokens": pa.list_(pa.from_numpy_dtype(tokens.dtype), tokens.num_tokens)}
    schema = pa.schema(columns, {"steadyvq": json.dumps(_facts(tokens))})

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, schema) as writer:
            for start, block in _blocks(tokens):
                count, views = block.shape[:2]
                values = {
                    "name": np.repeat(np.array(names[start : start + count], object), views),
                    "split": np.repeat(np.array(splits[start : start + count], object), views),
                    "label": np.repeat(tokens.labels[start : start + count], views),
                    "view": np.tile(np.arange(views, dtype=np.int32), count),
                    "tokens": list(block.reshape(count * views, -1)),
                }
                writer.write_table(pa.table({k: pa.array(values[k], columns[k]) for k in columns}, schema))
                tell(count)

    write_atomically(out / "tokens.parquet", write)


def to_webdataset(tokens: TokenSet, out: Path, tell: Tell) -> None:
    """`tokens-00000.tar` and so on; the times in them are 0, so that the same tokens give the same bytes."""
    names = tokens.names()
    for number, start in enumerate(range(0, len(tokens), TAR_IMAGES)):
        rows = range(start, min(start + TAR_IMAGES, len(tokens)))
        write_atomically(out / f"tokens-{number:05d}.tar", partial(_tar, tokens, names, rows, tell))


def _tar(tokens: TokenSet, names: list[str], rows: range, tell: Tell, path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for row in rows:
            array = io.BytesIO()
            np.save(array, tokens.read([row] * tokens.num_views, range(tokens.num_views)), allow_pickle=False)
            parts = {"npy": array.getvalue(), "json": json.dumps({"name": names[row]}).encode()}
            if tokens.labels[row] >= 0:
                parts["cls"] = str(int(tokens.labels[row])).encode()
            for ending, content in sorted(parts.items()):
                info = tarfile.TarInfo(f"{row:09d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            tell(1)


EXPORTERS: dict[str, Callable[[TokenSet, Path, Tell], None]] = {
    "llamagen": to_llamagen,
    "bin": to_bin,
    "parquet": to_parquet,
    "webdataset": to_webdataset,
}
