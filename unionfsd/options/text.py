"""The text of mount options: how it is split, escaped and quoted, and readers for its values.

It is what overlayfs and mount(8) take: options are separated by commas, a backslash takes the next character literally
(so that paths with ``,`` and ``:`` can be said), and a value in double quotes may hold commas.

Readers raise ValueError with the reason alone; who calls them knows the option's name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

from unionfsd.typed import Final, NamedTuple

#: The highest 32-bit number is no id: it means "none", or "keep it".
_MAX_ID: Final = 2**32 - 1


def split_options(text: str) -> list[str]:
    """The options in `text`, escapes and quotes left in, empty ones (podman ends its list with a comma) left out."""
    return [piece for piece in split(text, ",") if piece]


# A run of plain characters, an escaped character, a value in double quotes, or one character of any kind.
_TOKEN: Final = r'(?<==)"[^"]*"(?=,|$)|\\.|[^\\:,="]+|.'


def split(text: str, separator: str) -> list[str]:
    """Split at `separator` (a comma or a colon) where it is neither escaped nor in a quoted value."""
    if "\\" not in text and '"' not in text:
        return text.split(separator)
    import re  # late: few options have escapes

    pieces = [""]
    for token in re.findall(_TOKEN, text, re.DOTALL):
        if token == separator:
            pieces.append("")
        else:
            pieces[-1] += token
    return pieces


def unescape(text: str) -> str:
    """Every backslash taken out, but for those that were escaped and one that stands alone at the end."""
    if "\\" not in text:
        return text
    import re

    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def unquote(text: str) -> str:
    """The text without the double quotes around it."""
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] == '"' else text


# Readers of values. They raise ValueError with the reason, without the option's name.


def read_path(text: str) -> bytes:
    """A path with its escapes taken out; relative ones stay so until `Parsed.config` makes them absolute."""
    path = os.fsencode(unescape(text))
    if not path:
        raise ValueError("empty path")
    return path


def read_control(text: str) -> str | bytes:
    """A path, or one of the words "auto" and "off"."""
    return text if text in ("auto", "off") else read_path(text)


def read_lowers(text: str) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Colon-separated paths of lowers; those of data-only lowers, each of which comes after two colons."""
    pieces = split(text, ":")
    end = pieces.index("") if "" in pieces else len(pieces)
    if not end or any(pieces[end::2]) or (len(pieces) - end) % 2:
        raise ValueError("empty path between colons; data-only layers come last, each after '::'")
    return tuple(map(read_path, pieces[:end])), tuple(map(read_path, pieces[end + 1 :: 2]))


class TreeFile(NamedTuple):
    """Where the index of a layer's tree is, and its SHA-256, None for whoever trusts the file as it is."""

    path: bytes
    digest: bytes | None


def read_trees(text: str) -> tuple[TreeFile | None, ...]:
    """Colon-separated paths of indices, each after its SHA-256 and an @ if that is known; an empty one is none."""
    return tuple(_read_tree(piece) if piece else None for piece in split(text, ":"))


def _read_tree(text: str) -> TreeFile:
    import re

    found = re.match(r"([0-9a-f]{64})@", text)
    if found is None:
        return TreeFile(read_path(text), None)
    return TreeFile(read_path(text[found.end() :]), bytes.fromhex(found[1]))


def read_text(text: str) -> str:
    """Any text that is not empty."""
    if not text:
        raise ValueError("empty value")
    return unescape(text)


def read_seconds(text: str) -> float:
    """Seconds, 0 or more, fractions allowed."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError("not a number of seconds, 0 or more")
    return seconds


def read_id(text: str) -> int:
    """A numeric user or group id; the highest 32-bit number means "none" to the kernel and is none."""
    if not (text.isascii() and text.isdigit() and int(text) < _MAX_ID):
        raise ValueError("not a numeric id")
    return int(text)


def read_mapping(text: str) -> tuple[tuple[int, int, int], ...]:
    """Ids as CONTAINER:HOST:COUNT triples joined by colons; containers/storage begins with a colon of its own."""
    words = [word for word in unescape(text).split(":") if word]
    if not words or len(words) % 3 or not all(word.isascii() and word.isdigit() for word in words):
        raise ValueError("not CONTAINER:HOST:COUNT numbers")
    numbers = [int(word) for word in words]
    triples = tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
    if any(count == 0 or max(disk, mount) + count > _MAX_ID for disk, mount, count in triples):
        raise ValueError("ids are numbers below 4294967295, and there is at least one of them")
    return triples


def read_switch(text: str) -> bool:
    """0 or 1; off and on mean the same."""
    if text not in ("0", "1", "off", "on"):
        raise ValueError("not 0 or 1")
    return text in ("1", "on")


def read_writeback(text: str) -> str:
    """auto, on or off; fuse-overlayfs has 1 and 0."""
    return one_of("auto", "on", "off")({"1": "on", "0": "off"}.get(text, text))


def one_of(*values: str) -> Callable[[str], str]:
    """A reader for one of `values`."""

    def read(text: str) -> str:
        if text not in values:
            raise ValueError(f"not one of {', '.join(values)}")
        return text

    return read
