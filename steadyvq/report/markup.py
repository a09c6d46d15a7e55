# SPDX-License-Identifier: Apache-2.0
"""HTML and SVG as nested calls; whatever is not markup already is escaped, so no run can break or script a page."""

import html
import re
from collections.abc import Iterable

VOID = {"meta", "img", "br", "wbr"}
# Characters that neither HTML nor XML can hold, not even escaped.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Return text as markup that shows it."""
    return text if isinstance(text, Markup) else Markup(html.escape(_FORBIDDEN.sub("�", str(text))))


def tag(name: str, /, *content: object, **attributes: object) -> Markup:
    """Return an element.

    Args:
        name: of the element.
        *content: markup, or anything else to be shown as text; None is left out.
        **attributes: None is left out; `class_` is written `class`, and other underscores become hyphens.
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{shown} />")
    return Markup(f"<{name}{shown}>{join(*content)}</{name}>")


def join(*content: object) -> Markup:
    """Return several pieces one after the other."""
    return Markup("".join(escape(piece) for piece in content if piece is not None))


def table(head: Iterable[str], rows: Iterable[Markup], class_: str | None = None) -> Markup:
    """Return a table in a box of its own, which scrolls where the page is narrower.

    Args:
        head: heads of the columns.
        rows: elements `tr`.
        class_: of the table.
    """
    heads = tag("tr", *(tag("th", name, scope="col") for name in head))
    body = tag("table", tag("thead", heads), tag("tbody", *rows), class_=class_)
    # Without a place in the order of tabs the box could not be scrolled by keyboard.
    return tag("div", body, class_="scroll", tabindex=0)
