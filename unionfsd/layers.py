"""Layers: the directories a union is made of, opened once and reached only beneath their roots.

Rules this file obeys:

- Nothing here resolves a path inside a layer: a directory of a lower is a chain of single names (`LowerDir`).
- A `LayerStack` is a value. `opening` makes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Callable, Iterator
from itertools import chain

from . import format as fmt
from . import remote, syscalls
from .fdcache import FdCache, Holder
from .inuse import unlock
from .syscalls import Fd
from .treeindex import TreeIndex
from .typed import Final, NamedTuple, Protocol, TypeAlias

_NAMES: Final = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
"""What os.fsencode looks up for each name."""
_INO_BITS: Final = 56
#: 2**64 divided by the golden ratio (Knuth, TAOCP 6.4, multiplicative hashing).
_SPREAD: Final = 0x9E3779B97F4A7C15


class DirEntry(Protocol):
    """What is used of an os.DirEntry but its name, which is of type str where a descriptor was read."""

    def inode(self) -> int: ...
    def is_dir(self, *, follow_symlinks: bool = ...) -> bool: ...
    def is_file(self, *, follow_symlinks: bool = ...) -> bool: ...
    def is_symlink(self) -> bool: ...


Scanned: TypeAlias = tuple[bytes, DirEntry]
"""An entry of a directory and its name."""


class Layer:
    """One directory of the stack: `root` is an O_PATH fd, `path` what the user called it, `dev` its st_dev."""

    __slots__ = (
        "_uuid",
        "dev",
        "idmapped",
        "noatime",
        "override",
        "path",
        "root",
        "root_dir",
        "system",
        "tree",
        "writable",
    )

    def __init__(self, path: bytes, root: Fd, *, writable: bool, noatime: bool) -> None:
        self.path = path
        self.root = root if writable else remote.layer_root(root)
        #: What it waits for, a lower whose file system does for somebody else.
        self.system = remote.system_of(self.root)
        root = self.root
        self.dev = os.fstat(root.fd).st_dev
        self.writable = writable
        self.noatime = noatime
        self.root_dir = (LowerDir if self.system is None else RemoteDir)(self, None, b"")
        #: Whether the kernel maps the ids of its mount already; looked at only where ids are mapped at all.
        self.idmapped = False
        #: How it keeps owners and modes; None: as its file system does.
        self.override = _override_form(root.fd)
        #: What it must hold, where that is checked.
        self.tree: TreeIndex | None = None
        self._uuid: bytes | None = None
        if self.system is not None:
            _ = self.uuid  # now that it answers: whether something is of this layer is asked of others, too

    @property
    def uuid(self) -> bytes:
        """UUID of the file system, 16 bytes, all zero where the kernel does not tell."""
        if self._uuid is None:
            try:
                with syscalls.reopen(self.root.fd, os.O_RDONLY | os.O_DIRECTORY) as fd:
                    self._uuid = fs_uuid(fd.fd)
            except OSError:
                self._uuid = bytes(16)
        return self._uuid

    def stat_handle(self, kind: int, handle: bytes) -> os.stat_result | None:
        """fstat of what a file handle means in the layer's file system; None when it means nothing here or to us."""
        try:
            with (
                syscalls.reopen(self.root.fd, os.O_RDONLY | os.O_DIRECTORY) as mount,
                syscalls.open_by_handle(mount.fd, kind, handle) as fd,
            ):
                return syscalls.fstat(fd.fd)
        except OSError:
            return None

    def open_data(self, dirfd: int, name: bytes, *, write: bool = False) -> Fd:
        """fd for the data of the regular file `name`; EIO when something else has taken its place.

        One whose data is elsewhere (metacopy) has a hole there: see `read_data_marks`.
        """
        fd = self._open(dirfd, name, os.O_RDWR if write else os.O_RDONLY)
        if not stat.S_ISREG(syscalls.fstat(fd.fd).st_mode):
            raise OSError(errno.EIO, "layer changed underneath: not a regular file", os.fsdecode(name))
        return fd

    def _open(self, dirfd: int, name: bytes, flags: int) -> Fd:
        if not (self.noatime or self.writable):
            try:
                return syscalls.open_data(dirfd, name, flags | os.O_NOATIME)
            except PermissionError:
                pass  # only the owner may ask for O_NOATIME
        return syscalls.open_data(dirfd, name, flags)

    def scan(self, fd: int) -> Iterator[Scanned]:
        """Entries of the directory that the O_PATH `fd` refers to, without "." and ".."."""
        if self.system is not None:
            entries, known = remote.ask(self._scanned, fd)
            if isinstance(fd, remote.Number):
                fd.keep(known)
            yield from entries
        else:
            yield from self._scan(fd)

    def _scan(self, fd: int) -> Iterator[Scanned]:
        if self.noatime or self.writable:
            with os.scandir(syscalls.proc_path(fd)) as entries:
                yield from ((entry.name, entry) for entry in entries)
            return
        flags = os.O_RDONLY | os.O_DIRECTORY
        try:
            reading = syscalls.reopen(fd, flags | os.O_NOATIME)
        except PermissionError:
            reading = syscalls.reopen(fd, flags)
        with reading, os.scandir(reading.fd) as unnamed:
            yield from ((entry.name.encode(*_NAMES), entry) for entry in unnamed)

    def _scanned(self, fd: int) -> tuple[list[Scanned], remote.Known]:
        """All of them, their types asked for where the directory does not tell, and what is known of them."""
        entries = list(self._scan(fd))
        for _, entry in entries:
            with contextlib.suppress(OSError):
                entry.is_symlink()
        return entries, remote.foresee(fd, chain.from_iterable(map(_next_questions, entries)))

    def __repr__(self) -> str:
        return f"Layer({os.fsdecode(self.path)!r})"


def _override_form(root: int) -> fmt.OverrideForm | None:
    present = xattr_names(root)
    return next((form for form in fmt.OVERRIDE_FORMS if form.name in present), None)


class LowerDir(Holder):
    """A directory of a lower: `name` in `parent`, which is None for the layer's root. Immutable but for its open fd."""

    __slots__ = ("_marks", "layer", "name", "parent")

    def __init__(self, layer: Layer, parent: LowerDir | None, name: bytes) -> None:
        super().__init__()
        self.layer = layer
        self.parent = parent
        self.name = name
        self._marks: fmt.Marks | None = None

    def open(self, fds: FdCache) -> int:
        """The number of its O_PATH fd, good until the next call that opens one."""
        if self.fd is not None:
            self.hot += 1
            return self.fd.fd
        missing: list[LowerDir] = []
        at: LowerDir = self
        while at.fd is None and at.parent is not None:
            missing.append(at)
            at = at.parent
        number = at.layer.root.fd if at.fd is None else at.fd.fd
        for step in reversed(missing):
            number = fds.admit(step, syscalls.open_dir(number, step.name))
        return number

    def marks(self, fds: FdCache) -> fmt.Marks:
        """Whether it is opaque, in any form, and whether it may hold xattr whiteouts."""
        if self._marks is None:
            self._marks = read_marks(self.open(fds))
        return self._marks

    def stat(self, fds: FdCache) -> os.stat_result:
        return syscalls.fstat(self.open(fds))

    def doubt(self, fds: FdCache) -> None:
        """Forget what is known of the names in it."""

    def child(self, name: bytes) -> LowerDir:
        return LowerDir(self.layer, self, name)

    def components(self) -> tuple[bytes, ...]:
        """Its path from the layer's root."""
        names: list[bytes] = []
        at: LowerDir = self
        while at.parent is not None:
            names.append(at.name)
            at = at.parent
        return tuple(reversed(names))

    def __repr__(self) -> str:
        return f"LowerDir({os.fsdecode(self.layer.path)!r}, {b'/'.join(self.components())!r})"


class RemoteDir(LowerDir):
    """One of a layer that waits for somebody else: what was known when its parent was listed need not be asked."""

    __slots__ = ()

    def marks(self, fds: FdCache) -> fmt.Marks:
        if self._marks is None and self.parent is not None:
            self._marks = remote.ask(_marks_of, self.parent.open(fds), self.name)
        return super().marks(fds)

    def stat(self, fds: FdCache) -> os.stat_result:
        return super().stat(fds) if self.parent is None else syscalls.stat_at(self.parent.open(fds), self.name)

    def doubt(self, fds: FdCache) -> None:
        number = self.open(fds)
        if isinstance(number, remote.Number):
            number.forget()

    def child(self, name: bytes) -> LowerDir:
        return RemoteDir(self.layer, self, name)


def _marks_of(dirfd: int, name: bytes) -> fmt.Marks:
    with syscalls.open_dir(dirfd, name) as fd:
        return read_marks(fd.fd)


def _next_questions(scanned: Scanned) -> Iterator[tuple[Callable[..., object], bytes]]:
    name, entry = scanned
    yield from remote.about(name)
    if entry.is_dir(follow_symlinks=False):
        yield _marks_of, name


def read_marks(dirfd: int) -> fmt.Marks:
    """Marks of the directory `dirfd` (O_PATH), from its xattrs and from ``.wh..wh..opq``."""
    present = set(xattr_names(dirfd))
    values = [syscalls.getxattr(dirfd, name) for name in fmt.OPAQUE_NAMES if name in present]
    marks = fmt.marks(values) if values else fmt.NO_MARKS
    redirect = next((name for name in fmt.REDIRECT_NAMES if name in present), None)
    if redirect is not None:
        marks = marks._replace(redirect=fmt.decode_redirect(syscalls.getxattr(dirfd, redirect)))
    if not marks.opaque and exists(dirfd, fmt.WH_OPAQUE):
        marks = marks._replace(opaque=True)
    return marks


def optional_xattr(fd: int, name: bytes) -> bytes | None:
    """Value of an xattr of the object `fd` (O_PATH allowed), None when it has none or its file system keeps none."""
    try:
        return syscalls.getxattr(fd, name)
    except OSError as exc:
        if exc.errno in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM):
            return None
        raise


def xattr_names(fd: int) -> list[bytes]:
    """Names of the xattrs of the object `fd` (O_PATH allowed); none where its file system keeps none."""
    try:
        return syscalls.listxattr(fd)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return []
        raise


def has_any_xattr(dirfd: int, name: bytes, xattrs: tuple[bytes, ...]) -> bool:
    """Whether `name` beneath `dirfd` has one of `xattrs`.

    Most objects have none at all, and then to list them costs half of what the error of a missing one does.
    """
    try:
        names = syscalls.listxattr_at(dirfd, name)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return False
        raise
    return any(os.fsdecode(xattr) in names for xattr in xattrs) if names else False


class DataMarks(NamedTuple):
    """What a file says that has no data of its own: the digest of that data, and what it is called in layers below."""

    digest: fmt.Digest | None
    redirect: fmt.Redirect | None


def read_data_marks(fd: int) -> DataMarks | None:
    """Marks of the regular file `fd` (O_PATH allowed); None when it has its data itself. EIO, EINVAL for bad ones."""
    present = xattr_names(fd)
    metacopy = next((name for name in fmt.METACOPY_NAMES if name in present), None)
    if metacopy is None:
        return None
    redirect = next((name for name in fmt.REDIRECT_NAMES if name in present), None)
    return DataMarks(
        fmt.decode_metacopy(syscalls.getxattr(fd, metacopy)),
        None if redirect is None else fmt.decode_redirect(syscalls.getxattr(fd, redirect)),
    )


def exists(dirfd: int, name: bytes) -> bool:
    """Whether `name` is in the directory `dirfd`; a name too long for the file system is not."""
    try:
        return syscalls.stat_or_none(dirfd, name) is not None
    except OSError as exc:
        if exc.errno != errno.ENAMETOOLONG:
            raise
        return False


def is_xattr_whiteout(dirfd: int, name: bytes) -> bool:
    """Whether the empty regular file `name` bears the whiteout xattr."""
    with syscalls.open_object(dirfd, name) as fd:
        return any(optional_xattr(fd.fd, attr) is not None for attr in fmt.WHITEOUT_NAMES)


_FS_IOC_GETFSUUID: Final = 0x80111500


def fs_uuid(fd: int) -> bytes:
    """The 16 bytes of the UUID of the file system of `fd` (readable); ENOTTY before Linux 6.9 or where it has none."""
    buf = bytearray(17)
    fcntl.ioctl(fd, _FS_IOC_GETFSUUID, buf)
    if buf[0] != 16:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
    return bytes(buf[1:17])


def _fold(ino: int) -> int:
    """`ino` in `_INO_BITS` bits; large ones, such as those of a union below, are spread so that they do not meet."""
    return (ino * _SPREAD % 2**64) >> (64 - _INO_BITS) if ino >> _INO_BITS else ino


class LayerStack:
    """The layers of one mount: `lowers` top first, `upper` and `work` None when nothing can be written.

    `data`: lowers that show nothing, and have data of files above them, top first.
    """

    def __init__(
        self,
        lowers: tuple[Layer, ...],
        upper: Layer | None,
        work: Fd | None,
        locks: tuple[Fd, ...],
        data: tuple[Layer, ...] = (),
    ) -> None:
        self.lowers = lowers
        self.data = data
        self.upper = upper
        self.work = work
        self.locks = locks
        #: Whether a layer keeps owners in xattrs.
        self.overrides = False
        self._fsids: dict[int, int] = {}
        for layer in (upper, *lowers):
            if layer is not None:
                self._fsid(layer.dev)
                self.overrides |= layer.override is not None

    @property
    def top(self) -> Layer:
        return self.upper or self.lowers[0]

    @property
    def is_remote(self) -> bool:
        """Whether a lower waits for somebody else."""
        return any(layer.system is not None for layer in (*self.lowers, *self.data))

    def _fsid(self, dev: int) -> int:
        return self._fsids.setdefault(dev, len(self._fsids) & 0x7F)

    def ino(self, st: os.stat_result) -> int:
        """The inode number that the mount shows for an object of a layer: unique over the layers' file systems.

        The top byte tells the file systems apart, as the high bits of xino do (ovl.rst, "Inode properties"); the first
        file system keeps its numbers as they are.
        """
        return self._fsid(st.st_dev) << _INO_BITS | _fold(st.st_ino)

    def entry_inos(self, layer: Layer) -> Callable[[int], int]:
        """The same from directory entries of `layer`, whose file system is taken to be that of the layer's root."""
        prefix = self._fsid(layer.dev) << _INO_BITS
        return lambda ino: prefix | _fold(ino) if ino >> _INO_BITS else prefix | ino

    def find_origin(self, origin: fmt.Origin) -> os.stat_result | None:
        """The object that `origin` means, wherever in a lower; None without CAP_DAC_READ_SEARCH, or when it is gone."""
        for layer in self.lowers:
            if layer.uuid == origin.uuid:
                st = layer.stat_handle(origin.kind, origin.handle)
                if st is not None:
                    return st
        return None

    def find_data(self, names: tuple[bytes, ...], fds: FdCache) -> tuple[LowerDir, bytes] | None:
        """The regular file `names` in the topmost data-only layer that has something there."""
        for layer in self.data:
            at = layer.root_dir
            for name in names[:-1]:
                at = at.child(name)
            try:
                st = syscalls.stat_at(at.open(fds), names[-1])
            except (FileNotFoundError, NotADirectoryError):
                continue
            return (at, names[-1]) if stat.S_ISREG(st.st_mode) else None
        return None

    def unlock(self) -> None:
        """Give up the locks on upper and work: from now on another mount may have them."""
        for held in self.locks:
            unlock(held)

    def close(self) -> None:
        """Close every descriptor; the locks on upper and work go with them."""
        for layer in (self.upper, *self.lowers, *self.data):
            if layer is not None:
                layer.root.close()
        if self.work is not None:
            self.work.close()
        self.unlock()
