# SPDX-License-Identifier: Apache-2.0
"""Random reads of stored tokens against one raw NumPy memory map of the same bytes.

    python benchmarks/token_reads.py

100,000 images of 2 views of 256 tokens (102 MB), every image read once in a random order in a random view, in batches.
CPU time, one thread, the two interleaved, median of the repeats; the files are in the page cache.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from steadyvq.files import write_text
from steadyvq.generation.tokens import FORMAT, LABELS, META, SPLIT_CODES, VERSION, TokenSet, file_sha256

VIEWS, GRID, CODES = 2, (16, 16), 65536


def make(folder: Path, images: int, per_shard: int) -> Path:
    """A set of random tokens, and beside it one raw file of the same numbers."""
    rng = np.random.default_rng(0)
    raw = np.memmap(folder / "raw.bin", np.uint16, "w+", shape=(images, VIEWS, GRID[0] * GRID[1]))
    shards = []
    for number, start in enumerate(range(0, images, per_shard)):
        count = min(per_shard, images - start)
        part = rng.integers(0, CODES, (count, VIEWS, GRID[0] * GRID[1]), np.uint16)
        raw[start : start + count] = part
        path = folder / f"tokens-{number:05d}.npy"
        np.save(path, part)
        shards.append({"file": path.name, "rows": count, "bytes": path.stat().st_size, "sha256": file_sha256(path)})
    raw.flush()
    np.save(folder / LABELS, np.zeros(images, np.int32))
    np.save(folder / SPLIT_CODES, np.zeros(images, np.uint8))
    facts = {"num_codes": CODES, "shape": GRID, "dtype": "uint16", "size": 256, "views": ["centre", "centre-flip"]}
    named = {"tokenizer": {"hash": "none", "name": "none"}, "classes": ["all"], "shards": shards}
    write_text(folder / META, json.dumps({"format": FORMAT, "version": VERSION, **facts, **named}))
    return folder


def seconds(
    read: Callable[[NDArray[np.int64], NDArray[np.int64]], object], rows: NDArray[np.int64], batch: int
) -> float:
    views = rows % VIEWS
    start = time.process_time()
    for first in range(0, len(rows), batch):
        read(rows[first : first + batch], views[first : first + batch])
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    rows = np.random.default_rng(1).permutation(arguments.images)
    print(f"{'shards':>6} {'batch':>6} {'raw, us per grid':>17} {'ours, us per grid':>18} {'ratio':>6}")
    for per_shard in (arguments.images, 4096):
        with tempfile.TemporaryDirectory() as folder:
            tokens = TokenSet(make(Path(folder), arguments.images, per_shard))
            raw = np.memmap(
                Path(folder) / "raw.bin", np.uint16, "r", shape=(arguments.images, VIEWS, tokens.num_tokens)
            )
            assert np.array_equal(tokens.read(rows[:999], rows[:999] % 2), raw[rows[:999], rows[:999] % 2])
            for batch in (1, 64, 256):
                readers = (lambda r, v, raw=raw: raw[r, v], tokens.read)
                times = [[seconds(read, rows, batch) for read in readers] for _ in range(arguments.repeats)]
                plain, ours = (1e6 * statistics.median(part) / len(rows) for part in zip(*times, strict=True))
                print(f"{len(tokens.shards):>6} {batch:>6} {plain:>17.2f} {ours:>18.2f} {ours / plain:>6.2f}")


if __name__ == "__main__":
    main()
