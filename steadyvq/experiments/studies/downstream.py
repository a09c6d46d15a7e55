# SPDX-License-Identifier: Apache-2.0
"""Reconstruction, generation and learnability: one prior and budget over the tokens of different methods."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from steadyvq.data import to_float
from steadyvq.experiments.claims import Claim, Decision, Results, above, one_each
from steadyvq.experiments.closed import profiles, rank_correlation, trained
from steadyvq.experiments.contest import steady
from steadyvq.experiments.generate import decoded, real_crops, tokenise
from steadyvq.experiments.outcome import psnr_by_photograph, tokenizer_and_crops
from steadyvq.experiments.runner import fresh_run
from steadyvq.experiments.studies import table1
from steadyvq.experiments.study import ArmPlan, Cell, Computed, Measure, Study, Values
from steadyvq.experiments.verdict import final_record
from steadyvq.files import read_tensors, write_atomically
from steadyvq.generation import TokenSet
from steadyvq.generation.body import TokenPrior, llama_parts
from steadyvq.generation.judge import features_of
from steadyvq.generation.priors import load_prior, prior_task
from steadyvq.generation.sampling import balanced_labels, sample_tokens
from steadyvq.metrics import to_uint8
from steadyvq.metrics.frechet import kernel_distance
from steadyvq.models import Tokenizer, load_features
from steadyvq.report import image_grid
from steadyvq.training.config import resolve
from steadyvq.training.loop import Engine
from steadyvq.training.run import RunFolder
from steadyvq.training.strict import merge

NSVQ, FVQ = "arXiv 2606.11363, latent diffusion", "arXiv 2509.10140, abstract"
OF_TABLE1 = ("vq", "ema", "vqgan_lc", "simvq", "fvq", "nsvq")
"""Arms of the experiment `table1`, whose tokenizers these are: with a common --cells their runs are shared."""
METHODS = (*OF_TABLE1, "steady")
PHOTOGRAPHS, PICTURE = "photographs", "samples.png"
BATCH = 64


@dataclass(frozen=True)
class Learnt:
    """A prior over the tokens of a tokenizer.

    Attributes:
        model: The prior, in float64.
        tokens: What it was trained on.
    """

    model: TokenPrior
    tokens: TokenSet


def need_libraries() -> None:
    """Raises ValueError unless the prior and the network of KID-Lite0 can be had."""
    try:
        llama_parts()
        load_features("lite0")
    except ValueError as error:
        raise ValueError(
            f"this experiment trains priors and judges samples: pip install 'steadyvq[ar,fd]' ({error})"
        ) from error


def photographs(cell: Cell) -> Values:
    """Features of crops of training photographs, and their mean colour, for all arms of a seed."""
    config = RunFolder.open(next(iter(cell.inputs.values()))).config
    crops, _ = real_crops(config.data, cell.settings["judged"], cell.seed)
    found = {"features": features_of(load_features("lite0"), crops), "colour": to_float(crops).mean((0, 2, 3))}
    write_atomically(cell.folder / "photographs.safetensors", lambda path: save_file(found, path))
    return {"crops": len(crops)}


def downstream(cell: Cell) -> Values:
    """Tokenises, trains the prior, draws, and measures."""
    settings = cell.settings
    path = next(folder for name, folder in cell.inputs.items() if name != PHOTOGRAPHS)
    config = RunFolder.open(path).config
    tokenizer, crops, _ = tokenizer_and_crops(path)
    shared = read_tensors(cell.inputs[PHOTOGRAPHS] / "photographs.safetensors")
    tokens = tokenise(tokenizer, config.data, cell.folder / "tokens", settings["views"], cell.seed, quiet=True)
    learnt = _learn(cell, tokens, config.data.eval_split)
    record = final_record(path).metrics
    found: Values = {"psnr": record["psnr"], "of_ceiling": record["utilization"] / record["ceiling"]}
    found |= _bits(learnt, tokenizer, crops.images, shared["colour"], settings["equal_psnr"])
    made = _drawn(learnt, tokenizer, cell.seed, settings["judged"])
    rng = np.random.default_rng(cell.seed)
    rows = rng.choice(tokens.rows_or_all("train"), settings["judged"])
    views = rng.integers(0, tokens.num_views, settings["judged"])
    network = load_features("lite0")
    for name, images in {"kid": made, "kid_real_tokens": decoded(tokenizer, tokens, tokens.read(rows, views))}.items():
        found[name] = kernel_distance(shared["features"], features_of(network, images))
    write_atomically(cell.folder / PICTURE, image_grid(made[:BATCH]).save)
    rounded = {name: round(float(value), 5) for name, value in found.items()}
    return rounded | {"photographs": {"psnr": psnr_by_photograph(path)}}


def _learn(cell: Cell, tokens: TokenSet, held_out: str) -> Learnt:
    """The prior, trained for its steps on the tokens of training photographs."""
    data = {"source": str(tokens.folder), "eval_split": held_out}
    wanted = {"task": "autoregressive", "seed": cell.seed, "data": data}
    config = resolve(merge(dict(cell.settings["prior"]), wanted))
    run = fresh_run(cell.folder, config)
    Engine(prior_task(config, tokens), run, quiet=True).fit()
    model = load_prior(run.path / "prior").model
    assert isinstance(model, TokenPrior)
    return Learnt(model.double(), tokens)


@torch.no_grad()
def _bits(learnt: Learnt, tokenizer: Tokenizer, images: Tensor, colour: Tensor, equal_psnr: float) -> Values:
    """Bits of held-out crops (B, 3, S, S) uint8 under the prior, and at a PSNR that all tokenizers reach.

    A sender who codes a share s of the images with the tokenizer, and of the others nothing, needs s R bits and makes the
    squared error s D + (1 - s) D_0, with D_0 that of the mean colour. So the bits at the squared error E >= D are
    R (D_0 - E) / (D_0 - D): what every tokenizer can really do, without training others.
    """
    nats, error, blank = 0.0, 0.0, 0.0
    for part in torch.split(images, BATCH):
        real = to_float(part)
        grids = tokenizer.encode(real)
        labels = torch.full((len(part),), learnt.model.null)
        nats += float(learnt.model(grids.flatten(1), labels).double().sum())
        # Pixels reach from -1 to 1, so that a quarter of the squared error is that of pixels from 0 to 1.
        error += float((tokenizer.decode(grids).clamp(-1, 1) - real).double().square().mean((1, 2, 3)).sum()) / 4
        blank += float((colour.view(1, 3, 1, 1) - real).double().square().mean((1, 2, 3)).sum()) / 4
    count = len(images)
    bits, error, blank = nats / math.log(2) / count, error / count, blank / count
    share = (blank - 10 ** (-equal_psnr / 10)) / (blank - error)
    counts = torch.from_numpy(_counts(learnt.tokens)).double() + 1
    alone = -(counts / counts.sum()).log2()
    each = alone[tokenizer.encode(to_float(images)).flatten(1)].sum(1).mean()
    return {"bits": bits, "equal_bits": bits * share, "bits_by_counts": float(each)}


def _counts(tokens: TokenSet) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """How often each code occurs in the training photographs (K,)."""
    rows = tokens.rows_or_all("train")
    found = np.zeros(tokens.num_codes, np.int64)
    for view in range(tokens.num_views):
        found += np.bincount(tokens.read(rows, view).reshape(-1).astype(np.int64), minlength=tokens.num_codes)
    return found


@torch.no_grad()
def _drawn(learnt: Learnt, tokenizer: Tokenizer, seed: int, count: int) -> Tensor:
    """Pictures (N, 3, S, S) uint8 of the prior."""
    found = []
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        drawn = sample_tokens(learnt.model, balanced_labels(learnt.model, (), numbers), seed, numbers)
        found.append(to_uint8(tokenizer.decode(learnt.tokens.grids(drawn))))
    return torch.cat(found)


def arms(settings: Mapping[str, Any]) -> Mapping[str, ArmPlan]:
    """For every method its tokenizer and what comes after it; the features of photographs once."""
    plans = {**table1.arms(settings), "steady": trained(settings, steady())}
    tokenizers = {f"tokenizer {name}": replace(plans[name], hidden=True) for name in METHODS}
    first, own = next(iter(tokenizers)), settings["downstream"]
    judged = {"judged": own["judged"]}
    made: dict[str, ArmPlan] = dict(tokenizers)
    made[PHOTOGRAPHS] = Computed(photographs, judged, needs=(first,), hidden=True, steps=own["judged"])
    for name in METHODS:
        made[name] = Computed(downstream, own, needs=(f"tokenizer {name}", PHOTOGRAPHS), steps=own["steps"])
    return made


def pictures(folder: Path, cells: Mapping[tuple[str, int], Path], _: Results) -> Sequence[Path]:
    """What the prior of every method drew with seed 0."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [(path / PICTURE, folder / f"{arm}.png") for (arm, seed), path in cells.items() if seed == 0]
    return [Path(shutil.copyfile(drawn, out)) for drawn, out in made if drawn.is_file()]


def closer(better: str, worse: str) -> Callable[[Results], Decision]:
    """Decides whether the samples of a method are closer to photographs than those of another."""
    what = f"KID-Lite0 of samples: `{worse}` less `{better}`"
    return lambda results: above(results.gains(worse, better, "kid"), 0.0, what, "+.3f")


def dearer(more: str, less: str) -> Callable[[Results], Decision]:
    """Decides whether the images of a method cost more bits than those of another, at equal PSNR."""
    what = f"bits per image at equal PSNR: `{more}` less `{less}`"
    return lambda results: above(results.gains(more, less, "equal_bits"), 0.0, what, "+.0f")


def _same_order(results: Results) -> Decision:
    found = [-value for value in rank_correlation(results, METHODS, "psnr", "kid")]
    return above(one_each(found), 0.0, "rank correlation of PSNR and -KID-Lite0 over the methods", "+.2f")


def _prior(size: Mapping[str, Any], steps: int, batch: int, lr: float = 3e-3) -> Values:
    """Configuration of the prior, of one epoch."""
    return {
        "data": {"epoch_samples": steps * batch, "eval_crops": 64},
        "prior": {**size, "label_dropout": 0.0, "dropout": 0.05, "shown": 0},
        "optim": {"lr": lr, "decay": "cosine", "warmup_steps": 20, "betas": [0.9, 0.95], "ema_decay": 0.99},
        "epochs": 1,
        "batch_size": batch,
    }


def _profiles() -> Mapping[str, Values]:
    sizes: Mapping[str, Values] = {
        "tiny": {
            "prior": _prior({"layers": 3, "heads": 4, "width": 96}, 600, 16),
            "views": 64,
            "judged": 512,
            "equal_psnr": 18.0,
            "steps": 1600,
        },
        "small": {
            "prior": _prior({"size": "tiny"}, 4000, 32),
            "views": 128,
            "judged": 2048,
            "equal_psnr": 18.0,
            "steps": 20_000,
        },
        "full": {
            "prior": _prior({"size": "B"}, 1_500_000, 256, 1e-4),
            "views": 10,
            "judged": 50_000,
            "equal_psnr": 18.0,
            "steps": 1_500_000,
        },
    }
    return {name: {**own, "downstream": sizes[name]} for name, own in profiles(400, "nsvq_imagenet128").items()}


STUDY = Study(
    name="downstream",
    title="Reconstruction, generation, learnability",
    question="Do tokens that reconstruct better also generate better, and what do they cost a prior?",
    protocol=(
        "{size} Tokenizers are those of `table1` and of the preset `steady`. "
        "Over the tokens of random crops of the training photographs one autoregressive prior without classes is trained for "
        "the same steps at the same rate for every method, and draws without guidance. "
        "KID-Lite0 (the papers: gFID by the 2015 Inception, of latent diffusion or LlamaGen) is that of "
        "samples, and of the decoded tokens of real crops, against other crops of the training photographs. Bits are "
        "-log2 p of the held-out crops on which PSNR is measured. Bits at equal PSNR (18 dB) are those of a sender who codes "
        "so many of the images that their mean squared error, with the mean colour for the others, is that of 18 dB. Bits by "
        "counts need no prior: "
        "-log2 of how often codes occur in training."
    ),
    profiles=_profiles(),
    arms=arms,
    claims=(
        Claim("NSVQ's samples are closer than SimVQ's", NSVQ, closer("nsvq", "simvq"), "gFID 16.62 and 20.11"),
        Claim("NSVQ's samples are closer than VQGAN-LC's", NSVQ, closer("nsvq", "vqgan_lc"), "gFID 16.62 and 17.98"),
        Claim("VQGAN-LC's samples are closer than SimVQ's", NSVQ, closer("vqgan_lc", "simvq"), "gFID 17.98 and 20.11"),
        Claim(
            "FVQ's samples are closer than those of a plain codebook",
            FVQ,
            closer("fvq", "vq"),
            "LlamaGen on FVQ: gFID 0.5 below VAR, 0.2 below DiT",
        ),
        Claim("The preset's samples are closer than NSVQ's", "ours", closer("steady", "nsvq")),
        Claim("The preset's samples are closer than SimVQ's", "ours", closer("steady", "simvq")),
        Claim("What reconstructs better generates better", "ours", _same_order),
        Claim("NSVQ's images cost more bits than plain VQ's at equal PSNR", "ours", dearer("nsvq", "vq")),
    ),
    measures=(
        Measure("psnr", "PSNR, dB", ".2f"),
        Measure("of_ceiling", "codes used, % of ceiling", ".1f", 100),
        Measure("kid", "KID-Lite0 of samples"),
        Measure("kid_real_tokens", "of real tokens"),
        Measure("bits", "bits per image", ".0f"),
        Measure("equal_bits", "at equal PSNR", ".0f"),
        Measure("bits_by_counts", "by counts", ".0f"),
    ),
    curves=(),
    draw=pictures,
    check=need_libraries,
)
