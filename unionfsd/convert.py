"""Between the forms that marks can have: an upper of one form made one of another.

Rules this file obeys:

- Nobody has the upper mounted; it is locked. Lowers are not touched.
- One entry at a time, and at each moment the view is the same: the new mark is there before the old one goes, or
  takes its place in one call. What a crash leaves is an upper of both forms, which is a valid one;
  converting again ends it.
- What has no place in the new form stays as it is, and is reported.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator

from . import format as fmt
from . import syscalls
from .doctor import Directory, Walk, Whiteout, bears_whiteout, join, whiteout_of
from .layers import LayerStack, exists, xattr_names
from .syscalls import stat_or_none
from .typed import Final, Literal, NamedTuple

Form = Literal["kernel", "user", "fuse-overlayfs"]
FORMS: Final[tuple[Form, ...]] = ("kernel", "user", "fuse-overlayfs")

_NAMESPACE: Final[dict[Form, bytes]] = {"kernel": fmt.TRUSTED, "user": fmt.USER}
#: Where a whiteout is made before it takes another's place: hidden from every mount, like all names of aufs's own.
_STAGED: Final = fmt.WH + fmt.WH + b"unionfsd"
#: What cannot be said without xattrs.
_UNSAYABLE: Final = (*fmt.REDIRECT_NAMES, *fmt.METACOPY_NAMES)


class Step(NamedTuple):
    """One conversion: `what` is to be done to the entry `path`; `error` why it was not."""

    path: bytes
    what: str
    error: str | None = None


_Do = Callable[[], None]


def convert(stack: LayerStack, form: Form, *, apply: bool) -> Iterator[Step]:
    """What it takes to make the upper of `stack` one of `form`, done entry by entry if `apply`."""
    change = _Change(form)
    for directory in Walk(stack).run():
        times = os.fstat(directory.fd)
        done = False
        for path, what, do in change.directory(directory):
            step = _perform(path, what, do) if apply else Step(path, what)
            done |= apply and step.error is None
            yield step
        if done:
            syscalls.utimens(directory.fd, times.st_atime_ns, times.st_mtime_ns)


def _perform(path: bytes, what: str, do: _Do) -> Step:
    try:
        do()
    except OSError as exc:
        return Step(path, what, exc.strerror)
    return Step(path, what)


class _Change:
    def __init__(self, form: Form) -> None:
        self._form = form
        self._target = _NAMESPACE.get(form)

    def directory(self, at: Directory) -> Iterator[tuple[bytes, str, _Do]]:
        """The changes to a directory and what it holds, its subdirectories' own left out."""
        if at.marks.opaque:
            yield from self._opaque(at)
        for name in at.names:
            st = stat_or_none(at.fd, name)
            if st is None:
                continue
            whiteout = whiteout_of(at, name, st)
            if whiteout is not None:
                yield from self._whiteout(at, name, whiteout)
            elif not fmt.is_reserved(name) and not stat.S_ISDIR(st.st_mode):
                yield from self._marks(at, name, join(at.path, name))
        yield from self._marks(at, b"", at.path)
        if at.marks.xwhiteouts and not at.marks.opaque:
            yield at.path, "drop the mark of xattr whiteouts", lambda: _drop_xwhiteouts(at)

    # Whiteouts.

    def _whiteout(self, at: Directory, name: bytes, whiteout: Whiteout) -> Iterator[tuple[bytes, str, _Do]]:
        path = join(at.path, name)
        wanted = "chardev" if self._target is not None else "wh"
        if at.marks.opaque and not (whiteout.form == "wh" and exists(at.fd, whiteout.name)):
            yield path, "remove a whiteout from an opaque directory", lambda: syscalls.unlink_at(at.fd, name)
        elif whiteout.form == wanted:
            return
        elif wanted == "wh":
            yield path, f"{whiteout.form} whiteout to .wh.", lambda: _to_wh(at.fd, name)
        elif whiteout.form == "wh" and exists(at.fd, whiteout.name):
            yield path, ".wh. whiteout beside its entry to an opaque mark", lambda: self._beside(at.fd, name, whiteout)
        else:
            yield path, f"{whiteout.form} whiteout to a device node", lambda: _to_device(at.fd, name, whiteout)

    def _beside(self, fd: int, name: bytes, whiteout: Whiteout) -> None:
        assert self._target is not None
        with syscalls.open_object(fd, whiteout.name) as beside:
            if stat.S_ISDIR(os.fstat(beside.fd).st_mode):
                syscalls.setxattr(beside.fd, self._target + fmt.OPAQUE, fmt.OPAQUE_YES)
        syscalls.unlink_at(fd, name)

    # Opaque directories.

    def _opaque(self, at: Directory) -> Iterator[tuple[bytes, str, _Do]]:
        present = set(xattr_names(at.fd))
        own = None if self._target is None else self._target + fmt.OPAQUE
        others = [name for name in fmt.OPAQUE_NAMES if name in present and name != own]
        marked = exists(at.fd, fmt.WH_OPAQUE)
        if own is None:
            if others or not marked:
                yield at.path, "opaque mark to .wh..wh..opq", lambda: _opaque_to_wh(at.fd, others, marked=marked)
        elif others or marked or own not in present:
            yield at.path, f"opaque mark to {os.fsdecode(own)}", lambda: _opaque_to_xattr(at.fd, own, others, marked)

    # Other marks.

    def _marks(self, at: Directory, name: bytes, path: bytes) -> Iterator[tuple[bytes, str, _Do]]:
        """Marks in the other namespace; without a namespace of its own the form has none."""
        with syscalls.open_object(at.fd, name) if name else syscalls.reopen(at.fd, os.O_PATH) as fd:
            names = xattr_names(fd.fd)
        for attr in names:
            suffix = _suffix(attr)
            if suffix is None or suffix == fmt.OPAQUE or (name and suffix == fmt.WHITEOUT and bears_whiteout(at, name)):
                continue
            if self._target is None:
                if attr in _UNSAYABLE:
                    yield path, f"drop {os.fsdecode(attr)}", _unsayable
            elif not attr.startswith(self._target):
                new = self._target + suffix
                yield path, f"{os.fsdecode(attr)} to {os.fsdecode(new)}", _on(at.fd, name, _mover(attr, new))


def _suffix(attr: bytes) -> bytes | None:
    """What a mark of the format is called without its namespace; None for other attributes."""
    for namespace in (fmt.TRUSTED, fmt.USER):
        if attr.startswith(namespace) and fmt.is_internal(attr):
            return attr[len(namespace) :]
    return None


def _unsayable() -> None:
    raise OSError(errno.EOPNOTSUPP, "there is no such mark in the new form, and without it data would be missing")


def _on(dirfd: int, name: bytes, do: Callable[[int], None]) -> _Do:
    def call() -> None:
        with syscalls.open_object(dirfd, name) if name else syscalls.reopen(dirfd, os.O_PATH) as fd:
            do(fd.fd)

    return call


def _mover(attr: bytes, new: bytes) -> Callable[[int], None]:
    def move(fd: int) -> None:
        syscalls.setxattr(fd, new, syscalls.getxattr(fd, attr))
        syscalls.removexattr(fd, attr)

    return move


def _to_wh(fd: int, name: bytes) -> None:
    if not exists(fd, fmt.wh_name(name)):
        syscalls.create_at(fd, fmt.wh_name(name), 0o600).close()
    syscalls.unlink_at(fd, name)


def _to_device(fd: int, name: bytes, whiteout: Whiteout) -> None:
    if whiteout.form == "wh":
        syscalls.mknod_at(fd, whiteout.name, stat.S_IFCHR, os.makedev(0, 0))
        syscalls.unlink_at(fd, name)
        return
    if exists(fd, _STAGED):
        syscalls.unlink_at(fd, _STAGED)
    syscalls.mknod_at(fd, _STAGED, stat.S_IFCHR, os.makedev(0, 0))
    syscalls.renameat2(fd, _STAGED, fd, name)


def _drop_xwhiteouts(at: Directory) -> None:
    for name in at.names:
        st = stat_or_none(at.fd, name)
        if st is not None and whiteout_of(at, name, st) is not None and stat.S_ISREG(st.st_mode):
            raise OSError(errno.EBUSY, "whiteouts that need it are left")
    for name in set(xattr_names(at.fd)).intersection(fmt.OPAQUE_NAMES):
        syscalls.removexattr(at.fd, name)


def _opaque_to_wh(fd: int, others: list[bytes], *, marked: bool) -> None:
    if not marked:
        syscalls.create_at(fd, fmt.WH_OPAQUE, 0o600).close()
    for name in others:
        syscalls.removexattr(fd, name)


def _opaque_to_xattr(fd: int, own: bytes, others: list[bytes], marked: bool) -> None:
    syscalls.setxattr(fd, own, fmt.OPAQUE_YES)
    for name in others:
        syscalls.removexattr(fd, name)
    if marked:
        syscalls.unlink_at(fd, fmt.WH_OPAQUE)
