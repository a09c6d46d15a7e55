# SPDX-License-Identifier: Apache-2.0
"""A page of pictures from a prior beside what they are compared with: one HTML file that needs nothing else."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from steadyvq.files import write_text
from steadyvq.report.markup import Markup, table, tag
from steadyvq.report.style import STYLE

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_samples_report(
    out: Path, title: str, notes: Sequence[str], rows: Sequence[Mapping[str, str]], pictures: Mapping[str, Image.Image]
) -> Path:
    """Write the page.

    Args:
        out: the HTML file.
        title: heading of the page.
        notes: paragraphs under it.
        rows: of a table of numbers, as text by column; the first column names the row.
        pictures: by what is written below them.

    Returns:
        The file that was written.
    """
    body = [tag("header", tag("p", "SteadyVQ report", class_="brand"), tag("h1", title))]
    body += [tag("p", note, class_="note") for note in notes]
    if rows:
        heads = list(rows[0])
        lines = [
            tag("tr", tag("th", row[heads[0]], scope="row"), *(tag("td", row[head]) for head in heads[1:]))
            for row in rows
        ]
        body += [tag("h2", "Numbers"), table(heads, lines)]
    shown = [_figure(name, picture) for name, picture in pictures.items()]
    body += [tag("h2", "Pictures"), tag("div", *shown, class_="pictures")]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    write_text(out, "<!DOCTYPE html>\n" + tag("html", head, tag("body", tag("main", *body)), lang="en") + "\n")
    return out


def _figure(name: str, picture: Image.Image) -> Markup:
    content = io.BytesIO()
    picture.save(content, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
    image = tag("img", src=source, width=picture.width, height=picture.height, alt=name)
    return tag("figure", image, tag("figcaption", tag("span", name, class_="last")), class_="picture")
