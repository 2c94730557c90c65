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
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from unionfsd import syscalls
from unionfsd.images import beneath
from unionfsd.syscalls import Fd

_TYPES: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


class Difference(NamedTuple):
    """An object that is not what it was: `what` is "added", "missing", or the members that differ."""

    path: str
    what: str


def lines(root: Fd, digests: Mapping[int, bytes] | None = None) -> Iterator[bytes]:
    """The manifest of the tree `root`. `digests` are of files by inode number; files not in it are read."""
    yield _line("", root, os.fstat(root.fd), digests)
    for path, directory, name, st in beneath.walk(root):
        with syscalls.open_object(directory.fd, name) as fd:
            yield _line(os.fsdecode(b"/".join(path)), fd, st, digests)


def _line(path: str, fd: Fd, st: os.stat_result, digests: Mapping[int, bytes] | None) -> bytes:
    kind = stat.S_IFMT(st.st_mode)
    entry: dict[str, Any] = {
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
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


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
        entry = json.loads(line)
        path = os.fsencode(entry["path"])
        yield (tuple(path.split(b"/")) if path else ()), entry
