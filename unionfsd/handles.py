"""The data path: descriptors of files that are read and written, and the operations on them.

Rules this file obeys:

- Data belongs to the node, not to an open: every reader of a node sees what any writer of it wrote, also after the file
  was copied up. There is one cached descriptor per node.
- The first write copies up. From then on nothing opens the lower again.
- What the page cache has is read in place; what it has not, and large or synchronous writes, go to a thread.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial

from . import protection, remote, syscalls, verity
from .copyup import CopyUp
from .fdcache import FdCache
from .guard import Guard
from .inodes import DirNode, Node, NodeTable, OpenState, path_of
from .integrity import same_state
from .lookup import Resolver
from .protection import APPEND, IMMUTABLE
from .steps import Blocking, Gate, Op
from .syscalls import Fd
from .typed import Final, TypeAlias, TypeVar
from .workdir import Workdir

#: Writes up to this size go to the page cache without a thread.
_INLINE_WRITE: Final = 256 * 1024
_KEEP_SIZE: Final = 1  # FALLOC_FL_KEEP_SIZE
T = TypeVar("T")
SyncCall: TypeAlias = Callable[[int], None]

_WOULD_BLOCK: Final = {errno.EAGAIN, errno.EOPNOTSUPP}


class Handles:
    """The data of one mount's files. `copy_up` is None when nothing can be written; `syncs`: whether fsync does."""

    def __init__(
        self,
        resolver: Resolver,
        table: NodeTable,
        fds: FdCache,
        copy_up: CopyUp | None,
        guard: Guard,
        work: Workdir | None,
        *,
        syncs: bool,
    ) -> None:
        self._resolver = resolver
        self._verifies = resolver.integrity is not None
        self._table = table
        self._fds = fds
        self._copy_up = copy_up
        self._syncs = syncs
        self._guard = guard
        self._work = work

    # Descriptors.

    def open(self, node: Node, flags: int) -> Op[None]:
        """Count an open with the open(2) `flags`; one for writing copies up first, O_TRUNC without the data."""
        if isinstance(node, DirNode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        truncate = bool(flags & os.O_TRUNC)
        if truncate or flags & os.O_ACCMODE != os.O_RDONLY:
            fd = yield from self.writable(node, 0 if truncate else None, anywhere=not flags & os.O_APPEND)
            if truncate:
                syscalls.truncate(fd.fd, 0)
        else:
            yield from self._readable(node)
        node.state().opens += 1

    def open_found(self, node: Node, flags: int) -> Op[None]:
        """As `open`, of a node that was looked up for it: where that fails, the kernel is told of neither."""
        try:
            yield from self.open(node, flags)
        except BaseException:
            self._table.forget(node.nodeid, 1)
            raise

    def opened(self, node: Node, fd: Fd) -> None:
        """Count the open of a file that was just created with the O_RDWR descriptor `fd`."""
        state = node.state()
        self._admit(state, fd, writable=True)
        state.opens += 1

    def release(self, node: Node) -> None:
        """The end of an open."""
        if node.open is not None and node.open.opens:
            node.open.opens -= 1
            self._table.settle(node)

    def _readable(self, node: Node) -> Op[Fd]:
        """The descriptor of the data; what was recorded of it is checked when it is first opened."""
        state = node.state()
        while state.fd is None:
            fd = self._open(node, state, write=False)
            data = node.entry.data
            if not self._is_sound(node, state, fd):
                yield from self._vouch(node, state, fd)
            elif data is None or data.digest is None:
                self._admit(state, fd)
                return fd
            else:
                yield Blocking(partial(verity.check, fd, data.digest, data.path), fd)
                # Meanwhile it may have been copied up; if not, it need not be checked again.
                if node.entry.data is data:
                    node.entry = node.entry.with_data(data._replace(digest=None))
        state.hot += 1
        return state.fd

    def _is_sound(self, node: Node, state: OpenState, fd: Fd) -> bool:
        """Whether the file `fd`, which has the data of `node`, need not be looked through any more."""
        if not self._verifies or (node.entry.upper and node.entry.data is None):
            return True
        return state.sound is not None and state.sound == same_state(fd)

    def _doubts(self, node: Node, state: OpenState, fd: Fd) -> bool:
        """Whether a file that was looked through has changed since: then it is given up."""
        if self._is_sound(node, state, fd):
            return False
        self._fds.forget(state)
        return True

    def _vouch(self, node: Node, state: OpenState, fd: Fd) -> Op[None]:
        """See that `fd`, which has the data of `node` in a lower, has the data it must have. EIO."""
        checks, data = self._resolver.integrity, node.entry.data
        assert checks is not None
        if state.checking is not None:
            yield state.checking
            return
        place = (node.entry.lowers[0], node.entry.name or node.name) if data is None else (data.lower, data.name)
        seen = same_state(fd)
        wanted = checks.data(*place)
        if wanted is not None:
            gate = state.checking = Gate()
            try:
                sound = yield from checks.look_through(fd, wanted, path_of(node))
            finally:
                state.checking = None
                gate.open()
            if not sound:
                raise checks.fail(*place, "data")
        state.sound = seen

    def _admit(self, state: OpenState, fd: Fd, *, writable: bool = False) -> None:
        self._fds.admit(state, fd)
        state.writable = writable

    def writable(self, node: Node, size: int | None = None, *, anywhere: bool = False) -> Op[Fd]:
        """The O_RDWR descriptor of a regular file, copied up first if need be: of its data only `size` bytes then.

        EPERM for one that is immutable and, if it is to be cut or written `anywhere`, for one that is append-only.
        """
        if self._copy_up is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        state = node.state()
        if state.fd is None or not state.writable:
            guarded = self._guard.of(node)
            if guarded & IMMUTABLE:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            state.append = bool(guarded & APPEND)
        if state.append and (anywhere or size is not None):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        while True:
            if not node.entry.upper:
                yield from self._copy_up.node(node, size)
            state = node.state()
            if state.fd is not None and state.writable:
                state.hot += 1
                return state.fd
            fd = self._open(node, state, write=True)
            if node.entry.data is None:
                self._admit(state, fd, writable=True)
                return fd
            yield from self._copy_up.data(node, size)

    def _open(self, node: Node, state: OpenState, *, write: bool) -> Fd:
        """The object opened; to read, the file that has its data."""
        data = node.entry.data
        if data is not None and not write:
            return data.open(self._fds)
        fd = self._open_object(node, state, write=write)
        data = self._resolver.locate(node, fd.fd)
        return fd if data is None or write else data.open(self._fds)

    def _open_object(self, node: Node, state: OpenState, *, write: bool) -> Fd:
        if state.orphan is not None:
            return syscalls.reopen(state.orphan.fd, os.O_RDWR if write else os.O_RDONLY)
        dirfd, name = self._resolver.spot(node)
        layer = self._resolver.stack.upper if node.entry.upper else node.entry.lowers[0].layer
        assert layer is not None
        return layer.open_data(dirfd, name, write=write)

    # Data.

    def readinto(self, node: Node, buffer: memoryview, offset: int) -> Op[int]:
        """Fill `buffer` from byte `offset`; returns the bytes read, fewer only at the end of the file."""
        state = node.open
        if state is None or state.fd is None or (self._verifies and self._doubts(node, state, state.fd)):
            fd = yield from self._readable(node)
        else:
            state.hot = True
            fd = state.fd
        try:
            done = syscalls.preadv(fd.fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError as exc:
            if exc.errno not in _WOULD_BLOCK:
                raise
            done = 0
        if done == len(buffer):
            return done
        # So that no call is made to see that the end has come.
        end = len(buffer) if remote.system_of(fd) else os.fstat(fd.fd).st_size - offset
        if done >= end:
            return done
        rest: int = yield Blocking(partial(_read_all, fd, buffer[done:end], offset + done), fd)
        return done + rest

    def read(self, node: Node, size: int, offset: int) -> Op[memoryview]:
        """At most `size` bytes from byte `offset`; fewer only at the end of the file."""
        buffer = memoryview(bytearray(size))
        done = yield from self.readinto(node, buffer, offset)
        return buffer[:done]

    def write(self, node: Node, data: bytes | bytearray | memoryview, offset: int) -> Op[int]:
        """Write all of `data` at byte `offset`; returns its length, less only when the space ran out on the way."""
        fd = yield from self.writable(node)
        view = memoryview(data)
        if node.open is not None and node.open.append and offset < os.fstat(fd.fd).st_size:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return (yield from _put(fd, view, offset))

    def write_late(self, node: Node, data: memoryview, offset: int) -> Op[int]:
        """As `write`, of what the kernel kept in its writeback cache: see `late`."""
        return self.late(node, self._write_late(node, data, offset))

    def _write_late(self, node: Node, data: memoryview, offset: int) -> Op[int]:
        fd = yield from self.writable(node)
        if node.state().append:
            done: int = yield Blocking(partial(_append, fd, data, offset))
            return done
        return (yield from _put(fd, data, offset))

    def late(self, node: Node, op: Op[T]) -> Op[T]:
        """Do `op`, a change of the data of `node`, where the kernel keeps the mtime (its writeback cache).

        It says when the change was, before this or after, or thinks it said so. So the mtime stays as it is, over all
        such changes that are under way together.
        """
        fd = yield from self.writable(node)
        state = node.state()
        if not state.arriving:
            state.mtime_ns = os.fstat(fd.fd).st_mtime_ns
        state.arriving += 1
        state.untimed = True
        try:
            return (yield from op)
        finally:
            state.arriving -= 1
            if not state.arriving and self._copy_up is not None:
                self._copy_up.restore_mtime(fd.fd, state.mtime_ns)

    def flush(self, node: Node) -> Op[None]:
        """close(2) of one descriptor: nothing is kept back that an error could come from."""
        yield from ()

    def fsync(self, node: Node, datasync: bool) -> Op[None]:
        """Put a regular file or a directory on disk; nothing to do for what is only in a lower, or never synced."""
        if not self._syncs or not node.entry.upper:
            return
        sync = syscalls.fdatasync if datasync else syscalls.fsync
        if isinstance(node, DirNode):
            fd = syscalls.reopen(self._resolver.upper_dir(node), os.O_RDONLY | os.O_DIRECTORY)
        elif node.entry.data is not None:
            fd = self._open_object(node, node.state(), write=False)
        else:
            fd = yield from self._readable(node)
        yield Blocking(partial(_on_fd, sync, fd))

    def fallocate(self, node: Node, mode: int, offset: int, length: int) -> Op[None]:
        """fallocate(2) with every mode that the upper has."""
        fd = yield from self.writable(node)
        if node.open is not None and node.open.append and mode & ~_KEEP_SIZE:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        yield Blocking(partial(_fallocate, fd, mode, offset, length))

    def lseek(self, node: Node, offset: int, whence: int) -> Op[int]:
        """lseek(2) with SEEK_DATA or SEEK_HOLE; ENXIO past the end."""
        fd = yield from self._readable(node)
        return syscalls.lseek(fd.fd, offset, whence)

    def backing(self, node: Node) -> Fd | None:
        """The descriptor of the file that the kernel may read and write in place of us while `node` is open.

        An upper file is O_RDWR, whatever it is opened for: all opens of a node must have the same. A lower one is given
        away only where nothing can be written: elsewhere a copy-up could not take it back (docs/performance.md).
        One that is append-only is not: the kernel would not keep to its end.
        """
        state = node.state()
        if not node.entry.upper:
            if self._copy_up is not None:
                return None
            if state.fd is None:
                fd = self._open(node, state, write=False)
                if not self._is_sound(node, state, fd):
                    return None
                self._admit(state, fd)
        elif state.fd is None or not state.writable:
            state.append = bool(self._guard.of(node) & APPEND)
            fd = self._open(node, state, write=True)
            if node.entry.data is not None:
                return None
            self._admit(state, fd, writable=True)
        return None if state.append else state.fd

    def ioctl(self, node: Node, command: int, data: bytes) -> Op[bytes]:
        """One of the inode flag ioctls with its argument `data`; returns what it answers. ENOTTY for all others.

        The kernel has checked the caller's right (vfs_fileattr_set).
        """
        if command not in syscalls.FLAG_IOCTLS:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        changes = command in syscalls.FLAG_CHANGES
        if changes:
            if self._copy_up is None:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            yield from self._copy_up.node(node)
        guarded = 0 if changes else self._guard.of(node)
        with self._resolver.open_object(node) as found, syscalls.reopen(found.fd, os.O_RDONLY | os.O_NONBLOCK) as fd:
            answer = protection.ioctl(fd.fd, command, data, guarded, self._work)
        if changes:
            self._forget_protection(node)
        return answer

    def _forget_protection(self, node: Node) -> None:
        """What protects the node may have changed: who writes next is asked again."""
        if isinstance(node, DirNode):
            node.protection = None
        elif node.open is not None and node.open.writable:
            self._fds.forget(node.open)

    def copy_file_range(self, source: Node, offset: int, target: Node, target_offset: int, length: int) -> Op[int]:
        """copy_file_range(2) between two files of the mount; EXDEV where the layers' file systems cannot."""
        out = yield from self.writable(target)
        fd = yield from self._readable(source)
        done: int = yield Blocking(partial(_copy_range, fd, out, length, offset, target_offset), fd)
        return done


def _put(fd: Fd, view: memoryview, offset: int) -> Op[int]:
    """Write to an upper file, large parts in a thread."""
    if len(view) <= _INLINE_WRITE:
        return _write_all(fd, view, offset)
    done: int = yield Blocking(partial(_write_all, fd, view, offset))
    return done


# In threads: each holds the Fd, so that an eviction meanwhile does not close it.


def _read_all(fd: Fd, buffer: memoryview, offset: int) -> int:
    done = 0
    while done < len(buffer):
        count = os.preadv(fd.fd, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def _write_all(fd: Fd, view: memoryview, offset: int) -> int:
    done = 0
    while done < len(view):
        try:
            done += syscalls.pwrite(fd.fd, view[done:], offset + done)
        except OSError:
            if done:
                return done
            raise
    return done


def _append(fd: Fd, view: memoryview, offset: int) -> int:
    """Write to an append-only file what the kernel had in whole pages: what is there already must be what it was."""
    there = min(max(os.fstat(fd.fd).st_size - offset, 0), len(view))
    if os.pread(fd.fd, there, offset) != view[:there]:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    return there + _write_all(fd, view[there:], offset + there)


def _on_fd(call: SyncCall, fd: Fd) -> None:
    call(fd.fd)


def _fallocate(fd: Fd, mode: int, offset: int, length: int) -> None:
    syscalls.fallocate(fd.fd, mode, offset, length)


def _copy_range(source: Fd, target: Fd, length: int, offset: int, target_offset: int) -> int:
    return syscalls.copy_range(source.fd, target.fd, length, offset, target_offset)
