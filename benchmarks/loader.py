# SPDX-License-Identifier: Apache-2.0
"""Images per second from indexed shards, beside a plain DataLoader over the same files, in one run.

    OMP_NUM_THREADS=1 python benchmarks/loader.py                           # tiles of the built-in photographs
    OMP_NUM_THREADS=1 python benchmarks/loader.py --data DIR --workers 8 --json out.json

The plain loader is what one writes first: a list of paths, `Image.open`, a crop with the global generator, torch's
DataLoader with shuffling. Both decode the same files to crops of the same size in the same number of workers and turn
batches into floats. They take turns, several rounds each, so that a busy machine troubles both; the ratio is that of the
medians, and `--cold` drops the files from the page cache before every round (which needs no rights: posix_fadvise).
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from steadyvq.data import CropFeed, CropRule, Request, ShardWriter, StreamedCrops, open_source
from steadyvq.data.mvtb import mvtb_files


class PlainFiles(Dataset):
    """Paths, Pillow, a random crop and mirror."""

    def __init__(self, folder: Path, crop: int) -> None:
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        self.crop = crop

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as opened:
            image = opened.convert("RGB")
        left, top = random.randint(0, image.width - self.crop), random.randint(0, image.height - self.crop)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        region = pixels[:, top : top + self.crop, left : left + self.crop]
        return region.flip(2) if random.random() < 0.5 else region


def plain(folder: Path, crop: int, workers: int, batch: int) -> int:
    """One pass with the plain loader; returns the number of images."""
    loader = DataLoader(PlainFiles(folder, crop), batch, shuffle=True, num_workers=workers, drop_last=True)
    return sum(len(images.float().div_(127.5).sub_(1.0)) for images in loader)


def streamed(data: Path, crop: int, workers: int, batch: int) -> int:
    """One pass with ours over a folder or its shards; returns the number of images."""
    source = open_source(data, min_side=crop)
    crops = StreamedCrops(source, CropRule(crop, (1.0, 1.0), skip_flat=False), len(source))
    requests = [Request(0, range(start, start + batch)) for start in range(0, len(source) - batch + 1, batch)]
    feed = CropFeed(crops, workers)
    with feed.running(requests):
        return sum(len(feed.batch(*request)) for request in requests)


def write_tiles(folder: Path, count: int, side: int) -> None:
    """Tiles of the built-in photographs as JPEG files in class folders."""
    files = mvtb_files()[::3]
    for number, (_, path, _) in enumerate(files):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        own = folder / f"class{number:02d}"
        own.mkdir()
        for i in range(count // len(files)):
            left, top = i * 7919 % (image.width - side), i * 104729 % (image.height - side)
            image.crop((left, top, left + side, top + side)).save(own / f"{i:05d}.jpg", quality=90)


def forget(folder: Path) -> None:
    """Drops the files below a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def measure(forms: dict[str, tuple[Callable[[Path], int], Path]], rounds: int, cold: bool) -> dict[str, list[float]]:
    """Images per second of each form in each round; the forms take turns."""
    rates: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, (work, place) in forms.items():
            if cold:
                forget(place)
            start = time.perf_counter()
            images = work(place)
            rates[name].append(images / (time.perf_counter() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of images (default: tiles of the built-in photographs)")
    parser.add_argument("--count", type=int, default=4000, help="tiles to cut")
    parser.add_argument("--side", type=int, default=160, help="side of a tile in pixels")
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the page cache of the files before every round")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.data or Path(scratch, "tiles")
        if given.data is None:
            folder.mkdir()
            write_tiles(folder, given.count, given.side)
        start = time.perf_counter()
        written = ShardWriter(folder, Path(scratch, "shards")).write()
        seconds = time.perf_counter() - start
        print(
            f"{written.samples} images, {written.bytes / 1e6:.0f} MB, written at {written.samples / seconds:.0f} images/s"
        )
        for workers in given.workers:
            size = {"crop": given.crop, "workers": workers, "batch": given.batch}
            forms = {
                "plain files": (lambda place, size=size: plain(place, **size), folder),
                "our files": (lambda place, size=size: streamed(place, **size), folder),
                "shards": (lambda place, size=size: streamed(place, **size), written.folder),
            }
            rates = measure(forms, given.rounds, given.cold)
            middle = {name: statistics.median(values) for name, values in rates.items()}
            ratio = middle["shards"] / middle["plain files"]
            results.append({"workers": workers, "rates": rates, "ratio": ratio})
            told = ", ".join(f"{name} {value:.0f}" for name, value in middle.items())
            print(f"{workers} workers: {told} images/s; shards over plain files: {ratio:.2f}")
    if given.json:
        given.json.write_text(
            json.dumps({"settings": vars(given) | {"data": None, "json": None}, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
