# SPDX-License-Identifier: Apache-2.0
"""Stored tokens of a data set: memory-mapped arrays that are read in any order at the speed of the disk.

meta.json             grid, number of codes, hash of the tokenizer, views, histogram, checksums; written last
tokens-00000.npy      tokens (images, views, tokens) of one shard, uint16 or uint32
tokens-00000.json     its table: names, labels and splits of its images, its SHA-256
latents-00000.npy     latents before quantization (images, views, d, h, w), where they were asked for
labels.npy            class of every image, int32, -1 where there are none
splits.npy            split of every image, as its position in train, val, test
tokenizer/            the tokenizer, which decodes them
plan.json             what is being written, so that an interrupted writer goes on
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from steadyvq.data.names import SPLITS
from steadyvq.data.shards import read_json
from steadyvq.models import Tokenizer
from steadyvq.models.perceptual_weights import digest

META, PLAN, TOKENIZER = "meta.json", "plan.json", "tokenizer"
LABELS, SPLIT_CODES = "labels.npy", "splits.npy"
FORMAT, VERSION = "steadyvq-tokens", 1
AGAIN = "delete it and run the same `steadyvq tokenize` again, which writes what is missing"
LATENT_TYPES = ("float32", "float16")
_READ = 1 << 22


@dataclass(frozen=True)
class TokenShard:
    """One array as meta.json has it.

    Attributes:
        file: Its name.
        rows: Images in it.
        bytes: Its size.
        sha256: Of its bytes.
    """

    file: str
    rows: int
    bytes: int
    sha256: str


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of all that decides which tokens an image gets: encoder and quantizer, not the decoder."""
    state = {
        name: value
        for name, value in tokenizer.state_dict().items()
        if name.partition(".")[0] in ("encoder", "pre_quant", "quantizer")
    }
    size = None if tokenizer.config is None else asdict(tokenizer.config)
    spec = {key: value for key, value in (tokenizer.quantizer.spec or {}).items() if key != "name"}
    described = json.dumps([size, spec], sort_keys=True, default=str)
    return hashlib.sha256(f"{digest(state)} {described}".encode()).hexdigest()


def is_token_set(path: str | Path) -> bool:
    """Whether a folder holds stored tokens, complete or not."""
    # Path("") is the current folder, which an empty setting does not mean.
    files = [Path(path) / name for name in (META, PLAN)] if str(path) else []
    return any(FORMAT.encode() in _beginning(file) for file in files if file.is_file())


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(100)


def file_sha256(path: Path, tell: Callable[[int], object] = lambda count: None) -> str:
    """SHA-256 of a file; `tell` hears how many bytes were read."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ):
            found.update(block)
            tell(len(block))
    return found.hexdigest()


class TokenSet:
    """Stored tokens, opened for reading.

    Args:
        folder: Written by `steadyvq tokenize`.

    Attributes:
        num_codes: K of the tokenizer.
        shape: Of the tokens of one image, as the tokenizer has them; (h, w) for most.
        num_tokens: How many that are.
        views: Names of the views.
        size: Side of the images in pixels.
        labels: Class of every image (N,), -1 where there are none.
        classes: Names of the classes.
        tokenizer_hash: Of the tokenizer that wrote them.
        latent_shape: Of the stored latents of one image (d, h, w); None where none are stored.

    Raises:
        ValueError: The folder holds no tokens, or not all of them.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.meta = meta = _read_meta(self.folder)
        try:
            self.shards = [TokenShard(**entry) for entry in meta["shards"]]
            self.num_codes, self.size = int(meta["num_codes"]), int(meta["size"])
            self.shape = tuple(int(side) for side in meta["shape"])
            self.views: list[str] = [str(name) for name in meta["views"]]
            self.classes: list[str] = [str(name) for name in meta["classes"]]
            self.dtype = np.dtype(str(meta["dtype"]))
            self.tokenizer_hash, self.tokenizer_name = meta["tokenizer"]["hash"], meta["tokenizer"]["name"]
            stored = meta.get("latents") or {"shards": [], "shape": None}
            self.latent_shards = [TokenShard(**entry) for entry in stored["shards"]]
            self.latent_shape: tuple[int, ...] | None = stored["shape"] and tuple(int(side) for side in stored["shape"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.folder / META} is damaged ({error!r}): {AGAIN}") from error
        self.num_tokens = int(np.prod(self.shape))
        self._starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self._check()
        self._lines = self._mapped(self.shards)
        self._latents = self._mapped(self.latent_shards)
        self.labels: NDArray[np.int32] = np.load(self.folder / LABELS, allow_pickle=False)
        self._splits: NDArray[np.uint8] = np.load(self.folder / SPLIT_CODES, allow_pickle=False)

    def _mapped(self, shards: list[TokenShard]) -> list[NDArray[Any]]:
        """One line per view of an image; as plain arrays, whose look-ups cost less than those of NumPy's memmap."""
        maps = (np.asarray(np.load(self.folder / shard.file, mmap_mode="r")) for shard in shards)
        return [values.reshape(-1, int(np.prod(values.shape[2:]))) for values in maps]

    def _check(self) -> None:
        for shard in (*self.shards, *self.latent_shards):
            path = self.folder / shard.file
            size = path.stat().st_size if path.is_file() else -1
            if size != shard.bytes:
                found = "is missing" if size < 0 else f"has {size} bytes, but {META} says {shard.bytes} (cut short?)"
                raise ValueError(f"{path} {found}: {_restore(shard)}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def num_views(self) -> int:
        """Views of every image."""
        return len(self.views)

    @property
    def histogram(self) -> NDArray[np.int64]:
        """How often each code occurs, over all images and views (K,)."""
        return np.array(self.meta["histogram"], np.int64)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that there are."""
        return tuple(SPLITS[code] for code in np.unique(self._splits).tolist())

    def rows(self, split: str = "all") -> NDArray[np.int64]:
        """Numbers of the images of a split.

        Raises:
            ValueError: There is no such split here.
        """
        if split == "all":
            return np.arange(len(self))
        if split not in self.splits:
            raise ValueError(
                f"the tokens in {self.folder} have no split {split!r}: use one of {', '.join((*self.splits, 'all'))}"
            )
        return np.flatnonzero(self._splits == SPLITS.index(split))

    def rows_or_all(self, split: str) -> NDArray[np.int64]:
        """Numbers of the images of a split; all of them where there is only one."""
        return self.rows(split if len(self.splits) > 1 else "all")

    def read(self, rows: ArrayLike, views: ArrayLike = 0) -> NDArray[Any]:
        """Tokens (B, tokens) of images, each in one of its views, in the type they are stored in.

        Args:
            rows: Numbers of the images (B,).
            views: Number of the view of each (B,), or of all.
        """
        return self._read(self._lines, rows, views)

    def read_latents(self, rows: ArrayLike, views: ArrayLike = 0) -> NDArray[Any]:
        """Latents before quantization (B, d, h, w) of images, each in one of its views, in the type they are stored in.

        Raises:
            ValueError: None are stored.
        """
        if self.latent_shape is None:
            raise ValueError(
                f"{self.folder} holds tokens alone: write them again into another folder with `steadyvq tokenize --latents "
                "float32`, or set diffusion.space=codes"
            )
        return self._read(self._latents, rows, views).reshape(-1, *self.latent_shape)

    def _read(self, lines: list[NDArray[Any]], rows: ArrayLike, views: ArrayLike) -> NDArray[Any]:
        row = np.asarray(rows, np.int64)
        shard = np.searchsorted(self._starts, row, side="right") - 1
        line = (row - self._starts[shard]) * self.num_views + np.asarray(views, np.int64)
        if len(self.shards) == 1:
            return np.asarray(lines[0].take(line, axis=0))
        out = np.empty((len(row), lines[0].shape[1]), lines[0].dtype)
        # The rows of a batch lie in nearly as many shards: an index array for each would cost more than a look-up.
        for target, number, place in zip(out, shard.tolist(), line.tolist(), strict=True):
            target[:] = lines[number][place]
        return out

    def grids(self, tokens: NDArray[Any] | Tensor) -> Int[Tensor, "B ..."]:
        """Tokens (B, tokens) as `Tokenizer.decode` takes them, int64."""
        # torch knows too little of unsigned types.
        flat = tokens if isinstance(tokens, Tensor) else torch.from_numpy(np.asarray(tokens).astype(np.int64))
        return flat.long().reshape(-1, *self.shape)

    def names(self) -> list[str]:
        """Names of all images, from the tables of the shards."""
        tables = (read_json((self.folder / shard.file).with_suffix(".json")) for shard in self.shards)
        return [str(name) for table in tables for name in table["names"]]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that is stored with the tokens.

        Raises:
            ValueError: It is another one than the tokens name, or cannot be read.
        """
        found = Tokenizer.from_pretrained(self.folder / TOKENIZER)
        self.check_tokenizer(found, str(self.folder / TOKENIZER))
        return found

    def check_tokenizer(self, tokenizer: Tokenizer, name: str) -> None:
        """Refuses a tokenizer that would give, and understands, other tokens.

        Raises:
            ValueError: It names both.
        """
        refuse_other_tokenizer(self.tokenizer_hash, f"the tokens in {self.folder}", tokenizer_hash(tokenizer), name)

    def verify(self, tell: Callable[[int], object] = lambda count: None) -> list[str]:
        """Reads every byte again; a sentence for each shard that is not as it was written."""
        return [
            f"{shard.file} is not as it was written (its SHA-256 differs): {_restore(shard)}"
            for shard in (*self.shards, *self.latent_shards)
            if file_sha256(self.folder / shard.file, tell) != shard.sha256
        ]


def refuse_other_tokenizer(wanted: str, whose: str, found: str, name: str) -> None:
    """Raises ValueError, naming both, unless two hashes of tokenizers agree."""
    if wanted != found:
        raise ValueError(
            f"{whose} were written by the tokenizer {wanted[:12]}, but {name} is the tokenizer {found[:12]}: its codes mean "
            "something else, use the tokenizer that wrote them"
        )


def _restore(shard: TokenShard) -> str:
    table = Path(shard.file.replace("latents-", "tokens-")).with_suffix(".json").name
    return f"delete it with {table} and {META} and run the same `steadyvq tokenize` again, which writes it anew"


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    if not is_token_set(folder):
        raise ValueError(f"{str(folder)!r} holds no tokens: give a folder written by `steadyvq tokenize`")
    if not path.is_file():
        raise ValueError(
            f"the tokens in {str(folder)!r} are not complete (no {META}): run the same `steadyvq tokenize` "
            "again, and it goes on"
        )
    meta = read_json(path)
    if meta.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {meta.get('version')!r}, but this version of steadyvq reads {VERSION}: tokenize anew"
        )
    return meta


def token_dtype(num_codes: int) -> np.dtype[Any]:
    """The smallest type that holds all codes."""
    return np.dtype(np.uint16 if num_codes <= 1 << 16 else np.uint32)


def split_counts(codes: Sequence[int] | NDArray[np.uint8]) -> dict[str, int]:
    """Images per split, of those that there are."""
    counts = np.bincount(np.asarray(codes, np.int64), minlength=len(SPLITS)).tolist()
    return {name: count for name, count in zip(SPLITS, counts, strict=True) if count}
