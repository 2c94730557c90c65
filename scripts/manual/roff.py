"""The Markdown that docs/ is written in, as man(7).

It knows what those documents use and nothing else: headings, paragraphs, lists, tables, code, links. A table becomes
a list of its first column, with the others beneath.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Final

# groff prints these as what a typesetter wants, unless told otherwise (groff_char(7)).
_TYPED: Final = str.maketrans({"-": r"\-", "~": r"\(ti", "^": r"\(ha", "'": r"\(aq", "`": r"\(ga"})
_INLINE: Final = re.compile(r"`(?P<code>[^`]+)`|\*\*(?P<bold>[^*]+)\*\*|\[(?P<text>[^]]+)\]\((?P<link>[^)]+)\)")


def page(name: str, section: int, about: str, markdown: str, *, version: str) -> str:
    """A whole manual page; the document's own title is left out."""
    head = [
        f'.TH "{name.upper()}" {section} "" "unionfsd {version}" "unionfsd"',
        ".nh",
        ".SH NAME",
        f"{literal(name)} \\- {about}",
    ]
    return "\n".join([*head, *blocks(markdown)]) + "\n"


def blocks(markdown: str) -> Iterator[str]:
    """Lines of roff for a document."""
    lines = [line for line in markdown.splitlines() if not line.startswith(("# ", "<!--"))]
    while lines:
        line = lines[0]
        if not line.strip():
            del lines[0]
        elif line.startswith("#"):
            del lines[0]
            yield f".{'SH' if line.startswith('## ') else 'SS'} {text(line.lstrip('# ')).upper()}"
        elif line.startswith("```"):
            code = list(takewhile(lambda line: not line.startswith("```"), lines[1:]))
            del lines[: len(code) + 2]
            yield from _example(code)
        elif line.startswith("    "):
            code = _take(lines, lambda line: line.startswith("    "))
            yield from _example([line[4:] for line in code])
        elif line.startswith("|"):
            yield from _table(_take(lines, lambda line: line.startswith("|")))
        elif line.startswith("- "):
            yield from _item(_take_item(lines))
        else:
            yield ".PP"
            yield text(" ".join(_take(lines, _is_text)))


def _is_text(line: str) -> bool:
    return bool(line.strip()) and not line.startswith(("#", "```", "|", "- "))


def _take(lines: list[str], wanted: Callable[[str], bool]) -> list[str]:
    """The first lines that are `wanted`, taken out of `lines`."""
    taken = list(takewhile(wanted, lines))
    del lines[: len(taken)]
    return taken


def _take_item(lines: list[str]) -> list[str]:
    first = lines.pop(0)[2:]
    return [first, *(line.strip() for line in _take(lines, lambda line: line.startswith("  ")))]


def _item(lines: list[str]) -> Iterator[str]:
    yield ".IP \\(bu 2"
    yield text(" ".join(lines))


def _example(lines: list[str]) -> Iterator[str]:
    yield from (".PP", ".RS 4", ".EX")
    yield from (literal(line) for line in lines)
    yield from (".EE", ".RE")


def _table(rows: list[str]) -> Iterator[str]:
    heads, _, *cells = map(_cells, rows)
    for first, *rest in cells:
        *notes, last = [(head, cell) for head, cell in zip(heads[1:], rest, strict=True) if cell]
        yield ".TP"
        yield text(first)
        yield text(" ".join([last[1], *(f"{head.capitalize()}: {_sentence(cell)}" for head, cell in notes)]))


def _cells(row: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def _sentence(words: str) -> str:
    return words if words.endswith(".") else f"{words}."


def text(markdown: str) -> str:
    """Running text: code and emphasis in bold, links as what they say."""
    parts, at = [], 0
    for match in _INLINE.finditer(markdown):
        parts.append(literal(markdown[at : match.start()], hyphens=False))
        parts.append(_inline(match))
        at = match.end()
    parts.append(literal(markdown[at:], hyphens=False))
    return "".join(parts)


def _inline(match: re.Match[str]) -> str:
    if match["text"]:
        return text(match["text"])
    return f"\\fB{literal(match['code'] or match['bold']).removeprefix(chr(92) + '&')}\\fR"


def literal(words: str, *, hyphens: bool = True) -> str:
    """Characters as they are: no escapes, no requests and, for what is typed, hyphens that are minus signs."""
    words = words.replace("\\", "\\e")
    if hyphens:
        words = words.translate(_TYPED)
    return f"\\&{words}" if words.startswith((".", "'")) else words
