# SPDX-License-Identifier: Apache-2.0
"""`steadyvq eval`, `encode` and `decode`: a trained tokenizer at work."""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.npyio import NpzFile
from PIL import Image

from steadyvq.cli.common import check_output, open_tokenizer, say, table
from steadyvq.cli.distances import against, alike, distances, feature_networks, notes, show_checks
from steadyvq.data import EvaluationCrops, ImageSource, always_streamed, decode_image, open_source, short_name
from steadyvq.data.collection import image_files, read_images
from steadyvq.files import write_atomically
from steadyvq.generation import TokenSet, Views, is_token_set
from steadyvq.generation.tokenise import encode_views
from steadyvq.metrics import read_record, to_uint8, write_record
from steadyvq.models import LPIPS, Tokenizer, load_lpips
from steadyvq.models.perceptual import CLASSIFIERS, too_small
from steadyvq.models.perceptual_weights import MissingWeights
from steadyvq.quantizers.names import look_up
from steadyvq.training.config import DataConfig, RunConfig
from steadyvq.training.evaluation import evaluate, record_of
from steadyvq.training.photographs import photographs_of
from steadyvq.training.progress import ProgressReport

BATCH = 32
NAME_BYTES = 100
"""Longest part of a photograph's name in the name of a decoded picture; file systems end at 255 in all."""


def evaluate_run(arguments: argparse.Namespace) -> int:
    """Measures a tokenizer on photographs and writes a record."""
    tokenizer, config = open_tokenizer(arguments.run, arguments.quantizer)
    source = config.data.source if arguments.data is None and config else arguments.data
    if source is None:
        raise ValueError(f"{arguments.run} is no run folder, so it names no data: pass --data FOLDER")
    crop = _positive("--crop", arguments.crop, config.data.crop_size if config else 128)
    count = _positive("--count", arguments.count, config.data.eval_crops if config else 320)
    step = _step(arguments.run)
    scale = _scale(arguments.scale, config)
    cut = f"{crop}" if scale == 1 else f"{crop}x{scale:g}"
    name = f"eval-{short_name(source)}-{arguments.split}-{cut}-{count}-step-{step:08d}.json"
    folder = arguments.run / "evaluations" if config else arguments.run
    out = folder / name if arguments.out is None else arguments.out
    check_output(out)
    data = replace(config.data if config else DataConfig(max_side=None), source=source, crop_size=crop)
    photographs = photographs_of(data).split(arguments.split)
    if isinstance(photographs, ImageSource):
        photographs = photographs.load(count)
    crops = EvaluationCrops(photographs, crop, count, scale=scale)
    perceptual, left_out = _perceptual(arguments, config, crop)
    networks, without = feature_networks(arguments)
    other = None if arguments.against is None else alike(arguments.against, crops, [*perceptual, *networks])
    if arguments.self_check:
        show_checks(networks, crops)
    result = evaluate(tokenizer, crops, BATCH, perceptual, networks)
    record = record_of(result, crops, config.hash() if config else "", step)
    write_record(out, record)
    m = result.metrics
    row = {
        "PSNR dB": f"{m['psnr']:.2f}",
        "SSIM": f"{m['ssim']:.3f}",
        **{f"LPIPS {network.net}": f"{m[f'lpips_{network.net}']:.4f}" for network in perceptual},
        **distances(networks, m),
        "codes used": f"{m['active']}/{m['num_codes']} ({m['utilization']:.1%}; ceiling {m['ceiling']:.1%})",
        "perplexity": f"{m['perplexity']:.0f}",
        "tokens": f"{m['tokens']:,}",
        "images": f"{len(crops)} of {len(set(crops.photographs))} photographs",
    }
    table([row])
    for reason in left_out:
        say(f"without LPIPS: {reason}")
    for line in [*without, *notes(networks, m, len(crops))]:
        say(line)
    say(f"record: {out}")
    if other is not None:
        against(other, record)
    return 0


def _perceptual(
    arguments: argparse.Namespace, config: RunConfig | None, crop: int
) -> tuple[list[LPIPS], list[MissingWeights]]:
    """The networks of LPIPS to measure with: those asked for, or those that can be had, and why not the others."""
    if arguments.lpips == "none":
        return [], []
    named: Path | None = arguments.lpips_weights
    nets = list(CLASSIFIERS) if arguments.lpips is None else arguments.lpips.split(",")
    for net in nets:
        look_up("network of LPIPS", net, CLASSIFIERS)
    if named is not None and not named.is_dir() and len(nets) > 1:
        raise ValueError(f"--lpips-weights {named} is no folder, and a file holds one network: say which with --lpips")
    found, left_out = list[LPIPS](), list[MissingWeights]()
    for net in dict.fromkeys(nets):
        source: Path | str | None = named
        if named is None and config is not None and config.perceptual_net == net:
            source = config.perceptual_weights
        try:
            found.append(_network(net, source, crop))
        except MissingWeights as error:
            left_out.append(error)
            if arguments.lpips is not None or (named is not None and len(left_out) == len(nets)):
                raise
    return found, left_out


def _network(net: str, source: Path | str | None, crop: int) -> LPIPS:
    if crop < CLASSIFIERS[net].smallest:
        raise MissingWeights(too_small(net, crop))
    try:
        return load_lpips(net, source)
    except MissingWeights as error:
        raise MissingWeights(f"{error}; --lpips-weights PATH names them") from error


def _positive(option: str, given: int | None, default: int) -> int:
    value = default if given is None else given
    if value < 1:
        raise ValueError(f"{option} is {value}, but it must be at least 1")
    return value


def _scale(given: float | None, config: RunConfig | None) -> float:
    """How much photographs are shrunk before crops are cut: as asked for, or as the run's own evaluations do."""
    value = given if given is not None else config.data.min_scale if config else 1.0
    if not 1 <= value < math.inf:
        raise ValueError(f"--scale is {value:g}, but photographs are shrunk by a factor of at least 1")
    return value


def _step(run: Path) -> int:
    """The step of the newest evaluation, which is when the tokenizer was saved."""
    records = sorted((run / "evaluations").glob("step-*.json"))
    return read_record(records[-1]).step if records else 0


def encode(arguments: argparse.Namespace) -> int:
    """Turns a folder of images into an .npz file of tokens."""
    tokenizer, config = open_tokenizer(arguments.run, arguments.quantizer)
    size = _positive("--size", arguments.size, config.data.crop_size if config else 128)
    if arguments.out.suffix != ".npz":
        raise ValueError(f"--out is {arguments.out}, but tokens go into an .npz file: name one")
    check_output(arguments.out)
    indices, names, skipped = _encode_files(tokenizer, arguments.data, size)
    codes = np.array(tokenizer.quantizer.num_codes)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, tokens=indices, names=np.array(names), num_codes=codes)

    write_atomically(arguments.out, write)
    for path, reason in skipped:
        say(f"skipped {path}: {reason}")
    shape = "x".join(map(str, indices.shape[1:]))
    say(f"{len(indices)} images as {shape} tokens each: {arguments.out}")
    return 0


def _encode_files(
    tokenizer: Tokenizer, data: str, size: int
) -> tuple[npt.NDArray[np.int64], list[str], list[tuple[str, str]]]:
    """Tokens (images, h, w) (or as the quantizer has them), names, and what was skipped.

    No more than a batch of photographs is in memory.
    """
    files, read = _readable(data)
    tokens, names, skipped = [], [], list[tuple[str, str]]()
    views = Views(size=size)
    with ProgressReport("encode", len(files)) as progress:

        def cut(path: Path) -> torch.Tensor:
            try:
                return views.cut(read(path), 0)
            finally:
                progress.advance()

        for found, grids in encode_views(tokenizer, read_images(files, cut, data, skipped), len(views), BATCH):
            names += found
            tokens.append(grids[:, 0])
    return torch.cat(tokens).numpy(), names, skipped


def _readable(data: str) -> tuple[list[tuple[str, Path]], Callable[[Path], torch.Tensor]]:
    """The (name, path) of every image, and what decodes one; what has no path gets one of its source and its name."""
    if not always_streamed(data):
        return image_files(data), decode_image
    source = open_source(data)
    numbers = {Path(data, source.name(number)): number for number in range(len(source))}
    return [(source.name(n), path) for path, n in numbers.items()], lambda path: source.decode(numbers[path])


def decode(arguments: argparse.Namespace) -> int:
    """Turns tokens, an .npz file or the first views of a folder of tokens, into PNG files."""
    check_output(arguments.out, folder=True)
    tokenizer, _ = open_tokenizer(arguments.run, arguments.quantizer)
    if is_token_set(arguments.tokens):
        stored = TokenSet(arguments.tokens)
        stored.check_tokenizer(tokenizer, str(arguments.run))
        tokens, names = stored.grids(stored.read(stored.rows())), stored.names()
    else:
        tokens, names = _read_tokens(arguments.tokens, tokenizer.quantizer.num_codes, tokenizer.index_rank)
    with ProgressReport("decode", len(tokens)) as progress:
        for start in range(0, len(tokens), BATCH):
            images = to_uint8(tokenizer.decode(tokens[start : start + BATCH])).permute(0, 2, 3, 1).numpy()
            for number, image in enumerate(images, start):
                picture = Image.fromarray(image)
                target = arguments.out / f"{number:06d}_{_short(names[number])}.png"
                write_atomically(target, picture.save)
                progress.advance()
    say(f"{len(tokens)} images: {arguments.out}")
    return 0


def _short(name: str) -> str:
    """The last part of a photograph's name, fit for a file name on any system."""
    stem = "".join(letter if letter.isprintable() else "_" for letter in Path(name).stem)
    return stem.encode()[:NAME_BYTES].decode(errors="ignore")


def _read_tokens(path: Path, num_codes: int, rank: int) -> tuple[torch.Tensor, list[str]]:
    tokens, names, codes = _load_tokens(path)
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"{path} holds tokens of type {tokens.dtype}, but tokens are integers: encode again")
    if tokens.ndim != rank or 0 in tokens.shape:
        needed = "(images, height, width) are" if rank == 3 else f"{rank} axes, the first of images, are"
        raise ValueError(f"{path} holds tokens of shape {tokens.shape}, but {needed} needed")
    if len(names) != len(tokens):
        raise ValueError(f"{path} holds {len(names)} names for {len(tokens)} images: encode again")
    if codes != num_codes:
        raise ValueError(
            f"{path} was written with {codes} codes, but this tokenizer has {num_codes}: decode with the tokenizer "
            "that encoded it"
        )
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < num_codes:
        raise ValueError(
            f"{path} holds tokens from {int(tokens.min())} to {int(tokens.max())}, but this tokenizer has {num_codes} "
            "codes: decode with the tokenizer that encoded them"
        )
    return torch.from_numpy(tokens.astype(np.int64)), names


def _load_tokens(path: Path) -> tuple[npt.NDArray[Any], list[str], int]:
    """Tokens, names and number of codes, as the file has them."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, NpzFile):
            raise ValueError("it is a single array")
        with archive as file:
            return file["tokens"], [str(name) for name in file["names"]], int(file["num_codes"])
    # A damaged archive raises a dozen types, BadZipFile, zlib.error, EOFError and MemoryError among them.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read as tokens ({reason}): give an .npz file written by encode") from error
