"""What a registry wants to know of who asks: the header WWW-Authenticate (RFC 9110, 11.6.1)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from unionfsd.typed import Final, NamedTuple

_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER: Final = re.compile(rf'\s*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))')
_SCHEME: Final = re.compile(rf"[\s,]*({_TOKEN})(?=[\s,]|$)")
_COMMA: Final = re.compile(r"\s*(?:,|$)\s*")
_MAX: Final = 1 << 16


class Challenge(NamedTuple):
    """A way to say who one is: `scheme` in lower case, parameters by their names in lower case."""

    scheme: str
    parameters: Mapping[str, str]


def read(headers: Sequence[str]) -> list[Challenge]:
    """The challenges in the headers of an answer, in their order; what cannot be read ends the list."""
    return [each for header in headers for each in _challenges(header[:_MAX])]


def _challenges(text: str) -> Iterator[Challenge]:
    at = 0
    while match := _SCHEME.match(text, at):
        at = match.end()
        found: dict[str, str] = {}
        while parameter := _PARAMETER.match(text, at):
            name, quoted, plain = parameter.groups()
            found[name.lower()] = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            at = parameter.end()
            comma = _COMMA.match(text, at)
            if comma is None:
                break
            at = comma.end()
        yield Challenge(match[1].lower(), found)
