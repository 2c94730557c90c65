"""`python -m unionfsd.options FILE`: write the tables of all options into FILE, below the line that says so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from unionfsd.options.table import GROUPS
from unionfsd.typed import Final

MARK: Final = "<!-- What follows is written by `python -m unionfsd.options docs/options.md`. -->"


def tables() -> Iterator[str]:
    """A heading and a Markdown table for each group of options, line by line."""
    for title, options in GROUPS:
        yield f"## {title}"
        yield ""
        yield "| option | default | meaning |"
        yield "| --- | --- | --- |"
        for option in options:
            cells = (f"`{option.usage}`", option.default, option.help)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""


def renewed(text: str) -> str:
    """`text`, a whole document, with its tables made anew."""
    head, mark, _ = text.partition(MARK)
    if not mark:
        raise SystemExit(f"the line is missing below which the tables go: {MARK}")
    return head + "\n".join([mark, "", *tables()]).rstrip() + "\n"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(renewed(document.read_text()))
