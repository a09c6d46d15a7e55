# SPDX-License-Identifier: Apache-2.0
"""Stored tokens: what they decode to, that their bytes depend on nothing but the plan, their copies, their refusals."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from conftest import tiny_recipe
from PIL import Image

from steadyvq.cli import main
from steadyvq.cli.tokens import histogram_lines
from steadyvq.data import EvaluationCrops, decode_image, load_collection, open_source
from steadyvq.generation import TokenSet, TokenWriter, Views, tokenizer_hash
from steadyvq.generation.shares import Share, share_of
from steadyvq.metrics import to_uint8
from steadyvq.models import Tokenizer
from steadyvq.training.config import resolve
from steadyvq.training.evaluation import evaluate
from steadyvq.training.tokenizer_task import build_tokenizer

SIZE = 16


def tokenizer_of(photos, seed=0, **quantizer):
    """An untrained tokenizer: its tokens are as good as any to be stored."""
    settings = {"name": "vq", "num_codes": 32, "dim": 8, **quantizer}
    return build_tokenizer(resolve(tiny_recipe(photos, quantizer=settings, seed=seed))).eval()


@pytest.fixture(scope="module")
def tokenizer(photos, tmp_path_factory):
    """A saved tokenizer's folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_of(photos).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classed(tmp_path_factory):
    """Crops of real photographs in a folder per class, each as large as a view."""
    folder = tmp_path_factory.mktemp("classed")
    crops = EvaluationCrops(load_collection("mvtb", max_side=160), SIZE, 40)
    for i, image in enumerate(crops.images):
        place = folder / ("odd" if i % 2 else "even")
        place.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i:03d}.png")
    return folder


def write(tokenizer, data, out, views="centre", **options):
    found = Tokenizer.from_pretrained(tokenizer)
    kept = {"shard_images": 12, "batch": 8, **options}
    writer = TokenWriter(found, "it", open_source(data, SIZE), out, Views(views, SIZE), **kept)
    writer.write()
    return writer


def contents(folder):
    """The bytes of all files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class TestViews:
    def test_centre_is_the_centre_square_and_flip_its_mirror(self):
        image = torch.arange(3 * 4 * 6, dtype=torch.uint8).reshape(3, 4, 6)
        views = Views("centre,flip", 4)
        cut = views.cut(image, 0)
        assert torch.equal(cut[0], image[:, :, 1:5])
        assert torch.equal(cut[1], image[:, :, 1:5].flip(2))
        assert views.names == ["centre", "centre-flip"]

    def test_ten_crop_is_corners_and_centre_and_their_mirrors(self, photos):
        image = decode_image(next(photos.glob("*.png")))
        side = min(image.shape[1:])
        size = side - 4
        views = Views("ten-crop", size, crop_range=side / size)
        cut = views.cut(image, 0)
        top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
        square = image[:, top : top + side, left : left + side]
        places = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
        expected = [square[:, y : y + size, x : x + size] for y, x in places]
        assert torch.equal(cut, torch.stack(expected + [part.flip(2) for part in expected]))
        assert len(views) == len(cut) == 10

    def test_random_views_differ_and_depend_on_seed_and_image_alone(self, photos):
        image = decode_image(next(photos.glob("*.png")), 64)
        first = Views("random-6", 16).cut(image, 3)
        assert torch.equal(first, Views("random-6", 16).cut(image, 3))
        assert torch.equal(first[:2], Views("random-2", 16).cut(image, 3)), "more views leave the first as they are"
        assert not torch.equal(first, Views("random-6", 16, seed=1).cut(image, 3))
        assert not torch.equal(first, Views("random-6", 16).cut(image, 4))
        assert len({view.numpy().tobytes() for view in first}) == 6

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("centre,ten-crop", "one kind"),
            ("random-0", "random-0"),
            ("random", "no view 'random'"),
            ("fivecrop", "no view 'fivecrop'"),
            ("flip,flip", "one kind"),
        ],
    )
    def test_refusals(self, text, said):
        with pytest.raises(ValueError, match=said):
            Views(text)


def test_decoding_stored_tokens_is_what_eval_reconstructs(tokenizer, classed, tmp_path):
    """To the last bit of the floats: the crops of an evaluation, tokenised, stored, read and decoded."""
    write(tokenizer, classed, tmp_path / "tokens", batch=8)
    stored = TokenSet(tmp_path / "tokens")
    found = stored.tokenizer()
    collection = load_collection(classed)
    crops = EvaluationCrops(collection, SIZE, len(collection))
    assert [source.photograph for source in crops.sources] == stored.names()
    result = evaluate(found, crops, 8)
    metered = np.zeros(stored.num_codes, np.int64)
    for start, images in zip(range(0, len(crops), 8), crops.batches(8), strict=True):
        grids = stored.grids(stored.read(np.arange(start, min(start + 8, len(stored)))))
        with torch.no_grad():
            reconstruction = found(images)[0].clamp(-1, 1)
        assert torch.equal(found.decode(grids), reconstruction)
        assert torch.equal(to_uint8(found.decode(grids)), to_uint8(reconstruction))
        metered += np.bincount(grids.flatten().numpy(), minlength=stored.num_codes)
    assert np.array_equal(stored.histogram, metered)
    assert np.array_equal(stored.histogram, result.counts.numpy())


def test_labels_splits_and_types(tokenizer, classed, photos, tmp_path):
    write(tokenizer, classed, tmp_path / "tokens", "centre,flip")
    stored = TokenSet(tmp_path / "tokens")
    assert stored.classes == ["even", "odd"]
    assert [stored.classes[label] for label in stored.labels] == [name.split("/")[0] for name in stored.names()]
    assert set(stored.splits) == {"train", "val"}
    assert sorted([*stored.rows("train"), *stored.rows("val")]) == list(range(40))
    assert stored.dtype == np.uint16
    assert stored.read([3, 39], [1, 0]).shape == (2, 64)
    large = tokenizer_of(photos, name="fsq", num_codes=69120, dim=6, options={"levels": [8, 8, 8, 9, 3, 5]})
    large.save_pretrained(tmp_path / "large")
    write(tmp_path / "large", photos, tmp_path / "wide")
    assert TokenSet(tmp_path / "wide").dtype == np.uint32
    assert set(TokenSet(tmp_path / "wide").labels.tolist()) == {-1}


def test_reading_in_any_order_over_shards(tokenizer, classed, tmp_path):
    one = TokenSet(write(tokenizer, classed, tmp_path / "one", "centre,flip", shard_images=100).out)
    many = TokenSet(write(tokenizer, classed, tmp_path / "many", "centre,flip", shard_images=7).out)
    rng = np.random.default_rng(0)
    rows, views = rng.integers(0, 40, 200), rng.integers(0, 2, 200)
    assert len(many.shards) == 6
    assert np.array_equal(one.read(rows, views), many.read(rows, views))
    whole = np.concatenate([np.load(many.folder / shard.file) for shard in many.shards])
    assert np.array_equal(many.read(rows, views), whole[rows, views])


def test_the_bytes_do_not_depend_on_who_writes_them(tokenizer, classed, tmp_path):
    """One process, three in turn, and one that was stopped within a shard."""
    write(tokenizer, classed, tmp_path / "one", "ten-crop")
    expected = contents(tmp_path / "one")
    for index in (2, 0, 1):
        write(tokenizer, classed, tmp_path / "three", "ten-crop", share=Share(index, 3))
    assert contents(tmp_path / "three") == expected

    class Stopped(Exception):
        pass

    def stop(_):
        nonlocal left
        left -= 1
        if not left:
            raise Stopped

    left = 17
    found = Tokenizer.from_pretrained(tokenizer)
    options = {"shard_images": 12, "batch": 8}
    writer = TokenWriter(found, "it", open_source(classed, SIZE), tmp_path / "cut", Views("ten-crop", SIZE), **options)
    with pytest.raises(Stopped):
        writer.write(stop)
    with pytest.raises(ValueError, match="not complete"):
        TokenSet(tmp_path / "cut")
    again = write(tokenizer, classed, tmp_path / "cut", "ten-crop")
    assert (again.done, again.total) == (12, 40)
    assert contents(tmp_path / "cut") == expected


@pytest.mark.slow
@pytest.mark.recovery
def test_processes_of_a_launcher_and_a_kill_leave_the_same_bytes(tokenizer, classed, tmp_path):
    """Three processes at once as torchrun starts them, one of which is killed; then array jobs go on with it."""

    def command(out, *more, **environment):
        words = ["tokenize", tokenizer, "--data", classed, "--out", tmp_path / out, "--views", "ten-crop"]
        sizes = ["--size", SIZE, "--shard-images", "4", "--batch", "5", *more]
        return subprocess.Popen(
            [sys.executable, "-m", "steadyvq", *map(str, words + sizes)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    whole = command("one")
    three = [
        command("three", TORCHELASTIC_RUN_ID="x", RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
        for r in range(3)
    ]
    while not list((tmp_path / "three").glob("tokens-*.npy")) and three[1].poll() is None:
        time.sleep(0.005)
    three[1].send_signal(signal.SIGKILL)
    for process in (whole, three[0], three[2]):
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
    three[1].wait()
    for index in range(2):
        job = command("three", "--num-shards", "2", "--shard-index", str(index))
        said = job.communicate(timeout=120)[1]
        assert job.returncode == 0, said
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("tokens-*.npy"))) == 10


def test_unreadable_images_are_left_out_and_named(tokenizer, classed, tmp_path, capsys):
    shutil.copytree(classed, tmp_path / "data")
    (tmp_path / "data" / "even" / "000.png").write_bytes(b"nothing")
    out = tmp_path / "tokens"
    assert main(["tokenize", str(tokenizer), "--data", str(tmp_path / "data"), "--out", str(out), "--size", "16"]) == 0
    assert "skipped even/000.png: not a PNG" in capsys.readouterr().err
    stored = TokenSet(out)
    assert len(stored) == 39
    assert stored.meta["skipped"] == 1
    assert "even/000.png" not in stored.names()
    assert stored.names()[0] == "even/002.png"


@pytest.fixture(scope="module")
def exported(tokenizer, classed, tmp_path_factory):
    """Tokens with classes and two views."""
    return TokenSet(write(tokenizer, classed, tmp_path_factory.mktemp("t") / "tokens", "centre,flip").out)


class TestExports:
    def export(self, stored, out, name):
        assert main(["tokens", "export", str(stored.folder), str(out), "--format", name]) == 0
        return np.stack([stored.read(stored.rows(), view) for view in range(2)], axis=1)

    def test_llamagen(self, exported, tmp_path):
        """As its loader reads them: features[:, view] and labels are joined by a batch and squeezed."""
        tokens = self.export(exported, tmp_path, "llamagen")
        for i in (0, 17, 39):
            features = np.load(tmp_path / "imagenet16_codes" / f"{i}.npy")
            label = np.load(tmp_path / "imagenet16_labels" / f"{i}.npy")
            assert features.shape == (1, 2, 64)
            assert torch.from_numpy(features).dtype == torch.int64
            assert np.array_equal(features[:, 1][0], tokens[i, 1])
            assert label.tolist() == [exported.labels[i]]
        assert len(list((tmp_path / "imagenet16_codes").iterdir())) == 40

    def test_bin(self, exported, tmp_path):
        tokens = self.export(exported, tmp_path, "bin")
        said = json.loads((tmp_path / "tokens.json").read_text())
        flat = np.fromfile(tmp_path / "tokens.bin", said["dtype"]).reshape(said["shape"])
        assert np.array_equal(flat, tokens)
        assert np.array_equal(np.fromfile(tmp_path / "labels.bin", "<i4"), exported.labels)

    def test_webdataset(self, exported, tmp_path):
        tokens = self.export(exported, tmp_path / "a", "webdataset")
        self.export(exported, tmp_path / "b", "webdataset")
        assert contents(tmp_path / "a") == contents(tmp_path / "b")
        with tarfile.open(tmp_path / "a" / "tokens-00000.tar") as tar:
            names = tar.getnames()
            assert names[:3] == ["000000000.cls", "000000000.json", "000000000.npy"]
            assert np.array_equal(np.load(io.BytesIO(tar.extractfile("000000007.npy").read())), tokens[7])
            assert int(tar.extractfile("000000007.cls").read()) == exported.labels[7]

    def test_parquet(self, exported, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        tokens = self.export(exported, tmp_path, "parquet")
        found = parquet.read_table(tmp_path / "tokens.parquet").to_pydict()
        assert np.array_equal(np.array(found["tokens"]).reshape(tokens.shape), tokens)
        assert found["label"][::2] == exported.labels.tolist()
        assert found["view"][:4] == [0, 1, 0, 1]
        assert found["name"][::2] == exported.names()

    def test_llamagen_needs_labels(self, tokenizer, photos, tmp_path, capsys):
        out = write(tokenizer, photos, tmp_path / "tokens").out
        assert main(["tokens", "export", str(out), str(tmp_path / "x"), "--format", "llamagen"]) == 2
        assert "one sub-folder per class" in capsys.readouterr().err


class TestBadInput:
    @pytest.fixture
    def stored(self, tokenizer, classed, tmp_path):
        return TokenSet(write(tokenizer, classed, tmp_path / "tokens").out)

    def refused(self, capsys, *words):
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") <= 3
        assert "Traceback" not in said
        return said

    def test_tokens_of_another_tokenizer_name_both(self, stored, classed, photos, tmp_path, capsys):
        other = tokenizer_of(photos, seed=1)
        other.save_pretrained(tmp_path / "other")
        hashes = stored.tokenizer_hash[:12], tokenizer_hash(other)[:12]
        for words in (
            ["tokens", "inspect", stored.folder, "--tokenizer", tmp_path / "other"],
            ["decode", tmp_path / "other", stored.folder, "--out", tmp_path / "pictures"],
            ["tokenize", tmp_path / "other", "--data", classed, "--out", stored.folder, "--size", SIZE],
        ):
            said = self.refused(capsys, *words)
            assert all(name in said for name in hashes), said

    def test_a_changed_byte_and_a_cut_shard_are_named(self, stored, tmp_path, capsys):
        path = stored.folder / "tokens-00001.npy"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "tokens-00001.npy is not as it was written" in self.refused(capsys, "tokens", "inspect", stored.folder)
        path.write_bytes(content[:-10])
        said = self.refused(capsys, "tokens", "export", stored.folder, tmp_path / "x", "--format", "bin")
        assert f"tokens-00001.npy has {len(content) - 10} bytes" in said

    def test_following_the_advice_brings_back_the_bytes(self, stored, tokenizer, classed):
        before = contents(stored.folder)
        for name in ("tokens-00001.npy", "tokens-00001.json", "meta.json"):
            (stored.folder / name).unlink()
        write(tokenizer, classed, stored.folder)
        assert contents(stored.folder) == before

    def test_other_settings_and_other_folders(self, stored, tokenizer, classed, capsys):
        words = ["tokenize", tokenizer, "--data", classed, "--out"]
        same = [stored.folder, "--size", SIZE, "--shard-images", "12", "--batch", "8"]
        assert "differs in views" in self.refused(capsys, *words, *same, "--views", "ten-crop")
        assert "holds other files" in self.refused(capsys, *words, classed, "--size", SIZE)
        assert "multiple of the tokenizer's downsampling" in self.refused(capsys, *words, "new", "--size", 17)
        assert "belong together" in self.refused(capsys, *words, "new", "--num-shards", 3)
        assert "numbered from 0" in self.refused(capsys, *words, "new", "--num-shards", 3, "--shard-index", 3)
        assert "--device is 'tpu9'" in self.refused(capsys, *words, "new", "--device", "tpu9")

    def test_no_tokens_here(self, tmp_path, capsys):
        assert "holds no tokens" in self.refused(capsys, "tokens", "inspect", tmp_path)
        assert "unknown format of tokens 'npz'" in self.refused(
            capsys, "tokens", "export", self.empty(tmp_path), tmp_path / "x", "--format", "npz"
        )

    def empty(self, tmp_path):
        (tmp_path / "meta.json").write_text(
            json.dumps(
                {"format": "steadyvq-tokens", "version": 1, "shards": [], "num_codes": 2, "size": 8, "shape": [1, 1]}
                | {"views": ["centre"], "classes": [], "dtype": "uint16", "tokenizer": {"hash": "a", "name": "b"}}
            )
        )
        for name in ("labels.npy", "splits.npy"):
            np.save(tmp_path / name, np.zeros(0, np.int32))
        return tmp_path


def test_inspect_and_decode(tokenizer, classed, tmp_path, capsys):
    stored = TokenSet(write(tokenizer, classed, tmp_path / "tokens", "ten-crop").out)
    assert main(["tokens", "inspect", str(stored.folder)]) == 0
    said = capsys.readouterr()
    assert "ceiling" in said.out
    assert f"{stored.histogram.sum():,}" in said.out
    assert Image.open(stored.folder / "inspect.png").size == (8 * 34 - 2, 2 * (66 - 1) + 6)
    assert main(["decode", str(tokenizer), str(stored.folder), "--out", str(tmp_path / "pictures")]) == 0
    first = np.asarray(Image.open(tmp_path / "pictures" / "000000_000.png"))
    image = to_uint8(stored.tokenizer().decode(stored.grids(stored.read(np.arange(32)))))[0]
    assert np.array_equal(first, image.permute(1, 2, 0).numpy())


def test_the_histogram_counts_codes_by_their_hits():
    lines = histogram_lines(np.array([0, 0, 0, 1, 2, 3, 4, 7, 8]))
    assert [line.split("codes")[0].split() for line in lines] == [
        ["0", "hits", "3"],
        ["1", "hits", "1"],
        ["2", "to", "3", "hits", "2"],
        ["4", "to", "7", "hits", "2"],
        ["8", "to", "15", "hits", "1"],
    ]


def test_the_hash_of_a_tokenizer_is_of_what_decides_tokens(photos):
    found = tokenizer_of(photos)
    before = tokenizer_hash(found)
    with torch.no_grad():
        found.decoder.conv_in.weight += 1
    assert tokenizer_hash(found) == before
    with torch.no_grad():
        found.quantizer.codes.base += 1e-3
    assert tokenizer_hash(found) != before


def test_shares_of_array_jobs_and_launchers():
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3"}
    assert share_of(None, None, {}) == Share(0, 1, 0)
    assert share_of(5, 2, {}) == Share(2, 5, 0)
    assert share_of(None, None, torchrun) == Share(3, 4, 1)
    assert share_of(2, 1, torchrun) == Share(7, 8, 1)
    assert sorted(i for index in range(7) for i in Share(index, 7).of(40)) == list(range(40))
