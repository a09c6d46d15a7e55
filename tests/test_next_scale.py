# SPDX-License-Identifier: Apache-2.0
"""The next-scale prior: what a scale sees, stepwise and teacher-forced reading, drawing, training."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from runs import check_a_kill_leaves_no_trace
from stored import BY_HEART, recipe, store

from steadyvq.cli import main
from steadyvq.generation.next_scale import NextScalePrior, scale_mask, scale_places
from steadyvq.generation.priors import load_prior, prior_task
from steadyvq.generation.sampling import SamplingConfig, keyed_uniforms, sample_tokens
from steadyvq.quantizers import build_quantizer
from steadyvq.training.config import resolve
from steadyvq.training.loop import Engine
from steadyvq.training.prior_config import PriorConfig
from steadyvq.training.run import RunFolder

pytest.importorskip("transformers", reason="the prior is an extra: pip install 'steadyvq[ar]'")

SCALES, CODES, DIM = [1, [2, 3], 4], 11, 4
STARTS = [0, 1, 7, 23]
SMALL = PriorConfig(layers=2, heads=2, width=32, dropout=0.0)
FACTORISED = PriorConfig(layers=2, heads=2, width=32, dropout=0.0, factorised=True)


def quantizer_of(**options):
    return build_quantizer("multiscale", num_codes=CODES, dim=DIM, scales=SCALES, **options).double()


def prior_of(config=SMALL, classes=3, **options):
    """A float64 prior whose head is not 0 and whose scales hear each other, so that its distributions differ."""
    torch.manual_seed(0)
    prior = NextScalePrior(config, quantizer_of(**options), classes).eval().double()
    with torch.no_grad():
        for part in (prior.head, prior.classes, prior.places, prior.levels):
            for parameter in part.parameters():
                parameter.normal_(std=0.5)
        for parameter in prior.body.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    return prior


def test_places_are_those_of_the_last_grid():
    places = scale_places([(1, 1), (2, 2), (4, 4)])
    assert places[0].tolist() == [1.5, 1.5]
    assert places[1:5].tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]
    assert places[5:].tolist() == [[i, j] for i in range(4) for j in range(4)]


def test_what_a_scale_reads_is_the_sum_of_the_coarser_ones():
    """VAR, algorithm 1, one scale at a time: the next input is the decoded beginning, averaged to the next size."""
    vq = quantizer_of(phis=2)
    tokens = torch.randint(CODES, (2, STARTS[2]))
    found = vq.following(tokens)
    for scale, part in enumerate(found):
        so_far = vq.decode(tokens[:, : STARTS[scale + 1]])
        size = vq.scales[scale + 1]
        naive = torch.stack(
            [
                F.adaptive_avg_pool2d(image, size).movedim(0, -1)  # the mean of the pixels of every cell
                for image in so_far
            ]
        )
        assert torch.allclose(part, naive, atol=1e-6)
    with pytest.raises(ValueError, match="nothing follows the last"):
        vq.following(torch.randint(CODES, (2, STARTS[3])))


def test_a_token_depends_on_coarser_scales_alone():
    prior, labels = prior_of(), torch.tensor([1])
    tokens = torch.randint(CODES, (1, 23))
    before = prior.read(tokens[:, : STARTS[2]], labels)
    assert before.shape[1] == 23
    for place in range(STARTS[2]):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % CODES
        differs = (prior.read(changed[:, : STARTS[2]], labels) - before).abs().amax(2)[0] > 1e-12
        own_end = next(end for end in STARTS[1:] if place < end)
        assert not differs[:own_end].any(), "its own scale and coarser ones do not hear of it"
        assert differs[own_end:].all()
    assert ((prior.read(tokens[:, : STARTS[2]], torch.tensor([0])) - before).abs().amax(2) > 1e-6).all()
    mask = scale_mask([(1, 1), (1, 2)])
    assert mask.tolist() == [[True, False, False], [True, True, True], [True, True, True]]


@pytest.mark.parametrize("config", [SMALL, FACTORISED], ids=["one digit", "two digits"])
def test_teacher_forced_reading_is_stepwise_reading(config):
    prior, labels = prior_of(config), torch.tensor([0, 2])
    tokens = torch.randint(CODES, (2, 23))
    whole = prior.read(tokens[:, : STARTS[2]], labels)
    cache = prior.new_cache()
    for scale in range(3):
        begun = tokens[:, : STARTS[scale]]
        own = whole[:, STARTS[scale] : STARTS[scale + 1]]
        assert torch.allclose(prior.read(begun, labels, cache), own, atol=1e-12)
        assert torch.allclose(prior.read(begun, labels)[:, STARTS[scale] :], own, atol=1e-12)
        logits = prior.head.logits(own, [])
        if prior.head.digits == 1:
            naive = -logits.log_softmax(2).gather(2, tokens[:, STARTS[scale] : STARTS[scale + 1], None])[..., 0]
            found = prior(tokens, labels)[:, STARTS[scale] : STARTS[scale + 1]]
            assert torch.allclose(found.double(), naive, atol=1e-5)


WAYS = [SamplingConfig(), SamplingConfig(temperature=0.0), SamplingConfig(guidance=2.5), SamplingConfig(top_k=4)]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_drawing_is_what_the_definition_says(way):
    """Every token of a scale from its own distribution; guidance grows from 1 to s."""
    prior, numbers = prior_of(), [5, 0]
    labels = torch.tensor([0, 2])
    found = sample_tokens(prior, labels, 3, numbers, way)
    assert torch.equal(found, prior.sample(labels, 3, numbers, way, cached=False))
    for row, label, number in zip(found.tolist(), labels.tolist(), numbers, strict=True):
        uniform = keyed_uniforms(23, 3, [number])[0].tolist()
        for scale in range(3):
            begun = torch.tensor([row[: STARTS[scale]]], dtype=torch.long)
            s = 1 + (way.guidance - 1) * scale / 2
            for place in range(STARTS[scale], STARTS[scale + 1]):
                c, u = (
                    prior.head.logits(prior.read(begun, torch.tensor([name]))[0, place], []).tolist()
                    for name in (label, prior.null)
                )
                logits = [b + s * (a - b) for a, b in zip(c, u, strict=True)]
                order = sorted(range(CODES), key=lambda k: -logits[k])
                kept = sorted(order[: way.top_k or CODES] if way.temperature else order[:1])
                weights = [np.exp(logits[k] - logits[order[0]]) for k in kept]
                ends = np.cumsum(weights) / sum(weights)
                assert row[place] == kept[int(np.searchsorted(ends, uniform[place], side="right"))]


def test_guidance_of_one_is_the_conditional_model():
    prior, labels = prior_of(), torch.tensor([0, 1, 2])
    plain = sample_tokens(prior, labels, 0, range(3), SamplingConfig(guidance=1.0))
    assert torch.equal(plain, sample_tokens(prior, labels, 0, range(3), SamplingConfig(guidance=1.0 + 1e-12)))
    assert not torch.equal(plain, sample_tokens(prior, labels, 0, range(3), SamplingConfig(guidance=6.0)))


def test_a_sample_does_not_depend_on_those_beside_it():
    prior, labels = prior_of(), torch.arange(12) % 3
    whole = sample_tokens(prior, labels, 7, range(12))
    for part in (*torch.arange(3).split(1), *torch.randperm(12).split(5)):
        assert torch.equal(sample_tokens(prior, labels[part], 7, part.tolist()), whole[part])
    assert len({tuple(row) for row in whole.tolist()}) == 12


def test_the_quantizer_does_not_learn_and_is_saved_with_the_prior():
    prior = prior_of(inner="simvq")
    assert not list(prior.quantizer.parameters())
    assert not any("embedding" in name for name, _ in prior.named_parameters()), "all that is there is used"
    rebuilt = NextScalePrior(SMALL, build_quantizer(**prior.quantizer.spec), 3).double()
    rebuilt.load_state_dict(prior.state_dict())
    tokens, labels = torch.randint(CODES, (2, 23)), torch.tensor([0, 1])
    assert torch.equal(rebuilt.eval()(tokens, labels), prior(tokens, labels))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    options = {"scales": [1, 2, 4], "inner": "vq"}
    folder = tmp_path_factory.mktemp("scales")
    return store(folder, {"name": "multiscale", "num_codes": 32, "dim": 8, "options": options}, size=8)


@pytest.mark.slow
def test_it_learns_32_images_by_heart(tokens, tmp_path):
    config = resolve(recipe("next_scale", tokens, **BY_HEART))
    run = RunFolder(tmp_path / "run", config)
    run.begin("test")
    Engine(prior_task(config, tokens), run, quiet=True).fit()
    prior = load_prior(run.path / "prior").model
    wanted = torch.from_numpy(tokens.read(tokens.rows()).astype(np.int64))
    labels = torch.from_numpy(tokens.labels.astype(np.int64))
    with torch.no_grad():
        assert float(prior(wanted, labels).mean()) < 0.05
    assert torch.equal(sample_tokens(prior, labels, 0, range(32), SamplingConfig(temperature=0.0)), wanted)


KINDS = pytest.mark.parametrize("kind", ["masked", "next_scale"])


def of_kind(kind, tokens, folder):
    """Tokens that the kind can learn."""
    return tokens if kind == "next_scale" else store(folder, {"name": "vq", "num_codes": 32, "dim": 8}, size=8)


@KINDS
@pytest.mark.slow
@pytest.mark.recovery
def test_killed_and_resumed_it_is_the_same_run(kind, tokens, tmp_path):
    """Dropout, hidden classes, hidden tokens and averaged weights included, bit for bit; through the command line."""
    stored = of_kind(kind, tokens, tmp_path / "own")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(kind, stored, epochs=12, checkpoint_every=2)))
    check_a_kill_leaves_no_trace(tmp_path)


@KINDS
def test_pictures_depend_on_their_numbers_alone(kind, tokens, tmp_path, capsys):
    """Not on the batch, on who draws them, on a picture that is lost; and they can be judged."""
    stored = of_kind(kind, tokens, tmp_path / "own")
    task = prior_task(resolve(recipe(kind, stored)), stored)
    torch.nn.init.normal_(task.prior.head.output.weight)
    RunFolder(tmp_path / "run", task.config).begin("test")
    task.export(tmp_path / "run" / "prior")
    words = ["sample", str(tmp_path / "run"), "--seed", "3", "--guidance", "1.5", "--class", "class01,class03"]
    words += ["--steps", "5"] if kind == "masked" else []
    assert main([*words, "--num", "6", "--out", str(tmp_path / "a")]) == 0
    for index in (1, 0):
        part = ["--num", "6", "--batch", "2", "--num-shards", "2", "--shard-index", str(index)]
        assert main([*words, *part, "--out", str(tmp_path / "b")]) == 0
    (tmp_path / "b" / "000004.png").unlink()
    assert main([*words, "--num", "6", "--out", str(tmp_path / "b")]) == 0
    files = [{path.name: path.read_bytes() for path in (tmp_path / x).glob("*.png")} for x in "ab"]
    assert files[0] == files[1]
    assert len(set(files[0].values())) == 7
    capsys.readouterr()
    assert main(["sample", *words[1:], "--num", "6", "--temperature", "0.5", "--out", str(tmp_path / "b")]) == 2
    assert "differs in drawing" in capsys.readouterr().err


def test_bad_input(tokens, tmp_path):
    plain = store(tmp_path, {"name": "vq", "num_codes": 32, "dim": 8}, size=8)
    with pytest.raises(
        ValueError, match="of the quantizer 'vq', but a next-scale prior needs tokens of several scales"
    ):
        prior_task(resolve(recipe("next_scale", plain)))
    with pytest.raises(ValueError, match="which has 32 codes: leave it out"):
        prior_task(resolve(recipe("next_scale", tokens, prior={"vocabulary": 64})))
    for kind in ("masked", "autoregressive"):
        with pytest.raises(ValueError, match=r"have shape \(21,\) for an image, but this prior knows grids"):
            prior_task(resolve(recipe(kind, tokens)))
    moved = tmp_path / "moved"
    shutil.copytree(tokens.folder, moved)
    shutil.rmtree(moved / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer"):
        prior_task(resolve({**recipe("next_scale", tokens), "data": {"source": str(moved), "epoch_samples": 32}}))
