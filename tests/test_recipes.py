# SPDX-License-Identifier: Apache-2.0
"""The published recipes: their numbers against the papers', their commands, their parts, their tiny variants."""

import re
from pathlib import Path

import pytest
import torch
from clusters import command_lines, resolved
from safetensors.torch import save_file

from steadyvq.cli import main
from steadyvq.data import EvaluationCrops, load_collection
from steadyvq.experiments.recipes import LABELS, SIZE_KEYS, config_of, published, said, text_of, tiny
from steadyvq.models import build_discriminator
from steadyvq.training.config import read_recipe, resolve
from steadyvq.training.photographs import training_crops
from steadyvq.training.run import differences
from steadyvq.training.stages import Schedule
from steadyvq.training.tokenizer_task import quantizer_of

ROOT = Path(__file__).parent.parent
IMAGENET = 1_281_167

# crop, tokens, K, d, epochs, batch, learning rate, betas. From NSVQ, arXiv 2606.11363, table 1 and text; README and
# configuration of SimVQ; taming-transformers (4.5e-6 per image, 8 x 12); README of VQGAN-LC; FVQ,
# arXiv 2509.10140, and its scripts.
FACTS = {
    "nsvq_imagenet128": (128, 256, 65536, 128, 70, 128, 1e-4, (0.5, 0.9)),
    "nsvq_imagenet256": (256, 256, 65536, 128, 70, 128, 1e-4, (0.5, 0.9)),
    "nsvq_celeba128": (128, 256, 65536, 128, 70, 128, 1e-4, (0.5, 0.9)),
    "nsvq_celebahq256": (256, 256, 65536, 128, 70, 128, 1e-4, (0.5, 0.9)),
    "simvq_imagenet128": (128, 256, 65536, 128, 50, 256, 1e-4, (0.5, 0.9)),
    "vqgan_imagenet256": (256, 256, 16384, 256, 50, 96, 4.5e-6 * 96, (0.5, 0.9)),
    "vqgan_lc_imagenet256": (256, 256, 100000, 8, 100, 2048, 1e-4, (0.5, 0.9)),
    "fvq_imagenet256": (256, 256, 262144, 256, 40, 128, 1e-4, (0.9, 0.95)),
}
# weight of g, adaptive, generator's loss, first step, layers
JUDGES = {
    "nsvq": (0.1, False, "non_saturating_per_image", 0, 3),
    "simvq": (0.1, False, "non_saturating_per_image", 0, 3),
    "vqgan": (0.8, True, "hinge", 250_001, 3),
    "vqgan_lc": (0.1, True, "hinge", 50_000, 2),
    "fvq": (0.5, False, "hinge", 20_000, 3),
}


@pytest.mark.parametrize("name", FACTS)
def test_a_recipe_has_the_published_numbers(name):
    config = config_of(name)
    side = config.data.crop_size // config.model.downsampling
    optim, judge = config.optim, config.adversarial
    found = (config.data.crop_size, side**2, config.quantizer.num_codes, config.quantizer.dim, config.epochs)
    assert (*found, config.batch_size, optim.lr, optim.betas) == (
        *FACTS[name][:6],
        pytest.approx(FACTS[name][6]),
        FACTS[name][7],
    )
    family = name.rpartition("_")[0]
    layers = judge.options["layers"]
    assert (judge.weight, judge.adaptive, judge.generator_loss, judge.start, layers) == JUDGES[family]
    assert judge.discriminator_loss == "hinge"
    assert config.perceptual == 1.0
    assert config.perceptual_net == "vgg"
    assert judge.leak == (family == "simvq")


def test_every_published_recipe_is_held_to_its_numbers():
    assert published() == sorted(FACTS)
    for name in tiny().values():
        assert name in FACTS


def test_nsvq_has_its_three_stages():
    joint, warmup, refine = config_of("nsvq_imagenet128").stages
    assert (joint.until.plateau, joint.until.patience, joint.frozen) == ("commitment", 10, ())
    assert set(warmup.frozen) == {"encoder", "discriminator"}
    assert warmup.weights == {"ns": 0.0, "commitment": 0.0, "adversarial": 0.0}
    assert (refine.frozen, refine.weights) == (("encoder",), {"ns": 0.0, "commitment": 0.0})
    assert refine.ramp == {"adversarial": 2}
    assert warmup.paused == refine.paused == ("replace",)
    for name in FACTS:
        expected = (joint, warmup, refine) if name.startswith("nsvq") else resolve({}).stages
        assert config_of(name).stages == expected, name


def test_fvq_is_annealed_as_its_code_does():
    """Linear to 1 over 4 epochs; with u the fraction of what is left: 1 below 0.3, else 0.01 + 0.99 (1 - u) / 0.7."""
    config = resolve(read_recipe("fvq_imagenet256"), ["data.epoch_samples=1281167"])
    warm, total = 4 * config.steps_per_epoch, 40 * config.steps_per_epoch
    assert config.optim.warmup_steps == warm
    for step in range(warm, total, 9973):
        u = (step - warm) / (total - 1 - warm)
        expected = 1.0 if u < 0.3 else 0.01 + 0.99 * (1 - u) / 0.7
        assert config.lr_factor(step) == pytest.approx(expected, abs=1e-4), step
    assert config.lr_factor(warm // 2) == pytest.approx(0.5, abs=1e-3)


def test_vqgan_lc_warms_up_for_five_epochs():
    config = config_of("vqgan_lc_imagenet256")
    assert config.optim.warmup_steps == pytest.approx(5 * IMAGENET / config.batch_size, abs=1)


@pytest.fixture
def cluster(tmp_path, monkeypatch, photos) -> Path:
    """The folder of somebody on a cluster, with the data sets that the commands name."""
    for name in ("imagenet", "celeba", "celebahq"):
        (tmp_path / name).symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FACTS)
def test_the_commands_of_a_recipe_resolve(name, cluster, capsys):
    """On a machine with eight GPUs; each of them goes on if it is given again."""
    lines = command_lines(
        "\n".join(line.removeprefix("#") for line in text_of(name).splitlines() if line.startswith("#   "))
    )
    assert lines
    for line in lines:
        options, shown = resolved(line, cluster, capsys)
        assert shown["title"] == shown["recipe"] == name
        assert shown["auto_resume"]
        assert options.nproc_per_node == "8"
        assert shown["batch_size"] % 8 == 0


def test_the_commands_of_the_page_resolve(cluster, capsys):
    lines = command_lines((ROOT / "docs" / "recipes.md").read_text())
    assert len(lines) == 3
    found = [resolved(line, cluster, capsys) for line in lines]
    assert all(shown["title"] == "nsvq_imagenet128" for _, shown in found)
    assert [options and options.nproc_per_node for options, _ in found] == ["8", None, "4"]


def test_the_commands_of_the_page_on_clusters_resolve(cluster, capsys):
    """One machine, several with and without SLURM, machines that come and go, and less memory."""
    lines = command_lines((ROOT / "docs" / "clusters.md").read_text())
    assert len(lines) >= 6
    found = [resolved(line, cluster, capsys) for line in lines]
    assert all(shown["auto_resume"] for _, shown in found)
    launchers = [options for options, _ in found if options is not None]
    assert {options.nnodes for options in launchers} == {"1:1", "2", "2:4"}
    assert {options.max_restarts for options in launchers} >= {0, 3}
    assert any(shown["strategy"] == "fsdp" and shown["activation_checkpointing"] for _, shown in found)
    assert any(shown["quantizer"]["sharded"] and shown["quantizer"]["num_codes"] == 1 << 20 for _, shown in found)


@pytest.mark.parametrize("name", FACTS)
def test_a_recipe_says_where_its_values_come_from(name):
    for label in LABELS:
        assert len(said(name, label)) > 10, label
    assert re.search("open by|^# Ours", text_of(name), re.MULTILINE)
    assert "Time: " in text_of(name)


@pytest.mark.parametrize("name", FACTS)
def test_the_parts_of_a_recipe_can_be_built(name, tmp_path):
    save_file({"features": torch.randn(256, 768)}, tmp_path / "clip.safetensors")
    sets = ["quantizer.num_codes=256"]
    if "lc" in name:
        sets.append(f"quantizer.options.features={tmp_path / 'clip.safetensors'}")
    config = resolve(read_recipe(name), sets)
    quantizer = quantizer_of(config)
    schedule = Schedule(config.stages)
    schedule.apply({part: [] for part in ("encoder", "decoder", "quantizer", "discriminator")}, quantizer)
    judge = config.adversarial
    network = build_discriminator(judge.discriminator, config.data.crop_size, **judge.options)
    assert network(torch.zeros(2, 3, 64, 64)).ndim >= 2


@pytest.mark.parametrize("name", tiny())
def test_a_tiny_recipe_differs_in_sizes_alone(name):
    small, base = config_of(name).to_dict(), config_of(tiny()[name]).to_dict()
    changed = set(differences(small, base))
    assert changed <= SIZE_KEYS.keys()
    assert {"quantizer.num_codes", "epochs", "batch_size"} <= changed
    assert f"`{tiny()[name]}`" in text_of(name)


def test_every_family_has_a_tiny_recipe():
    assert {base.partition("_imagenet")[0] for base in tiny().values()} == {name.rpartition("_")[0] for name in FACTS}


def test_the_shorter_side_becomes_the_crop(photos):
    """`min_scale: 1000`: every region is as wide as the photograph's shorter side, in training and evaluation."""
    config = resolve(read_recipe("nsvq_imagenet128"), [f"data.source={photos}", "data.epoch_samples=128"])
    collection = load_collection(photos, min_side=64)
    crops = training_crops(resolve(config.to_dict(), ["data.crop_size=64", "data.streaming=false"]), collection)
    rule = crops.rule
    for image in collection.images:
        side = min(image.shape[1:])
        assert rule._region(image, 0.3, 0.7, 0.2).shape[1:] == (side, side)
    for box in (source.box for source in EvaluationCrops(collection.split("val"), 64, 4, scale=1000.0).sources):
        assert box[2] - box[0] == pytest.approx(box[3] - box[1], abs=1)


@pytest.mark.parametrize("sets", [["data.min_scale=0.5"], ["data.min_scale=3", "data.max_scale=2"]])
def test_scales_that_make_no_sense_are_refused(sets):
    with pytest.raises(ValueError, match="1 <= min_scale <= max_scale"):
        resolve({}, sets)


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTS)
def test_a_published_recipe_trains(name, photos, tmp_path, monkeypatch):
    """Two steps at the published settings but for width, K and batch; LPIPS has tests of its own."""
    monkeypatch.chdir(tmp_path)
    save_file({"features": torch.randn(256, 768)}, tmp_path / "clip_centres.safetensors")
    small = ["model.channels=32", "quantizer.num_codes=256", "batch_size=2", "epochs=1", "data.epoch_samples=4"]
    cheap = ["perceptual=0", "data.workers=0", "data.eval_crops=2", "probe_images=2", "adversarial.start=0"]
    words = [word for pair in (*small, *cheap) for word in ("--set", pair)]
    assert main(["train", name, "--data", str(photos), "--out", "run", *words]) == 0
    assert (tmp_path / "run" / "tokenizer").is_dir()
