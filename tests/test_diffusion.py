# SPDX-License-Identifier: Apache-2.0
"""The diffusion prior: noise, schedulers, the way from latents to noise and back to tokens, training, sampling."""

import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_recipe
from PIL import Image
from runs import check_a_kill_leaves_no_trace

from steadyvq.cli import main
from steadyvq.data import EvaluationCrops, load_collection, open_source
from steadyvq.files import read_tensors
from steadyvq.generation import TokenSet, TokenWriter, Views, tokenizer_hash
from steadyvq.generation.diffusion import (
    SCHEDULERS,
    DiffusionDrawing,
    DiffusionPrior,
    denoise,
    make_scheduler,
    sample_generator,
    sample_latents,
    timed_scheduler,
)
from steadyvq.generation.diffusion_task import DiffusionTask, channel_statistics, snap
from steadyvq.generation.priors import load_prior
from steadyvq.models import Tokenizer
from steadyvq.training.config import read_recipe, resolve
from steadyvq.training.diffusion_config import DiffusionConfig, DitConfig, UnetConfig
from steadyvq.training.loop import Engine
from steadyvq.training.run import RunFolder
from steadyvq.training.strict import merge
from steadyvq.training.tokenizer_task import build_tokenizer

pytest.importorskip("diffusers", reason="the prior is an extra: pip install 'steadyvq[diffusion]'")

SHAPE = (8, 4, 4)
SMALL = {"unet": UnetConfig((16, 32), 1, (1,), 16), "dit": DitConfig(2, 2, 32)}
PREDICTIONS = ("epsilon", "v", "flow")
FITTING = [(p, s) for p in PREDICTIONS for s in SCHEDULERS if (p == "flow") == (s == "flow")]


def prior_of(classes=3, seed=0, **settings):
    """A float64 prior whose output is not 0."""
    torch.manual_seed(seed)
    prior = DiffusionPrior(DiffusionConfig(**SMALL, **settings), SHAPE, classes).eval().double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        prior.mean.normal_()
        prior.deviation.uniform_(0.5, 2)
    return prior


def naive_alphas_bar(config):
    """arXiv 2006.11239, below equation 4; `scaled_linear` of latent diffusion; arXiv 2102.09672, equation 17."""
    count = config.times
    if config.schedule == "cosine":
        f = [np.cos((t / count + 0.008) / 1.008 * np.pi / 2) ** 2 for t in range(count + 1)]
        betas = [min(1 - f[t + 1] / f[t], 0.999) for t in range(count)]
    else:
        power = 2 if config.schedule == "scaled_linear" else 1
        first, last = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
        betas = [(first + (last - first) * t / (count - 1)) ** power for t in range(count)]
    product, found = 1.0, []
    for beta in betas:
        product *= 1 - beta
        found.append(product)
    return found


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_is_added_as_the_papers_say(prediction, schedule):
    prior = prior_of(prediction=prediction, schedule=schedule)
    clean, noise = torch.randn(2, 5, *SHAPE, dtype=torch.float64)
    where = torch.tensor([0.0, 0.1234, 0.5, 0.9, 1 - 2**-24], dtype=torch.float64)
    noisy, times, wanted = prior.noised(clean, noise, where)
    alphas = naive_alphas_bar(prior.config)
    for i, u in enumerate(where.tolist()):
        x, e = clean[i], noise[i]
        if prediction == "flow":
            s = 1 - u
            expected, told, target = (1 - s) * x + s * e, 1000 * s, e - x
        else:
            told = int(1000 * u)
            a = alphas[told]
            expected = a**0.5 * x + (1 - a) ** 0.5 * e
            target = e if prediction == "epsilon" else a**0.5 * e - (1 - a) ** 0.5 * x
        assert torch.allclose(noisy[i], expected, atol=1e-5)
        assert float(times[i]) == pytest.approx(told)
        assert torch.allclose(wanted[i], target, atol=1e-5)


def oracle(prior, clean):
    """Predicts what `noised` says should be predicted, for samples whose clean latents are known."""
    alphas = naive_alphas_bar(prior.config)

    def predict(x, time):
        if prior.config.prediction == "flow":
            return (x - clean) / (float(time) / prior.config.times)
        a = alphas[int(time)]
        noise = (x - a**0.5 * clean) / (1 - a) ** 0.5
        return noise if prior.config.prediction == "epsilon" else a**0.5 * noise - (1 - a) ** 0.5 * clean

    return predict


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Tokens with latents of 32 crops of photographs, each of a class of its own, and two without classes and latents."""
    folder = tmp_path_factory.mktemp("diffusion")
    tokenizer = build_tokenizer(
        resolve(tiny_recipe(folder, quantizer={"name": "vq", "num_codes": 32, "dim": 8, "init": "none"}))
    ).eval()
    crops = EvaluationCrops(load_collection("mvtb", max_side=160), 16, 32)
    with torch.no_grad():
        # Codes among the latents, so that tokens differ.
        latents = tokenizer.latents(crops.images[:8].float() / 127.5 - 1).permute(0, 2, 3, 1).reshape(-1, 8)
        tokenizer.quantizer.init_from(latents[torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))])
    for i, image in enumerate(crops.images):
        (folder / "data" / f"class{i:02d}").mkdir(parents=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "data" / f"class{i:02d}" / "image.png")
    views = Views("centre,flip", 16)
    TokenWriter(
        tokenizer, "mine", open_source(folder / "data"), folder / "tokens", views, shard_images=10, latents="float32"
    ).write()
    TokenWriter(
        tokenizer, "mine", open_source(folder / "data"), folder / "small", Views(size=8), latents="float32"
    ).write()
    (folder / "plain").mkdir()
    for i in range(2):
        (folder / "plain" / f"{i}.png").write_bytes((folder / "data" / f"class{i:02d}" / "image.png").read_bytes())
    TokenWriter(tokenizer, "mine", open_source(folder / "plain"), folder / "unlabelled", views).write()
    return folder


def recipe(tokens, **changes):
    base = {
        "title": "diffusion",
        "task": "diffusion",
        "data": {"source": str(tokens), "epoch_samples": 32, "eval_crops": 8},
        "diffusion": {
            "unet": {"widths": [16, 32], "blocks": 1, "attention": [1], "head_width": 16},
            "dit": {"layers": 2, "heads": 2, "width": 32},
            "shown": 0,
        },
        "optim": {"lr": 3e-3},
        "epochs": 4,
        "batch_size": 8,
        "eval_every": 2,
        "log_every": 1,
    }
    return merge(base, changes)


class TestStoredLatents:
    def test_they_are_what_the_encoder_gives_and_what_the_tokens_were_looked_up_for(self, stored):
        tokens = TokenSet(stored / "tokens")
        tokenizer = tokens.tokenizer()
        rows, views = np.array([3, 31, 0, 12]), np.array([0, 1, 1, 0])
        found = torch.from_numpy(tokens.read_latents(rows, views))
        assert found.shape == (4, *tokens.latent_shape)
        for latents, row, view in zip(found, rows.tolist(), views.tolist(), strict=True):
            image = np.asarray(Image.open(stored / "data" / f"class{row:02d}" / "image.png"))
            pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            with torch.no_grad():
                expected = tokenizer.latents(pixels.flip(3) if view else pixels)[0]
            assert torch.allclose(latents, expected, atol=1e-5)
        assert torch.equal(snap(tokenizer, found), tokens.grids(tokens.read(rows, views)))
        assert len(set(tokens.read(range(32)).flatten().tolist())) > 16

    def test_a_kill_and_several_parts_leave_the_same_bytes(self, stored, tmp_path):
        from steadyvq.generation.shares import Share

        tokens = TokenSet(stored / "tokens")
        words = (tokens.tokenizer(), "mine", open_source(stored / "data"), tmp_path / "t", Views("centre,flip", 16))
        for index in (2, 0, 1):
            share = Share(index, 3)
            TokenWriter(*words, shard_images=10, latents="float32", share=share).write()
        (tmp_path / "t" / "meta.json").unlink()
        (tmp_path / "t" / "tokens-00001.json").unlink()
        (tmp_path / "t" / "latents-00001.npy").write_bytes(b"cut")
        TokenWriter(*words, shard_images=10, latents="float32").write()
        for path in sorted((stored / "tokens").glob("*.*")):
            assert (tmp_path / "t" / path.name).read_bytes() == path.read_bytes(), path.name
        with pytest.raises(ValueError, match="differs in latents"):
            TokenWriter(*words, shard_images=10)
        path = tmp_path / "t" / "latents-00002.npy"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        (problem,) = TokenSet(tmp_path / "t").verify()
        assert "latents-00002.npy is not as it was written" in problem
        assert "tokens-00002.json" in problem
        path.write_bytes(content[:-4])
        with pytest.raises(ValueError, match=r"latents-00002.npy has .* bytes.*cut short"):
            TokenSet(tmp_path / "t")

    def test_half_precision_halves_them(self, stored, tmp_path):
        tokens = TokenSet(stored / "tokens")
        words = (tokens.tokenizer(), "mine", open_source(stored / "plain"), tmp_path / "half", Views(size=16))
        TokenWriter(*words, latents="float16").write()
        half = TokenSet(tmp_path / "half").read_latents([0, 1])
        assert half.dtype == np.float16
        assert np.allclose(half, tokens.read_latents([0, 1]), atol=2e-3, rtol=2e-3)
        with pytest.raises(ValueError, match="stored as float32 or float16"):
            TokenWriter(*words, latents="int8")


@pytest.mark.parametrize(("prediction", "scheduler"), FITTING)
def test_from_latents_to_noise_and_back_all_tokens_of_a_batch_return(stored, prediction, scheduler):
    """Normalised, denoised by a network that knows the answer, quantized: no token of 32 images changes."""
    tokens = TokenSet(stored / "tokens")
    task = DiffusionTask(resolve(recipe(stored / "tokens", diffusion={"prediction": prediction})), tokens)
    task.prepare()
    prior = task.prior.double()
    latents = task.vectors(np.arange(32)).double()
    clean = prior.normalise(latents)
    generators = [sample_generator(0, number) for number in range(32)]
    noise = torch.stack([torch.randn(prior.shape, generator=g, dtype=torch.float64) for g in generators])
    drawing = DiffusionDrawing(scheduler=scheduler, steps=20)
    found = denoise(oracle(prior, clean), timed_scheduler(prior.config, drawing), noise, generators)
    back = snap(tokens.tokenizer(), found * prior.deviation + prior.mean)
    assert torch.equal(back, tokens.grids(tokens.read(range(32))))
    # The test can fail: noise alone has other tokens.
    other = snap(tokens.tokenizer(), noise * prior.deviation + prior.mean)
    assert not torch.equal(other, back)


def test_ddim_is_the_papers_step():
    """arXiv 2010.02502, equation 12 with sigma = 0, against diffusers' scheduler with our settings."""
    prior = prior_of()
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    classes, steps = torch.tensor([0, 2]), 10

    def predict(noisy, time):
        with torch.no_grad():
            return prior(noisy, time.double().expand(2), classes)

    found = denoise(predict, timed_scheduler(prior.config, DiffusionDrawing(steps=steps)), x)
    alphas = naive_alphas_bar(prior.config)
    for t in range(999, 0, -100):
        noise = predict(x, torch.tensor(t))
        a, before = alphas[t], alphas[t - 100] if t >= 100 else 1.0
        clean = (x - (1 - a) ** 0.5 * noise) / a**0.5
        x = before**0.5 * clean + (1 - before) ** 0.5 * noise
    assert torch.allclose(found, x, atol=1e-4)


class TestDrawing:
    labels = torch.tensor([0, 1, 2, 1])

    def draw(self, prior, numbers=(0, 1, 2, 3), labels=None, seed=0, **drawing):
        labels = self.labels[list(numbers)] if labels is None else labels
        return sample_latents(prior, labels, seed, numbers, DiffusionDrawing(**{"steps": 4, **drawing}))

    def test_guidance(self):
        """1 is the conditional model; 0 is that without classes; 2 is c + (c - u) at every step."""
        prior = prior_of()
        plain = self.draw(prior)
        assert torch.allclose(plain, self.draw(prior, guidance=1 + 1e-13), atol=1e-9)
        nothing = self.draw(prior, labels=torch.full((4,), prior.null))
        assert torch.allclose(self.draw(prior, guidance=0.0), nothing, atol=1e-9)
        assert not torch.allclose(plain, nothing, atol=1e-3)

        def guided(x, time):
            with torch.no_grad():
                given, without = (
                    prior(x, time.double().expand(4), c) for c in (self.labels, torch.full((4,), prior.null))
                )
            return given + (given - without)

        noise = torch.stack(
            [torch.randn(SHAPE, generator=sample_generator(0, n), dtype=torch.float64) for n in range(4)]
        )
        expected = denoise(guided, timed_scheduler(prior.config, DiffusionDrawing(steps=4)), noise)
        expected = expected * prior.deviation + prior.mean
        assert torch.allclose(self.draw(prior, guidance=2.0), expected, atol=1e-9)
        with pytest.raises(ValueError, match="knows no classes"):
            self.draw(prior_of(classes=0), labels=torch.zeros(4, dtype=torch.long), guidance=2.0)

    @pytest.mark.parametrize(("prediction", "scheduler"), FITTING)
    @pytest.mark.parametrize("network", ["unet", "dit"])
    def test_a_sample_does_not_depend_on_those_beside_it(self, network, prediction, scheduler):
        prior = prior_of(network=network, prediction=prediction)
        whole = self.draw(prior, scheduler=scheduler)
        for part in ((2,), (3, 0), (1, 2, 3)):
            assert torch.allclose(self.draw(prior, part, scheduler=scheduler), whole[list(part)], atol=1e-4)
        assert not torch.allclose(self.draw(prior, seed=1, scheduler=scheduler), whole, atol=0.1)
        assert not torch.allclose(whole[1], whole[3], atol=0.1)

    def test_refusals(self):
        for prediction, name in (("flow", "ddim"), ("v", "flow")):
            with pytest.raises(ValueError, match=f"'{name}' does not fit a prior that predicts '{prediction}'"):
                make_scheduler(DiffusionConfig(prediction=prediction), name)
        with pytest.raises(ValueError, match="one of ddpm, ddim"):
            DiffusionDrawing(scheduler="pndm")
        with pytest.raises(ValueError, match="use a divisor of 1000"):
            self.draw(prior_of(), steps=30)
        with pytest.raises(ValueError, match="there are 1000 noise levels"):
            self.draw(prior_of(), scheduler="dpm++", steps=1001)
        with pytest.raises(ValueError, match="steps >= 1"):
            DiffusionDrawing(steps=0)
        few = timed_scheduler(DiffusionConfig(times=64), DiffusionDrawing())
        assert len(few.timesteps) == 32


def test_the_published_recipe_has_the_published_size():
    """arXiv 2112.10752 and its configuration cin256-v2: LDM-4; 178,000 steps of 1,200 images."""
    config = resolve(read_recipe("ldm_imagenet256"))
    size = config.diffusion.unet
    assert [width // 192 for width in size.widths] == [1, 2, 3, 5]
    # Resolutions 32, 16 and 8 of 64.
    assert [64 >> level for level in size.attention] == [32, 16, 8]
    assert config.epochs * (1_281_167 // config.batch_size) == pytest.approx(178_000, rel=0.01)
    assert (config.diffusion.times, config.optim.lr, size.blocks) == (1000, 1e-4, 2)
    with torch.device("meta"):
        prior = DiffusionPrior(config.diffusion, (3, 64, 64), 1000)
    assert sum(p.numel() for p in prior.parameters()) / 1e6 == pytest.approx(264, abs=1)


def test_channels_are_measured_over_the_training_images(stored):
    tokens = TokenSet(stored / "tokens")
    task = DiffusionTask(resolve(recipe(stored / "tokens")), tokens)
    task.prepare()
    every = np.concatenate([tokens.read_latents(task.train_rows, view) for view in range(2)]).astype(np.float64)
    assert np.allclose(task.prior.mean.flatten(), every.mean((0, 2, 3)), atol=1e-5)
    assert np.allclose(task.prior.deviation.flatten(), every.std((0, 2, 3)), atol=1e-5)
    parts = channel_statistics(lambda part: torch.from_numpy(every[part]), np.arange(len(every)), batch=7)
    assert np.allclose(parts[0], every.mean((0, 2, 3)))
    task.export(stored / "exported")
    saved = load_prior(stored / "exported")
    assert torch.equal(saved.model.deviation, task.prior.deviation)
    assert saved.tokenizer_hash == tokenizer_hash(tokens.tokenizer())
    half = TokenSet(stored / "tokens")
    half.latent_shards = half.latent_shards[:1]
    with pytest.raises(ValueError, match="holds other tokens"):
        DiffusionTask(resolve(recipe(stored / "tokens")), half).load_state_dict(task.state_dict())
    codes = DiffusionTask(resolve(recipe(stored / "tokens", diffusion={"space": "codes"})), tokens)
    vectors = codes.vectors(np.arange(4))
    assert torch.equal(vectors, tokens.tokenizer().quantizer.decode(tokens.grids(tokens.read(range(4)))))
    assert torch.equal(snap(tokens.tokenizer(), vectors), tokens.grids(tokens.read(range(4))))


def test_batches_are_functions_of_their_positions(stored):
    task = DiffusionTask(resolve(recipe(stored / "tokens", data={"epoch_samples": 32})))
    whole = task.batch(1, range(32))
    parts = [torch.cat(pair) for pair in zip(task.batch(1, range(5)), task.batch(1, range(5, 32)), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))
    latents, labels, where, noise = (
        torch.cat(parts) for parts in zip(*(task.batch(e, range(32)) for e in range(8)), strict=True)
    )
    assert noise.shape == latents.shape
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert float(noise.pow(4).mean()) == pytest.approx(3, abs=0.15)
    assert 0 <= float(where.min()) < 0.05
    assert 0.95 < float(where.max()) < 1
    assert 0 < (labels == task.prior.null).sum() < 64


@pytest.mark.slow
@pytest.mark.parametrize(("network", "prediction", "error"), [("unet", "v", 0.4), ("dit", "flow", 0.05)])
def test_it_learns_four_images_by_heart(stored, tmp_path, network, prediction, error):
    """Each of four classes draws its own image; the DiT brings back its tokens too, for which a UNet takes more steps."""
    changes = {
        "data": {"epoch_samples": 16 * 300},
        "diffusion": {"network": network, "prediction": prediction, "label_dropout": 0.0},
        "optim": {"lr": 4e-3, "decay": "cosine", "ema_decay": 0.0},
    }
    tokens = TokenSet(stored / "small")
    config = resolve(recipe(stored / "small", epochs=1, batch_size=16, eval_every=1, **changes))
    task = DiffusionTask(config, tokens)
    task.train_rows = task.held_out = rows = np.array([3, 9, 14, 27])
    run = RunFolder(tmp_path / "run", config)
    run.begin("test")
    Engine(task, run, quiet=True).fit()
    prior = load_prior(run.path / "prior").model
    found = sample_latents(
        prior, torch.from_numpy(tokens.labels[rows].astype(np.int64)), 0, range(4), DiffusionDrawing(steps=20)
    )
    wanted = torch.from_numpy(tokens.read_latents(rows)).double()
    apart = (found[:, None] - wanted[None]).square().mean((2, 3, 4)) / wanted.var()
    assert apart.argmin(1).tolist() == [0, 1, 2, 3]
    assert float(apart.diagonal().mean()) < error
    if network == "dit":
        right = snap(tokens.tokenizer(), found) == tokens.grids(tokens.read(rows))
        assert float(right.double().mean()) > 0.8


@pytest.mark.slow
@pytest.mark.recovery
def test_killed_and_resumed_it_is_the_same_run(stored, tmp_path):
    """Dropout, hidden classes, measured channels and averaged weights included, bit for bit; through the command line."""
    changes = {"diffusion": {"dropout": 0.1}, "epochs": 6, "eval_every": 3, "checkpoint_every": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(stored / "tokens", **changes)))
    check_a_kill_leaves_no_trace(tmp_path)
    whole, killed = (read_tensors(tmp_path / name / "prior" / "prior.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert not torch.equal(whole["deviation"], torch.ones_like(whole["deviation"]))


@pytest.fixture(scope="module")
def run(stored):
    """A run folder of a prior that has hardly learnt anything."""
    config = resolve(recipe(stored / "tokens", epochs=1, diffusion={"shown": 4}))
    task = DiffusionTask(config)
    folder = RunFolder(stored / "run", config)
    folder.begin("test")
    Engine(task, folder, quiet=True).fit()
    assert list((stored / "run" / "pictures").glob("*.png"))
    return stored / "run"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_pictures_depend_on_their_numbers_alone(run, tmp_path, capsys):
    words = ["sample", str(run), "--seed", "3", "--guidance", "1.5", "--scheduler", "ddpm", "--steps", "5"]
    assert main([*words, "--num", "10", "--out", str(tmp_path / "a")]) == 0
    whole = files(tmp_path / "a")
    assert len(whole) == 11
    assert len(set(whole.values())) > 6
    for index in (1, 0):
        part = ["--num", "10", "--batch", "3", "--num-shards", "2", "--shard-index", str(index)]
        assert main([*words, *part, "--out", str(tmp_path / "b")]) == 0
    assert files(tmp_path / "b") == whole
    (tmp_path / "b" / "000004.png").unlink()
    capsys.readouterr()
    assert main([*words, "--num", "10", "--out", str(tmp_path / "b")]) == 0
    assert "9 of 10 pictures lie in" in capsys.readouterr().err
    assert files(tmp_path / "b") == whole


class TestBadInput:
    def refused(self, *arguments, **changes):
        with pytest.raises(ValueError) as caught:
            DiffusionTask(resolve(recipe(*arguments, **changes)))
        return str(caught.value)

    def said(self, capsys, *words):
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    def test_settings(self, stored):
        assert "--latents float32" in self.refused(stored / "unlabelled")
        codes = {"space": "codes"}
        assert "have no labels" in self.refused(stored / "unlabelled", diffusion={"conditional": True, **codes})
        assert DiffusionTask(resolve(recipe(stored / "unlabelled", diffusion=codes))).prior.num_classes == 0
        assert "'epsilon', 'v', 'flow'" in self.refused(stored / "tokens", diffusion={"prediction": "x0"})
        assert "halves both sides 4 times" in self.refused(stored / "tokens", diffusion={"unet": {"widths": 5 * [16]}})
        assert "patches of 3" in self.refused(stored / "tokens", diffusion={"network": "dit", "dit": {"patch": 3}})
        assert "multiples of it" in self.refused(stored / "tokens", diffusion={"unet": {"head_width": 24}})
        assert "levels are 0 to 1" in self.refused(stored / "tokens", diffusion={"unet": {"attention": [2]}})
        assert "prior is set, but it means nothing" in self.refused(stored / "tokens", prior={"size": "B"})

    def test_sampling(self, run, stored, tmp_path, capsys):
        words = ["sample", run, "--out", tmp_path / "x", "--num", "2"]
        assert "--top-k means nothing to a prior of the kind 'diffusion'" in self.said(capsys, *words, "--top-k", "5")
        assert "must be one of ddpm" in self.said(capsys, *words, "--scheduler", "euler")
        assert "does not fit a prior that predicts 'epsilon'" in self.said(capsys, *words, "--scheduler", "flow")
        other = Tokenizer.from_pretrained(stored / "tokens" / "tokenizer")
        mine = tokenizer_hash(other)
        with torch.no_grad():
            next(other.encoder.parameters()).add_(1)
        other.save_pretrained(tmp_path / "other")
        said = self.said(capsys, *words, "--tokenizer", tmp_path / "other")
        assert mine[:12] in said
        assert tokenizer_hash(other)[:12] in said
        assert not (tmp_path / "x").exists()

    def test_other_tokens_are_refused_at_a_resume(self, run):
        other = TokenSet(run.parent / "tokens")
        other.tokenizer_hash, other.tokenizer_name = "f" * 64, "another one"
        folder = RunFolder.open(run)
        with pytest.raises(ValueError, match="another one is the tokenizer ffffffffffff"):
            Engine(DiffusionTask(folder.config, other), folder, resume=True, quiet=True)

    def test_without_diffusers_there_is_one_sentence(self, stored, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "diffusers", None)
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(stored / "tokens")))
        assert "pip install 'steadyvq[diffusion]'" in self.said(
            capsys, "train", tmp_path / "r.yaml", "--out", tmp_path / "run"
        )
