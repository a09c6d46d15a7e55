# SPDX-License-Identifier: Apache-2.0
"""The autoregressive prior: its rotation, its distribution, how it is drawn from, how it is trained."""

import shutil
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
from steadyvq.generation import TokenSet, TokenWriter, Views, tokenizer_hash
from steadyvq.generation.autoregressive import AutoregressivePrior
from steadyvq.generation.body import Rotary, places_of
from steadyvq.generation.prior_task import PriorTask
from steadyvq.generation.priors import load_prior, with_counted_tokens
from steadyvq.generation.sampling import (
    SamplingConfig,
    class_numbers,
    draw,
    keyed_uniforms,
    probabilities,
    sample_tokens,
)
from steadyvq.training.config import resolve
from steadyvq.training.loop import Engine
from steadyvq.training.prior_config import SIZES, PriorConfig
from steadyvq.training.run import RunFolder
from steadyvq.training.strict import merge
from steadyvq.training.tokenizer_task import build_tokenizer

pytest.importorskip("transformers", reason="the prior is an extra: pip install 'steadyvq[ar]'")

GRID, CODES = (3, 4), 7
SMALL = PriorConfig(layers=2, heads=2, width=32, dropout=0.0)


def prior_of(config=SMALL, codes=CODES, classes=3, grid=GRID, seed=0, spread=0.3):
    """A float64 prior whose head is not 0, so that its distributions differ."""
    torch.manual_seed(seed)
    prior = AutoregressivePrior(config, codes, grid, classes).eval().double()
    with torch.no_grad():
        for parameter in prior.head.parameters():
            parameter.normal_(std=spread)
        prior.classes.weight.normal_(std=spread)
    return prior


FACTORISED = PriorConfig(layers=2, heads=2, width=32, dropout=0.0, factorised=True)
BOTH = pytest.mark.parametrize("config", [SMALL, FACTORISED], ids=["one digit", "two digits"])


def test_rotation_depends_on_differences_of_rows_and_of_columns():
    """arXiv 2104.09864, equation 15, per axis; the naive form turns pairs of features one at a time."""
    width, base = 8, 100.0
    table = Rotary(places_of(GRID), width, base, first=1)
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            place = 1 + row * GRID[1] + column
            angles = [row * base ** (-4 * j / width) for j in range(2)] + [
                column * base ** (-4 * j / width) for j in range(2)
            ]
            for pair, angle in enumerate(angles):
                for feature in (pair, pair + width // 2):
                    assert float(table.cos[place, feature]) == pytest.approx(np.cos(angle))
                    assert float(table.sin[place, feature]) == pytest.approx(np.sin(angle))
    assert not table.cos[0].any()
    assert not table.sin[0].any()


def test_the_class_acts_through_its_value_alone():
    """Every query scores it 0: in the first layer its key does not matter, and its value does."""
    prior = prior_of()
    tokens, labels = torch.randint(CODES, (2, 11)), torch.tensor([0, 1])
    before = prior.read(tokens, labels)
    layer = prior.body.layers[0].self_attn
    seen = []
    layer.k_proj.register_forward_hook(lambda module, inputs, out: torch.cat([out[:, :1] + 5, out[:, 1:]], dim=1))
    assert torch.allclose(prior.read(tokens, labels), before, atol=1e-12)
    layer.v_proj.register_forward_hook(
        lambda module, inputs, out: seen.append(1) or torch.cat([out[:, :1] + 5, out[:, 1:]], 1)
    )
    assert not torch.allclose(prior.read(tokens, labels), before, atol=1e-3)


def test_a_token_sees_those_before_it_and_no_other():
    prior = prior_of()
    tokens, labels = torch.randint(CODES, (1, 12)), torch.tensor([1])
    before = prior(tokens, labels)
    for place in range(12):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % CODES
        differs = (prior(changed, labels) - before).abs()[0] > 1e-9
        assert not differs[:place].any()
        assert differs[place:].all()


@BOTH
@pytest.mark.parametrize("codes", [5, 7, 9])
def test_probabilities_of_all_grids_sum_to_one(config, codes):
    """exp(-sum of what forward gives) over every grid of a small space, also where no square number of codes exists."""
    prior = prior_of(config, codes, grid=(1, 3))
    every = torch.cartesian_prod(*[torch.arange(codes)] * 3)
    with torch.no_grad():
        total = (-prior(every, torch.full((len(every),), 2)).double().sum(1)).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-5)


def test_sizes_have_the_published_numbers_of_parameters():
    """LlamaGen, table of models: 111 M, 343 M, 775 M, 1.4 B; 16,384 codes, 1,000 classes."""
    for name, millions in {"B": 111, "L": 343, "XL": 775, "XXL": 1400}.items():
        with torch.device("meta"):
            prior = AutoregressivePrior(PriorConfig(size=name), 16384, (16, 16), 1000)
        found = sum(parameter.numel() for parameter in prior.parameters()) / 1e6
        assert found == pytest.approx(millions, rel=0.02)
    assert set(SIZES) >= {"B", "L", "XL", "XXL", "XXXL", "1B", "3B", "7B"}


def test_two_digits_save_what_they_promise():
    with torch.device("meta"):
        plain, split = (AutoregressivePrior(config, 65536, (16, 16), 10).head for config in (SMALL, FACTORISED))
    assert sum(p.numel() for p in plain.parameters()) == 2 * 65536 * 32
    assert sum(p.numel() for p in split.parameters()) == 5 * 256 * 32


def naive(prior, label, seed, number, config):
    """One sample by the definition: the whole sequence is read anew for every token, and nothing is shared."""
    numbers = keyed_uniforms(prior.num_tokens * prior.head.digits, seed, [number])[0].tolist()
    tokens = []
    for place in range(prior.num_tokens):
        digits = []
        for digit in range(prior.head.digits):

            def logits(name, digits=digits):
                hidden = prior.read(torch.tensor([tokens], dtype=torch.long), torch.tensor([name]))[:, -1]
                return prior.head.logits(hidden, [torch.tensor([d]) for d in digits])[0].tolist()

            given = logits(label)
            if config.guidance != 1:
                without = logits(prior.null)
                given = [
                    u + config.guidance * (c - u) if c > -np.inf else c for c, u in zip(given, without, strict=True)
                ]
            order = sorted(range(len(given)), key=lambda k: -given[k])
            if config.temperature == 0:
                digits.append(order[0])
                continue
            kept = order[: config.top_k] if config.top_k else order
            weights = {k: np.exp((given[k] - given[order[0]]) / config.temperature) for k in kept}
            total, sum_before, stay = sum(weights.values()), 0.0, set()
            for k in kept:
                if sum_before < config.top_p:
                    stay.add(k)
                sum_before += weights[k] / total
            total = sum(weights[k] for k in stay)
            end, chosen = 0.0, None
            for k in sorted(stay):
                end += weights[k] / total
                if chosen is None and numbers[place * prior.head.digits + digit] < end:
                    chosen = k
            digits.append(chosen)
        tokens.append(int(prior.head.join([torch.tensor(d) for d in digits])))
    return tokens


WAYS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.0),
    SamplingConfig(guidance=2.5),
    SamplingConfig(guidance=1.5, temperature=0.7, top_k=4),
    SamplingConfig(top_p=0.6),
    SamplingConfig(top_k=5, top_p=0.8, temperature=1.3),
]


@BOTH
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_drawing_is_what_the_definition_says_with_cache_and_without(config, way):
    prior = prior_of(config)
    labels, numbers = torch.tensor([0, 1, 2, 1]), [5, 0, 2, 9]
    cached = sample_tokens(prior, labels, 3, numbers, way)
    assert torch.equal(cached, prior.sample(labels, 3, numbers, way, cached=False))
    assert cached.tolist() == [
        naive(prior, label, 3, number, way) for label, number in zip(labels.tolist(), numbers, strict=True)
    ]


def test_guidance_of_one_is_the_conditional_model():
    prior = prior_of()
    labels = torch.tensor([0, 1, 2])
    plain = sample_tokens(prior, labels, 0, range(3), SamplingConfig(guidance=1.0))
    almost = sample_tokens(prior, labels, 0, range(3), SamplingConfig(guidance=1.0 + 1e-12))
    assert torch.equal(plain, almost)
    assert plain.tolist() == [naive(prior, label, 0, label, SamplingConfig()) for label in range(3)]
    assert not torch.equal(plain, sample_tokens(prior, labels, 0, range(3), SamplingConfig(guidance=4.0)))
    zero = sample_tokens(prior, labels, 0, range(3), SamplingConfig(guidance=0.0))
    assert torch.equal(zero, sample_tokens(prior, torch.full((3,), prior.null), 0, range(3)))


def test_a_sample_does_not_depend_on_those_beside_it():
    prior = prior_of()
    labels = torch.arange(40) % 3
    whole = sample_tokens(prior, labels, 7, range(40))
    for parts in (torch.arange(6).split(1), torch.arange(40).split(7), torch.randperm(40).split(16)):
        for part in parts:
            assert torch.equal(sample_tokens(prior, labels[part], 7, part.tolist()), whole[part])
    assert len({tuple(row) for row in whole.tolist()}) > 36
    assert not torch.equal(sample_tokens(prior, labels, 8, range(40)), whole)


def test_draws_follow_their_probabilities():
    chances = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0]], dtype=torch.float64)
    numbers = torch.arange(0, 1, 1e-4, dtype=torch.float64)
    found = torch.bincount(draw(chances.expand(len(numbers), -1), numbers), minlength=6) / len(numbers)
    assert torch.allclose(found.double(), chances[0], atol=1e-4 + 1e-9)
    assert draw(chances, torch.tensor([1 - 2**-53])).tolist() == [4]
    kept = probabilities(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), SamplingConfig(top_k=2))
    assert (kept[0] > 0).tolist() == [False, True, True, False]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Tokens of 32 crops of photographs, each of a class of its own, and two of them without classes."""
    folder = tmp_path_factory.mktemp("prior")
    tokenizer = build_tokenizer(
        resolve(tiny_recipe(folder, quantizer={"name": "vq", "num_codes": 32, "dim": 8}))
    ).eval()
    crops = EvaluationCrops(load_collection("mvtb", max_side=160), 16, 32)
    for i, image in enumerate(crops.images):
        (folder / "data" / f"class{i:02d}").mkdir(parents=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "data" / f"class{i:02d}" / "image.png")
    for name, size in {"tokens": 16, "small": 8}.items():
        TokenWriter(tokenizer, "mine", open_source(folder / "data"), folder / name, Views(size=size)).write()
    shutil.copytree(folder / "data" / "class00", folder / "plain")
    shutil.copy(folder / "data" / "class01" / "image.png", folder / "plain" / "other.png")
    TokenWriter(
        tokenizer, "mine", open_source(folder / "plain"), folder / "unlabelled", Views("centre,flip", 16)
    ).write()
    return folder


def recipe(tokens, **changes):
    base = {
        "title": "prior",
        "task": "autoregressive",
        "data": {"source": str(tokens), "epoch_samples": 32, "eval_crops": 8},
        "prior": {"layers": 2, "heads": 2, "width": 64, "shown": 0},
        "optim": {"lr": 3e-3, "betas": [0.9, 0.95]},
        "epochs": 6,
        "batch_size": 8,
        "eval_every": 3,
        "log_every": 1,
    }
    return merge(base, changes)


@pytest.mark.slow
def test_it_learns_32_grids_by_heart(stored, tmp_path):
    """Cross-entropy below 0.05 nats, and every class draws its own grid again."""
    changes = {
        "prior": {"label_dropout": 0.0, "dropout": 0.0, "weight_decay": 0.0},
        "optim": {"lr": 5e-3, "decay": "cosine", "ema_decay": 0.0},
    }
    length = {"epochs": 350, "batch_size": 32, "eval_every": 350, "checkpoint_every": 350}
    config = resolve(recipe(stored / "small", **length, **changes))
    tokens = TokenSet(stored / "small")
    # All images are trained on, whatever the hash of their names says.
    tokens._splits[:] = 0
    task = PriorTask(config, tokens)
    run = RunFolder(tmp_path / "run", config)
    run.begin("test")
    Engine(task, run, quiet=True).fit()
    prior = load_prior(run.path / "prior")
    wanted = torch.from_numpy(tokens.read(tokens.rows()).astype(np.int64))
    labels = torch.from_numpy(tokens.labels.astype(np.int64))
    assert len(set(tokens.labels.tolist())) == 32
    with torch.no_grad():
        nats = prior.model(wanted, labels)
    assert float(nats.mean()) < 0.05
    greedy = sample_tokens(prior.model, labels, 0, range(32), SamplingConfig(temperature=0.0))
    assert torch.equal(greedy, wanted), f"{(greedy != wanted).sum()} tokens differ, largest -log p {nats.max():.3f}"
    assert prior.tokenizer_hash == tokenizer_hash(tokens.tokenizer())


def test_batches_show_every_image_once_per_pass_and_hide_classes(stored):
    config = with_counted_tokens(
        resolve(recipe(stored / "tokens", data={"epoch_samples": None})), TokenSet(stored / "tokens")
    )
    task = PriorTask(config)
    length = len(task.train_rows)
    assert config.data.epoch_samples == length < 32
    seen = [task.batch(epoch, range(length)) for epoch in range(4)]
    wanted = sorted(map(tuple, task.tokens.read(task.train_rows).tolist()))
    for tokens, _ in seen:
        assert sorted(map(tuple, tokens.tolist())) == wanted
    assert not torch.equal(seen[0][0], seen[1][0])
    again = [torch.cat(parts) for parts in zip(task.batch(1, range(5)), task.batch(1, range(5, length)), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(again, seen[1], strict=True))
    hidden = torch.cat([labels for _, labels in seen]) == task.prior.null
    assert 0 < hidden.sum() < 0.3 * len(hidden)
    other = PriorTask(resolve(recipe(stored / "unlabelled", data={"epoch_samples": 8})))
    assert other.prior.num_classes == 0
    views = {tuple(row) for row in other.batch(0, range(8))[0].tolist()}
    one = {tuple(row) for view in range(2) for row in other.tokens.read(other.train_rows, view).tolist()}
    assert views == one, "both views are drawn"


@pytest.mark.slow
@pytest.mark.recovery
def test_killed_and_resumed_it_is_the_same_run(stored, tmp_path):
    """Dropout, hidden classes and averaged weights included, bit for bit; through the command line."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(stored / "tokens", epochs=12, checkpoint_every=2)))
    check_a_kill_leaves_no_trace(tmp_path)


class TestBadInput:
    def refused(self, *arguments, **changes):
        with pytest.raises(ValueError) as caught:
            PriorTask(resolve(recipe(*arguments, **changes)))
        return str(caught.value)

    def test_labels_and_vocabulary(self, stored):
        assert "have no labels" in self.refused(stored / "unlabelled", prior={"conditional": True})
        said = self.refused(stored / "tokens", prior={"vocabulary": 16})
        assert "of 32 codes, but prior.vocabulary is 16" in said
        assert "holds no tokens" in self.refused(stored / "data")
        assert "prior.size is 'huge'" in self.refused(stored / "tokens", prior={"size": "huge"})
        assert "multiple of 4" in self.refused(stored / "tokens", prior={"width": 36})
        assert "quantizer is set, but it means nothing" in self.refused(stored / "tokens", quantizer={"dim": 4})

    def test_tokens_of_another_tokenizer_are_refused_at_a_resume(self, stored, tmp_path):
        config = resolve(recipe(stored / "tokens", epochs=1))
        run = RunFolder(tmp_path / "run", config)
        run.begin("test")
        Engine(PriorTask(config), run, quiet=True).fit()
        other = TokenSet(stored / "tokens")
        mine = other.tokenizer_hash
        other.tokenizer_hash, other.tokenizer_name = "f" * 64, "another one"
        with pytest.raises(ValueError, match=f"{mine[:12]}.*another one is the tokenizer ffffffffffff"):
            Engine(PriorTask(config, other), run, resume=True, quiet=True)

    def test_sampling(self):
        with pytest.raises(ValueError, match="knows no classes"):
            sample_tokens(prior_of(classes=0), torch.tensor([0]), 0, [0], SamplingConfig(guidance=2.0))
        with pytest.raises(ValueError, match="0 < top_p <= 1"):
            SamplingConfig(top_p=0.0)
        assert class_numbers(["b", "0"], ["a", "b"]) == [1, 0]
        with pytest.raises(ValueError, match="no class 'c': the prior knows 2"):
            class_numbers(["c"], ["a", "b"])


def test_a_prior_without_classes_has_one_beginning(stored):
    prior = prior_of(classes=0)
    assert prior.null == 0
    assert sample_tokens(prior, torch.zeros(2, dtype=torch.long), 0, range(2)).shape == (2, 12)


def test_without_transformers_there_is_one_sentence(stored, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.cache_utils", None)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(stored / "tokens")))
    assert main(["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'steadyvq[ar]'" in capsys.readouterr().err
