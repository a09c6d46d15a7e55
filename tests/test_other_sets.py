# SPDX-License-Identifier: Apache-2.0
"""Data sets of Hugging Face and of webdataset, made of real photographs, in the pipeline of streamed ones."""

import io
import json
import os
import shutil
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_recipe
from runs import assert_same, log, state
from tiles import write_tiles

from steadyvq.cli import main
from steadyvq.data import CropFeed, CropRule, Request, StreamedCrops, decode_image, open_source
from steadyvq.data.addresses import absolute_address, parse_address, short_name
from steadyvq.data.tarsets import TarSet, read_tars, unread_tars
from steadyvq.training.config import resolve, with_absolute_paths

COUNT, SIDE = 60, 24


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    write_tiles(folder, COUNT)
    return folder


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def order(data: str, workers: int, begun: int = 0) -> tuple:
    """(photographs, images, what could not be read) of an epoch from a batch on."""
    crops = StreamedCrops(open_source(data, SIDE), CropRule(SIDE, (1.0, 1.5)), COUNT, seed=7)
    feed = CropFeed(crops, workers)
    wanted = [Request(0, range(start, start + 10)) for start in range(10 * begun, COUNT, 10)]
    numbers, images = [], []
    with feed.running(wanted):
        for request in wanted:
            images.append(feed.batch(*request))
            numbers += feed.numbers
    return numbers, torch.cat(images), feed.report().faults


def assert_streams(data: str, bad: int = 0) -> None:
    """Every photograph once, the same with any number of workers and after a resume; corrupt ones are replaced."""
    numbers, images, faults = order(data, 0)
    assert len(numbers) == COUNT
    assert len(set(Counter(numbers)) ^ set(range(COUNT))) == bad
    assert faults.replaced == len(faults.reasons) == bad
    for workers, begun in ((2, 0), (1, 2)):
        again, pixels, _ = order(data, workers, begun)
        assert again == numbers[10 * begun :]
        assert torch.equal(pixels, images[10 * begun :])


# ---- names ----


def test_addresses():
    assert parse_address("my_photos") is None
    assert parse_address("mvtb") is None
    assert parse_address(Path("a:b")) is None
    found = parse_address("hf:imagenet-1k:split=train[:10%]:column=image")
    assert (found.kind, found.place) == ("hf", "imagenet-1k")
    assert found.settings == {"split": "train[:10%]", "column": "image"}
    assert short_name("hf:some/set:split=train") == "set"
    assert short_name("wds:/data/train-{000..146}.tar") == "train--000..146-.tar"
    assert short_name("/data/my photos") == "my photos"


def test_addresses_become_absolute_where_they_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    assert absolute_address("hf:saved:split=train") == f"hf:{tmp_path}/saved:split=train"
    assert absolute_address("hf:some/set") == "hf:some/set"
    wds = with_absolute_paths(resolve({}, ["data.source=wds:a-{0..3}.tar:val=b.tar:image=png"]))
    assert wds.data.source == f"wds:{tmp_path}/a-{{0..3}}.tar:val={tmp_path}/b.tar:image=png"
    assert with_absolute_paths(wds).data.source == wds.data.source


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("hf:", "names no data set: write hf:NAME_OR_PATH"),
        ("wds:", "names no data set: write wds:PATTERN_OF_TARS"),
        ("hf:a:splt=train", r"sets 'splt' \(did you mean 'split'\?\), but hf: has the settings split, column"),
        ("wds:a.tar:val=", "names nothing for 'val'"),
    ],
)
def test_addresses_that_make_no_sense(data, message):
    with pytest.raises(ValueError, match=message):
        open_source(data)


@pytest.mark.parametrize(("data", "library"), [("hf:some/set", "datasets"), ("wds:a.tar", "webdataset")])
def test_a_missing_library_names_the_extra(data, library, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["train", "quickstart", "--data", data, "--out", "nowhere"]) == 2
    told = capsys.readouterr().err
    assert f"needs the library {library}, which is not installed: pip install 'steadyvq[data]'" in told
    assert told.count("\n") == 1


# ---- webdataset ----


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def tars(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tars of 15 samples: an image, its class, a text."""
    folder = tmp_path_factory.mktemp("tars")
    files = sorted(tiles.rglob("*.jpg"))
    for number in range(4):
        content: dict[str, bytes] = {"__meta__/about.txt": b"no sample"}
        for path in files[number::4]:
            key = f"deep/{path.parent.name}-{path.stem}"
            content[f"{key}.txt"] = b"words"
            content[f"{key}.JPG"] = path.read_bytes()
            content[f"{key}.cls"] = f"{int(path.parent.name[-2:])}\n".encode()
        write_tar(folder / f"set-{number:03d}.tar", content)
    return folder


class TestTars:
    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        pytest.importorskip("webdataset")

    def test_samples_are_those_of_the_library(self, tars, tiles):
        """webdataset itself goes through the same tars: the same bytes and classes in the same order."""
        import webdataset

        pattern = f"{tars}/set-{{000..003}}.tar"
        source = open_source(f"wds:{pattern}")
        theirs = list(webdataset.WebDataset(pattern, shardshuffle=False))
        assert len(source) == len(theirs) == COUNT
        for row, sample in enumerate(theirs):
            assert source.store.read(row) == sample["jpg"]
            assert source.classes[source.labels[row]] == sample["cls"].decode().strip()
            assert source.name(row).endswith(sample["__key__"] + ".JPG")
        name = theirs[5]["__key__"].removeprefix("deep/").replace("-", "/") + ".jpg"
        assert torch.equal(source.decode(5), decode_image(tiles / name))
        assert source.classes == tuple("012345")
        assert {"train", "val"} == set(source.splits)
        wild = open_source(f"wds:{tars}/set-*.tar")
        assert wild.store.names[:] == source.store.names[:]

    def test_they_stream(self, tars):
        assert_streams(f"wds:{tars}/set-{{000..003}}.tar")

    def test_patterns_for_splits(self, tars):
        source = open_source(f"wds:{tars}/set-00[01].tar:val={tars}/set-002.tar:test={tars}/set-003.tar")
        assert [len(source.split(split)) for split in ("train", "val", "test")] == [30, 15, 15]
        assert all(source.split("val").name(i).startswith("val/set-002/deep/class") for i in range(15))

    def test_tars_are_read_through_once(self, tars, tmp_path, monkeypatch):
        data = f"wds:{tars}/set-{{000..003}}.tar"
        total = sum(path.stat().st_size for path in tars.iterdir())
        assert unread_tars(data) == total
        told: list[int] = []
        read_tars(data, told.append)
        assert (sum(told), len(told), unread_tars(data)) == (total, 4, 0)
        monkeypatch.setattr(TarSet, "_read_through", lambda *_: pytest.fail("it is known"))
        assert len(open_source(data)) == COUNT
        assert not list(tars.glob("*.json")), "nothing is written beside the tars"
        assert unread_tars("mvtb") == unread_tars(tars) == 0

    def test_an_interrupted_pass_keeps_the_tars_that_are_done(self, tars):
        data = f"wds:{tars}/set-{{000..003}}.tar"
        done: list[int] = []

        def stop(size: int) -> None:
            done.append(size)
            if len(done) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            read_tars(data, stop)
        assert len(TarSet(parse_address(data)).unread()) == 2

    def test_a_cache_that_cannot_be_written(self, tars, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(ValueError, match=r"which cannot be written .*: set XDG_CACHE_HOME to a folder that can"):
            open_source(f"wds:{tars}/set-000.tar")

    def test_several_processes_read_every_tar_once(self, tars, monkeypatch, tmp_path):
        """Three at the same time; each notes in a file which tars it has read."""
        data, notes = f"wds:{tars}/set-*.tar", tmp_path / "notes"
        read = TarSet._read_through

        def noted(self: TarSet, path: Path) -> object:
            with notes.open("a") as file:
                file.write(f"{path.name}\n")
            time.sleep(0.05)
            return read(self, path)

        monkeypatch.setattr(TarSet, "_read_through", noted)
        children = []
        for _ in range(3):
            children.append(os.fork())
            if not children[-1]:
                os._exit(0 if len(open_source(data)) == COUNT else 1)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        assert sorted(notes.read_text().split()) == [f"set-{i:03d}.tar" for i in range(4)]

    @pytest.mark.parametrize("harm", ["cut", "words", "other"])
    def test_a_damaged_cache_or_another_tar_is_read_anew(self, tars, tmp_path, harm):
        own = shutil.copytree(tars, tmp_path / "tars")
        data = f"wds:{own}/set-*.tar"
        before = [open_source(data).store.read(row) for row in range(COUNT)]
        (cache, *_) = sorted((tmp_path / "cache" / "steadyvq" / "webdataset").glob("*.json"))
        if harm == "cut":
            cache.write_bytes(cache.read_bytes()[:-40])
        elif harm == "words":
            cache.write_text("these are words")
        else:
            first, last = own / "set-000.tar", own / "set-003.tar"
            first.write_bytes(last.read_bytes())
            before[:15] = before[45:]
        assert len(TarSet(parse_address(data)).unread()) == 1
        assert [open_source(data).store.read(row) for row in range(COUNT)] == before

    def test_what_changes_later_is_found_when_it_is_read(self, tars, tmp_path):
        own = shutil.copytree(tars, tmp_path / "tars")
        data = f"wds:{own}/set-*.tar"
        source = open_source(data)
        tar = own / "set-001.tar"
        content = bytearray(tar.read_bytes())
        content[int(source.store._offset[17]) + 99] ^= 1
        tar.write_bytes(content)
        with pytest.raises(ValueError, match=r"its bytes in set-001.tar are not those of the index \(CRC-32 differs\)"):
            source.store.read(17)

    def test_corrupt_images_are_replaced(self, tars, tiles, tmp_path):
        files = sorted(tiles.rglob("*.jpg"))
        torn = {f"s{i:02d}.jpg": path.read_bytes()[: 300 if i in (7, 31) else None] for i, path in enumerate(files)}
        write_tar(tmp_path / "torn.tar", torn)
        assert_streams(f"wds:{tmp_path}/torn.tar", bad=2)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("wds:TARS/no-{0..3}.tar", "names no file '.*/no-0.tar': give tar files that exist"),
            ("wds:TARS/*.gz", r"names no file '.*/\*.gz'"),
            ("wds:s3://bucket/a.tar", "is not on a disk, but samples are read at any position"),
            ("wds:TARS/set-000.tar:val=TARS/set-00*.tar", "set-000.tar twice: every tar belongs to one split"),
            ("wds:TARS/set-000.tar:image=png", "no sample of .* has an image ending in png: .*:image=ENDING"),
            ("wds:TARS/set-000.tar:label=txt", "holds 'words', but a class is a whole number"),
            ("wds:OWN/packed.tar", "cannot be read as a tar .*not compressed is needed"),
            ("wds:OWN/words.tar", "cannot be read as a tar"),
            ("wds:OWN/cut.tar", "ends in the middle of a file header, at byte"),
            ("wds:OWN/torn.tar", "cannot be read as a tar .unexpected end of data"),
        ],
    )
    def test_what_is_no_such_set(self, tars, tmp_path, data, message):
        with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
            tar.add(tars / "set-000.tar", "a.jpg")
        (tmp_path / "words.tar").write_text("these are words")
        whole = (tars / "set-000.tar").read_bytes()
        with tarfile.open(tars / "set-000.tar") as tar:
            members = tar.getmembers()
        (tmp_path / "cut.tar").write_bytes(whole[: members[5].offset + 300])
        (tmp_path / "torn.tar").write_bytes(whole[: members[8].offset + 700])
        with pytest.raises(ValueError, match=message):
            open_source(data.replace("TARS", str(tars)).replace("OWN", str(tmp_path)))


# ---- Hugging Face ----


@pytest.fixture(scope="module")
def saved(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiles as others have them: saved on disk with splits, one saved split, a parquet file, a folder of images."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("hub")
    files = sorted(tiles.rglob("*.jpg"))
    features = datasets.Features(
        {"id": datasets.Value("int64"), "image": datasets.Image(), "label": datasets.ClassLabel(names=list("fedcba"))}
    )

    def made(chosen: list[Path], labelled: bool = True) -> object:
        labels = [int(path.parent.name[-2:]) if labelled else -1 for path in chosen]
        columns = {"id": list(range(len(chosen))), "image": [str(path) for path in chosen], "label": labels}
        return datasets.Dataset.from_dict(columns, features=features)

    parts = {"train": made(files[:40]), "validation": made(files[40:55]), "test": made(files[55:], labelled=False)}
    datasets.DatasetDict(parts).save_to_disk(folder / "splits")
    made(files).save_to_disk(folder / "one")
    made(files).to_parquet(folder / "set.parquet")
    (folder / "parquets").mkdir()
    made(files[:40]).to_parquet(folder / "parquets" / "train-00000-of-00001.parquet")
    made(files[40:]).to_parquet(folder / "parquets" / "validation-00000-of-00001.parquet")
    shutil.copytree(tiles, folder / "images")
    two = made(files).add_column("other", [None] * COUNT).cast_column("other", datasets.Image())
    two.save_to_disk(folder / "two")
    return folder


class TestHub:
    @pytest.fixture(autouse=True)
    def _offline(self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    @pytest.mark.parametrize("place", ["one", "set.parquet", "images"])
    def test_images_are_those_of_the_files(self, saved, tiles, place):
        source = open_source(f"hf:{saved}/{place}")
        files = sorted(tiles.rglob("*.jpg"))
        assert len(source) == COUNT
        assert source.name(3) == "train/000000003"
        for row in (0, 17, COUNT - 1):
            assert source.store.read(row) == files[row].read_bytes()
            assert torch.equal(source.decode(row), decode_image(files[row]))
        numbers = [int(path.parent.name[-2:]) for path in files]
        assert source.labels.tolist() == numbers
        named = [f"class{i:02d}" for i in range(6)] if place == "images" else list("fedcba")
        assert source.classes == tuple(named), "in the order of the data set"
        assert {"train", "val"} == set(source.splits)
        assert_streams(f"hf:{saved}/{place}")

    def test_splits(self, saved):
        source = open_source(f"hf:{saved}/splits")
        assert [len(source.split(split)) for split in ("train", "val", "test")] == [40, 15, 5]
        assert source.labels[55:].tolist() == [-1] * 5
        assert source.labels[:55].min() >= 0
        held = open_source(f"hf:{saved}/splits:split=validation")
        assert len(held) == 15
        assert set(held.splits) == {"train", "val"}
        assert len(open_source(f"hf:{saved}/parquets")) == COUNT
        assert len(open_source(f"hf:{saved}/parquets").split("val")) == COUNT - 40
        assert len(open_source(f"hf:{saved}/set.parquet:split=train[:10%]")) == 6

    def test_other_labels(self, saved):
        source = open_source(f"hf:{saved}/one:label=id:column=image")
        assert source.classes == tuple(str(i) for i in range(COUNT))
        assert source.labels.tolist() == list(range(COUNT))

    def test_corrupt_images_are_replaced(self, saved, tiles, tmp_path):
        import datasets

        files = sorted(tiles.rglob("*.jpg"))
        rows = [{"bytes": path.read_bytes()[: 300 if i in (7, 31) else None]} for i, path in enumerate(files)]
        rows[40] = None
        made = datasets.Dataset.from_dict(
            {"image": rows}, features=datasets.Features({"image": datasets.Image(decode=False)})
        )
        made.save_to_disk(tmp_path / "torn")
        assert_streams(f"hf:{tmp_path}/torn", bad=3)
        reasons = order(f"hf:{tmp_path}/torn", 0)[2].reasons
        assert reasons["train/000000040"] == "the row holds no image"
        kept = shutil.copytree(tiles, tmp_path / "images")
        source = open_source(f"hf:{kept}")
        (kept / files[3].relative_to(tiles)).unlink()
        with pytest.raises(ValueError, match="No such file or directory"):
            source.decode(3)
        made = datasets.Dataset.from_dict({"png": [path.read_bytes() for path in files]})
        made.save_to_disk(tmp_path / "raw")
        assert open_source(f"hf:{tmp_path}/raw:column=png").store.read(5) == files[5].read_bytes()

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("hf:SAVED/two", r"has the columns of images image, other .*: choose one with hf:.*/two:column=NAME"),
            ("hf:SAVED/one:column=pixels", "has no column 'pixels': use one of id, image, label"),
            ("hf:SAVED/one:column=id", "the column 'id' of .* but it must hold images"),
            ("hf:SAVED/one:label=name", "has no column 'name'"),
            ("hf:SAVED/splits:split=extra", "has no split 'extra': use one of train, validation, test"),
            ("hf:SAVED/one:config=a", "saved on disk, which knows neither config"),
            ("hf:SAVED/words.txt", "a file that ends neither in .parquet nor in .arrow"),
            (
                "hf:SAVED/nothing",
                "the data set '.*/nothing' cannot be loaded .*: give a folder written by save_to_disk",
            ),
            ("hf:nobody/nothing", "the data set 'nobody/nothing' cannot be loaded"),
        ],
    )
    def test_what_cannot_be_had(self, saved, data, message):
        (saved / "words.txt").write_text("words")
        with pytest.raises(ValueError, match=message) as told:
            open_source(data.replace("SAVED", str(saved)))
        assert "\n" not in str(told.value)


# ---- the commands ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "wds"])
def test_training_evaluating_and_encoding(kind, tars, tmp_path, monkeypatch, capsys, request):
    """Runs with other numbers of workers, resumed and not, agree to the last bit; the same set is evaluated and encoded."""
    if kind == "wds":
        pytest.importorskip("webdataset")
        data = f"wds:{tars}/set-{{000..002}}.tar:val={tars}/set-003.tar"
    else:
        data = f"hf:{request.getfixturevalue('saved')}/splits:split=train"
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(Path(data), keep_checkpoints=3)
    recipe["data"] |= {"source": data, "epoch_samples": 24, "workers": 1, "min_scale": 1.5}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "r.yaml", "--out", "whole"]) == 0
    told = capsys.readouterr().err
    assert ("index (bytes)" in told) == (kind == "wds")
    assert main(["train", "r.yaml", "--out", "run", "--set", "data.workers=0"]) == 0
    assert_same(state(tmp_path / "whole"), state(tmp_path / "run"))
    for path in sorted((tmp_path / "run" / "checkpoints").glob("step-*.safetensors"))[1:]:
        path.unlink()
    assert main(["train", "--resume", "run", "--set", "data.workers=2"]) == 0
    assert_same(state(tmp_path / "whole"), state(tmp_path / "run"))
    assert main(["eval", "run", "--lpips", "none"]) == 0
    assert main(["encode", "run", "--data", data, "--out", "t.npz"]) == 0
    with np.load("t.npz") as file:
        assert len(file["tokens"]) == (40 if kind == "hf" else COUNT)
    rows = [row for row in log(tmp_path / "run") if row["kind"] == "data"]
    assert all(row["replaced"] == 0 for row in rows)
    (record,) = (tmp_path / "run" / "evaluations").glob("eval-*.json")
    assert ":" not in record.name
    last = max((tmp_path / "run" / "evaluations").glob("step-*.json"))
    assert json.loads(record.read_text())["pixels_hash"] == json.loads(last.read_text())["pixels_hash"]
    assert main(["eval", "run", "--lpips", "none", "--scale", "1", "--out", "e.json"]) == 0
    assert json.loads(Path("e.json").read_text())["pixels_hash"] != json.loads(last.read_text())["pixels_hash"]
    assert main(["eval", "run", "--lpips", "none", "--scale", "0.5"]) == 2
    assert "--scale is 0.5, but photographs are shrunk by a factor of at least 1" in capsys.readouterr().err
