# SPDX-License-Identifier: Apache-2.0
"""`steadyvq data shard`, `verify` and `fetch`: photographs in indexed tar files, and the corpus."""

import argparse
import shlex
import sys
from pathlib import Path

from steadyvq.cli import INTERRUPTED
from steadyvq.cli.common import check_output, say
from steadyvq.data import ShardWriter, verify_shards
from steadyvq.data.corpus import corpus_names, fetch_corpus
from steadyvq.data.shards import read_index
from steadyvq.training.progress import ProgressReport

SHOWN = 20


def data(arguments: argparse.Namespace) -> int:
    """Runs one of the commands for data sets."""
    return {"shard": shard, "verify": verify, "fetch": fetch}[arguments.action](arguments)


def shard(arguments: argparse.Namespace) -> int:
    """Writes a folder of images into shards, or goes on with it."""
    check_output(arguments.out, folder=True)
    writer = ShardWriter(arguments.source, arguments.out, arguments.samples, arguments.check, arguments.threads)
    if writer.done:
        say(f"{writer.done} of {writer.total} images lie in finished shards of {arguments.out} already")
    try:
        with ProgressReport("shard", writer.total, writer.done) as progress:
            written = writer.write(lambda count: progress.advance())
    except KeyboardInterrupt:
        say(f"stopped; finished shards are kept, go on with: steadyvq {shlex.join(sys.argv[1:])}")
        return INTERRUPTED
    if written.skipped:
        say(f"{len(written.skipped)} files were left out:")
        for name, reason in written.skipped[:SHOWN]:
            say(f"  {name}: {reason}")
        if len(written.skipped) > SHOWN:
            say(f"  and {len(written.skipped) - SHOWN} more (all of them in {written.folder / 'index.json'})")
    say(f"{written.samples} images in {written.shards} shards, {written.bytes / 1e6:.1f} MB: {written.folder}")
    return 0


def fetch(arguments: argparse.Namespace) -> int:
    """Fetches the corpus of photographs, or what is missing of it."""
    try:
        with ProgressReport("fetch", len(corpus_names())) as progress:
            folder = fetch_corpus(arguments.source, progress.advance_by)
    except KeyboardInterrupt:
        say(f"stopped; photographs that are done are kept, go on with: steadyvq {shlex.join(sys.argv[1:])}")
        return INTERRUPTED
    print(f"{len(corpus_names())} photographs: {folder}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Reads every byte of a shard set and says what is wrong."""
    folder: Path = arguments.shards
    shards = read_index(folder)
    total = sum(shard.bytes for shard in shards)
    with ProgressReport("verify (bytes)", total) as progress:
        problems = verify_shards(folder, arguments.decode, progress.advance_by)
    if problems:
        for problem in problems[:SHOWN]:
            say(f"  {problem}")
        if len(problems) > SHOWN:
            say(f"  and {len(problems) - SHOWN} more")
        raise ValueError(
            f"{folder} has {len(problems)} faults: delete the shards named above with their tables and run the same "
            "`steadyvq data shard` again, which writes what is missing"
        )
    print(f"{sum(shard.samples for shard in shards)} images in {len(shards)} shards are as they were written: {folder}")
    return 0
