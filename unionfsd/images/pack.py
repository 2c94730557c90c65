"""Directories as the tar of a layer: sorted, without what differs from one writing to the next (image-spec, layer.md).

Rules this file obeys:

- The same tree gives the same bytes: names in order, no access times, no names of users, nothing of the machine.
- Of an upper, what it changes becomes entries, what it hides becomes explicit whiteouts before their siblings; the time
  is proportional to the upper, and to the lower directories that it makes opaque.
- What a layer cannot say is refused: a redirected directory, a metacopy, a file that the index keeps. A socket is left
  out as tar does.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from unionfsd import format as fmt
from unionfsd import syscalls
from unionfsd.errors import UserError
from unionfsd.images import beneath, tarwrite
from unionfsd.images.below import Below, has_xattr, is_opaque, is_whiteout
from unionfsd.images.beneath import Path
from unionfsd.images.tarread import HARD_LINK, Member
from unionfsd.syscalls import Fd


def directory(root: Fd) -> Iterator[bytes]:
    """The tar of a whole tree, in pieces."""
    return _Packer(root, None, None).pieces()


def upper(root: Fd, below: Below, *, newest: int | None = None) -> Iterator[bytes]:
    """The tar of what the upper `root` changes of `below`. No time in it is later than `newest`, in ns."""
    return _Packer(root, below, newest).pieces()


class _Packer:
    def __init__(self, root: Fd, below: Below | None, newest: int | None) -> None:
        self._root = root
        self._below = below
        self._newest = newest
        #: The opaque directory that the walk is in, or was in last.
        self._opaque: Path | None = None
        self._links: dict[tuple[int, int], bytes] = {}

    def pieces(self) -> Iterator[bytes]:
        yield from self._top()
        if self._below is not None:
            yield from self._hidden((), self._root)
        for path, parent, name, st in beneath.walk(self._root):
            if (fmt.is_reserved(name) and self._below is not None) or stat.S_ISSOCK(st.st_mode):
                continue
            if self._below is not None and is_whiteout(parent, name, st):
                continue
            with syscalls.open_object(parent.fd, name) as fd:
                yield from self._entry(path, fd, st)
                if self._below is not None and stat.S_ISDIR(st.st_mode):
                    yield from self._hidden(path, fd)
        yield tarwrite.END

    def _top(self) -> Iterator[bytes]:
        """The root, unless it is as it is below."""
        st = os.stat(self._root.fd)
        if self._below is not None:
            lower = [os.stat(fd.fd) for fd in self._below.directory(())[:1]]
            if [(had.st_mode, had.st_uid, had.st_gid) for had in lower] == [(st.st_mode, st.st_uid, st.st_gid)]:
                return
        yield tarwrite.header(self._member(b"./", stat.S_IFDIR, st, b"", _xattrs(self._root)))

    def _entry(self, path: Path, fd: Fd, st: os.stat_result) -> Iterator[bytes]:
        name = b"/".join(path)
        if fmt.is_reserved(path[-1]):
            raise UserError(f"{os.fsdecode(name)}: no image can hold a file of this name")
        self._refuse_marks(name, fd, st)
        first = self._links.setdefault((st.st_dev, st.st_ino), name) if st.st_nlink > 1 else name
        kind = stat.S_IFMT(st.st_mode)
        if first != name and kind != stat.S_IFDIR:
            yield tarwrite.header(self._member(name, HARD_LINK, st, first, {}))
            return
        target = syscalls.readlink(fd.fd) if kind == stat.S_IFLNK else b""
        yield tarwrite.header(self._member(name, kind, st, target, _xattrs(fd)))
        if kind == stat.S_IFREG:
            yield from _content(fd, st.st_size, name)

    def _member(self, name: bytes, kind: int, st: os.stat_result, target: bytes, xattrs: dict[bytes, bytes]) -> Member:
        size = st.st_size if kind == stat.S_IFREG else 0
        mtime = st.st_mtime_ns if self._newest is None else min(st.st_mtime_ns, self._newest)
        device = kind in (stat.S_IFCHR, stat.S_IFBLK)
        rdev = (os.major(st.st_rdev), os.minor(st.st_rdev)) if device else (0, 0)
        mode = stat.S_IMODE(st.st_mode)
        return Member(name, kind, mode, st.st_uid, st.st_gid, size, mtime, target, rdev, xattrs, size)

    @staticmethod
    def _refuse_marks(name: bytes, fd: Fd, st: os.stat_result) -> None:
        shown = os.fsdecode(name)
        if stat.S_ISDIR(st.st_mode):
            if any(has_xattr(fd, mark) for mark in fmt.REDIRECT_NAMES):
                raise UserError(f"{shown}: a renamed directory of a lower, which a layer cannot say", hint=_HINT)
        elif stat.S_ISREG(st.st_mode) and any(has_xattr(fd, mark) for mark in fmt.METACOPY_NAMES):
            raise UserError(f"{shown}: metadata without data, which a layer cannot say", hint=_HINT)
        elif any(has_xattr(fd, mark) for mark in fmt.NLINK_NAMES):
            raise UserError(f"{shown}: one of several names of a lower, which a layer cannot say", hint=_HINT)

    def _is_opaque(self, path: Path, fd: Fd) -> bool:
        """Whether a directory hides those below: it says so, or one that it lies in does."""
        inside = self._opaque is not None and path[: len(self._opaque)] == self._opaque
        if not inside and is_opaque(fd):
            self._opaque = path
            inside = True
        return inside

    def _hidden(self, path: Path, fd: Fd) -> Iterator[bytes]:
        """The whiteouts of a directory: those that stand in it, and for an opaque one all that is hidden by that."""
        assert self._below is not None
        present = beneath.names(fd.fd)
        hidden = {target for name in present if (target := fmt.wh_target(name)) is not None}
        for name in present:
            st = syscalls.stat_at(fd.fd, name)
            if is_whiteout(fd, name, st):
                hidden.add(name)
        if self._is_opaque(path, fd):
            hidden |= self._below.listing(path) - set(present)
        for name in sorted(hidden):
            if self._below.find((*path, name)) is not None:
                whiteout = b"/".join((*path, fmt.wh_name(name)))
                yield tarwrite.header(Member(whiteout, stat.S_IFREG, 0, 0, 0, 0, 0, b"", (0, 0), {}, 0))


_HINT = "mount it with redirect_dir=off and index=off, as containers of unionfsctl image are"


def _xattrs(fd: Fd) -> dict[bytes, bytes]:
    """What a user of the mount would see."""
    return {
        fmt.unescape(name): syscalls.getxattr(fd.fd, name)
        for name in syscalls.listxattr(fd.fd)
        if not fmt.is_internal(name)
    }


def _content(fd: Fd, size: int, name: bytes) -> Iterator[bytes]:
    left = size
    with syscalls.reopen(fd.fd, os.O_RDONLY) as data:
        while left > 0 and (piece := os.read(data.fd, min(left, 1 << 20))):
            left -= len(piece)
            yield piece
    if left:
        raise UserError(f"{os.fsdecode(name)}: shrank while it was read")
    yield tarwrite.padding(size)
