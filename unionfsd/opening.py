"""Opening the layers of a mount: locked, looked over, and refused before anything is written if they make no union.

A lower is opened, where the kernel allows, as a private read-only noatime copy of its mount: the kernel itself then
refuses any change to it, and no read moves its access times. Elsewhere it is opened plainly and O_NOATIME is tried.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from . import syscalls, treeindex
from .errors import LAYER, UserError
from .inuse import lock, refuse_kernel_mount
from .layers import Layer, LayerStack
from .logger import get_logger
from .options import MountConfig
from .syscalls import Fd

log = get_logger(__name__)


def open_stack(config: MountConfig) -> LayerStack:
    """Open the layers that `config` names, lock upper and work, and refuse what cannot be a union (UserError)."""
    check_overlap(config)
    with contextlib.ExitStack() as opened:
        lowers = tuple(_open_lower(path, config.mountpoint, opened) for path in config.lowerdirs)
        data = tuple(_open_lower(path, config.mountpoint, opened) for path in config.datadirs)
        for layer, file in zip((*lowers, *data), config.verify, strict=bool(config.verify)):
            layer.tree = None if file is None else treeindex.read(file.path, file.digest)
        if config.upperdir is None:
            stack = LayerStack(lowers, None, None, (), data)
        elif config.workdir is None:
            raise UserError("upperdir without workdir", hint="give -o workdir=DIR, on the upper's file system")
        else:
            upper, work, locks = _open_writable(config.upperdir, config.workdir, config.mountpoint, opened)
            stack = LayerStack(lowers, upper, work, locks, data)
        opened.pop_all()
        return stack


def open_idle(upper: bytes, lowers: tuple[bytes, ...], work: bytes | None, data: tuple[bytes, ...] = ()) -> LayerStack:
    """Open layers to look at them, and lock the upper: UserError for one that a mount has, or that is no directory."""
    with contextlib.ExitStack() as opened:
        st = _directory(upper, "upper")
        lock = _locked(upper, "upper", opened)
        refuse_kernel_mount(upper, st)
        top = Layer(upper, opened.enter_context(_open_root(upper, "upper")), writable=True, noatime=False)
        below, beside = (tuple(_open_lower(path, b"/", opened) for path in paths) for paths in (lowers, data))
        root = None if work is None else opened.enter_context(_open_root(work, "work"))
        stack = LayerStack(below, top, root, (lock,), beside)
        opened.pop_all()
        return stack


def _directory(path: bytes, what: str) -> os.stat_result:
    try:
        st = os.stat(path)
    except OSError as exc:
        raise UserError(f"{what} {_show(path)}: {exc.strerror}", hint="name an existing directory", code=LAYER) from exc
    if not stat.S_ISDIR(st.st_mode):
        raise UserError(f"{what} {_show(path)}: not a directory", hint="a layer is a directory", code=LAYER)
    return st


def _show(path: bytes) -> str:
    return os.fsdecode(path)


def _open_lower(path: bytes, mountpoint: bytes, opened: contextlib.ExitStack) -> Layer:
    _directory(path, "lowerdir")
    try:
        clone = syscalls.clone_mount(path, syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOATIME)
        root = opened.enter_context(clone)
        return Layer(path, root, writable=False, noatime=True)
    except OSError as exc:
        log.debug("lowerdir %s: no private mount (%s), opened plainly", _show(path), exc.strerror)
    if _inside(mountpoint, path):
        raise UserError(
            f"mountpoint {_show(mountpoint)} is inside lowerdir {_show(path)}",
            hint="mount elsewhere; only a privileged mount can lie inside its own layer",
            code=LAYER,
        )
    return Layer(path, opened.enter_context(_open_root(path, "lowerdir")), writable=False, noatime=False)


def _open_root(path: bytes, what: str, flags: int = os.O_PATH) -> Fd:
    try:
        return Fd(os.open(path, flags | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as exc:
        raise UserError(f"{what} {_show(path)}: {exc.strerror}", code=LAYER) from exc


def _open_writable(
    upper: bytes, work: bytes, mountpoint: bytes, opened: contextlib.ExitStack
) -> tuple[Layer, Fd, tuple[Fd, ...]]:
    """The upper, the work directory, and the locks on both."""
    upper_st, work_st = _directory(upper, "upperdir"), _directory(work, "workdir")
    _check_writable_pair(upper, upper_st, work, work_st, mountpoint)
    locks = (_locked(upper, "upperdir", opened), _locked(work, "workdir", opened))
    refuse_kernel_mount(upper, upper_st)
    roots = [opened.enter_context(_open_root(*root)) for root in ((upper, "upperdir"), (work, "workdir"))]
    return Layer(upper, roots[0], writable=True, noatime=False), roots[1], locks


def _check_writable_pair(
    upper: bytes, upper_st: os.stat_result, work: bytes, work_st: os.stat_result, mountpoint: bytes
) -> None:
    if upper_st.st_dev != work_st.st_dev:
        raise UserError(
            f"upperdir {_show(upper)} and workdir {_show(work)} are on different file systems",
            hint="put workdir next to upperdir",
            code=LAYER,
        )
    for path, what in ((upper, "upperdir"), (work, "workdir")):
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            raise UserError(
                f"{what} {_show(path)} is on a read-only file system",
                hint="give a writable one, or leave upperdir and workdir out for a read-only union",
                code=LAYER,
            )
        if _inside(mountpoint, path):
            raise UserError(
                f"mountpoint {_show(mountpoint)} is inside {what} {_show(path)}", hint="mount elsewhere", code=LAYER
            )


def _inside(path: bytes, directory: bytes) -> bool:
    """Whether `path` is strictly beneath `directory`, both resolved."""
    inner, outer = os.path.realpath(path), _real_path(directory)
    return inner != outer and inner.startswith(outer.rstrip(b"/") + b"/")


def _real_path(path: bytes) -> bytes:
    """The directory `path` without symlinks, as realpath(3) has it: the kernel tells, in a tenth of the time."""
    with Fd(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        found = os.readlink(syscalls.proc_path(fd.fd))
    return found if found.startswith(b"/") else os.path.realpath(path)  # "(unreachable)": it is beyond our root


def _locked(path: bytes, what: str, opened: contextlib.ExitStack) -> Fd:
    fd = opened.enter_context(_open_root(path, what, os.O_RDONLY))
    lock(fd, path, what)
    return fd


def check_overlap(config: MountConfig) -> None:
    """Refuse a layer that is, or lies inside, another one, as ovl_check_overlapping_layers does."""
    if not config.lowerdirs:
        raise UserError("no lowerdir given", hint="give -o lowerdir=DIR[:DIR...], top first")
    named = [("lowerdir", path) for path in config.lowerdirs]
    named += [("datadir", path) for path in config.datadirs]
    named += [("upperdir", config.upperdir)] if config.upperdir is not None else []
    named += [("workdir", config.workdir)] if config.workdir is not None else []
    roots: dict[tuple[int, int], tuple[str, bytes]] = {}
    for what, path in named:
        st = _directory(path, what)
        if other := roots.get((st.st_dev, st.st_ino)):
            raise _overlap(what, path, *other, "is the same directory as")
        roots[(st.st_dev, st.st_ino)] = (what, path)
    clear: set[bytes] = set()
    for what, path in named:
        for key in _ancestors(path, clear):
            if other := roots.get(key):
                raise _overlap(what, path, *other, "is inside")


def _ancestors(path: bytes, clear: set[bytes]) -> Iterator[tuple[int, int]]:
    """(device, inode) of the directories that `path` is in, up to one that is `clear`; what was passed is so."""
    at = _real_path(path)
    while at != b"/":
        at = os.path.dirname(at)
        if at in clear:
            return  # and with it all that it is in
        st = os.stat(at)
        yield st.st_dev, st.st_ino
        clear.add(at)


def _overlap(what: str, path: bytes, other_what: str, other: bytes, how: str) -> UserError:
    return UserError(
        f"{what} {_show(path)} {how} {other_what} {_show(other)}", hint="layers must not overlap", code=LAYER
    )
