"""Whether an upper belongs to the lowers that it is given with.

Rules this file obeys:

- Evidence is an origin that still means something in a file system of the lowers, and lies outside of all of them. What
  is gone, of another file system, or may not be asked for, proves nothing: layers are copied, restored and moved, and
  then go on being mounted. Nor do handles of file systems without a UUID, which may be others by now or, as those of
  FUSE, mean something else at every mount; but for ext4, whose handles are as good as random numbers.
- Nor does it prove anything when a lower that is given looks like a copy of what it means.
- What an upper is used with is recorded on its work directory, where nobody else looks, in the kernel's form for an
  index: `origin` is the root of the topmost lower, `upper` that of the upper (ovl_verify_set_fh). Uppers that others
  wrote have origins on the root, with index=on, and on merged directories.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from itertools import islice

from . import format as fmt
from . import mountinfo, syscalls
from .errors import LAYER, UserError
from .layers import Layer, LayerStack, optional_xattr
from .logger import get_logger
from .syscalls import Fd, stat_or_none
from .typed import Final, NamedTuple
from .workdir import Workdir

log = get_logger(__name__)

#: So many names of the upper's root are looked at, and so many origins among them.
_NAMES: Final = 64
_SAMPLES: Final = 8
#: File systems whose handles tell their objects from those of others without a UUID; their root is this one in each.
_NUMBERED: Final = (b"ext2", b"ext3", b"ext4")
_EXT_ROOT: Final = 2
#: So many entries of two directories, and bytes of two files, are compared to tell a copy.
_COMPARED: Final = 64
_BYTES: Final = 1 << 16


class Sample(NamedTuple):
    """An origin of the upper: of the entry `name` of its root or, with an empty name, of the root itself."""

    name: bytes
    origin: fmt.Origin


class Other(NamedTuple):
    """What an upper was used with that it is not given: a directory, for people; whether a lower looks like a copy."""

    path: bytes
    copied: bool


def other_lowers(stack: LayerStack) -> Other | None:
    """What the upper of `stack` was used with that is none of the lowers; None without proof of anything.

    Nothing is written. A `stack` without work: what is recorded there is not known.
    """
    assert stack.upper is not None
    if next(stack.upper.scan(stack.upper.root.fd), None) is None:
        return None  # emptied, or new
    places = Places(stack)
    other: Other | None = None
    for sample in _root_samples(stack):
        found = places.judge(sample)
        if found is not None and not found.copied:
            return found
        other = other or found
    for sample in islice(_samples(stack.upper), _SAMPLES):
        if places.has(sample):
            return other
        other = other or places.judge(sample)
    return other


def check(stack: LayerStack, *, rebase: bool) -> None:
    """UserError when the upper was used with other lowers, unless `rebase`: that is accepted. A warning for copies."""
    other = None if stack.upper is None else other_lowers(stack)
    if other is None or rebase:
        return
    assert stack.upper is not None
    message = (
        f"upperdir {os.fsdecode(stack.upper.path)} was used with {os.fsdecode(other.path)}, which is not in lowerdir "
        + ":".join(os.fsdecode(layer.path) for layer in stack.lowers)
    )
    if not other.copied:
        raise UserError(message, hint="mount it with that, or accept these with the option rebase", code=LAYER)
    log.warning("%s, but looks the same: taken for a copy", message)


def record(stack: LayerStack, work: Workdir) -> None:
    """Remember on the work directory what the upper is used with, unless that is known."""
    assert stack.upper is not None
    assert stack.work is not None
    if work.abilities.namespace is None or _recorded(stack):
        return
    try:
        marks = ((fmt.ORIGIN, stack.lowers[0], 0), (fmt.UPPER, stack.upper, fmt.ORIGIN_OF_UPPER))
        values = [(suffix, fmt.encode_origin(origin_of(layer), flags)) for suffix, layer, flags in marks]
        for suffix, value in values:
            work.mark(stack.work.fd, suffix, value)
    except (OSError, ValueError) as exc:
        log.debug("what the upper is used with is not recorded: %s", exc)


def _recorded(stack: LayerStack) -> bool:
    """Whether the work directory names one of the lowers, and this upper."""
    origin = _work_origin(stack)
    return origin is not None and any(origin == handle for _, handle in _root_handles(stack))


def origin_of(layer: Layer) -> fmt.Origin:
    """What an origin has that means the root of `layer`; OSError where its file system has no handles."""
    kind, handle = syscalls.file_handle(layer.root.fd, b"")
    return fmt.Origin(kind, handle, layer.uuid)


def read_origin(fd: int, names: tuple[bytes, ...] = fmt.ORIGIN_NAMES) -> fmt.Origin | None:
    """The origin in one of the xattrs `names` of the object `fd` (O_PATH allowed)."""
    values = (optional_xattr(fd, name) for name in names)
    return next((fmt.decode_origin(value) for value in values if value), None)


def _root_handles(stack: LayerStack) -> Iterator[tuple[Layer, fmt.Origin]]:
    for layer in (*stack.lowers, *stack.data):
        try:
            yield layer, origin_of(layer)
        except OSError:
            continue


def _work_origin(stack: LayerStack) -> fmt.Origin | None:
    """The topmost lower that the upper was mounted with last; None when that is not known, or of another upper."""
    assert stack.upper is not None
    if stack.work is None:
        return None
    upper = read_origin(stack.work.fd, fmt.UPPER_NAMES)
    try:
        return read_origin(stack.work.fd) if upper == origin_of(stack.upper) else None
    except OSError:
        return None


def _root_samples(stack: LayerStack) -> Iterator[Sample]:
    assert stack.upper is not None
    for origin in (_work_origin(stack), read_origin(stack.upper.root.fd)):
        if origin is not None:
            yield Sample(b"", origin)


def _samples(upper: Layer) -> Iterator[Sample]:
    """Those of directories in the root, which are merged with what they mean."""
    root = upper.root.fd
    if all(optional_xattr(root, name) is None for name in fmt.IMPURE_NAMES):
        return
    for name, entry in islice(upper.scan(root), _NAMES):
        if entry.is_dir(follow_symlinks=False):
            with syscalls.open_dir(root, name) as fd:
                origin = read_origin(fd.fd)
            if origin is not None:
                yield Sample(name, origin)


class Places:
    """Where origins lie, for the lowers of one stack."""

    def __init__(self, stack: LayerStack) -> None:
        self._layers = (*stack.lowers, *stack.data)
        self._roots = {_key(os.fstat(layer.root.fd)) for layer in self._layers}
        self._handles = {origin for _, origin in _root_handles(stack)}

    def judge(self, sample: Sample) -> Other | None:
        """The directory that the origin means, if that is known to be in no lower."""
        if sample.origin in self._handles:
            return None
        with self._opened(sample.origin) as fd:
            if not _is_dir(fd) or self._inside(fd.fd):
                return None
            path = os.readlink(syscalls.proc_path(fd.fd))
            return Other(path, any(self._is_copy(fd.fd, layer, sample.name) for layer in self._layers))

    def has(self, sample: Sample) -> bool:
        """Whether the directory that the origin means is known to be in a lower."""
        with self._opened(sample.origin) as fd:
            return _is_dir(fd) and self._inside(fd.fd)

    def lost(self, origin: fmt.Origin) -> bool:
        """Whether what the origin means is known to be gone, or to be in no lower."""
        if origin in self._handles:
            return False
        try:
            with self._found(origin) as fd:
                return not (self._inside(fd.fd) if _is_dir(fd) else self._holds(fd.fd))
        except PermissionError:
            return False
        except OSError:
            return True

    def _opened(self, origin: fmt.Origin) -> Fd:
        """O_PATH fd of what the origin means; a closed one when that cannot be said."""
        try:
            return self._found(origin)
        except OSError:
            return Fd(-1)

    def _found(self, origin: fmt.Origin) -> Fd:
        """O_PATH fd of what the origin means; ESTALE when it is gone, EPERM when we may not ask."""
        layer = next((layer for layer in self._layers if layer.uuid == origin.uuid), None)
        if layer is None:
            raise _error(errno.ESTALE)
        numbered = not any(origin.uuid)
        if numbered and not _is_numbered(layer):
            raise _error(errno.EPERM)
        # Opened by its path, so that what is found has one, too.
        with Fd(os.open(layer.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as mount:
            found = syscalls.open_by_handle(mount.fd, origin.kind, origin.handle)
        if numbered and os.fstat(found.fd).st_ino == _EXT_ROOT:
            found.close()
            raise _error(errno.EPERM)
        return found

    def _holds(self, fd: int) -> bool:
        """Whether the file `fd` may be in a lower: the kernel does not always know where a file is."""
        path = os.readlink(syscalls.proc_path(fd))
        try:
            above = Fd(os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            with above:
                there = stat_or_none(above.fd, os.path.basename(path))
                return there is None or not os.path.samestat(there, os.fstat(fd)) or self._inside(above.fd)
        except OSError:
            return True

    def _inside(self, fd: int) -> bool:
        """Whether the directory `fd` is in a lower, or its root: by going up."""
        at = syscalls.reopen(fd, os.O_PATH | os.O_DIRECTORY)
        key = _key(os.fstat(at.fd))
        while key not in self._roots:
            try:
                above = Fd(os.open(b"..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at.fd))
            except FileNotFoundError:
                return False  # outside of the mount by which the lower is reached
            at, last, key = above, key, _key(os.fstat(above.fd))
            if key == last:
                return False
        return True

    def _is_copy(self, fd: int, layer: Layer, name: bytes) -> bool:
        """Whether the directory `name` of the root of `layer` looks like the directory `fd`."""
        try:
            there = syscalls.open_dir(layer.root.fd, name) if name else syscalls.reopen(layer.root.fd, os.O_PATH)
        except OSError:
            return False
        with there:
            ours, theirs = _entries(there.fd), _entries(fd)
            alike = sum(_alike(there.fd, fd, entry) for entry in ours & theirs)
            return 2 * alike >= len(ours | theirs)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _is_numbered(layer: Layer) -> bool:
    device = os.major(layer.dev), os.minor(layer.dev)
    return any(line.device == device and line.fstype in _NUMBERED for line in mountinfo.read())


def _is_dir(fd: Fd) -> bool:
    return fd.fd >= 0 and stat.S_ISDIR(os.fstat(fd.fd).st_mode)


def _key(st: os.stat_result) -> tuple[int, int]:
    return st.st_dev, st.st_ino


def _entries(fd: int) -> set[bytes]:
    flags = os.O_RDONLY | os.O_DIRECTORY
    try:
        reading = syscalls.reopen(fd, flags | os.O_NOATIME)
    except PermissionError:
        reading = syscalls.reopen(fd, flags)
    with reading:
        return {os.fsencode(name) for name in sorted(os.listdir(reading.fd))[:_COMPARED]}


def _alike(one: int, other: int, name: bytes) -> bool:
    """Whether the entry `name` of the one directory could be a copy of that of the other: time, size and data."""
    first, second = stat_or_none(one, name), stat_or_none(other, name)
    if first is None or second is None or stat.S_IFMT(first.st_mode) != stat.S_IFMT(second.st_mode):
        return False
    if not stat.S_ISREG(first.st_mode):
        return _same_time(first.st_mtime_ns, second.st_mtime_ns)
    return first.st_size == second.st_size and _head(one, name) == _head(other, name)


def _same_time(one: int, other: int) -> bool:
    """In ns; archives may keep whole seconds only."""
    second = 1_000_000_000
    return one == other or (one // second == other // second and 0 in (one % second, other % second))


def _head(dirfd: int, name: bytes) -> bytes:
    try:
        with syscalls.open_data(dirfd, name, os.O_RDONLY | os.O_NOATIME) as fd:
            return os.pread(fd.fd, _BYTES, 0)
    except PermissionError as exc:
        if exc.errno != errno.EPERM:
            raise
        return b""
