# SPDX-License-Identifier: Apache-2.0
"""The corpus: packages are checked and taken apart, every photograph lies in one split, and the test split has one door."""

import ast
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import steadyvq.data.corpus as corpus
from steadyvq.data import load_collection, open_source
from steadyvq.data.mvtb import mvtb_files
from steadyvq.experiments.held_out import open_test, openings

ROOT = Path(__file__).parents[1]


def deb(files: dict[str, bytes]) -> bytes:
    """A .deb as dpkg-deb writes it: an `ar` archive of debian-binary, control.tar and data.tar.xz."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo("./" + name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    made = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", inner.getvalue())):
        made += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        made += content + b"\n" * (len(content) % 2)
    return made


def photograph(number: int) -> bytes:
    """A part of a real photograph, larger than the corpus keeps, as a JPEG."""
    _, path, _ = mvtb_files()[number]
    file = io.BytesIO()
    Image.open(path).convert("RGB").resize((900, 300)).save(file, format="JPEG")
    return file.getvalue()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in the place of the listed ones, and a home of its own."""
    names = ["usr/share/w/Hill/contents/images/2560x1600.jpg", "usr/share/w/sea.jpg", "usr/share/w/town.jpg"]
    content = deb({name: photograph(i) for i, name in enumerate(names)} | {"usr/share/doc/w/copyright": b"CC0"})
    debs = tmp_path / "debs"
    debs.mkdir()
    (debs / "walls_1%3a2.0-1_all.deb").write_bytes(content)
    listed = corpus.Package(
        "walls",
        "1:2.0-1",
        "pool/w/walls_2.0-1_all.deb",
        hashlib.sha256(content).hexdigest(),
        *((name,) for name in names),
    )
    monkeypatch.setattr(corpus, "corpus_packages", lambda: (listed,))
    monkeypatch.setattr(corpus, "mvtb_files", lambda: [file for file in mvtb_files() if file[2] != "test"][:2])
    monkeypatch.setenv("STEADYVQ_HOME", str(tmp_path / "home"))
    return debs


def test_a_package_becomes_photographs_in_their_splits(package, tmp_path):
    done = []
    home = corpus.fetch_corpus(package, done.append)
    assert sum(done) == len(corpus.corpus_names()) == 5
    found = {name: split for name, _, split in corpus.corpus_files()}
    assert found["walls/Hill.png"] == "train"
    assert found["walls/sea.png"] == "val"
    assert "walls/town.png" not in found
    pixels = np.asarray(Image.open(home / "open" / "walls" / "sea.png"))
    assert pixels.shape == (240, 720, 3)
    collection = load_collection("corpus")
    assert open_source("corpus").store.read(0) == (home / "open" / open_source("corpus").store.names[0]).read_bytes()
    assert set(collection.splits) == {"train", "val"}
    assert sorted(open_source("corpus").store.names[:]) == sorted(found)
    # Once more nothing is done again.
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*.png")}
    corpus.fetch_corpus(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in home.rglob("*.png")}


def test_the_test_photographs_are_seen_by_nobody_who_does_not_say_so(package):
    corpus.fetch_corpus(package)
    with pytest.raises(ValueError, match="has no split 'test'"):
        load_collection("corpus").split("test")
    held_out = open_test("a test", "abc123")
    assert held_out.names == ("walls/town.png",)
    assert held_out.split_label == "test"
    assert held_out.images[0].dtype == torch.uint8
    (opening,) = openings()
    assert (opening["caller"], opening["config"]) == ("a test", "abc123")


def test_what_cannot_be_had_is_told(package, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="run `steadyvq data fetch corpus`"):
        corpus.corpus_files()
    with pytest.raises(ValueError, match=r"does not hold walls_2.0-1_all.deb"):
        corpus.fetch_corpus(tmp_path)
    assert not corpus.corpus_home().exists()
    file = next(package.iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="another SHA-256"):
        corpus.fetch_corpus(package)
    monkeypatch.setattr(corpus, "ARCHIVE", "http://127.0.0.1:9/")
    with pytest.raises(ValueError, match="could not be fetched"):
        corpus.fetch_corpus()


def test_every_listed_photograph_is_in_one_split():
    packages = corpus.corpus_packages()
    files = [(one.package, file) for one in packages for split in (one.train, one.val, one.test) for file in split]
    assert len(files) == len(set(files)) == 323
    names = corpus.corpus_names()
    assert len(names) == 323 + len(mvtb_files())
    assert {split: list(names.values()).count(split) for split in ("train", "val", "test")} == {
        "train": 263,
        "val": 52,
        "test": 70,
    }
    assert all(len(one.sha256) == 64 for one in packages)


def test_the_search_does_not_open_the_test_photographs():
    """Nothing that the search imports from our experiments but the judge of the contest reaches `open_test`."""
    users = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "steadyvq").rglob("*.py"))
        if any(isinstance(node, ast.Name) and node.id == "open_test" for node in ast.walk(ast.parse(path.read_text())))
    ]
    assert users == ["steadyvq/experiments/contest.py"]
    search = ast.parse((ROOT / "steadyvq/experiments/studies/steady_search.py").read_text())
    words = {node.id for node in ast.walk(search) if isinstance(node, ast.Name)}
    assert not words & {"judged", "open_test"}
    assert all(
        keyword.arg != "judge" for node in ast.walk(search) if isinstance(node, ast.Call) for keyword in node.keywords
    )


def test_the_command_says_where_the_photographs_are(package, steadyvq_command):
    """As a process the command knows the real list, so that a folder without the packages is refused in one sentence."""
    done = steadyvq_command("data", "fetch", "corpus", "--from", str(package))
    assert done.returncode == 2
    assert "endless-sky-data" in done.stderr
    assert "Traceback" not in done.stderr
