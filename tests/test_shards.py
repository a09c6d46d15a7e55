# SPDX-License-Identifier: Apache-2.0
"""Shards hold the bytes of their files whatever happens to the writer, and say so when they do not."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiles import contents, write_tiles

from steadyvq.data import CropFeed, CropRule, Request, ShardWriter, StreamedCrops, open_source, sharding, verify_shards
from steadyvq.data.shards import ShardStore, is_shard_set

COUNT, SAMPLES = 90, 25


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    write_tiles(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def whole(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "shards"
    ShardWriter(tiles, folder, SAMPLES).write()
    return folder


@pytest.fixture
def shards(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(whole, tmp_path / "shards")
    return tmp_path / "shards"


# ---- what is written ----


def test_tars_hold_the_files_for_any_program(tiles, whole, tmp_path):
    assert [path.name for path in sorted(whole.glob("*.tar"))] == [f"shard-{i:05d}.tar" for i in range(4)]
    for path in sorted(whole.glob("*.tar")):
        subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True, stderr=subprocess.PIPE)
    assert contents(tmp_path) == contents(tiles)


def test_the_store_reads_every_file_in_any_order(tiles, whole):
    store = ShardStore(whole)
    wanted = contents(tiles)
    assert list(store.names) == sorted(wanted)
    for row in random.Random(0).sample(range(COUNT), COUNT):
        assert store.read(row) == wanted[store.names[row]]
    assert verify_shards(whole, decode=True) == []


def test_long_and_strange_names_survive(tiles, tmp_path):
    source = tmp_path / "source"
    photo = (tiles / "class00" / "tile00000.jpg").read_bytes()
    names = ["a" * 90 + "/" + "b" * 150 + ".jpg", "übermut/ſ 日本.jpg", "x.jpg", os.fsdecode(b"latin\xe9.jpg")]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(photo)
    ShardWriter(source, tmp_path / "out", 3).write()
    store = ShardStore(tmp_path / "out")
    assert sorted(store.names) == sorted(names)
    assert all(store.read(row) == photo for row in range(len(names)))
    assert verify_shards(tmp_path / "out", decode=True) == []


def test_threads_and_repetition_change_no_byte(tiles, whole, tmp_path):
    ShardWriter(tiles, tmp_path / "one", SAMPLES, threads=1).write()
    assert contents(tmp_path / "one") == contents(whole)
    times = {path: path.stat().st_mtime_ns for path in whole.iterdir() if not path.name.startswith(".")}
    again = ShardWriter(tiles, whole, SAMPLES)
    assert again.done == again.total == COUNT
    again.write(lambda count: pytest.fail("there is nothing to do"))
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_what_cannot_be_decoded_is_left_out_if_asked_for(tiles, tmp_path):
    source = shutil.copytree(tiles / "class00", tmp_path / "source" / "c").parent
    good = (source / "c" / "tile00000.jpg").read_bytes()
    (source / "c" / "torn.jpg").write_bytes(good[: len(good) // 2])
    (source / "c" / "gone.jpg").symlink_to("nowhere")
    plain = ShardWriter(source, tmp_path / "plain", 8).write()
    assert [name for name, _ in plain.skipped] == ["c/gone.jpg"]
    checked = ShardWriter(source, tmp_path / "checked", 8, check=True).write()
    assert [name for name, _ in checked.skipped] == ["c/gone.jpg", "c/torn.jpg"]
    assert plain.samples == checked.samples + 1 == COUNT // 6 + 1
    (problem,) = verify_shards(tmp_path / "plain", decode=True)
    assert "'c/torn.jpg' cannot be decoded" in problem
    assert verify_shards(tmp_path / "checked", decode=True) == []


def test_the_built_in_photographs_keep_their_splits(monkeypatch, tmp_path):
    from steadyvq.data import built_in

    some = built_in.mvtb_files()[::12]
    monkeypatch.setitem(built_in.BUILT_IN, "mvtb", lambda: some)
    ShardWriter("mvtb", tmp_path / "out", 3).write()
    source, direct = open_source(tmp_path / "out"), open_source("mvtb")
    held = {source.name(i): split for i, split in enumerate(source.splits)}
    assert held == {f"{split}/{name}": split for name, _, split in some}
    assert {direct.name(i): split for i, split in enumerate(direct.splits)} == {n: split for n, _, split in some}


# ---- kills ----


def killed(work) -> None:
    """Does something in a process that must die by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_writer_killed_again_and_again_leaves_the_same_shards(tiles, whole, tmp_path):
    out = tmp_path / "out"
    dice = random.Random(5)
    lives = 0
    while (writer := ShardWriter(tiles, out, SAMPLES)).done < writer.total:
        left = [dice.randint(1, SAMPLES + 10)]

        def tell(count: int, left: list[int] = left) -> None:
            left[0] -= count
            if left[0] <= 0:
                die()

        if writer.total - writer.done < left[0]:
            break
        killed(lambda writer=writer, tell=tell: writer.write(tell))
        lives += 1
        assert not (out / "index.json").exists()
        with pytest.raises(ValueError, match=r"not complete \(no index.json\).*goes on"):
            open_source(out)
    assert lives >= 4
    assert ShardWriter(tiles, out, SAMPLES).write().samples == COUNT
    assert contents(out) == contents(whole)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [".lock"], "no half file is left"


@pytest.mark.parametrize("name", ["plan.json", "shard-00001.tar", "shard-00001.json", "index.json"])
@pytest.mark.parametrize("before", [True, False])
def test_killed_around_every_rename(tiles, whole, tmp_path, name, before, monkeypatch):
    rename = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if target.name == name and before:
            die()
        done = rename(path, target)
        if target.name == name:
            die()
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        killed(lambda: ShardWriter(tiles, tmp_path / "out", SAMPLES).write())
    ShardWriter(tiles, tmp_path / "out", SAMPLES).write()
    assert contents(tmp_path / "out") == contents(whole)


def test_a_full_disk_keeps_finished_shards(tiles, whole, tmp_path, monkeypatch):
    def full(file: int) -> None:
        if (tmp_path / "out" / "shard-00001.tar").exists():
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sharding.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            ShardWriter(tiles, tmp_path / "out", SAMPLES).write()
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == ["shard-00000.tar", "shard-00001.tar"]
    writer = ShardWriter(tiles, tmp_path / "out", SAMPLES)
    assert writer.done == 2 * SAMPLES
    writer.write()
    assert contents(tmp_path / "out") == contents(whole)


# ---- what does not fit together ----


def test_another_source_or_other_settings_are_refused(tiles, whole, tmp_path):
    before = contents(whole)
    with pytest.raises(ValueError, match=r"begun with something else \(samples\).*same source and options"):
        ShardWriter(tiles, whole, SAMPLES + 1)
    other = shutil.copytree(tiles, tmp_path / "other")
    (other / "class00" / "tile00000.jpg").rename(other / "class00" / "renamed.jpg")
    with pytest.raises(ValueError, match=r"begun with something else \(the list of file names\)"):
        ShardWriter(other, whole, SAMPLES)
    with pytest.raises(ValueError, match="holds shards already"):
        ShardWriter(whole, tmp_path / "out")
    with pytest.raises(ValueError, match="not empty"):
        ShardWriter(tiles, tiles)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no images: put .png, .jpg or .webp"):
        ShardWriter(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="samples is 0"):
        ShardWriter(tiles, tmp_path / "out", 0)
    assert contents(whole) == before
    assert not (tmp_path / "out").exists()


def test_one_writer_at_a_time(tiles, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing shards"):
            ShardWriter(tiles, tmp_path / "out").write()
    assert ShardWriter(tiles, tmp_path / "out").write().samples == COUNT


def test_files_of_these_names_make_no_shard_set(tiles):
    assert not is_shard_set(tiles)
    (tiles / "index.json").write_text('{"pictures": []}')
    assert not is_shard_set(tiles)
    (tiles / "index.json").unlink()


def test_a_torn_tar(shards, tiles):
    tar = shards / "shard-00002.tar"
    tar.write_bytes(tar.read_bytes()[:-20_000])
    with pytest.raises(ValueError, match=r"shard-00002.tar has \d+ bytes, but the index says \d+ \(cut short"):
        open_source(shards)
    (problem,) = verify_shards(shards)
    assert "shard-00002.tar" in problem
    assert ShardWriter(tiles, shards, SAMPLES).done == COUNT - SAMPLES
    tar.unlink()
    with pytest.raises(ValueError, match=r"shard-00002.tar is missing: run the same"):
        open_source(shards)
    writer = ShardWriter(tiles, shards, SAMPLES)
    assert writer.done == COUNT - SAMPLES
    writer.write()
    assert verify_shards(shards) == []


def test_the_index_of_another_tar(tiles, shards, tmp_path):
    """Tars of the same size, files of the same sizes: only the names in the headers differ."""
    other = tmp_path / "others"
    for path in sorted(tiles.rglob("*.jpg")):
        target = other / path.parent.name / path.name.replace("tile", "pile")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    ShardWriter(other, tmp_path / "other_shards", SAMPLES).write()
    shutil.copyfile(tmp_path / "other_shards" / "shard-00001.tar", shards / "shard-00001.tar")
    said = r"index does not match .*shard-00001.tar: before byte 512 the tar has '.*pile.*' of \d+ bytes, the index '.*tile"
    with pytest.raises(ValueError, match=said):
        open_source(shards)
    assert "shard-00001.tar" in verify_shards(shards)[0]


def test_the_table_of_another_index(shards, tmp_path):
    shutil.copyfile(shards / "shard-00000.json", shards / "shard-00001.json")
    with pytest.raises(ValueError, match=r"shard-00001.json is not the table that index.json names"):
        open_source(shards)
    (shards / "shard-00001.json").unlink()
    with pytest.raises(ValueError, match=r"the table .*shard-00001.json cannot be read"):
        open_source(shards)
    (shards / "index.json").write_text((shards / "index.json").read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(ValueError, match="no index of version 1"):
        open_source(shards)
    (shards / "index.json").write_text('{"format": "steadyvq-shards", "ver')
    with pytest.raises(ValueError, match=r"index.json cannot be read.*delete it"):
        open_source(shards)


def test_a_flipped_bit_is_found(shards, tiles):
    store = ShardStore(shards)
    row = COUNT - 3
    tar = shards / "shard-00003.tar"
    content = bytearray(tar.read_bytes())
    content[int(store._offset[row]) + 99] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00003.tar are not those of the index \(CRC-32 differs\)"):
        ShardStore(shards).read(row)
    problems = verify_shards(shards)
    assert any("SHA-256 differs" in problem for problem in problems)
    assert any(f"{store.names[row]!r} is damaged" in problem for problem in problems)


def test_a_tar_with_other_files_of_the_same_size_is_found_by_verify(shards, tiles):
    """The first and last header are right, one in between is not."""
    tar = shards / "shard-00000.tar"
    with tarfile.open(tar) as opened:
        member = opened.getmembers()[7]
    content = bytearray(tar.read_bytes())
    header = tarfile.TarInfo("class00/else00007.jpg")
    header.size = member.size
    content[member.offset : member.offset + 512] = header.tobuf()
    tar.write_bytes(content)
    problems = verify_shards(shards)
    assert any("other files, or at other places" in problem for problem in problems)


# ---- the command ----


@pytest.mark.slow
def test_the_commands(tiles, steadyvq_command, tmp_path):
    (tmp_path / "photos").symlink_to(tiles)
    done = steadyvq_command("data", "shard", "photos", "out", "--samples", SAMPLES)
    assert done.returncode == 0, done.stderr
    assert "shard 90/90" in done.stderr
    assert "90 images in 4 shards" in done.stderr
    good = steadyvq_command("data", "verify", "out", "--decode")
    assert (good.returncode, good.stdout) == (0, "90 images in 4 shards are as they were written: out\n")
    tar = tmp_path / "out" / "shard-00000.tar"
    content = bytearray(tar.read_bytes())
    content[5000] ^= 1
    tar.write_bytes(content)
    bad = steadyvq_command("data", "verify", "out")
    assert bad.returncode == 2
    assert "shard-00000.tar" in bad.stderr
    assert "Traceback" not in bad.stderr


@pytest.mark.slow
def test_twenty_thousand_files_killed_resumed_and_read_back(tmp_path):
    """A real writer killed with SIGKILL in the middle; then every image exactly once per epoch, however many workers."""
    count, source, out = 20_000, tmp_path / "tiles", tmp_path / "out"
    write_tiles(source, count, side=32, photographs=20)
    command = [sys.executable, "-m", "steadyvq", "data", "shard", str(source), str(out), "--samples", "1500"]
    writer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (out / "shard-00004.tar").exists():
        assert writer.poll() is None
        time.sleep(0.002)
    writer.kill()
    assert writer.wait() == -signal.SIGKILL
    assert not (out / "index.json").exists()
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert resumed.returncode == 0, resumed.stderr
    assert "lie in finished shards" in resumed.stderr
    assert json.loads((out / "index.json").read_text())["samples"] == count
    assert verify_shards(out) == []
    crops = StreamedCrops(open_source(out, min_side=16), CropRule(16, (1.0, 1.0), skip_flat=False), count, seed=3)
    orders = []
    for epoch, workers in enumerate((1, 2, 3)):
        orders.append(read_back(crops, workers, epoch, 0))
        assert Counter(orders[-1]) == Counter(range(count))
    begun = 7_000
    assert read_back(crops, 2, 1, begun) == orders[1][begun:], "a resume in the middle of the epoch"


def read_back(crops: StreamedCrops, workers: int, epoch: int, begun: int) -> list[int]:
    """The photographs of an epoch from a position on, as a training run asks for them."""
    feed = CropFeed(crops, workers)
    requests = [Request(epoch, range(start, start + 250)) for start in range(begun, len(crops), 250)]
    numbers: list[int] = []
    with feed.running(requests):
        for request in requests:
            assert feed.batch(*request).shape == (250, 3, 16, 16)
            numbers += feed.numbers
    assert feed.report().faults.replaced == 0
    return numbers


def test_shards_of_every_kind_of_picture_decode_as_their_files(tmp_path):
    from steadyvq.data import decode_image

    source = tmp_path / "source"
    source.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(source / "turned.jpg", exif=exif, quality=95)
    image.convert("CMYK").save(source / "cmyk.jpg", quality=95)
    image.convert("L").save(source / "grey.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(source / "deep.png")
    Image.fromarray(np.dstack([pixels, pixels[..., 0]]), "RGBA").save(source / "alpha.png")
    image.save(source / "web.webp", lossless=True)
    ShardWriter(source, tmp_path / "out").write()
    shards, folder = (open_source(data, min_side=24, max_side=40) for data in (tmp_path / "out", source))
    for number in range(len(shards)):
        wanted = decode_image(source / shards.name(number), 24, 40)
        assert (shards.decode(number) == wanted).all()
        assert (folder.decode(number) == wanted).all()
    assert shards.decode([shards.name(i) for i in range(6)].index("turned.jpg")).shape == (3, 36, 24)
