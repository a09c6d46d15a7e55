# SPDX-License-Identifier: Apache-2.0
"""`steadyvq import` and `export` as a user meets them."""

import pytest
import torch
import yaml
from foreign import random_state, save_taming, taming

import steadyvq
from steadyvq.cli import main
from steadyvq.training.config import read_recipe, resolve
from steadyvq.training.weights import averaged_weights


def command(*words: object) -> int:
    return main([str(word) for word in words])


def test_import_says_what_it_did_and_writes_a_recipe(tmp_path, capsys):
    save_taming(tmp_path / "theirs.ckpt")
    assert command("import", tmp_path / "theirs.ckpt", tmp_path / "out") == 0
    told = capsys.readouterr().err
    for part in ("format: taming", "none left over", "64 codes of 4 features", "f = 2", "loss.* (2)", "--init-from"):
        assert part in told
    config = resolve(read_recipe(str(tmp_path / "out" / "recipe.yaml")))
    tokenizer = steadyvq.Tokenizer.from_pretrained(tmp_path / "out")
    assert config.model == tokenizer.config
    assert config.quantizer.name == "vq"
    assert config.quantizer.options["losses"] == {"commitment": 1.0, "codebook": 0.25}


@pytest.mark.parametrize("format", ["taming", "diffusers"])
def test_there_and_back(format, tmp_path):
    state = save_taming(tmp_path / "theirs.ckpt")
    assert command("import", tmp_path / "theirs.ckpt", tmp_path / "ours") == 0
    out = tmp_path / ("back" if format == "diffusers" else "back.ckpt")
    assert command("export", tmp_path / "ours", out, "--format", format) == 0
    assert command("import", out, tmp_path / "again") == 0
    a, b = (averaged_weights(tmp_path / name) for name in ("ours", "again"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    if format == "taming":
        back = torch.load(out, weights_only=True)["state_dict"]
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("import", "nothing.ckpt", "out"), "there is no file"),
        (("import", "theirs.ckpt", "out", "--format", "tamming"), "did you mean 'taming'"),
        (("import", "theirs.ckpt", "theirs.ckpt"), "is a file"),
        (("import", "theirs.ckpt", "out", "--weights", "ema"), "no averaged weights"),
        (("import", "theirs.ckpt", "out", "--groups", "0"), "groups is 0"),
        (("import", "unknown.pt", "out"), "format is unknown"),
        (("export", "ours", "file", "--format", "llamagem"), "did you mean 'llamagen'"),
        (("export", "ours", "file", "--format", "llamagen", "--quantizer", "x"), "holds no config.yaml"),
        (("export", "ours", "ours", "--format", "taming"), "is a folder"),
        (("export", "nothing", "file", "--format", "taming"), "there is no folder"),
    ],
)
def test_refusals_are_one_line_with_code_2_and_leave_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_taming(tmp_path / "theirs.ckpt")
    torch.save({"a": torch.zeros(1)}, "unknown.pt")
    assert command("import", "theirs.ckpt", "ours") == 0
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert command(*words) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_imported_tokenizers_encode_decode_evaluate_and_train_on(photos, tmp_path, steadyvq_command):
    torch.save(random_state(taming(32, (1, 2), 2, (1,), 8, 4, 64, "llamagen")), tmp_path / "vq.pt")
    assert steadyvq_command("import", "vq.pt", "ours").returncode == 0
    small = {"epochs": 1, "batch_size": 4, "eval_every": 1}
    small |= {"data.epoch_samples": 8, "data.eval_crops": 8, "data.crop_size": 16}
    recipe = yaml.safe_load((tmp_path / "ours" / "recipe.yaml").read_text())
    assert recipe["quantizer"]["name"] == "vqgan_fc"
    sets = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    train = ["train", "ours/recipe.yaml", "--init-from", "ours", "--data", photos, "--out", "run", *sets]
    for words in (
        ["encode", "ours", "--data", photos, "--size", "32", "--out", "tokens.npz"],
        ["decode", "ours", "tokens.npz", "--out", "decoded"],
        ["eval", "ours", "--data", photos, "--split", "all", "--crop", "32", "--count", "8"],
        train,
        ["export", "run", "trained.pt", "--format", "llamagen"],
        ["import", "trained.pt", "again"],
    ):
        done = steadyvq_command(*words)
        assert done.returncode == 0, done.stderr
    started, ended = averaged_weights(tmp_path / "ours"), averaged_weights(tmp_path / "again")
    kernel = "encoder.conv_in.weight"
    assert not torch.equal(started[kernel], ended[kernel])
    assert (started[kernel] - ended[kernel]).abs().max() < 0.01
