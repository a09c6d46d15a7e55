# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report: reconstructions and the tokens behind them, embedded whole."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from steadyvq.report.markup import Markup, tag
from steadyvq.report.runs import Run

EARLIER_PICTURES = 5
ZOOM_TO = 500
_RECONSTRUCTIONS = "Held-out images above, their reconstructions below."
_DRAWN = "Pictures that the prior drew."
_CODES = (
    "Tokens: the same images as codes, a square per token, a colour per code; that colours look alike means nothing."
)


def picture_section(runs: Sequence[Run]) -> list[Markup]:
    """Return the newest reconstructions of each run beside its code map; empty where there are neither."""
    reconstructions = [_newest(run, _names(run, runs)) for run in runs]
    maps = [_code_map(run, _names(run, runs)) for run in runs]
    if not any((*reconstructions, *maps)):
        return []
    described = dict.fromkeys(_described(run) for run in runs)
    said = [*described] if any(reconstructions) else []
    said += [_CODES] if any(maps) else []
    pairs = [tag("div", *pair, class_="pictures") for pair in zip(reconstructions, maps, strict=True) if any(pair)]
    parts = [tag("h2", "Pictures"), *pairs, tag("p", " ".join(said), class_="small")]
    return [*parts, _earlier(runs[0])] if len(runs) == 1 and len(runs[0].pictures) > 1 else parts


def _names(run: Run, runs: Sequence[Run]) -> list[str]:
    return [run.label] if len(runs) > 1 else []


def _described(run: Run) -> str:
    return _DRAWN if run.is_prior else _RECONSTRUCTIONS


def _newest(run: Run, names: Sequence[str]) -> Markup | None:
    # A picture whose file is damaged is left out; the one before it is the newest then.
    usable = (shown for step, path in reversed(run.pictures) if (shown := _picture(path, names, step, _described(run))))
    return next(usable, None)


def _code_map(run: Run, names: Sequence[str]) -> Markup | None:
    return None if run.code_map is None else _picture(run.code_map, names, "tokens", "Map of codes.")


def _earlier(run: Run) -> Markup:
    before = run.pictures[:-1]
    count = min(EARLIER_PICTURES, len(before))
    chosen = [before[i * (len(before) - 1) // max(1, count - 1)] for i in range(count)]
    pictures = [_picture(path, (), step, _described(run)) for step, path in chosen]
    summary = tag("summary", f"Earlier pictures ({count} of {len(before)})")
    return tag("details", summary, tag("div", *pictures, class_="pictures"))


def _picture(path: Path, names: Sequence[str], what: str, described: str) -> Markup | None:
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.verify()
            width, height = image.size
    except (OSError, SyntaxError, ValueError):
        return None
    zoom = max(1, ZOOM_TO // width)
    image_tag = tag(
        "img",
        src=f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}",
        width=width * zoom,
        height=height * zoom,
        alt=f"{described} {', '.join((*names, what))}",
    )
    label = [tag("span", name, class_="name") for name in names]
    return tag("figure", image_tag, tag("figcaption", *label, tag("span", what, class_="last")), class_="picture")
