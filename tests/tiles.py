# SPDX-License-Identifier: Apache-2.0
"""Many small files of real photographs: tiles cut from the built-in ones, in folders that name classes."""

from pathlib import Path

from PIL import Image

from steadyvq.data.mvtb import mvtb_files


def write_tiles(folder: Path, count: int, side: int = 48, photographs: int = 6) -> list[str]:
    """Cuts JPEG tiles evenly from some photographs, one class folder for each; returns their relative names, sorted."""
    files = mvtb_files()[:: max(1, 60 // photographs)][:photographs]
    names = []
    for number, (_, path, _) in enumerate(files):
        own = count // len(files) + (number < count % len(files))
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        across = image.width - side
        # A prime step keeps tiles from lying below each other.
        places = [divmod(i * 7919, across) for i in range(own)]
        (folder / f"class{number:02d}").mkdir(parents=True, exist_ok=True)
        for i, (row, left) in enumerate(places):
            top = (row * 5) % (image.height - side)
            name = f"class{number:02d}/tile{i:05d}.jpg"
            image.crop((left, top, left + side, top + side)).save(folder / name, quality=85)
            names.append(name)
    return sorted(names)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder that is not hidden."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
