"""Digests as ``ALGORITHM:HEX`` strings, and ChainIDs (image-spec, descriptor.md and config.md)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

from unionfsd.errors import UserError
from unionfsd.typed import Final, Protocol

_LENGTHS: Final = {"sha256": 64, "sha512": 128}
_FORM: Final = re.compile(r"(sha256|sha512):([0-9a-f]+)")


class Hash(Protocol):
    """What hashlib makes."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def checked(text: object) -> str:
    """`text` if it is a digest of an algorithm that can be relied on, else UserError."""
    match = _FORM.fullmatch(text) if isinstance(text, str) else None
    if match is None or len(match[2]) != _LENGTHS[match[1]]:
        raise UserError(f"not a digest: {text!r:.200}", hint="sha256: or sha512: and lower-case hexadecimal digits")
    return match[0]


def split(digest: str) -> tuple[str, str]:
    """(algorithm, hexadecimal digits) of a checked digest."""
    algorithm, _, digits = digest.partition(":")
    return algorithm, digits


def hasher(digest: str = "sha256:") -> Hash:
    """A hash object of the algorithm of `digest`."""
    return hashlib.new(split(digest)[0])


def of(data: bytes) -> str:
    """The sha256 digest of `data`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def matches(digest: str, data: bytes) -> bool:
    """Whether `data` has `digest`."""
    made = hasher(digest)
    made.update(data)
    return made.hexdigest() == split(digest)[1]


def chain_ids(diff_ids: Sequence[str]) -> Iterator[str]:
    """The ChainID of every layer, the lowest first (config.md, "Layer ChainID")."""
    chain = ""
    for diff_id in diff_ids:
        chain = of(f"{chain} {diff_id}".encode()) if chain else diff_id
        yield chain
