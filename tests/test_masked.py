# SPDX-License-Identifier: Apache-2.0
"""The masked-token prior: what it hides and looks at, how it is drawn from, how it is trained."""

import itertools
import math

import numpy as np
import pytest
import torch
from stored import BY_HEART, recipe, store

from steadyvq.cli import main
from steadyvq.generation.masked import MaskedDrawing, MaskedPrior, hidden_count, hidden_counts
from steadyvq.generation.priors import load_prior, prior_task
from steadyvq.generation.sampling import SamplingConfig, keyed_uniforms, sample_tokens
from steadyvq.training.config import resolve
from steadyvq.training.loop import Engine
from steadyvq.training.prior_config import PriorConfig
from steadyvq.training.run import RunFolder

pytest.importorskip("transformers", reason="the prior is an extra: pip install 'steadyvq[ar]'")

GRID, CODES = (3, 4), 7
SMALL = PriorConfig(layers=2, heads=2, width=32, dropout=0.0)
FACTORISED = PriorConfig(layers=2, heads=2, width=32, dropout=0.0, factorised=True)
BOTH = pytest.mark.parametrize("config", [SMALL, FACTORISED], ids=["one digit", "two digits"])


def prior_of(config=SMALL, codes=CODES, classes=3, grid=GRID, spread=0.3):
    """A float64 prior whose head is not 0, so that its distributions differ."""
    torch.manual_seed(0)
    prior = MaskedPrior(config, codes, grid, classes).eval().double()
    with torch.no_grad():
        for part in (prior.head, prior.classes, prior.mask, prior.places):
            for parameter in part.parameters():
                parameter.normal_(std=spread)
    return prior


class TestSchedule:
    def test_of_256_tokens_in_8_steps(self):
        """arXiv 2202.04200, section 3: ceil(cos(pi t / 16) 256), by hand."""
        assert hidden_counts(8, 256) == [252, 237, 213, 182, 143, 98, 50, 0]

    @pytest.mark.parametrize("total", [1, 5, 12, 64, 256])
    @pytest.mark.parametrize("steps", [1, 2, 3, 8, 12])
    def test_is_the_definition_with_at_least_one_token_per_step(self, steps, total):
        def definition(step):
            # The smallest whole number that is not below cos(pi t / 2 T) n; 1e-9 is less than any true distance here.
            level = math.cos(math.pi * step / (2 * steps)) * total
            return next(k for k in range(total + 1) if k >= level - 1e-9)

        found = hidden_counts(steps, total)
        left = total
        for step, count in enumerate(found, 1):
            wanted = 0 if step == steps else definition(step)
            assert count == max(0, min(wanted, left - 1))
            left = count
        assert left == 0
        assert len(found) <= steps

    def test_hides_something_at_every_ratio_of_training(self):
        for ratio in np.arange(0, 1, 1e-3):
            assert 1 <= hidden_count(float(ratio), 16) <= 16
        assert hidden_count(0.0, 16) == 16
        assert hidden_count(2 / 3, 16) == 8, "a half, not one more by rounding"


def test_hidden_tokens_are_not_looked_at_and_all_others_are():
    prior, labels = prior_of(), torch.tensor([1])
    tokens = torch.randint(CODES, (1, 12))
    hidden = torch.zeros(1, 12, dtype=torch.bool)
    hidden[0, [2, 7, 8]] = True
    before = prior.read(tokens, hidden, labels)
    for place in range(12):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % CODES
        after = prior.read(changed, hidden, labels)
        if hidden[0, place]:
            assert torch.equal(after, before)
        else:
            assert ((after - before).abs().amax(2) > 1e-9).all(), "a token is seen from before it and from behind it"
    assert not torch.allclose(prior.read(tokens, hidden, torch.tensor([2])), before, atol=1e-3)


@BOTH
def test_drawing_token_by_token_is_a_distribution(config):
    """Hidden one by one in any order, exp(-sum of what forward gives) over all grids is 1."""
    prior = prior_of(config, 5, grid=(1, 3))
    every = torch.cartesian_prod(*[torch.arange(5)] * 3)
    labels = torch.full((len(every),), 2)
    for order in ([0, 1, 2], [2, 0, 1]):
        hidden, total = torch.ones(len(every), 3, dtype=torch.bool), torch.zeros(len(every))
        with torch.no_grad():
            for place in order:
                total += prior(every, hidden, labels)[:, place].float()
                hidden[:, place] = False
        assert float((-total).exp().sum()) == pytest.approx(1, abs=1e-5)


def naive(prior, label, seed, number, way):
    """One sample by the definition, one token at a time."""
    n, digits = prior.num_tokens, prior.head.digits
    counts = hidden_counts(way.steps, n)
    known = {}
    for step, left in enumerate(counts):
        numbers = keyed_uniforms(n * digits, seed, [number], step, 6)[0].tolist()
        noise = keyed_uniforms(n, seed, [number], step, 7)[0].tolist()
        tokens = torch.tensor([[known.get(place, 0) for place in range(n)]])
        hidden = torch.tensor([[place not in known for place in range(n)]])
        drawn, sure = {}, {}
        for place in (p for p in range(n) if p not in known):
            own, log_p = [], 0.0
            for digit in range(digits):

                def logits(name, own=own, place=place, tokens=tokens, hidden=hidden):
                    state = prior.read(tokens, hidden, torch.tensor([name]))[:, place]
                    return prior.head.logits(state, [torch.tensor([d]) for d in own])[0].tolist()

                given = logits(label)
                if way.guidance != 1:
                    given = [
                        u + way.guidance * (c - u) if c > -math.inf else c
                        for c, u in zip(given, logits(prior.null), strict=True)
                    ]
                order = sorted(range(len(given)), key=lambda k: -given[k])
                top = given[order[0]]
                kept = sorted(order[: way.top_k] if way.top_k else order)
                if way.temperature == 0:
                    chosen = order[0]
                else:
                    weights = [math.exp((given[k] - top) / way.temperature) for k in kept]
                    ends = np.cumsum(weights) / sum(weights)
                    chosen = kept[int(np.searchsorted(ends, numbers[place * digits + digit], side="right"))]
                log_p += given[chosen] - top - math.log(sum(math.exp(x - top) for x in given))
                own.append(chosen)
            drawn[place] = int(prior.head.join([torch.tensor(d) for d in own]))
            gumbel = -math.log(-math.log(noise[place]))
            sure[place] = log_p + way.choice_temperature * (1 - (step + 1) / len(counts)) * gumbel
        again = sorted(drawn, key=lambda place: sure[place])[:left]
        known |= {place: token for place, token in drawn.items() if place not in again}
    return [known[place] for place in range(n)]


WAYS = [
    MaskedDrawing(),
    MaskedDrawing(temperature=0.0, choice_temperature=0.0, steps=3),
    MaskedDrawing(guidance=2.5, steps=4),
    MaskedDrawing(guidance=1.5, temperature=0.7, top_k=4, choice_temperature=1.0, steps=2),
    MaskedDrawing(steps=50),
]


@BOTH
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_drawing_is_what_the_definition_says(config, way):
    prior = prior_of(config)
    labels, numbers = [0, 2], [5, 0]
    found = sample_tokens(prior, torch.tensor(labels), 3, numbers, way)
    assert found.tolist() == [naive(prior, *pair, way) for pair in zip(labels, [3, 3], numbers, strict=True)]


def test_guidance_of_one_is_the_conditional_model():
    prior, labels = prior_of(), torch.tensor([0, 1, 2])
    plain = sample_tokens(prior, labels, 0, range(3), MaskedDrawing(guidance=1.0))
    assert torch.equal(plain, sample_tokens(prior, labels, 0, range(3), MaskedDrawing(guidance=1.0 + 1e-12)))
    assert not torch.equal(plain, sample_tokens(prior, labels, 0, range(3), MaskedDrawing(guidance=6.0)))
    zero = sample_tokens(prior, labels, 0, range(3), MaskedDrawing(guidance=0.0))
    assert torch.equal(zero, sample_tokens(prior, torch.full((3,), prior.null), 0, range(3), MaskedDrawing()))


def test_a_sample_does_not_depend_on_those_beside_it():
    prior, labels = prior_of(), torch.arange(20) % 3
    whole = sample_tokens(prior, labels, 7, range(20), MaskedDrawing())
    for part in (*torch.arange(4).split(1), *torch.randperm(20).split(7)):
        assert torch.equal(sample_tokens(prior, labels[part], 7, part.tolist(), MaskedDrawing()), whole[part])
    assert len({tuple(row) for row in whole.tolist()}) > 17
    assert not torch.equal(sample_tokens(prior, labels, 8, range(20), MaskedDrawing()), whole)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return store(tmp_path_factory.mktemp("masked"), {"name": "vq", "num_codes": 32, "dim": 8}, size=8)


@pytest.mark.slow
def test_it_learns_32_grids_by_heart(tokens, tmp_path):
    # Longer than the others, since a step tells nothing of the tokens that it does not hide.
    config = resolve(recipe("masked", tokens, **BY_HEART | {"epochs": 600, "eval_every": 600, "checkpoint_every": 600}))
    run = RunFolder(tmp_path / "run", config)
    run.begin("test")
    Engine(prior_task(config, tokens), run, quiet=True).fit()
    prior = load_prior(run.path / "prior").model
    wanted = torch.from_numpy(tokens.read(tokens.rows()).astype(np.int64))
    labels = torch.from_numpy(tokens.labels.astype(np.int64))
    with torch.no_grad():
        nats = prior(wanted, torch.ones_like(wanted, dtype=torch.bool), labels)
    assert float(nats.mean()) < 0.05, "all hidden, by the class alone"
    greedy = MaskedDrawing(temperature=0.0, choice_temperature=0.0)
    assert torch.equal(sample_tokens(prior, labels, 0, range(32), greedy), wanted)


def test_what_is_hidden_is_a_function_of_the_place_in_the_run(tokens):
    task = prior_task(resolve(recipe("masked", tokens)), tokens)
    whole = [torch.cat(parts) for parts in zip(task.batch(1, range(5)), task.batch(1, range(5, 32)), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(whole, task.batch(1, range(32)), strict=True))
    seen = torch.cat([task.batch(epoch, range(32))[1] for epoch in range(20)])
    assert seen.any(1).all()
    # The mean of cos(pi r / 2) over r in [0, 1) is 2 / pi; rounding up adds half a token.
    assert float(seen.sum(1).float().mean()) == pytest.approx(16 * 2 / math.pi + 0.5, abs=0.6)
    assert float(seen.float().mean(0).std()) < 0.05, "no place is preferred"


def test_the_loss_is_the_mean_over_the_hidden_tokens_of_the_batch(tokens):
    task = prior_task(resolve(recipe("masked", tokens, prior={"dropout": 0.0})), tokens)
    torch.nn.init.normal_(task.prior.head.output.weight)
    batch = task.batch(0, range(8))
    task.prior.requires_grad_(False)
    whole = task.loss("prior", task.prior, batch, {})
    parts = [task.loss("prior", task.prior, [x[i : i + 3] for x in batch], {}) for i in (0, 3, 6)]
    assert int(whole.count) == int(batch[1].sum()) == sum(int(part.count) for part in parts)
    mean = sum(float(part.loss) * int(part.count) for part in parts) / int(whole.count)
    assert float(whole.loss) == pytest.approx(mean, rel=1e-5)
    states = task.prior.read(*batch)
    naive = [
        -states[i, j].matmul(task.prior.head.output.weight.T).log_softmax(0)[batch[0][i, j]].item()
        for i, j in batch[1].nonzero().tolist()
    ]
    assert float(whole.loss) == pytest.approx(np.mean(naive), rel=1e-4)


def test_bits_are_the_mean_over_orders(tmp_path, tokens):
    """Of one image, against -log p by the chain rule over every tenth order of all of four tokens."""
    from steadyvq.generation import masked_task

    task = prior_task(resolve(recipe("masked", tokens)), tokens)
    task.prior = prior_of(grid=(2, 2), codes=5, spread=1.0)
    grid, label = torch.tensor([[1, 4, 0, 2]]), torch.tensor([1])
    exact = []
    with torch.no_grad():
        for order in itertools.permutations(range(4)):
            hidden, total = torch.ones(1, 4, dtype=torch.bool), 0.0
            for place in order:
                total += float(task.prior(grid, hidden, label)[0, place])
                hidden[0, place] = False
            exact.append(total)
        kept, masked_task.PARTS = masked_task.PARTS, 400
        try:
            found = task.surprisal(np.array([3]), grid, label)
        finally:
            masked_task.PARTS = kept
    assert float(found) == pytest.approx(np.mean(exact), rel=0.03)
    assert np.std(exact) > 0


def test_bad_input(tokens, tmp_path, capsys):
    with pytest.raises(ValueError, match="steps >= 1 and choice_temperature >= 0"):
        MaskedDrawing(steps=0)
    with pytest.raises(ValueError, match="choice_temperature -1"):
        MaskedDrawing(choice_temperature=-1)
    with pytest.raises(ValueError, match="knows no classes"):
        sample_tokens(prior_of(classes=0), torch.tensor([0]), 0, [0], MaskedDrawing(guidance=2.0))
    with pytest.raises(ValueError, match=r"of 32 codes, but prior\.vocabulary is 16"):
        prior_task(resolve(recipe("masked", tokens, prior={"vocabulary": 16})))
    task = prior_task(resolve(recipe("autoregressive", tokens)), tokens)
    RunFolder(tmp_path / "run", task.config).begin("test")
    task.export(tmp_path / "run" / "prior")
    words = ["sample", str(tmp_path / "run"), "--out", str(tmp_path / "s"), "--num", "2"]
    assert main([*words, "--steps", "4"]) == 2
    assert "--steps means nothing to a prior of the kind 'autoregressive'" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_plain_way_of_drawing_is_taken_too():
    prior, labels = prior_of(), torch.tensor([0, 1])
    plain = sample_tokens(prior, labels, 0, range(2), SamplingConfig(top_k=3))
    assert torch.equal(plain, sample_tokens(prior, labels, 0, range(2), MaskedDrawing(top_k=3)))
