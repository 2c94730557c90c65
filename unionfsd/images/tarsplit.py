"""The tar that a layer of podman's or Docker's store came as, byte for byte, from its files and its tar-split.

Both keep with a layer what of its tar is not in the files (vbatts/tar-split, tar/storage/entry.go): a line of JSON for
each piece, in order. Of type 2 the payload is the bytes themselves, headers and padding; of type 1 the name of a file
whose content comes here, and its size. What comes out is worth what its DiffID says of it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterator

from unionfsd import syscalls
from unionfsd.errors import UserError, reason
from unionfsd.images import archives, compress
from unionfsd.images.beneath import Tree
from unionfsd.images.compress import Readable
from unionfsd.syscalls import Fd
from unionfsd.typed import Any, Final

_FILE: Final = 1
_SEGMENT: Final = 2
#: A line has a header and what was between two, at most.
_MAX_LINE: Final = 64 << 20


def size(path: str) -> int:
    """Bytes of the tar that the tar-split `path` is of; UserError."""
    return sum(
        int(entry.get("size") or 0) if entry["type"] == _FILE else len(_bytes(entry, "payload", path))
        for entry in _entries(path)
    )


def stream(path: str, diff: str) -> Readable:
    """The tar itself, from the files in the directory `diff`; UserError at the first that is not there as it was."""
    return compress.Source(_pieces(path, diff), algorithm=None)


def _pieces(path: str, diff: str) -> Iterator[bytes]:
    with Fd(os.open(diff, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)) as root:
        tree = Tree(root)
        for entry in _entries(path):
            if entry["type"] == _SEGMENT:
                yield _bytes(entry, "payload", path)
            elif entry.get("size"):
                yield from _content(tree, entry, path)


def _content(tree: Tree, entry: dict[str, Any], path: str) -> Iterator[bytes]:
    raw = _bytes(entry, "name_raw", path) or os.fsencode(str(entry.get("name")))
    names = tuple(part for part in raw.split(b"/") if part not in (b"", b"."))
    if not names or b".." in names:
        raise UserError(f"{path}: {raw!r:.200}: not the name of a file")
    left = int(entry["size"])
    try:
        with syscalls.open_data(tree.directory(names[:-1]).fd, names[-1], os.O_RDONLY) as fd:
            while left > 0 and (piece := os.read(fd.fd, min(left, 1 << 20))):
                left -= len(piece)
                yield piece
    except OSError as error:
        raise UserError(f"{path}: {os.fsdecode(raw)}: {reason(error)}") from None
    if left:
        raise UserError(f"{path}: {os.fsdecode(raw)}: shorter than it was")


def _bytes(entry: dict[str, Any], key: str, path: str) -> bytes:
    try:
        return base64.b64decode(entry.get(key) or "", validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise UserError(f"{path}: not a tar-split") from None


def _entries(path: str) -> Iterator[dict[str, Any]]:
    try:
        opened = Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from None
    with opened:
        rest = b""
        for piece in compress.pieces(archives.stream(opened)):
            *whole, rest = (rest + piece).split(b"\n")
            yield from (_entry(line, path) for line in whole if line)
            if len(rest) > _MAX_LINE:
                raise UserError(f"{path}: not a tar-split: a line of more than {_MAX_LINE} bytes")
        if rest:
            yield _entry(rest, path)


def _entry(line: bytes, path: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if isinstance(entry, dict) and entry.get("type") in (_FILE, _SEGMENT) and int(entry.get("size") or 0) >= 0:
            return entry
    except (ValueError, TypeError):
        pass
    raise UserError(f"{path}: not a tar-split")
