# SPDX-License-Identifier: Apache-2.0
"""`steadyvq tokenize` and `steadyvq tokens`: a data set as stored tokens, a look at them, and copies for other projects."""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from steadyvq.cli import INTERRUPTED
from steadyvq.cli.common import check_output, open_tokenizer, say, table
from steadyvq.data import open_source
from steadyvq.files import write_atomically
from steadyvq.generation import TokenSet, TokenWriter, Views
from steadyvq.generation.exports import EXPORTERS
from steadyvq.generation.shares import share_of
from steadyvq.metrics import UsageMeter, to_uint8
from steadyvq.models import Tokenizer
from steadyvq.quantizers.names import look_up
from steadyvq.report import code_map, picture_grid
from steadyvq.training.progress import ProgressReport

SHOWN, SKIPPED_SHOWN = 16, 10


def device_of(name: str, local: int = 0) -> torch.device:
    """The device that `--device` names; of several GPUs the one that is this process's."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if chosen == "cuda" and torch.cuda.device_count():
        chosen = f"cuda:{local % torch.cuda.device_count()}"
    try:
        device = torch.device(chosen)
        torch.zeros(1, device=device)
    # torch has no type of its own for a device that is not there.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device is {name!r}, but it cannot be used ({str(error).splitlines()[0]})") from error
    return device


def tokenize(arguments: argparse.Namespace) -> int:
    """Writes the tokens of a data set, or goes on with it."""
    check_output(arguments.out, folder=True)
    share = share_of(arguments.num_shards, arguments.shard_index)
    tokenizer, config = open_tokenizer(arguments.tokenizer, arguments.quantizer)
    size = arguments.size if arguments.size is not None else config.data.crop_size if config else 128
    scales = (config.data.min_scale, config.data.max_scale) if config else (1.0, 2.0)
    views = Views(arguments.views, size, arguments.crop_range, scales, arguments.seed)
    # Random crops are those of training, which sees photographs shrunk to a largest side.
    max_side = config.data.max_side if config and views.is_random else None
    source = open_source(arguments.data, size if views.is_random else 1, max_side)
    writer = TokenWriter(
        tokenizer.to(device_of(arguments.device, share.local)),
        str(arguments.tokenizer),
        source,
        arguments.out,
        views,
        shard_images=arguments.shard_images,
        batch=arguments.batch,
        share=share,
        threads=arguments.threads,
        latents=arguments.latents,
    )
    if writer.done:
        say(f"{writer.done} of {writer.total} images lie in finished shards of {arguments.out} already")
    part = "" if share.count == 1 else f" (part {share.index + 1} of {share.count})"
    try:
        with ProgressReport(f"tokenize{part}", writer.total, writer.done, quiet=share.local > 0) as progress:
            complete = writer.write(progress.advance_by)
    except KeyboardInterrupt:
        say(f"stopped; finished shards are kept, go on with: steadyvq {shlex.join(sys.argv[1:])}")
        return INTERRUPTED
    if not complete:
        say(
            f"{writer.total} images{part} are done; the last part to finish makes the tokens in {arguments.out} complete"
        )
        return 0
    if share.local == 0:
        _tell_about(TokenSet(arguments.out), writer.skipped())
    return 0


def _tell_about(tokens: TokenSet, skipped: list[tuple[str, str]]) -> None:
    for name, reason in skipped[:SKIPPED_SHOWN]:
        say(f"skipped {name}: {reason}")
    if len(skipped) > SKIPPED_SHOWN:
        say(f"and {len(skipped) - SKIPPED_SHOWN} more were skipped")
    shape, views = "x".join(map(str, tokens.shape)), tokens.num_views
    mega = sum(shard.bytes for shard in (*tokens.shards, *tokens.latent_shards)) / 1e6
    say(f"{len(tokens)} images, {views} view{'s' * (views > 1)} of {shape} tokens, {mega:.1f} MB: {tokens.folder}")


def tokens(arguments: argparse.Namespace) -> int:
    """Runs one of the commands for stored tokens."""
    return {"inspect": inspect, "export": export}[arguments.action](arguments)


def inspect(arguments: argparse.Namespace) -> int:
    """Checks stored tokens and shows what they are."""
    found = TokenSet(arguments.tokens)
    out = arguments.out or found.folder / "inspect.png"
    check_output(out)
    _verify(found)
    counts = found.histogram
    meter = UsageMeter(found.num_codes)
    meter.counts += torch.from_numpy(counts)
    usage = meter.report()
    table(
        [
            {
                "images": f"{len(found):,}",
                "views": f"{found.num_views}",
                "tokens": "x".join(map(str, found.shape)),
                "codes used": f"{usage.active:,}/{usage.num_codes:,} ({usage.utilization:.1%}; ceiling {usage.ceiling:.1%})",
                "perplexity": f"{usage.perplexity:,.0f}",
                "all tokens": f"{usage.tokens:,}",
                "classes": f"{len(found.classes):,}",
                "splits": ", ".join(f"{name} {count:,}" for name, count in found.meta["splits"].items()),
            }
        ]
    )
    print("\n".join(histogram_lines(counts)))
    say(f"tokenizer {found.tokenizer_hash[:12]} ({found.tokenizer_name}); views {found.meta['cut']['text']}")
    tokenizer = _tokenizer(found, arguments.tokenizer, arguments.quantizer)
    write_atomically(out, picture(found, tokenizer).save)
    say(f"images decoded from tokens above, their tokens below: {out}")
    return 0


def _verify(found: TokenSet) -> None:
    with ProgressReport("verify (bytes)", sum(s.bytes for s in (*found.shards, *found.latent_shards))) as progress:
        problems = found.verify(progress.advance_by)
    if problems:
        raise ValueError("; ".join(problems[:3]))


def _tokenizer(found: TokenSet, path: Path | None, quantizer: str | None) -> Tokenizer:
    if path is None:
        return found.tokenizer()
    tokenizer, _ = open_tokenizer(path, quantizer)
    found.check_tokenizer(tokenizer, str(path))
    return tokenizer


def histogram_lines(counts: NDArray[np.int64], width: int = 40) -> list[str]:
    """How many codes were hit how often, in powers of two, as bars of text."""
    largest = int(counts.max())
    edges = [0, 1] + [1 << i for i in range(1, largest.bit_length())]
    bins = np.searchsorted(edges, counts, side="right") - 1
    found = np.bincount(bins, minlength=len(edges))
    lines = []
    for i, (low, codes) in enumerate(zip(edges, found.tolist(), strict=True)):
        high = (edges[i + 1] if i + 1 < len(edges) else 2 * low) - 1
        hits = f"{low:,}" if low >= high else f"{low:,} to {high:,}"
        lines.append(f"{hits:>19} hits  {codes:>7,} codes  {'#' * round(width * codes / max(found.max(), 1))}".rstrip())
    return lines


def picture(found: TokenSet, tokenizer: Tokenizer) -> Image.Image:
    """Some images decoded from their tokens, each above a map of them where they are a grid."""
    rows = np.arange(len(found))[:: max(1, len(found) // SHOWN)][:SHOWN]
    # Other views show too, where there are some.
    grids = found.grids(found.read(rows, np.arange(len(rows)) % found.num_views))
    images = to_uint8(tokenizer.decode(grids))
    if len(found.shape) != 2:
        return picture_grid(images, images)
    scale = max(1, found.size // found.shape[0])
    maps = [np.asarray(code_map(grid, found.num_codes, scale)) for grid in grids.numpy()]
    return picture_grid(images, np.stack(maps).transpose(0, 3, 1, 2))


def export(arguments: argparse.Namespace) -> int:
    """Copies stored tokens for another project."""
    found = TokenSet(arguments.tokens)
    look_up("format of tokens", arguments.format, EXPORTERS)
    check_output(arguments.out, folder=True)
    _verify(found)
    with ProgressReport(f"export {arguments.format}", len(found)) as progress:
        EXPORTERS[arguments.format](found, arguments.out, progress.advance_by)
    say(f"{len(found)} images for {arguments.format}: {arguments.out}")
    return 0
