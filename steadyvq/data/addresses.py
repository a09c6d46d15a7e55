# SPDX-License-Identifier: Apache-2.0
"""Names of data sets that are neither folders of images nor shards of ours: a kind, a place and settings.

hf:NAME_OR_PATH[:split=S][:column=C][:label=L][:config=X][:revision=R]       Hugging Face datasets (data/hub.py)
wds:PATTERN[:val=PATTERN][:test=PATTERN][:image=ENDING][:label=ENDING]       webdataset tars (data/tarsets.py)
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HUB, TARS = "hf", "wds"
SETTINGS: dict[str, tuple[str, ...]] = {
    HUB: ("split", "column", "label", "config", "revision"),
    TARS: ("val", "test", "image", "label"),
}
"""What can be set, by kind."""

_PATTERNS = ("val", "test")


@dataclass(frozen=True)
class Address:
    """A data set as the user named it.

    Attributes:
        text: The whole name.
        kind: A key of ``SETTINGS``.
        place: What is behind it, without settings.
        settings: The settings given.
    """

    text: str
    kind: str
    place: str
    settings: Mapping[str, str]


def parse_address(data: str | Path) -> Address | None:
    """The parts of such a name; None for a folder.

    Raises:
        ValueError: There is no place, or a setting that this kind does not have.
    """
    text = str(data)
    kind, colon, rest = text.partition(":")
    if not colon or kind not in SETTINGS:
        return None
    # Splits of Hugging Face may hold colons of their own, as in train[:10%].
    place, *pairs = re.split(r":(?=\w+=)", rest)
    settings = dict(pair.split("=", 1) for pair in pairs)
    known = SETTINGS[kind]
    wrong = [name for name in settings if name not in known]
    if wrong:
        near = difflib.get_close_matches(wrong[0], known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{text!r} sets {wrong[0]!r}{hint}, but {kind}: has the settings {', '.join(known)}")
    empty = [name for name in settings if not settings[name]]
    if not place or empty:
        what = f"nothing for {empty[0]!r}" if empty else "no data set"
        form = "hf:NAME_OR_PATH" if kind == HUB else "wds:PATTERN_OF_TARS"
        raise ValueError(f"{text!r} names {what}: write {form}, and settings behind it as :{known[0]}=VALUE")
    return Address(text, kind, place, settings)


def absolute_address(data: str) -> str:
    """The same data set by absolute paths, so that a run means the same from every working directory."""
    address = parse_address(data)
    if address is None:
        return str(Path(data).expanduser().resolve())
    place, settings = address.place, dict(address.settings)
    if address.kind == TARS:
        place = _absolute(place)
        settings |= {name: _absolute(settings[name]) for name in _PATTERNS if name in settings}
    elif Path(place).expanduser().exists():
        place = _absolute(place)
    return ":".join([address.kind, place, *(f"{name}={value}" for name, value in settings.items())])


def _absolute(path: str) -> str:
    # What stands elsewhere (s3://...) is refused by name later.
    return path if "://" in path else str(Path(path).expanduser().resolve())


def short_name(data: str | Path) -> str:
    """A short form for the names of files: the last part of the path, without what file systems or shells might not take."""
    address = parse_address(data)
    last = Path(str(data) if address is None else address.place).name
    return last if address is None else re.sub(r"[^\w.-]+", "-", last).strip("-") or address.kind
