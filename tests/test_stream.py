# SPDX-License-Identifier: Apache-2.0
"""Streamed photographs: the same crops in the same order whoever prepares them, and every photograph once per pass."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_same, log, start, state, wait
from tiles import write_tiles

from steadyvq.data import (
    CropFeed,
    CropRule,
    ImageSource,
    Request,
    ShardWriter,
    StreamedCrops,
    decode_image,
    load_collection,
    open_photographs,
    open_source,
    to_float,
    usable_workers,
)
from steadyvq.data.feed import FeedReport
from steadyvq.data.names import PackedNames, classes_of, split_by_folder
from steadyvq.data.stream import Faults
from steadyvq.training.config import resolve
from steadyvq.training.loop import Engine, Interrupted
from steadyvq.training.photographs import with_counted_epoch
from steadyvq.training.run import RunFolder
from steadyvq.training.tokenizer_task import TokenizerTask

COUNT, SIDE = 60, 24
RULE = CropRule(SIDE, (1.0, 1.5))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    write_tiles(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def shards(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    ShardWriter(tiles, folder, 16).write()
    return folder


@pytest.fixture(scope="module")
def damaged(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The tiles with some files that cannot be read: (folder, name -> part of the reason)."""
    folder = shutil.copytree(tiles, tmp_path_factory.mktemp("damaged") / "tiles")
    good = (folder / "class00" / "tile00000.jpg").read_bytes()
    (folder / "class00" / "tile00001.jpg").write_bytes(good[: len(good) // 2])
    (folder / "class02" / "tile00002.jpg").write_bytes(b"")
    (folder / "class04" / "tile00000.jpg").write_bytes(b"these are words")
    reasons = {
        "class00/tile00001.jpg": "truncated",
        "class02/tile00002.jpg": "not a png, jpeg or webp image",
        "class04/tile00000.jpg": "not a png, jpeg or webp image",
    }
    return folder, reasons


def streamed(data: Path, length: int = COUNT, seed: int = 7) -> StreamedCrops:
    return StreamedCrops(open_source(data, SIDE, 200), RULE, length, seed)


def requests(begin: int, end: int, size: int, length: int) -> list[Request]:
    """Batches of a run from a batch number to another, none over the end of an epoch."""
    per_epoch = length // size
    places = [divmod(number, per_epoch) for number in range(begin, end)]
    return [Request(epoch, range(i * size, (i + 1) * size)) for epoch, i in places]


def run(crops: StreamedCrops, workers: int, wanted: list[Request]) -> tuple[list[torch.Tensor], list[int], CropFeed]:
    feed = CropFeed(crops, workers)
    images, numbers = [], []
    with feed.running(wanted):
        for request in wanted:
            images.append(feed.batch(*request))
            numbers += feed.numbers
    return images, numbers, feed


# ---- names, splits, classes ----


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
@settings(max_examples=50)
def test_packed_names_are_the_names(names):
    packed = PackedNames(names)
    assert list(packed) == names
    assert packed[:] == names
    assert packed[1:-1] == names[1:-1]
    if names:
        assert packed[-1] == names[-1]
    with pytest.raises(IndexError):
        packed[len(names)]


def test_splits_and_classes_of_folders():
    imagenet = ["train/n01/a.jpg", "train/n02/b.jpg", "val/n01/c.jpg"]
    assert split_by_folder(imagenet) == ("train", "train", "val")
    assert split_by_folder(["train/n01/a.jpg", "train/n02/b.jpg"]) is None
    assert split_by_folder([*imagenet, "d.jpg"]) is None
    assert split_by_folder([*imagenet, "other/d.jpg"]) is None
    classes, labels = classes_of(imagenet)
    assert classes == ("n01", "n02")
    assert labels.tolist() == [0, 1, 0]
    assert classes_of(["b/x.jpg", "a/deep/y.jpg"])[1].tolist() == [1, 0]
    for flat in (["a.jpg", "b.jpg"], ["n01/a.jpg", "b.jpg"], ["train/a.jpg", "val/b.jpg"]):
        assert classes_of(flat)[0] == ()
        assert set(classes_of(flat)[1].tolist()) == {-1}


def test_a_folder_its_shards_and_memory_have_the_same_splits(tiles, shards):
    loaded = load_collection(tiles, SIDE, test_fraction=0.2)
    for data in (tiles, shards):
        source = open_source(data, SIDE, test_fraction=0.2)
        assert [source.name(i) for i in range(COUNT)] == list(loaded.names)
        assert source.splits == loaded.splits
        assert source.classes == tuple(f"class{i:02d}" for i in range(6))
        for split in ("train", "val", "test"):
            part = source.split(split)
            assert [part.name(i) for i in range(len(part))] == list(loaded.split(split).names)
            assert part.split_label == split
            chosen = part.load(100)
            assert chosen.names == loaded.split(split).names
            assert all(map(torch.equal, chosen.images, loaded.split(split).images))
    with pytest.raises(ValueError, match=r"no split 'vel' \(did you mean 'val'\?\): use one of train, val, all"):
        open_source(tiles).split("vel")


def test_folders_called_train_and_val_are_the_splits(tiles, tmp_path):
    for i, path in enumerate(sorted(tiles.rglob("*.jpg"))):
        target = tmp_path / ("val" if i % 7 == 0 else "train") / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    source = open_source(tmp_path)
    val = source.split("val")
    assert len(val) == len([i for i in range(COUNT) if i % 7 == 0])
    assert all(val.name(i).startswith("val/") for i in range(len(val)))
    for i in range(len(val)):
        assert val.classes[int(val.labels[val.rows[i]])] == val.name(i).split("/")[1]


def test_one_photograph_alone_is_its_own_held_out_set(tiles, tmp_path):
    shutil.copyfile(tiles / "class00" / "tile00000.jpg", tmp_path / "one.jpg")
    source = open_source(tmp_path)
    assert source.split("val").split_label == load_collection(tmp_path).split("val").split_label
    assert len(source.split("train")) == 1


def test_what_streams(tiles, shards):
    assert isinstance(open_photographs(shards, False, SIDE, None, 0.0), ImageSource)
    assert isinstance(open_photographs(tiles, True, SIDE, None, 0.0), ImageSource)
    assert not isinstance(open_photographs(tiles, False, SIDE, None, 0.0), ImageSource)


# ---- order and crops ----


def test_every_photograph_once_per_pass_in_another_order(tiles):
    crops = streamed(tiles)
    orders = [[crops.number(epoch, i) for i in range(COUNT)] for epoch in range(3)]
    assert all(sorted(order) == list(range(COUNT)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != [streamed(tiles, seed=8).number(0, i) for i in range(COUNT)]
    # Neither sorted nor a rotation: neighbours of one order are no neighbours of the next.
    pairs = [set(pairwise(order)) for order in orders]
    assert len(pairs[0] & pairs[1]) < COUNT // 6


@pytest.mark.parametrize("length", [17, 60, 150])
def test_epochs_of_another_length_are_pieces_of_the_same_line(tiles, length):
    crops = streamed(tiles, length)
    line = [crops.number(epoch, i) for epoch in range(-(-5 * COUNT // length)) for i in range(length)]
    for turn in range(5):
        assert sorted(line[turn * COUNT : (turn + 1) * COUNT]) == list(range(COUNT))


def test_a_crop_is_that_of_its_file(tiles, shards):
    for data in (tiles, shards):
        crops = streamed(data)
        batch = crops.batch(2, 5, 9)
        for i, position in enumerate(range(5, 14)):
            name = crops.source.name(crops.number(2, position))
            whole = decode_image(tiles / name, SIDE, 200)
            wanted = RULE.cut(whole, CropRule.draws(7, 2, position))
            assert torch.equal(batch[i], to_float(wanted))
    with pytest.raises(ValueError, match="open them with min_side=24"):
        StreamedCrops(open_source(tiles), RULE, COUNT)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_workers_change_nothing(shards, workers):
    crops = streamed(shards)
    wanted = requests(0, 12, 10, COUNT)
    images, numbers, feed = run(crops, workers, wanted)
    assert Counter(numbers) == Counter(list(range(COUNT)) * 2)
    assert Counter(numbers[:COUNT]) == Counter(range(COUNT))
    for request, image in zip(wanted, images, strict=True):
        assert torch.equal(image, crops.batch(request.epoch, request.positions.start, 10))
    assert feed.labels.tolist() == [crops.source.labels[number] for number in feed.numbers]
    assert feed.report().images == 120


@pytest.mark.parametrize(("before", "after"), [(2, 3), (1, 0), (0, 2)])
def test_a_resume_in_the_middle_of_an_epoch(shards, before, after):
    crops = streamed(shards)
    whole, order, _ = run(crops, 1, requests(0, 12, 10, COUNT))
    first, numbers, _ = run(crops, before, requests(0, 4, 10, COUNT))
    rest, others, _ = run(streamed(shards), after, requests(4, 12, 10, COUNT))
    assert numbers + others == order
    assert all(map(torch.equal, first + rest, whole))


def test_processes_and_micro_batches_share_an_epoch(shards):
    """Two processes with pieces of five each make up the batches of one."""
    crops = streamed(shards)
    whole, _, _ = run(crops, 0, requests(0, 6, 10, COUNT))
    parts = []
    for rank in range(2):
        mine = [
            Request(r.epoch, range(r.positions.start + 5 * rank, r.positions.start + 5 * rank + 5))
            for r in requests(0, 6, 10, COUNT)
        ]
        parts.append(run(streamed(shards), 2, mine)[0])
    for image, a, b in zip(whole, *parts, strict=True):
        assert torch.equal(image, torch.cat([a, b]))


def test_a_batch_that_nobody_announced_is_the_same(shards):
    crops = streamed(shards)
    feed = CropFeed(crops, 1)
    wanted = requests(0, 3, 10, COUNT)
    with feed.running(wanted):
        assert torch.equal(feed.batch(5, range(3, 8)), crops.batch(5, 3, 5))
        assert feed.unannounced == 1
        for request in wanted:
            assert torch.equal(feed.batch(*request), crops.batch(0, request.positions.start, 10))
    assert torch.equal(feed.batch(*wanted[0]), crops.batch(0, 0, 10))


def test_the_global_generator_is_left_alone(shards):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(streamed(shards), 2, requests(0, 3, 10, COUNT))
    assert torch.equal(torch.get_rng_state(), before)


# ---- what cannot be read ----


def test_a_corrupt_image_is_replaced_by_a_function_of_its_number(damaged):
    folder, reasons = damaged
    whole, order, first = run(streamed(folder), 0, requests(0, 12, 10, COUNT))
    source = streamed(folder).source
    bad = [i for i in range(COUNT) if source.name(i) in reasons]
    crops = streamed(folder)
    # The same one in both passes, never another corrupt one, and not one for all.
    places = {b: [p for p in range(2 * COUNT) if crops.number(*divmod(p, COUNT)) == b] for b in bad}
    instead = {b: {order[p] for p in places[b]} for b in bad}
    assert all(len(places[b]) == 2 and len(instead[b]) == 1 for b in bad)
    used = [number for numbers in instead.values() for number in numbers]
    assert not set(used) & set(bad)
    assert len(set(used)) > 1
    for workers in (1, 3):
        images, numbers, feed = run(streamed(folder), workers, requests(0, 12, 10, COUNT))
        assert numbers == order
        assert all(map(torch.equal, images, whole))
        row = feed.learn([feed.report()])
        assert (row["replaced"], row["unreadable"]) == (6, 3)
        assert [name for name, _ in row["new_unreadable"]] == sorted(reasons)
        assert all(reasons[name] in reason.lower() for name, reason in row["new_unreadable"])
    # The class goes with the photograph that is shown.
    p = places[bad[0]][0]
    feed = CropFeed(crops)
    feed.batch(p // COUNT, range(p % COUNT, p % COUNT + 1))
    assert feed.labels.tolist() == [source.labels[next(iter(instead[bad[0]]))]]
    assert first.report().faults.reasons.keys() == reasons.keys()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_with_nothing_readable_says_so(tmp_path, workers):
    for i in range(40):
        (tmp_path / f"{i}.jpg").write_bytes(b"\xff\xd8\xff nothing")
    crops = streamed(tmp_path, 40)
    with pytest.raises(
        ValueError, match=r"cannot be read \(.*\), and neither can 16 others in its place: check the files"
    ):
        run(crops, workers, requests(0, 2, 10, 40))
    with pytest.raises(ValueError, match=r"none of 40 photographs of .* could be read"):
        crops.source.load(40)


def test_what_cannot_be_opened(tmp_path, tiles):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no images: put .png, .jpg or .webp files in it"):
        open_source(tmp_path / "empty")
    with pytest.raises(ValueError, match="no folder"):
        open_source(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"need more than 1.86e-05 GiB once decoded"):
        open_source(tiles).load(10, max_bytes=20_000)
    with pytest.raises(ValueError, match="workers is -1"):
        CropFeed(streamed(tiles), -1)
    gone = shutil.copytree(tiles, tmp_path / "tiles")
    crops = streamed(gone)
    name = crops.source.name(crops.number(0, 0))
    (gone / name).unlink()
    _, _, feed = run(crops, 0, requests(0, 1, 10, COUNT))
    assert feed.report().faults == Faults(1, {name: "No such file or directory"})


# ---- what is told of it ----


def test_rates_of_several_processes():
    """Two processes, 40 images each, in two seconds of which they wait a half; two workers each, busy for 1.6 s in all."""
    feed = CropFeed.__new__(CropFeed)
    feed.total = Faults(1, {"a": "torn"})
    reports = [FeedReport(40, 0.5, 1.5, 1.6, 2, Faults(rank, {"b": "gone"} if rank else {})) for rank in range(2)]
    assert feed.learn(reports) == {
        "images_per_second": 40.0,
        "loader_images_per_second": 100.0,
        "model_images_per_second": pytest.approx(53.3),
        "wait": 0.25,
        "workers": 4,
        "replaced": 2,
        "unreadable": 2,
        "new_unreadable": [("b", "gone")],
    }
    assert feed.learn([FeedReport(0, 0.0, 0.0, 0.0, 2, Faults())]) == {}
    other = CropFeed.__new__(CropFeed)
    other.load_state_dict(json.loads(json.dumps(feed.state_dict())))
    assert other.total == feed.total


def test_time_is_shared_out_between_waiting_and_training(shards):
    crops = streamed(shards)
    feed = CropFeed(crops)
    feed.batch(0, range(10))
    time.sleep(0.2)
    feed.batch(0, range(10, 20))
    report = feed.report()
    time.sleep(0.2)
    feed.batch(0, range(20, 30))
    assert 0.2 <= report.worked < 0.35
    assert report.busy <= report.waited
    assert feed.report().worked < 0.1, "what comes between two rows of the log, such as an evaluation, is no training"


def test_workers_leave_a_core_to_training():
    cores = len(os.sched_getaffinity(0))
    assert usable_workers() == max(1, min(8, cores - 1))
    assert usable_workers(cores) == 1


# ---- in a run ----


def recipe(data: Path, **changes: object) -> dict[str, object]:
    """Twelve steps over photographs on disk; an epoch is a pass."""
    plain = tiny_recipe(data, **{"batch_size": 9, "log_every": 100, **changes})
    plain["data"] = {**plain["data"], "epoch_samples": None, "streaming": True, "workers": 1}
    return plain


def fit(data: Path, path: Path, sets: list[str], resume: bool = False, stop: int | None = None) -> TokenizerTask:
    config = resolve(recipe(data), sets)
    config = with_counted_epoch(config, open_source(data, config.data.crop_size))
    task = TokenizerTask(config)
    folder = RunFolder(path, config) if resume else RunFolder.create(path, config, "test")
    engine = Engine(task, folder, resume=resume, quiet=True)
    inner, steps = task.loss, []

    def loss(*arguments):
        steps.append(1)
        if len(steps) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments)

    task.loss = loss
    if stop is None:
        engine.fit()
    else:
        with pytest.raises(Interrupted):
            engine.fit()
        assert engine.step == stop
    return task


def test_a_run_stopped_within_an_epoch_and_resumed_with_other_workers(damaged, tmp_path):
    data = damaged[0]
    whole = fit(data, tmp_path / "whole", ["data.workers=2"])
    total = len(open_source(data).split("train"))
    assert whole.config.data.epoch_samples == total
    assert whole.config.steps_per_epoch == total // 9 >= 5
    middle = 2 * whole.config.steps_per_epoch - 1
    # No row of the log between the end of the first epoch and the stop: only the checkpoint tells what was met there.
    first = fit(data, tmp_path / "run", ["data.workers=0"], stop=middle)
    resumed = fit(data, tmp_path / "run", ["data.workers=1"], resume=True)
    rows = [row for row in log(tmp_path / "run") if row["kind"] == "data"]
    met = {row["step"]: row["replaced"] for row in rows}
    assert first.feed.total.replaced == met[middle] > met[whole.config.steps_per_epoch]
    assert resumed.feed.unannounced == whole.feed.unannounced == 0
    assert_same(state(tmp_path / "whole"), state(tmp_path / "run"))
    kept = [[row for row in log(path) if row["kind"] != "data"] for path in (tmp_path / "whole", tmp_path / "run")]
    assert kept[0] == kept[1]
    assert resumed.feed.total == whole.feed.total
    assert whole.feed.total.replaced >= 1
    assert whole.config.hash() == resumed.config.hash(), "how many workers there are names no configuration"
    rows = [row for row in log(tmp_path / "whole") if row["kind"] == "data"]
    assert all(row["images_per_second"] > 0 and 0 <= row["wait"] <= 1 and row["workers"] == 2 for row in rows)
    listed = [name for row in rows for name, _ in row.get("new_unreadable", [])]
    assert sorted(listed) == sorted(whole.feed.total.reasons)


def test_memory_is_the_default_and_has_no_feed(photos):
    task = TokenizerTask(resolve(tiny_recipe(photos)))
    assert task.feed is None
    assert task.state_dict().keys() == {"probe", "monitor"}
    with pytest.raises(ValueError, match=r"data.workers is -1"):
        resolve(tiny_recipe(photos), ["data.workers=-1"])
    with pytest.raises(ValueError, match=r"data.epoch_samples is null"):
        TokenizerTask(resolve(tiny_recipe(photos), ["data.epoch_samples=null"]))


@pytest.mark.slow
def test_the_command_trains_on_shards_and_evaluates(damaged, steadyvq_command, tmp_path):
    ShardWriter(damaged[0], tmp_path / "shards", 16).write()
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(Path("shards"))))
    done = steadyvq_command("train", "r.yaml", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "photographs could not be read; others stood in for them in" in done.stderr
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 1 <= info["unreadable"] <= 3
    assert info["replaced"] >= info["unreadable"]
    assert steadyvq_command("eval", "run").returncode == 0
    encoded = steadyvq_command("encode", "run", "--data", "shards", "--out", "t.npz")
    assert encoded.returncode == 0, encoded.stderr
    assert "57 images" in encoded.stderr
    again = steadyvq_command("train", "r.yaml", "--resume", "run", "--set", "data.workers=0")
    assert again.returncode == 0, again.stderr


def started(tmp_path: Path, data: Path) -> "subprocess.Popen[str]":
    """A long run with two workers as a process group of its own, once it has trained some steps."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(data, epochs=5000)))
    process = subprocess.Popen(
        [sys.executable, "-m", "steadyvq", "train", "r.yaml", "--out", "run", "--set", "data.workers=2"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("run/checkpoints/step-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in found]


def assert_all_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in processes):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.recovery
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_to_all_processes_of_a_run_saves_it(shards, tmp_path, number, code):
    process = started(tmp_path, shards)
    workers = children(process.pid)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert "resume with" in said
    assert_all_gone(workers)


@pytest.mark.recovery
@pytest.mark.slow
def test_the_death_of_a_worker_is_told_in_a_sentence(shards, tmp_path):
    process = started(tmp_path, shards)
    workers = children(process.pid)
    os.kill(workers[0], signal.SIGKILL)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 3, said
    assert "a worker process that prepares batches has ended" in said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert_all_gone(workers)


def test_a_worker_that_dies_while_it_sends_is_told_in_the_same_sentence(shards):
    feed = CropFeed(streamed(shards), 1)
    feed.announce([Request(0, range(4)), Request(0, range(4, 8))])
    feed.batch(0, range(4))
    (worker,) = children(os.getpid())
    whole = feed._pieces
    assert whole is not None

    def torn():
        # The pipe breaks first, and the signal of the death comes later.
        threading.Timer(0.3, os.kill, (worker, signal.SIGKILL)).start()
        raise ConnectionResetError(104, "Connection reset by peer")
        yield

    feed._pieces = torn()
    with pytest.raises(OSError, match="a worker process that prepares batches has ended"):
        feed.batch(0, range(4, 8))


@pytest.mark.recovery
def test_two_processes_know_of_all_that_cannot_be_read(damaged, tmp_path):
    data = damaged[0]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(data, batch_size=10)))
    common = ["-m", "steadyvq", "train", tmp_path / "r.yaml", "--out"]
    rows = []
    for processes in (1, 2):
        wait(start(*common, tmp_path / f"run{processes}", processes=processes))
        data_rows = [row for row in log(tmp_path / f"run{processes}") if row["kind"] == "data"]
        rows.append((data_rows[-1]["replaced"], data_rows[-1]["unreadable"], data_rows[-1]["workers"]))
        feed = state(tmp_path / f"run{processes}")
        rows[-1] += tuple(value for name, value in feed.items() if name.startswith("/task/feed"))
    assert rows[0][:2] == rows[1][:2]
    assert rows[0][0] >= 1
    assert (rows[0][2], rows[1][2]) == (1, 2)
    assert rows[0][3:] == rows[1][3:]
