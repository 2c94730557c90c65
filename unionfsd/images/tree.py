"""The tree manifest of a layer: what every object of its directory is, kept when the layer is made, checked later.

A line of JSON per object, the root first and names in the order of their bytes::

    {"path":"usr/bin/env","type":"file","mode":"0755","uid":0,"gid":0,"mtime":1700000000000000000,"size":43,"sha256":"…"}

Bytes that are no UTF-8 stand as lone surrogates, as os.fsdecode has them; values of xattrs are hexadecimal. Access
and change times, link counts and inode numbers are not part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator

from unionfsd import format as fmt
from unionfsd import syscalls, treeindex
from unionfsd.errors import UserError
from unionfsd.images import beneath
from unionfsd.images.inodedigests import InodeDigests
from unionfsd.listing import DT_UNKNOWN, dt_type
from unionfsd.syscalls import Fd
from unionfsd.typed import Any, Final, NamedTuple

_TYPES: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
_MODES: Final = {name: kind for kind, name in _TYPES.items()}


Entry = dict[str, Any]
"""A line of a manifest."""


class Difference(NamedTuple):
    """An object that is not what it was: `what` is "added", "missing", or the members that differ."""

    path: str
    what: str


def lines(root: Fd) -> Iterator[bytes]:
    """The manifest of the tree `root`, whose files are all read."""
    return map(line, entries(root))


def line(entry: Entry) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def entries(root: Fd, digests: InodeDigests | None = None) -> Iterator[Entry]:
    """The same as objects. `digests` are of files by inode number; files not in it are read."""
    yield _entry("", root, os.fstat(root.fd), digests)
    for path, directory, name, st in beneath.walk(root):
        with syscalls.open_object(directory.fd, name) as fd:
            yield _entry(os.fsdecode(b"/".join(path)), fd, st, digests)


def _entry(path: str, fd: Fd, st: os.stat_result, digests: InodeDigests | None) -> Entry:
    kind = stat.S_IFMT(st.st_mode)
    entry: Entry = {
        "path": path,
        "type": _TYPES[kind],
        "mode": f"{stat.S_IMODE(st.st_mode):04o}",
        "uid": st.st_uid,
        "gid": st.st_gid,
        "mtime": st.st_mtime_ns,
    }
    if kind == stat.S_IFREG:
        known = digests.get(st.st_ino) if digests is not None else None
        entry |= {"size": st.st_size, "sha256": (known or _content(fd)).hex()}
    elif kind == stat.S_IFLNK:
        entry["target"] = os.fsdecode(syscalls.readlink(fd.fd))
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        entry["device"] = f"{os.major(st.st_rdev)}:{os.minor(st.st_rdev)}"
    names = syscalls.listxattr(fd.fd)
    if names:
        entry["xattrs"] = {os.fsdecode(name): syscalls.getxattr(fd.fd, name).hex() for name in sorted(names)}
    return entry


def _content(fd: Fd) -> bytes:
    """sha256 of a regular file."""
    made = hashlib.sha256()
    with syscalls.reopen(fd.fd, os.O_RDONLY) as data:
        while piece := os.read(data.fd, 1 << 20):
            made.update(piece)
    return made.digest()


def compare(kept: Iterator[bytes], found: Iterator[bytes]) -> Iterator[Difference]:
    """What differs between two manifests, both in the order of `lines`."""
    old, new = _entries(kept), _entries(found)
    before, after = next(old, None), next(new, None)
    while before is not None or after is not None:
        if after is None or (before is not None and before[0] < after[0]):
            assert before is not None
            yield Difference(before[1]["path"], "missing")
            before = next(old, None)
        elif before is None or after[0] < before[0]:
            yield Difference(after[1]["path"], "added")
            after = next(new, None)
        else:
            if before[1] != after[1]:
                keys = sorted(before[1].keys() | after[1].keys())
                changed = [key for key in keys if before[1].get(key) != after[1].get(key)]
                yield Difference(before[1]["path"], ", ".join(changed))
            before, after = next(old, None), next(new, None)


def _entries(manifest: Iterator[bytes]) -> Iterator[tuple[tuple[bytes, ...], dict[str, Any]]]:
    for line in manifest:
        try:
            entry = json.loads(line)
            path = os.fsencode(entry["path"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError("the manifest of its tree is damaged") from None
        yield (tuple(path.split(b"/")) if path else ()), entry


class Indexer:
    """Makes an index, which a mount checks objects with (`treeindex`), of a manifest's lines in their order."""

    def __init__(self) -> None:
        self._writer = treeindex.Writer()
        self._open: list[tuple[bytes, bytes, treeindex.Children]] = []

    def add(self, entry: Entry) -> None:
        path = os.fsencode(entry["path"])
        kind, xattrs = _MODES[entry["type"]], _xattrs(entry)
        described = _described(entry, kind, xattrs)
        if path:
            parent, _, name = path.rpartition(b"/")
            while self._open[-1][0] != parent:
                self._close()
            self._open[-1][2].add(name, _child(entry, name, kind, xattrs))
        if kind == stat.S_IFDIR:
            self._open.append((path, described, treeindex.Children()))
        else:
            content = bytes.fromhex(entry["sha256"]) if kind == stat.S_IFREG else treeindex.NO_CONTENT
            self._writer.add(path, treeindex.Record(described, content))

    def _close(self) -> None:
        path, described, children = self._open.pop()
        self._writer.add(path, treeindex.Record(described, children.digest()))

    def pieces(self) -> Iterator[bytes]:
        """The index; nothing can be added any more."""
        while self._open:
            self._close()
        return self._writer.pieces()


def _xattrs(entry: Entry) -> dict[bytes, bytes]:
    return {os.fsencode(name): bytes.fromhex(value) for name, value in entry.get("xattrs", {}).items()}


def _described(entry: Entry, kind: int, xattrs: dict[bytes, bytes]) -> bytes:
    major, _, minor = entry.get("device", "0:0").partition(":")
    return treeindex.metadata(
        kind | int(entry["mode"], 8),
        entry["uid"],
        entry["gid"],
        entry.get("size", 0),
        entry["mtime"],
        os.makedev(int(major), int(minor)),
        os.fsencode(entry.get("target", "")),
        xattrs,
    )


def _child(entry: Entry, name: bytes, kind: int, xattrs: dict[bytes, bytes]) -> int:
    """What the directory it is in says of an object."""
    marked = not entry.get("size") and not xattrs.keys().isdisjoint(fmt.WHITEOUT_NAMES)
    if entry.get("device") == "0:0" if kind != stat.S_IFREG else marked:
        return treeindex.WHITEOUT
    return DT_UNKNOWN if fmt.is_reserved(name) else dt_type(kind)
