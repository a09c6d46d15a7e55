# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown."""


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    rule = ["---"] + ["---:" if _numeric(column) else "---" for column in list(zip(*rows, strict=True))[1:]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, rule, *rows])


def _numeric(column: tuple[str, ...]) -> bool:
    return all(cell[:1].isdigit() or cell[:1] in "-+*" for cell in column)
