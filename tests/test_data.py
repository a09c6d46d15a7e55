# SPDX-License-Identifier: Apache-2.0
"""Reading real files of every kind, splitting them, and cutting crops that depend on nothing but their key."""

import hashlib
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from steadyvq.data import Collection, CropDataset, EvaluationCrops, decode_image, load_collection, load_image, to_float
from steadyvq.data.collection import image_files, read_images, split_by_name
from steadyvq.data.crops import FLAT_STD, uniforms
from steadyvq.data.decode import MAX_PIXELS


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def collection(*images: torch.Tensor) -> Collection:
    names = tuple(f"{i}.png" for i in range(len(images)))
    return Collection("synthetic", names, images, ("train",) * len(images), [])


def many_sizes() -> Collection:
    sizes = [(40, 90), (33, 32), (200, 64), (64, 64)]
    return collection(*(as_tensor(noise(*size, seed=i)).contiguous() for i, size in enumerate(sizes)))


# ---- decoding ----


def test_grey_one_bit_and_rgb_are_exact(tmp_path: Path) -> None:
    pixels = noise(9, 7)
    grey = pixels[..., 0]
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey > 127).save(tmp_path / "bit.png")
    assert torch.equal(decode_image(tmp_path / "rgb.png"), as_tensor(pixels))
    assert torch.equal(decode_image(tmp_path / "grey.png"), as_tensor(np.stack([grey] * 3, -1)))
    assert torch.equal(decode_image(tmp_path / "bit.png"), as_tensor(np.stack([(grey > 127) * np.uint8(255)] * 3, -1)))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 12 * 11).astype(np.uint16).reshape(12, 11)
    Image.fromarray(values).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as opened:
        assert opened.mode.startswith("I")
    expected = torch.from_numpy(np.rint(values / 257).astype(np.uint8))
    assert torch.equal(decode_image(tmp_path / "deep.png"), expected.expand(3, -1, -1))


def on_white(pixels: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.float64]:
    weight = alpha[..., None] / 255.0
    return pixels * weight + 255.0 * (1.0 - weight)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_transparency_lies_on_white(tmp_path: Path, mode: str, suffix: str) -> None:
    pixels, alpha = noise(8, 8), noise(8, 8, seed=1)[..., 0]
    alpha[:2], alpha[2:4] = 0, 255
    if mode == "LA":
        pixels = np.repeat(pixels[..., :1], 3, -1)
    rgba = Image.fromarray(np.dstack([pixels, alpha]), "RGBA")
    # Other writers ignore the two options of WebP.
    rgba.convert(mode).save(tmp_path / f"a{suffix}", lossless=True, exact=True)
    decoded = decode_image(tmp_path / f"a{suffix}").permute(1, 2, 0).numpy().astype(float)
    assert np.abs(decoded - on_white(pixels.astype(float), alpha)).max() <= 1.0
    assert (decoded[:2] == 255).all()


def test_palette_with_transparency(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), "P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    palette.save(tmp_path / "p.png", transparency=1)
    white, red, blue = (255, 255, 255), (200, 0, 0), (0, 0, 200)
    expected = as_tensor(np.array([[red, white], [blue, white]], dtype=np.uint8))
    assert torch.equal(decode_image(tmp_path / "p.png"), expected)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    cyan.save(tmp_path / "c.jpg", quality=100)
    decoded = decode_image(tmp_path / "c.jpg").float().mean((1, 2))
    assert torch.allclose(decoded, torch.tensor([0.0, 255.0, 255.0]), atol=3)


def test_multi_picture_file_gives_its_first_picture(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (16, 16), (0, 200, 0)), Image.new("RGB", (16, 16), (200, 0, 0))
    first.save(tmp_path / "m.jpg", format="MPO", save_all=True, append_images=[second], quality=95)
    assert torch.allclose(
        decode_image(tmp_path / "m.jpg").float().mean((1, 2)), torch.tensor([0.0, 200.0, 0.0]), atol=3
    )


# How the camera stored an upright picture for each EXIF orientation (TIFF 6.0, tag 274).
STORED = {
    1: lambda u: u,
    2: lambda u: u[:, ::-1],
    3: lambda u: u[::-1, ::-1],
    4: lambda u: u[::-1],
    5: lambda u: u.transpose(1, 0, 2),
    6: lambda u: u.transpose(1, 0, 2)[::-1],
    7: lambda u: u[::-1, ::-1].transpose(1, 0, 2),
    8: lambda u: u.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    upright = noise(6, 10)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))).save(tmp_path / "e.png", exif=exif)
    assert torch.equal(decode_image(tmp_path / "e.png"), as_tensor(upright))


def test_small_pictures_grow_and_large_ones_shrink(tmp_path: Path) -> None:
    Image.fromarray(noise(10, 25)).save(tmp_path / "small.png")
    Image.fromarray(noise(90, 400)).save(tmp_path / "wide.png")
    assert decode_image(tmp_path / "small.png", min_side=32).shape == (3, 32, 80)
    assert decode_image(tmp_path / "wide.png", max_side=200).shape == (3, 45, 200)
    # The crop wins over the limit.
    assert decode_image(tmp_path / "wide.png", min_side=60, max_side=200).shape == (3, 60, 267)


def test_load_image_takes_the_centre_square(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 200
    Image.fromarray(pixels).save(tmp_path / "w.png")
    assert torch.equal(load_image(tmp_path / "w.png", 10), torch.full((3, 10, 10), 200, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no image file at"):
        load_image(tmp_path / "missing.png", 10)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read the image .*bad.png.*: not a PNG"):
        load_image(tmp_path / "bad.png", 10)


def test_to_float_covers_the_range() -> None:
    assert torch.allclose(
        to_float(torch.tensor([[[0, 255, 51]]], dtype=torch.uint8)), torch.tensor([[[-1.0, 1.0, -0.6]]])
    )


# ---- folders ----


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def test_folder_is_recursive_sorted_and_tolerant(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    Image.fromarray(noise(8, 8)).save(tmp_path / "b" / "deep" / "x.PNG")
    Image.fromarray(noise(8, 8)).save(tmp_path / "a.JPeG", format="JPEG")
    Image.fromarray(noise(8, 8)).save(tmp_path / "c.webp")
    Image.fromarray(noise(8, 8)).save(tmp_path / "not-asked.bmp")
    Image.fromarray(noise(8, 8)).save(tmp_path / "gif.png", format="GIF")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(noise(64, 64)).save(tmp_path / "whole.jpg")
    cut = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "whole.jpg").unlink()
    (tmp_path / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "bomb.png").write_bytes(png_header(30000, 30000))
    loaded = load_collection(tmp_path, min_side=16)
    assert loaded.names == ("a.JPeG", "b/deep/x.PNG", "c.webp")
    assert [image.shape for image in loaded.images] == [(3, 16, 16)] * 3
    reasons = {Path(path).name: reason for path, reason in loaded.skipped}
    assert set(reasons) == {"empty.jpg", "cut.jpg", "bomb.png", "gif.png"}
    assert "truncated" in reasons["cut.jpg"]
    assert f"{MAX_PIXELS:,}" in reasons["bomb.png"]
    assert "not a PNG" in reasons["gif.png"]


def test_a_strip_that_would_grow_beyond_all_bounds_is_skipped(tmp_path: Path) -> None:
    Image.fromarray(noise(1, 20000)).save(tmp_path / "strip.png")
    Image.fromarray(noise(9, 9)).save(tmp_path / "fine.png")
    loaded = load_collection(tmp_path, min_side=256)
    assert loaded.names == ("fine.png",)
    assert "strip of 20000 x 1" in loaded.skipped[0][1]


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    Image.fromarray(noise(8, 8)).save(elsewhere / "x.png")
    (data / "link").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(data)
    assert load_collection(data).names == ("link/x.png",)


def test_folders_of_runs_and_hidden_folders_hold_no_photographs(tmp_path: Path) -> None:
    for name in ("a.png", "run/pictures/step.png", "half/b.png", ".cache/thumbnail.png", "more/.hidden/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(8, 8)).save(tmp_path / name)
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "run" / "log.jsonl").touch()
    (tmp_path / "half" / "config.yaml").touch()
    assert [name for name, _ in image_files(tmp_path)] == ["a.png", "half/b.png"]
    assert load_collection(tmp_path).names == ("a.png", "half/b.png")
    # A folder that the user names is read, whatever it is.
    assert [name for name, _ in image_files(tmp_path / "run")] == ["pictures/step.png"]
    assert [name for name, _ in image_files(tmp_path / ".cache")] == ["thumbnail.png"]


def test_images_are_read_one_at_a_time(tmp_path: Path) -> None:
    for name in ("a", "c", "d"):
        Image.fromarray(noise(8, 8, seed=ord(name))).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"nothing")
    read: list[str] = []
    skipped: list[tuple[str, str]] = []

    def decode(path: Path) -> torch.Tensor:
        read.append(path.name)
        return decode_image(path)

    images = read_images(image_files(tmp_path), decode, "here", skipped)
    assert next(images)[0] == "a.png"
    assert read == ["a.png"]
    name, pixels = next(images)
    assert (name, read) == ("c.png", ["a.png", "b.png", "c.png"])
    assert torch.equal(pixels, as_tensor(noise(8, 8, seed=ord("c"))))
    assert [name for name, _ in images] == ["d.png"]
    assert [path for path, _ in skipped] == [str(tmp_path / "b.png")]
    with pytest.raises(ValueError, match=r"none of the 1 images in 'here' could be read \(the first: not a PNG"):
        list(read_images([("b.png", tmp_path / "b.png")], decode_image, "here", []))


def test_folder_errors_are_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder '.*gone': give an existing folder and put .png, .jpg or .webp"):
        load_collection(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"no folder ''"):
        load_collection("")
    with pytest.raises(ValueError, match=r"has no images: put .png, .jpg or .webp files in it"):
        load_collection(tmp_path)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a.png' is a file, not a folder"):
        load_collection(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"none of the 2 images .* could be read \(the first: not a PNG"):
        load_collection(tmp_path)


def test_memory_is_limited(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(noise(32, 32)).save(tmp_path / f"{i}.png")
    assert len(load_collection(tmp_path, max_bytes=3 * 3072)) == 3
    with pytest.raises(ValueError, match=r"need more than .* GiB .*max_side"):
        load_collection(tmp_path, max_bytes=3 * 3072 - 1)


def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules is Python's own mark of a module that is not there.
    monkeypatch.setitem(sys.modules, "mvtbdata", None)
    with pytest.raises(
        ValueError, match=r"pip install mvtb-data \(or pip install 'steadyvq\[photos\]'\), or pass --data"
    ):
        load_collection("mvtb")


# ---- splits ----


@given(
    st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=40, unique=True), st.text(min_size=13, max_size=14)
)
@settings(max_examples=60, deadline=None)
def test_split_holds_out_some_and_adding_a_file_moves_none(names: list[str], new: str) -> None:
    splits = split_by_name(names, 0.25)
    assert set(splits) == {"train", "val"}
    assert split_by_name(names[::-1], 0.25) == splits[::-1]
    # With one photograph on a side it may be the one that had to be there.
    if min(Counter(splits).values()) > 1:
        assert split_by_name([*names, new], 0.25)[:-1] == splits


def test_split_fraction() -> None:
    splits = split_by_name([f"holiday/{i:05d}.jpg" for i in range(4000)], 0.1)
    assert Counter(splits)["val"] == pytest.approx(400, abs=4 * (4000 * 0.09) ** 0.5)


def test_one_photograph_serves_both_and_says_so(tmp_path: Path) -> None:
    Image.fromarray(noise(40, 40)).save(tmp_path / "only.png")
    loaded = load_collection(tmp_path)
    assert torch.equal(loaded.split("val").images[0], loaded.split("train").images[0])
    record = EvaluationCrops(loaded.split("val"), 32, 1).record
    assert record["split"] == "val (= train: there is only one photograph)"
    with pytest.raises(ValueError, match=r"no split 'test': use one of train, all"):
        loaded.split("test")
    with pytest.raises(ValueError, match=r"no split 'trian' \(did you mean 'train'\?\)"):
        loaded.split("trian")


# ---- training crops ----


def test_crops_are_regions_of_their_photographs() -> None:
    photos = many_sizes()
    dataset = CropDataset(photos, 32, 60, scales=(1.0, 1.0), flip=True)
    windows = [image.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1) for image in photos.images]
    mirrored = 0
    for index in range(60):
        crop = dataset[index]
        plain = any((window == crop).flatten(1).all(1).any() for window in windows)
        flipped = any((window == crop.flip(2)).flatten(1).all(1).any() for window in windows)
        assert plain != flipped
        mirrored += flipped
    assert 15 <= mirrored <= 45


def test_crops_depend_on_seed_epoch_and_index_alone() -> None:
    photos = many_sizes()
    dataset = CropDataset(photos, 32, 40, seed=3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = [dataset.crop(7, i) for i in range(40)]
    assert torch.equal(torch.get_rng_state(), state)
    again = CropDataset(photos, 32, 999, seed=3)
    assert all(torch.equal(again.crop(7, i), first[i]) for i in reversed(range(40)))
    for other in (CropDataset(photos, 32, 40, seed=4).crop(7, 0), dataset.crop(8, 0), dataset.crop(7, 1)):
        assert other.shape == first[0].shape
        assert not torch.equal(other, first[0])


def test_batch_is_the_normalised_crops() -> None:
    dataset = CropDataset(many_sizes(), 32, 40, seed=1)
    batch = dataset.batch(2, 10, 6)
    expected = torch.stack([dataset.crop(2, i) for i in range(10, 16)]).float() / 127.5 - 1.0
    assert batch.dtype == torch.float32
    assert torch.allclose(batch, expected, atol=1e-6)


def test_workers_and_other_processes_cut_the_same_crops() -> None:
    dataset = CropDataset(many_sizes(), 32, 12, seed=-9)
    keys = [(4, i) for i in range(12)]
    direct = torch.stack([dataset.crop(*key) for key in keys])
    for workers in (0, 2):
        loaded = torch.cat(list(DataLoader(dataset, batch_size=5, sampler=keys, num_workers=workers)))
        assert torch.equal(loaded, direct)
    script = "from steadyvq.data.crops import uniforms; print(uniforms(3, -9, 4, 2).tolist())"
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert process.stdout.strip() == str(uniforms(3, -9, 4, 2).tolist())


def test_key_parts_do_not_alias() -> None:
    keys = [(s, e, i) for s in range(-2, 3) for e in range(5) for i in range(5)]
    assert len({tuple(uniforms(4, *key)) for key in keys}) == len(keys)
    flat = np.concatenate([uniforms(8, *key) for key in keys])
    assert flat.min() >= 0.0
    assert flat.max() < 1.0
    assert flat.mean() == pytest.approx(0.5, abs=4 * (1 / 12 / flat.size) ** 0.5)


def test_photographs_weigh_the_same_whatever_their_size() -> None:
    tones = [torch.full((3, size, 64), 50 * i, dtype=torch.uint8) for i, size in enumerate((64, 64, 640, 3000))]
    dataset = CropDataset(collection(*tones), 32, 1, skip_flat=False)
    seen = Counter(int(dataset.crop(0, i)[0, 0, 0]) // 50 for i in range(2000))
    for photo in range(4):
        assert seen[photo] == pytest.approx(500, abs=4 * (2000 * 0.25 * 0.75) ** 0.5)


def ramp(height: int, width: int) -> torch.Tensor:
    """Red tells the column and green the row."""
    image = torch.zeros(3, height, width)
    image[0], image[1] = torch.arange(width) / (width - 1) * 255, (torch.arange(height) / (height - 1) * 255)[:, None]
    return image.round().to(torch.uint8)


def test_region_sizes_are_log_uniform_up_to_the_scale() -> None:
    dataset = CropDataset(collection(ramp(256, 256)), 16, 1, scales=(1.0, 4.0), flip=False, skip_flat=False)
    crops = torch.stack([dataset.crop(0, i) for i in range(800)]).float()
    sides = crops[:, 0, 8, -1] - crops[:, 0, 8, 0] + 1
    # A crop's outermost pixels average over about a scale, so the ramp spans 15/16 of the region.
    scales = sides / 15.5
    assert scales.min() < 1.1
    assert 3.6 < scales.max() < 4.3
    assert scales.log().mean() == pytest.approx(np.log(2.0), abs=0.08)
    limited = CropDataset(collection(ramp(20, 300)), 16, 1, scales=(1.0, 4.0), flip=False, skip_flat=False)
    assert all(limited.crop(0, i).shape == (3, 16, 16) for i in range(50))


def test_every_position_is_reached() -> None:
    image = ramp(34, 35)
    dataset = CropDataset(collection(image), 32, 1, scales=(1.0, 1.0), flip=False, skip_flat=False)
    corners = {tuple(dataset.crop(0, i)[:2, 0, 0].tolist()) for i in range(400)}
    assert corners == {(int(image[0, 0, x]), int(image[1, y, 0])) for y in range(3) for x in range(4)}


def test_flat_crops_are_redrawn() -> None:
    half = as_tensor(noise(64, 512)).clone()
    half[:, :, 128:] = 90
    kept = CropDataset(collection(half), 32, 1, scales=(1.0, 1.0), skip_flat=False)
    redrawn = CropDataset(collection(half), 32, 1, scales=(1.0, 1.0))

    def flat(dataset: CropDataset) -> int:
        return sum(float(dataset.crop(0, i).float().mean(0).std()) < FLAT_STD for i in range(200))

    assert flat(kept) > 100
    assert flat(redrawn) < 40
    tone = torch.full((3, 40, 40), 7, dtype=torch.uint8)
    assert torch.equal(CropDataset(collection(tone), 32, 1).crop(0, 0), tone[:, :32, :32])


def test_crop_errors() -> None:
    photos = many_sizes()
    with pytest.raises(ValueError, match=r"'0.png' is 90 x 40, but the crop size is 64: load .* min_side=64"):
        CropDataset(photos, 64, 10)
    with pytest.raises(ValueError, match="length is 0"):
        CropDataset(photos, 32, 0)
    with pytest.raises(ValueError, match="1 <= smallest <= largest"):
        CropDataset(photos, 32, 10, scales=(0.5, 2.0))
    with pytest.raises(IndexError):
        CropDataset(photos, 32, 10)[10]


# ---- evaluation crops ----


def overlaps(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_evaluation_crops_are_what_the_boxes_say() -> None:
    photos = many_sizes()
    crops = EvaluationCrops(photos, 16, 24)
    assert crops.images.shape == (24, 3, 16, 16)
    for pixels, source in zip(crops.images, crops.sources, strict=True):
        left, top, right, bottom = source.box
        image = photos.images[photos.names.index(source.photograph)]
        assert torch.equal(pixels, image[:, top:bottom, left:right])
    for i, a in enumerate(crops.sources):
        for b in crops.sources[:i]:
            assert a.photograph != b.photograph or not overlaps(a.box, b.box)
    # The 33 x 32 photograph has four cells; the other three share the rest.
    assert sorted(Counter(crops.photographs).values()) == [4, 6, 7, 7]
    assert crops.record == {
        "data": "synthetic",
        "split": "all",
        "crop": 16,
        "count": 24,
        "photographs": 4,
        "scale": 1.0,
        "seed": 0,
        "overlapping": 0,
        "hash": hashlib.sha256(crops.images.numpy().tobytes()).hexdigest(),
    }


def test_evaluation_crops_repeat_and_follow_the_seed() -> None:
    first, again, other = (EvaluationCrops(many_sizes(), 16, 20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert first.record["hash"] != other.record["hash"]
    batches = list(first.batches(8))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    assert torch.equal(torch.cat(batches), to_float(first.images))


def test_evaluation_fills_up_with_overlapping_crops_and_never_repeats_one() -> None:
    photos = collection(as_tensor(noise(40, 40)).contiguous())
    crops = EvaluationCrops(photos, 32, 50)
    assert crops.record["overlapping"] == 49
    assert len({source.box for source in crops.sources}) == 50
    everything = EvaluationCrops(photos, 32, 1000)
    assert len(everything) == everything.record["count"] == 81


def test_evaluation_scale_shrinks_first() -> None:
    image = ramp(64, 128)
    crops = EvaluationCrops(collection(image), 16, 8, scale=2.0)
    assert sorted(source.box for source in crops.sources) == [
        (x, y, x + 32, y + 32) for x in range(0, 128, 32) for y in (0, 32)
    ]
    small = torch.nn.functional.interpolate(image[None], size=(32, 64), mode="bicubic", antialias=True)[0]
    for pixels, source in zip(crops.images, crops.sources, strict=True):
        x, y = source.box[0] // 2, source.box[1] // 2
        assert torch.equal(pixels, small[:, y : y + 16, x : x + 16])


def test_built_in_photographs_are_pinned() -> None:
    """A change of the list, the decoder or the choice of crops must be noticed; the test split is all PNG."""
    pytest.importorskip("mvtbdata")
    photos = load_collection("mvtb", min_side=64)
    assert {split: len(photos.split(split)) for split in ("train", "val", "test")} == {
        "train": 39,
        "val": 12,
        "test": 11,
    }
    crops = EvaluationCrops(photos.split("test"), 64, 220)
    assert set(Counter(crops.photographs).values()) == {20}
    assert crops.record["hash"] == "3396bdf04f705f8d1342fd57f279f36d1d7076430337e71ff670fea8455cdfdb"
    train = CropDataset(photos.split("train"), 64, 100)
    assert train.batch(0, 0, 8).abs().max() <= 1.0
