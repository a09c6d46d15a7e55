# SPDX-License-Identifier: Apache-2.0
"""Writing the tokens of a data set: shard by shard, in any number of processes, again after a kill, always the same bytes.

A shard is a pure function of the plan and of its number. It is written under a temporary name and renamed, its table after it;
whatever process finds all tables there writes meta.json, and all would write the same.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from steadyvq.data import ImageSource, to_float
from steadyvq.data.shards import read_json
from steadyvq.files import write_atomically, write_text
from steadyvq.generation.shares import Share
from steadyvq.generation.tokens import (
    FORMAT,
    LABELS,
    LATENT_TYPES,
    META,
    PLAN,
    SPLIT_CODES,
    TOKENIZER,
    VERSION,
    file_sha256,
    split_counts,
    token_dtype,
    tokenizer_hash,
)
from steadyvq.generation.views import Views
from steadyvq.models import Tokenizer
from steadyvq.models.perceptual import full_precision

Item = TypeVar("Item")
Result = TypeVar("Result")
Cut = tuple[int, UInt8[Tensor, "V 3 S S"] | str]
"""Number of a photograph, and its views, or the reason why there are none."""


def encode_views(
    tokenizer: Tokenizer, cuts: Iterable[tuple[Item, Tensor]], views: int, batch: int
) -> Iterator[tuple[list[Item], Tensor]]:
    """Tokens of photographs, some at a time, as `encode_views_with_latents` gives them."""
    return ((items, tokens) for items, tokens, _ in encode_views_with_latents(tokenizer, cuts, views, batch))


@torch.no_grad()
def encode_views_with_latents(
    tokenizer: Tokenizer, cuts: Iterable[tuple[Item, Tensor]], views: int, batch: int
) -> Iterator[tuple[list[Item], Tensor, Tensor]]:
    """Tokens of photographs and the latents that they were looked up for, some at a time, on the tokenizer's device.

    Args:
        tokenizer: In evaluation mode.
        cuts: (anything, views (V, 3, S, S) uint8) of each photograph.
        views: V.
        batch: Crops in one forward.

    Yields:
        What stood beside the views, tokens (B, V, ...) as `Tokenizer.encode` has them, and latents (B, V, d, h, w).
    """
    device = next(tokenizer.parameters()).device
    rest = iter(cuts)
    while group := list(islice(rest, max(1, batch // views))):
        crops = torch.cat([cut for _, cut in group])
        with full_precision(device):
            inputs = [tokenizer.latents(to_float(part).to(device)) for part in torch.split(crops, batch)]
            found = [tokenizer.quantizer.encode(part).cpu() for part in inputs]
        tokens, latents = torch.cat(found), torch.cat([part.cpu() for part in inputs])
        tokens, latents = (values.reshape(len(group), views, *values.shape[1:]) for values in (tokens, latents))
        yield [item for item, _ in group], tokens, latents


class TokenWriter:
    """Writes the tokens of photographs into a folder, or goes on with it.

    Args:
        tokenizer: In evaluation mode, on its device.
        name: What the tokenizer is called in messages.
        source: The photographs.
        out: The folder.
        views: How they are cut.
        shard_images: Photographs in one shard.
        batch: Crops in one forward.
        share: The part of this process.
        threads: Photographs that are read at the same time.
        latents: Type in which the latents before quantization are stored too, float32 or float16 (None: they are not).

    Attributes:
        total: Photographs in the part of this process.
        done: How many of them lie in finished shards.

    Raises:
        ValueError: The folder holds something else, or the tokenizer cannot encode images of this size.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        name: str,
        source: ImageSource,
        out: Path,
        views: Views,
        *,
        shard_images: int = 4096,
        batch: int = 32,
        share: Share | None = None,
        threads: int = 4,
        latents: str | None = None,
    ) -> None:
        if min(shard_images, batch, threads) < 1:
            raise ValueError(
                f"shard images are {shard_images}, batch {batch} and threads {threads}, but each must be at least 1"
            )
        if latents not in (None, *LATENT_TYPES):
            raise ValueError(f"latents are to be {latents!r}, but they are stored as {' or '.join(LATENT_TYPES)}")
        if views.size % tokenizer.downsampling:
            raise ValueError(
                f"the size of a view is {views.size}, but it must be a multiple of the tokenizer's downsampling "
                f"{tokenizer.downsampling}"
            )
        self.tokenizer, self.source, self.out, self.views = tokenizer, source, out, views
        self.shard_images, self.batch, self.threads, self.latents = shard_images, batch, threads, latents
        side = views.size // tokenizer.downsampling
        self.shape = tuple(tokenizer.quantizer.index_shape((1, side, side))[1:])
        self.plan = self._plan(name)
        self.shards = -(-len(source) // shard_images)
        self.share = share or Share()
        self._begin()
        self._own = [shard for shard in self.share.of(self.shards) if not self._table(shard).is_file()]
        self.total = sum(len(self._numbers(shard)) for shard in self.share.of(self.shards))
        self.done = self.total - sum(len(self._numbers(shard)) for shard in self._own)

    def _plan(self, name: str) -> dict[str, Any]:
        """All that decides the bytes, and what the result is called."""
        names = hashlib.sha256(
            "\n".join(map(self.source.name, range(len(self.source)))).encode("utf-8", "surrogateescape")
        )
        return {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": {"hash": tokenizer_hash(self.tokenizer), "name": name},
            "data": self.source.data,
            "images": len(self.source),
            "names": names.hexdigest(),
            "views": json.loads(json.dumps(asdict(self.views))),
            "max_side": self.source.max_side,
            "shard_images": self.shard_images,
            "batch": self.batch,
            "device": next(self.tokenizer.parameters()).device.type,
            "latents": self.latents,
        }

    def _begin(self) -> None:
        path = self.out / PLAN
        if not path.is_file():
            # Another process may be writing the plan under a hidden name at this moment.
            if self.out.is_dir() and any(not path.name.startswith(".") for path in self.out.iterdir()):
                raise ValueError(f"{self.out} holds other files: give a new folder for the tokens with --out")
            write_text(path, json.dumps(self.plan, indent=2) + "\n")
            self.tokenizer.save_pretrained(self.out / TOKENIZER)
        found = read_json(path)
        if found.get("format") != FORMAT:
            raise ValueError(f"{self.out} holds other files: give a new folder for the tokens with --out")
        old, new = found["tokenizer"], self.plan["tokenizer"]
        if old["hash"] != new["hash"]:
            raise ValueError(
                f"{self.out} holds tokens of the tokenizer {old['hash'][:12]} ({old['name']}), but {new['name']} is the "
                f"tokenizer {new['hash'][:12]}: give another folder with --out"
            )
        unlike = [key for key in self.plan if key not in ("tokenizer", "data") and found.get(key) != self.plan[key]]
        if unlike:
            raise ValueError(
                f"{self.out} was begun with other settings (differs in {', '.join(unlike)}): repeat them, or give another "
                "folder with --out"
            )
        if not (self.out / TOKENIZER / "config.json").is_file():
            self.tokenizer.save_pretrained(self.out / TOKENIZER)

    def _file(self, shard: int) -> Path:
        return self.out / f"tokens-{shard:05d}.npy"

    def _table(self, shard: int) -> Path:
        return self._file(shard).with_suffix(".json")

    def _latent_file(self, shard: int) -> Path:
        return self.out / f"latents-{shard:05d}.npy"

    def _numbers(self, shard: int) -> range:
        first = shard * self.shard_images
        return range(first, min(first + self.shard_images, len(self.source)))

    def write(self, tell: Callable[[int], object] = lambda count: None) -> bool:
        """Writes what is missing of this part; `tell` hears how many photographs are done.

        Returns:
            Whether all parts are finished, so that the tokens can be used.

        Raises:
            ValueError: None of the photographs of the whole set can be read.
        """
        for shard in self._own:
            self._write_shard(shard, tell)
        if not all(self._table(shard).is_file() for shard in range(self.shards)):
            return False
        if not (self.out / META).is_file():
            self._finish()
        return True

    def _write_shard(self, shard: int, tell: Callable[[int], object]) -> None:
        skipped: list[tuple[str, str]] = []
        rows: list[int] = []
        parts = [
            np.zeros((0, len(self.views), int(np.prod(self.shape))), token_dtype(self.tokenizer.quantizer.num_codes))
        ]
        side = self.views.size // self.tokenizer.downsampling
        kept = [np.zeros((0, len(self.views), self.tokenizer.quantizer.dim, side, side), self.latents or "float32")]
        cuts = self._readable(shard, skipped, tell)
        for numbers, tokens, latents in encode_views_with_latents(self.tokenizer, cuts, len(self.views), self.batch):
            rows += numbers
            parts.append(tokens.reshape(len(numbers), len(self.views), -1).numpy().astype(parts[0].dtype))
            if self.latents:
                kept.append(latents.numpy().astype(self.latents))
        array, path = np.concatenate(parts), self._file(shard)
        _save(path, array)
        extra = {}
        if self.latents:
            _save(self._latent_file(shard), np.concatenate(kept))
            extra["latents"] = _described(self._latent_file(shard), len(rows))
        chosen = self.source.rows[rows]
        table = {
            **_described(path, len(rows)),
            **extra,
            "names": [self.source.name(number) for number in rows],
            "labels": self.source.labels[chosen].tolist(),
            "splits": self.source.split_codes[chosen].tolist(),
            "skipped": skipped,
        }
        write_text(self._table(shard), json.dumps(table) + "\n")

    def _readable(
        self, shard: int, skipped: list[tuple[str, str]], tell: Callable[[int], object]
    ) -> Iterator[tuple[int, Tensor]]:
        """(number, views) of the photographs of a shard that can be read, in order."""
        with ThreadPoolExecutor(self.threads) as pool:
            for number, found in _ahead(pool, self._cut, self._numbers(shard), 2 * self.threads):
                if isinstance(found, str):
                    skipped.append((self.source.name(number), found))
                else:
                    yield number, found
                tell(1)

    def _cut(self, number: int) -> Cut:
        try:
            return number, self.views.cut(self.source.decode(number), number)
        except ValueError as error:
            return number, str(error)

    def _finish(self) -> None:
        """Writes labels, splits and, last, meta.json."""
        tables = [read_json(self._table(shard)) for shard in range(self.shards)]
        if not any(table["rows"] for table in tables):
            name, reason = tables[0]["skipped"][0]
            raise ValueError(
                f"none of the {len(self.source)} images in {self.source.data!r} could be read (the first, {name}: {reason}): "
                f"put readable .png, .jpg or .webp files in it, and delete {self.out}"
            )
        labels = np.array([label for table in tables for label in table["labels"]], np.int32)
        splits = np.array([code for table in tables for code in table["splits"]], np.uint8)
        for name, values in ((LABELS, labels), (SPLIT_CODES, splits)):
            _save(self.out / name, values)
        codes = self.tokenizer.quantizer.num_codes
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": self.plan["tokenizer"],
            "num_codes": codes,
            "shape": self.shape,
            "dtype": token_dtype(codes).name,
            "data": self.source.data,
            "images": len(labels),
            "skipped": sum(len(table["skipped"]) for table in tables),
            "size": self.views.size,
            "views": self.views.names,
            "cut": self.plan["views"],
            "classes": self.source.classes,
            "splits": split_counts(splits),
            "shards": [{key: table[key] for key in ("file", "rows", "bytes", "sha256")} for table in tables],
            "histogram": self._histogram(codes).tolist(),
        }
        if self.latents:
            side = self.views.size // self.tokenizer.downsampling
            shape = (self.tokenizer.quantizer.dim, side, side)
            shards = [table["latents"] for table in tables]
            meta["latents"] = {"dtype": self.latents, "shape": shape, "shards": shards}
        write_text(self.out / META, json.dumps(meta) + "\n")

    def _histogram(self, codes: int) -> NDArray[np.int64]:
        counts = np.zeros(codes, np.int64)
        for shard in range(self.shards):
            tokens = np.load(self._file(shard), mmap_mode="r")
            for start in range(0, len(tokens), 1024):
                counts += np.bincount(tokens[start : start + 1024].reshape(-1).astype(np.int64), minlength=codes)
        return counts

    def skipped(self) -> list[tuple[str, str]]:
        """(name, reason) of the photographs that could not be read, of all finished shards."""
        tables = [read_json(path) for shard in range(self.shards) if (path := self._table(shard)).is_file()]
        return [(str(name), str(reason)) for table in tables for name, reason in table["skipped"]]


def _described(path: Path, rows: int) -> dict[str, Any]:
    return {"file": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _save(path: Path, values: NDArray[Any]) -> None:
    write_atomically(path, lambda temporary: np.save(temporary, values, allow_pickle=False))


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[int], Result], items: Iterable[int], depth: int
) -> Iterator[Result]:
    """Results in order, with no more than `depth` of them under way."""
    waiting: deque[Future[Result]] = deque()
    rest = iter(items)
    for item in islice(rest, depth):
        waiting.append(pool.submit(work, item))
    while waiting:
        result = waiting.popleft().result()
        for item in islice(rest, 1):
            waiting.append(pool.submit(work, item))
        yield result
