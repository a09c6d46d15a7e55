# SPDX-License-Identifier: Apache-2.0
"""From photographs to new pictures, small: a tokenizer, tokens, a prior, samples, and whether the prior has learnt.

    steadyvq demo generate                      # minutes on a laptop
    steadyvq demo generate --data my_photos/
    steadyvq demo generate --prior diffusion

The samples are judged beside two rivals that need no prior: every token drawn from what is usual at its place, and real
grids whose tokens are shuffled. All are decoded by the same tokenizer and compared with the same crops of the training
photographs.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steadyvq.data import open_source
from steadyvq.files import write_text
from steadyvq.generation import TokenSet, TokenWriter, Views
from steadyvq.generation.judge import features_of
from steadyvq.generation.priors import KINDS, load_prior, prior_task
from steadyvq.generation.sampler import Sampler, SampleSettings
from steadyvq.metrics import to_uint8
from steadyvq.metrics.frechet import FeatureStatistics, frechet_distance, kernel_distance
from steadyvq.metrics.generation import kernel_advantage
from steadyvq.models import Tokenizer, load_features
from steadyvq.models.perceptual_weights import MissingWeights
from steadyvq.report import image_grid
from steadyvq.report.samples import write_samples_report
from steadyvq.training.config import DataConfig, RunConfig, read_recipe, resolve, with_absolute_paths
from steadyvq.training.loop import Engine
from steadyvq.training.progress import ProgressReport
from steadyvq.training.run import RunFolder, source_commit
from steadyvq.training.tokenizer_task import TokenizerTask

VIEWS, JUDGED, SHOWN = 128, 1024, 64
RECIPES = {"autoregressive": "generate_prior", "diffusion": "generate_diffusion"}
"""By kind of prior."""
DRAWN: dict[str, dict[str, Any]] = {"diffusion": {"scheduler": "dpm++", "steps": 20}}
"""How each kind is drawn from, where its own default takes longer than a demo should."""
NOTE = (
    "A tokenizer was trained on the photographs, {views} crops of each of {images} training photographs were tokenised, "
    "and a small {kind} prior without classes learnt {what}. Below: pictures that it drew, and what they are "
    "compared with."
)
NUMBERS = (
    "KID-Lite0 and FD-Lite0 of {count} pictures each against {count} random crops of the training photographs (lower is "
    "closer). 'Ahead by' is the KID-Lite0 of a rival less that of the prior, with a 95 % interval by a paired bootstrap over "
    "samples and over photographs: above 0, the prior has learnt what the rival does not know."
)
RIVALS = ("marginals", "shuffled")


@dataclass(frozen=True)
class Generated:
    """What the demo leaves.

    Attributes:
        page: The report.
        rows: Of its table.
        seconds: By part, of this call.
    """

    page: Path
    rows: list[dict[str, str]]
    seconds: dict[str, float]


def run_generate(
    out: Path,
    *,
    data: str | None,
    prior: str = "autoregressive",
    seed: int = 0,
    sets: Sequence[str] = (),
    views: int = VIEWS,
    judged: int = JUDGED,
) -> Generated:
    """Does what is not done yet, and judges.

    Args:
        out: The folder; given again, it goes on.
        data: A folder of images (None: the built-in photographs).
        prior: A name of `RECIPES`.
        seed: Of everything.
        sets: Settings for the prior.
        views: Random crops of each photograph that are tokenised.
        judged: Pictures that are judged.

    Raises:
        ValueError: A setting or the data is not right.
        Interrupted: Ctrl-C came while something trained; the same call goes on.
    """
    overrides: dict[str, Any] = {"seed": seed}
    photographs = {} if data is None else {"data": {"source": data}}
    config = with_absolute_paths(resolve(read_recipe("generate_tokenizer"), (), {**overrides, **photographs}))
    learning = {**overrides, "data": {"source": str(out / "tokens")}}
    prior_config = with_absolute_paths(resolve(read_recipe(RECIPES[prior]), sets, learning))
    on_latents = prior == "diffusion" and prior_config.diffusion.space == "latents"
    seconds: dict[str, float] = {}
    clock = time.monotonic()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name] = time.monotonic() - clock
        clock = time.monotonic()

    _train(out / "tokenizer", config)
    tokenizer = Tokenizer.from_pretrained(out / "tokenizer" / "tokenizer")
    lap("tokenizer")
    tokens = tokenise(tokenizer, config.data, out / "tokens", views, seed, latents=on_latents)
    lap("tokens")
    _train(out / "prior", prior_config)
    lap("prior")
    trained = load_prior(out / "prior" / "prior")
    settings = SampleSettings(SHOWN, seed, drawing=trained.kind.drawing(**DRAWN.get(prior, {})))
    sampler = Sampler(trained, tokenizer, "the demo's tokenizer", out / "samples", settings)
    with ProgressReport("sample", SHOWN, SHOWN - len(sampler.missing)) as progress:
        sampler.draw(progress.advance_by)
    sets_of = _sets(sampler, tokenizer, tokens, judged, seed)
    lap("samples")
    real, names = real_crops(config.data, judged, seed)
    rows, metrics = _judge(sets_of, real, names)
    lap("judging")
    pictures = {"drawn by the prior": image_grid(sets_of["prior"][:SHOWN])}
    pictures |= {_TITLES[name]: image_grid(images[:SHOWN]) for name, images in sets_of.items() if name != "prior"}
    pictures["crops of training photographs"] = image_grid(real[:SHOWN])
    told = {"kind": prior, "what": "the latents before quantization" if on_latents else "the tokens"}
    notes = [NOTE.format(views=views, images=len(tokens.rows_or_all("train")), **told), NUMBERS.format(count=judged)]
    page = write_samples_report(out / "report.html", "From tokens to pictures", notes, rows, pictures)
    configs = {"tokenizer": config.hash(), "prior_config": prior_config.hash()}
    facts = {"commit": source_commit(), "kind": prior, **configs, "seconds": seconds}
    write_text(out / "generate.json", json.dumps({**facts, "count": judged, **metrics}, indent=2) + "\n")
    return Generated(page, rows, seconds)


def _train(path: Path, config: RunConfig) -> None:
    """Trains a run to its end, or goes on with it."""
    begun = (path / "config.yaml").is_file()
    if begun and json.loads((path / "run.json").read_text()).get("status") == "done":
        return
    task = prior_task(config) if config.task in KINDS else TokenizerTask(config)
    run = RunFolder(path, task.config)
    engine = Engine(task, run, resume=begun)
    if not begun:
        run.begin("steadyvq demo generate")
    engine.fit()


def tokenise(
    tokenizer: Tokenizer,
    data: DataConfig,
    out: Path,
    views: int,
    seed: int,
    *,
    latents: bool = False,
    quiet: bool = False,
) -> TokenSet:
    """Tokens of crops of all photographs, cut as those that the tokenizer was trained on."""
    source = open_source(data.source, data.crop_size, data.max_side)
    cut = Views(f"random-{views}", data.crop_size, scales=(data.min_scale, data.max_scale), seed=seed)
    kept = "float32" if latents else None
    writer = TokenWriter(tokenizer, "the demo's tokenizer", source, out, cut, shard_images=8, threads=1, latents=kept)
    with ProgressReport("tokenize", writer.total, writer.done, quiet=quiet) as progress:
        writer.write(progress.advance_by)
    return TokenSet(out)


_TITLES = {
    "marginals": "every token drawn from what is usual at its place",
    "shuffled": "real grids, their tokens shuffled",
    "real tokens": "real grids, decoded: the best that a prior could do",
}


def _sets(sampler: Sampler, tokenizer: Tokenizer, tokens: TokenSet, count: int, seed: int) -> dict[str, Tensor]:
    """Pictures (N, 3, S, S) uint8 of the prior and of its rivals."""
    rng = np.random.default_rng(seed)
    train = tokens.rows_or_all("train")
    every = np.concatenate([tokens.read(train, view) for view in range(tokens.num_views)]).astype(np.int64)
    places = np.arange(tokens.num_tokens)
    marginals = every[rng.integers(0, len(every), (count, tokens.num_tokens)), places]
    # With fewer grids than pictures some serve twice, shuffled otherwise.
    some = every[rng.permutation(np.resize(np.arange(len(every)), max(count, len(every))))[:count]]
    made = {"marginals": marginals, "shuffled": rng.permuted(some, axis=1), "real tokens": some}
    drawn = []
    with ProgressReport("sample more", count) as progress:
        for start in range(0, count, 64):
            numbers = range(start, min(start + 64, count))
            drawn.append(sampler.images(numbers))
            progress.advance_by(len(numbers))
    return {"prior": torch.cat(drawn), **{name: decoded(tokenizer, tokens, grids) for name, grids in made.items()}}


def decoded(tokenizer: Tokenizer, tokens: TokenSet, grids: NDArray[np.int64]) -> Tensor:
    """Pictures (N, 3, S, S) uint8 of grids of tokens (N, tokens)."""
    parts = [grids[start : start + 64] for start in range(0, len(grids), 64)]
    return torch.cat([to_uint8(tokenizer.decode(tokens.grids(part))) for part in parts])


def real_crops(data: DataConfig, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Random crops of the training photographs, others than those that were tokenised, and the photograph of each."""
    source = open_source(data.source, data.crop_size, data.max_side)
    source = source.split("train") if len(set(source.splits)) > 1 else source
    each = -(-count // len(source))
    views = Views(f"random-{each}", data.crop_size, scales=(data.min_scale, data.max_scale), seed=seed + 1)
    images, names, skipped = [], list[str](), list[tuple[str, str]]()
    for number, (name, image) in enumerate(source.images(range(len(source)), skipped)):
        images.append(views.cut(image, number))
        names += [name] * each
    # Turn by turn, so that cutting at the count leaves all photographs in.
    mixed = torch.stack(images).transpose(0, 1).flatten(0, 1)[:count]
    turn = [names[i * each] for _ in range(each) for i in range(len(images))][:count]
    return mixed, turn


def _judge(
    sets_of: dict[str, Tensor], real: Tensor, photographs: list[str]
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Rows of the table, and the same numbers by name."""
    try:
        network = load_features("lite0")
    except MissingWeights as error:
        return [{"pictures": f"not judged: {error}"}], {}
    with ProgressReport("judge", len(real) + sum(map(len, sets_of.values()))) as progress:
        y = features_of(network, real, progress.advance_by)
        found = {name: features_of(network, images, progress.advance_by) for name, images in sets_of.items()}
    rows, metrics = [], dict[str, Any]()
    for name, features in found.items():
        kid, frechet = kernel_distance(y, features), frechet_distance(_statistics(y), _statistics(features))
        row = {"pictures": name, "KID-Lite0": f"{kid:.4g}", "FD-Lite0": f"{frechet:.4g}", "prior ahead by": ""}
        metrics[name] = {"kid_lite0": kid, "fd_lite0": frechet}
        if name in RIVALS:
            value, low, high = kernel_advantage(y, found["prior"], features, photographs)
            row["prior ahead by"] = f"{value:.4g} [{low:.4g}, {high:.4g}]"
            metrics[name] |= {"ahead": value, "ahead_low": low, "ahead_high": high}
        rows.append(row)
    return rows, metrics


def _statistics(features: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics
