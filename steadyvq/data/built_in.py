# SPDX-License-Identifier: Apache-2.0
"""Photographs that have a name of their own where a folder could stand, each with a split that is checked in."""

from collections.abc import Callable, Mapping
from pathlib import Path

from steadyvq.data.corpus import corpus_files
from steadyvq.data.mvtb import mvtb_files

BUILT_IN: Mapping[str, Callable[[], list[tuple[str, Path, str]]]] = {"mvtb": mvtb_files, "corpus": corpus_files}
"""By name, the function that lists (name, path, split) of every photograph, sorted by name."""
