# SPDX-License-Identifier: Apache-2.0
"""`steadyvq sample` and `steadyvq eval-gen`: pictures from a prior, and how close they come to photographs."""

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import torch

import steadyvq
from steadyvq.cli import INTERRUPTED
from steadyvq.cli.common import check_output, open_tokenizer, say, table
from steadyvq.cli.distances import feature_networks
from steadyvq.cli.tokens import device_of
from steadyvq.data import EvaluationCrops, ImageSource, open_photographs
from steadyvq.generation.judge import PROTOCOL, judge_samples, read_samples
from steadyvq.generation.priors import Drawing, TrainedPrior, load_prior
from steadyvq.generation.sampler import Sampler, SampleSettings
from steadyvq.generation.sampling import class_numbers
from steadyvq.generation.shares import share_of
from steadyvq.generation.token_task import TokenTask
from steadyvq.generation.tokens import TOKENIZER
from steadyvq.metrics import EvaluationRecord, conditions, write_record
from steadyvq.metrics.protocol import protocol_id
from steadyvq.models import Tokenizer
from steadyvq.training.progress import ProgressReport

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

DRAWN_BY = ("guidance", "temperature", "top_k", "top_p", "scheduler", "steps", "choice_temperature")
"""Options of `sample` that say how a prior is drawn from; each kind knows some."""


def sample(arguments: argparse.Namespace) -> int:
    """Draws pictures, or goes on drawing."""
    check_output(arguments.out, folder=True)
    share = share_of(arguments.num_shards, arguments.shard_index)
    device = device_of(arguments.device, share.local)
    prior = load_prior(_prior_folder(arguments.run))
    tokenizer, name = _tokenizer_for(prior, arguments.tokenizer, arguments.quantizer)
    wanted = [] if arguments.classes is None else arguments.classes.split(",")
    drawing = _drawing(prior.kind, arguments)
    chosen = tuple(class_numbers(wanted, prior.classes))
    settings = SampleSettings(arguments.num, arguments.seed, chosen, drawing)
    default = "float64" if device.type == "cpu" else "float32"
    sampler = Sampler(
        prior,
        tokenizer.to(device),
        name,
        arguments.out,
        settings,
        batch=arguments.batch,
        share=share,
        dtype=DTYPES[arguments.dtype or default],
        device=device,
    )
    done = sampler.total - len(sampler.missing)
    if done:
        say(f"{done} of {sampler.total} pictures lie in {arguments.out} already")
    part = "" if share.count == 1 else f" (part {share.index + 1} of {share.count})"
    try:
        with ProgressReport(f"sample{part}", sampler.total, done, quiet=share.local > 0) as progress:
            complete = sampler.draw(progress.advance_by)
    except KeyboardInterrupt:
        say(f"stopped; the pictures drawn so far are kept, go on with: steadyvq {shlex.join(sys.argv[1:])}")
        return INTERRUPTED
    ending = f", the first {min(64, arguments.num)} side by side in grid.png" if complete else ""
    say(f"{sampler.total} pictures{part}: {arguments.out}{ending}")
    return 0


def _drawing(kind: type[TokenTask], arguments: argparse.Namespace) -> Drawing:
    """The options of drawing that were given, which must be ones that the kind of prior knows."""
    given = {name: value for name in DRAWN_BY if (value := getattr(arguments, name)) is not None}
    known = [field.name for field in fields(kind.drawing)]
    for name in given:
        if name not in known:
            options = ", ".join(f"--{other.replace('_', '-')}" for other in known)
            raise ValueError(
                f"--{name.replace('_', '-')} means nothing to a prior of the kind {kind.kind!r}, which is drawn from with "
                f"{options}: leave it out"
            )
    return kind.drawing(**given)


def _prior_folder(run: Path) -> Path:
    return run / "prior" if (run / "config.yaml").is_file() else run


def _tokenizer_for(prior: TrainedPrior, path: Path | None, quantizer: str | None) -> tuple[Tokenizer, str]:
    """The tokenizer that decodes: named, or the one that lies with the tokens."""
    if path is not None:
        return open_tokenizer(path, quantizer)[0], str(path)
    stored = prior.tokens / TOKENIZER
    if not stored.is_dir():
        raise ValueError(
            f"the tokens in {prior.tokens}, with their tokenizer, are gone: name a tokenizer with --tokenizer"
        )
    return Tokenizer.from_pretrained(stored), str(stored)


def evaluate_samples(arguments: argparse.Namespace) -> int:
    """Measures samples against photographs and writes a record."""
    samples = read_samples(arguments.samples)
    out = arguments.out or arguments.samples / "evaluation.json"
    check_output(out)
    size = samples.shape[2]
    photographs = open_photographs(arguments.data, False, size, 1024, 0.0).split(arguments.split)
    if isinstance(photographs, ImageSource):
        photographs = photographs.load(len(samples))
    crops = EvaluationCrops(photographs, size, arguments.count or len(samples), scale=arguments.scale)
    arguments.fd, arguments.self_check = True, False
    networks, without = feature_networks(arguments)
    with ProgressReport("measure", len(networks) * (len(samples) + len(crops))) as progress:
        found = judge_samples(networks, crops.images, samples, progress.advance_by)
    rows = [{"name": name, "value": f"{value:.4g}"} for name, value in found.shown.items()]
    table(rows)
    for line in [*without, *found.notes]:
        say(line)
    facts = crops.record
    known = conditions(size, len(crops), str(facts["hash"]), found.metrics)
    record = EvaluationRecord(
        metrics={**found.metrics, "samples": len(samples)},
        data=str(facts["data"]),
        split=str(facts["split"]),
        crop=size,
        count=len(crops),
        photographs=int(facts["photographs"]),
        tokens=0,
        pixels_hash=str(facts["hash"]),
        config_hash="",
        step=0,
        version=steadyvq.__version__,
        protocol=PROTOCOL,
        conditions={**known, "samples": len(samples)},
        protocol_id=protocol_id({**known, "samples": len(samples)}),
    )
    write_record(out, record)
    say(f"{len(samples)} samples against {len(crops)} crops of {facts['photographs']} photographs; record: {out}")
    return 0
