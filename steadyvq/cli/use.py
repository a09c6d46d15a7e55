# SPDX-License-Identifier: Apache-2.0
"""`steadyvq eval`, `encode` and `decode`: a trained tokenizer at work."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from steadyvq.cli.common import open_tokenizer, say, table
from steadyvq.data import EvaluationCrops, load_collection, to_float
from steadyvq.data.decode import centre_square
from steadyvq.metrics import to_uint8, write_record
from steadyvq.training.evaluation import evaluate, record_of
from steadyvq.training.progress import ProgressReport
from steadyvq.training.run import write_atomically

BATCH = 32


def evaluate_run(arguments: argparse.Namespace) -> int:
    """Measures a tokenizer on photographs and writes a record."""
    tokenizer, config = open_tokenizer(arguments.run, arguments.quantizer)
    source = arguments.data or (config.data.source if config else None)
    if source is None:
        raise ValueError(f"{arguments.run} is no run folder, so it names no data: pass --data FOLDER")
    crop = arguments.crop or (config.data.crop_size if config else 128)
    count = arguments.count or (config.data.eval_crops if config else 320)
    max_side = config.data.max_side if config else None
    photographs = load_collection(source, min_side=crop, max_side=max_side).split(arguments.split)
    crops = EvaluationCrops(photographs, crop, count)
    result = evaluate(tokenizer, crops, BATCH)
    record = record_of(result, crops, config.hash() if config else "", _step(arguments.run))
    name = f"eval-{Path(source).name}-{arguments.split}-{crop}.json"
    folder = arguments.run / "evaluations" if config else arguments.run
    out = arguments.out or folder / name
    write_record(out, record)
    m = result.metrics
    row = {
        "PSNR dB": f"{m['psnr']:.2f}",
        "SSIM": f"{m['ssim']:.3f}",
        "codes used": f"{m['active']}/{m['num_codes']} ({m['utilization']:.1%}; ceiling {m['ceiling']:.1%})",
        "perplexity": f"{m['perplexity']:.0f}",
        "tokens": f"{m['tokens']:,}",
        "images": f"{len(crops)} of {len(set(crops.photographs))} photographs",
    }
    table([row])
    say(f"record: {out}")
    return 0


def _step(run: Path) -> int:
    """The step of the newest evaluation, which is when the tokenizer was saved."""
    records = sorted((run / "evaluations").glob("step-*.json"))
    return int(json.loads(records[-1].read_text())["step"]) if records else 0


def encode(arguments: argparse.Namespace) -> int:
    """Turns a folder of images into an .npz file of tokens."""
    tokenizer, config = open_tokenizer(arguments.run, arguments.quantizer)
    size = arguments.size or (config.data.crop_size if config else 128)
    if arguments.out.suffix != ".npz":
        raise ValueError(f"--out is {arguments.out}, but tokens go into an .npz file: name one")
    photographs = load_collection(arguments.data, min_side=size)
    squares = torch.stack([centre_square(image, size) for image in photographs.images])
    tokens = []
    with ProgressReport("encode", len(squares)) as progress:
        for start in range(0, len(squares), BATCH):
            tokens.append(tokenizer.encode(to_float(squares[start : start + BATCH])))
            for _ in tokens[-1]:
                progress.advance()
    indices = torch.cat(tokens).numpy()
    names = np.array(photographs.names)
    codes = np.array(tokenizer.quantizer.num_codes)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, tokens=indices, names=names, num_codes=codes)

    write_atomically(arguments.out, write)
    for path, reason in photographs.skipped:
        say(f"skipped {path}: {reason}")
    say(f"{len(indices)} images as {indices.shape[1]}x{indices.shape[2]} tokens each: {arguments.out}")
    return 0


def decode(arguments: argparse.Namespace) -> int:
    """Turns an .npz file of tokens into PNG files."""
    tokenizer, _ = open_tokenizer(arguments.run, arguments.quantizer)
    tokens, names = _read_tokens(arguments.tokens, tokenizer.quantizer.num_codes)
    with ProgressReport("decode", len(tokens)) as progress:
        for start in range(0, len(tokens), BATCH):
            images = to_uint8(tokenizer.decode(tokens[start : start + BATCH])).permute(0, 2, 3, 1).numpy()
            for number, image in enumerate(images, start):
                picture = Image.fromarray(image)
                target = arguments.out / f"{number:06d}_{Path(names[number]).stem}.png"
                write_atomically(target, picture.save)
                progress.advance()
    say(f"{len(tokens)} images: {arguments.out}")
    return 0


def _read_tokens(path: Path, num_codes: int) -> tuple[torch.Tensor, list[str]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            tokens, names = torch.from_numpy(file["tokens"].astype(np.int64)), [str(name) for name in file["names"]]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as tokens ({error}): give an .npz file written by encode") from error
    if tokens.dim() != 3 or len(names) != len(tokens):
        raise ValueError(f"{path} holds tokens of shape {tuple(tokens.shape)}, but (images, height, width) are needed")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < num_codes:
        raise ValueError(
            f"{path} holds tokens from {int(tokens.min())} to {int(tokens.max())}, but this tokenizer has {num_codes} "
            "codes: decode with the tokenizer that encoded them"
        )
    return tokens, names
