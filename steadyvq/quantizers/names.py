# SPDX-License-Identifier: Apache-2.0
"""Looking things up by name, with an answer that helps when the name is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for an unknown name: lists the known ones and suggests the nearest."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}: known are {', '.join(names) or 'none'}{hint}")


ASSIGNMENT = "assignment"


def coupling(name: str) -> str:
    """What a name in `Quantizer.batch_coupled` stands for, in words."""
    return "the assignment" if name == ASSIGNMENT else f"the loss {name!r}"


def look_up(kind: str, name: str, table: Mapping[str, T]) -> T:
    """`table[name]`, or a ValueError that lists the known names and the nearest."""
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]
