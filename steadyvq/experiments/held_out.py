# SPDX-License-Identifier: Apache-2.0
"""The one door to the test photographs of the corpus: who opens it, and for which configuration, is written down.

A search chooses settings by the photographs of `val`. It is given the corpus by its name, which does not list the others
(`steadyvq/data/corpus.py`), and calls nothing of this file; a test looks through its code.
"""

import json
import time
from pathlib import Path

from steadyvq.data.collection import Collection, read_images
from steadyvq.data.corpus import HELD_OUT, corpus_files, corpus_home
from steadyvq.data.decode import decode_image

LEDGER = "openings.jsonl"


def open_test(caller: str, config_hash: str) -> Collection:
    """The test photographs of the corpus.

    Args:
        caller: Who asks: the name of an experiment.
        config_hash: Of the run that is to be judged.

    Raises:
        ValueError: The corpus has not been fetched.
    """
    files = corpus_files(held_out=True)
    opening = {"caller": caller, "config": config_hash, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    with (corpus_home() / LEDGER).open("a") as ledger:
        ledger.write(json.dumps(opening) + "\n")
    skipped: list[tuple[str, str]] = []
    found = list(read_images([(name, path) for name, path, _ in files], decode_image, "corpus", skipped))
    names, images = (tuple(part) for part in zip(*found, strict=True))
    return Collection("corpus", names, images, (HELD_OUT,) * len(names), skipped, HELD_OUT)


def openings(home: Path | None = None) -> list[dict[str, str]]:
    """Every opening so far, the first first."""
    ledger = (home or corpus_home()) / LEDGER
    return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.is_file() else []
