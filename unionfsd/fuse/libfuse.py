"""The pyfuse3 transport: libfuse's request loop under trio, and nothing about unions.

Rules this file obeys:

- It is the only file that imports pyfuse3.
- A handler has the shape of the union's own operations: a plain function when it never blocks, a generator of steps
  when it may. `_handler` is the one guard around all of them: pyfuse3 ends its loop on any exception but FUSEError.
- File and directory handles are nodeids: the data path belongs to the node, and a listing continues from its cookie.
- libfuse keeps one session per process, so one process serves one mount over this transport.

What pyfuse3 cannot express, and what follows from it, is listed in docs/deviations.md.
"""

from __future__ import annotations

import errno
import functools
import inspect
import os
import stat
from collections.abc import Callable, Coroutine
from time import perf_counter_ns

import pyfuse3

from unionfsd.events import NOBODY, Who
from unionfsd.fuse.abi import Opcode
from unionfsd.fuse.acting import Acting
from unionfsd.fuse.driver import finish, opened
from unionfsd.fuse.privileges import killed
from unionfsd.logger import get_logger
from unionfsd.steps import FrozenError
from unionfsd.typed import TYPE_CHECKING, Any, Final
from unionfsd.union import Caller, SetAttr

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unionfsd.options import MountConfig
    from unionfsd.steps import Op
    from unionfsd.union import Attr, Dirent, Found, Union

log = get_logger(__name__)

#: Requests in service at once. A request that waits for a large copy-up holds one; when all are held, the mount stalls.
_MAX_TASKS: Final = 500

#: The request behind a handler, where it does not have the handler's name.
_KINDS: Final = {"rename": Opcode.RENAME2, "readdir": Opcode.READDIRPLUS}

#: A handler as pyfuse3 calls it.
_Handler = Callable[..., Coroutine[Any, Any, Any]]


async def serve(union: Union, fuse_fd: int, config: MountConfig, *, started: Callable[[], None]) -> None:
    """Answer the kernel on `fuse_fd`, a mounted /dev/fuse descriptor, until the mount is gone.

    `started` is called once, when the kernel has opened the session; it must not touch the mount, whose first answer
    leaves after it returns. The mount is left as it is: cancelling ends the service, not the mount, and requests that
    were in hand stay unanswered until the last copy of `fuse_fd` is closed. `fuse_fd` stays the caller's.
    """
    # libfuse reads as soon as the descriptor was readable once. A request that its caller took back meanwhile would be
    # EAGAIN, which pyfuse3 takes for the end of the session; a blocking read waits for the next request instead.
    os.set_blocking(fuse_fd, True)
    operations = _Operations(union, config.timeout, started)
    operations.enable_acl = not config.noacl
    operations.supports_dot_lookup = bool(union.exports)
    _open_session(operations, fuse_fd)
    try:
        await pyfuse3.main(max_tasks=_MAX_TASKS)
    finally:
        pyfuse3.close(unmount=False)


def _open_session(operations: _Operations, fuse_fd: int) -> None:
    """Start libfuse's session on a duplicate of `fuse_fd`, which the session owns and closes."""
    fd = os.dup(fuse_fd)
    try:
        pyfuse3.init(operations, f"/dev/fd/{fd}", set())
    except BaseException:
        os.close(fd)
        raise


def _handler(fn: Callable[..., Any]) -> _Handler:
    """Make `fn`, a function or a generator of steps, a pyfuse3 handler that raises nothing but FUSEError."""
    generator = inspect.isgeneratorfunction(fn)
    kind = _KINDS.get(fn.__name__) or Opcode[fn.__name__.upper()]

    @functools.wraps(fn)
    async def answer(self: _Operations, *args: Any) -> Any:
        began = perf_counter_ns()
        who = _who(args)
        if self.counters.samples is not None and args and isinstance(args[0], int):
            self.counters.sample(args[0])
        try:
            while True:
                try:
                    return await self.drive(fn(self, *args), who) if generator else self.run(fn, args, who)
                except FrozenError as frozen:
                    await opened(frozen.gate)
        except OSError as error:
            raise self.failed(kind, error.errno or errno.EIO) from None
        except Exception as error:
            self.report(fn.__name__, error)
            raise self.failed(kind, errno.EIO) from None
        finally:
            self.counters.operations.took(kind, perf_counter_ns() - began)

    return answer


class _Operations(pyfuse3.Operations):
    """pyfuse3's names for the operations of one union."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = True

    def __init__(self, union: Union, timeout: float, started: Callable[[], None]) -> None:
        self.counters = union.counters
        self._union = union
        self._timeout = timeout
        self._started = started
        self._acting = Acting()
        union.events.who = self._acting.who

    def init(self) -> None:
        self._started()

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], who: Who) -> Any:
        """Run a handler that never blocks."""
        self._acting.now = who
        try:
            return fn(self, *args)
        finally:
            self._acting.now = None

    async def drive(self, op: Op[Any], who: Who) -> Any:
        """Run an operation to its end."""
        self._acting.now = who
        try:
            step = op.send(None)
        except StopIteration as stop:
            return stop.value
        finally:
            self._acting.now = None
        self.counters.threaded += 1
        rest = self._acting.resumed(op, step, who)
        return await finish(rest, rest.send(None))

    def failed(self, kind: Opcode, number: int) -> pyfuse3.FUSEError:
        """Count an errno; returns what tells it."""
        self.counters.errors += 1
        self.counters.operations.failed(kind, number)
        return pyfuse3.FUSEError(number)

    def report(self, operation: str, error: Exception) -> None:
        """Log and count an exception that nobody meant to raise: a defect, whatever the caller is told."""
        self.counters.faults += 1
        log.error("%s failed unexpectedly", operation, exc_info=error)

    # What the kernel knows of a node.

    @_handler
    def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        try:
            if name in (b".", b".."):
                return self._entry(self._union.reach(parent, name))
            return self._entry(self._union.lookup(parent, name))
        except FileNotFoundError:
            return self._absent()

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        # Not a handler: there is nobody to tell an errno to, and a FUSEError would end the loop.
        began = perf_counter_ns()
        try:
            for nodeid, count in inode_list:
                self._union.forget(nodeid, count)
        except Exception as error:
            self.report("forget", error)
        self.counters.operations.took(Opcode.BATCH_FORGET, perf_counter_ns() - began)

    @_handler
    def getattr(self, nodeid: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(nodeid, self._union.getattr(nodeid))

    @_handler
    def setattr(
        self,
        nodeid: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> Op[pyfuse3.EntryAttributes]:
        changed = yield from self._union.setattr(nodeid, _wanted(attr, fields), _caller(ctx))
        return self._attributes(nodeid, changed)

    @_handler
    def readlink(self, nodeid: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self._union.readlink(nodeid)

    @_handler
    def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        return _statvfs(self._union.statfs(self._union.root))

    # Names.

    @_handler
    def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry(self._union.mknod(parent, name, mode, rdev, _caller(ctx)))

    @_handler
    def mkdir(self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(self._union.mkdir(parent, name, mode, _caller(ctx)))

    @_handler
    def symlink(self, parent: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(self._union.symlink(parent, name, target, _caller(ctx)))

    @_handler
    def link(self, nodeid: int, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> Op[pyfuse3.EntryAttributes]:
        return self._entry((yield from self._union.link(nodeid, parent, name)))

    @_handler
    def unlink(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> Op[None]:
        yield from self._union.unlink(parent, name)

    @_handler
    def rmdir(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._union.rmdir(parent, name)

    @_handler
    def rename(
        self, parent: int, name: bytes, newparent: int, newname: bytes, flags: int, ctx: pyfuse3.RequestContext
    ) -> Op[None]:
        yield from self._union.rename(parent, name, newparent, newname, flags)

    # Data. There is no flush: the union keeps nothing back, and the ENOSYS of the base class ends such requests.

    @_handler
    def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> Op[tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]]:
        found = yield from self._union.create(parent, name, mode, flags, _caller(ctx))
        return _handle(found.nodeid), self._entry(found)

    @_handler
    def open(self, nodeid: int, flags: int, ctx: pyfuse3.RequestContext) -> Op[pyfuse3.FileInfo]:
        if flags & os.O_TRUNC:
            yield from self._union.setattr(nodeid, self._emptied(nodeid, ctx), _caller(ctx))
        yield from self._union.open(nodeid, flags & ~os.O_TRUNC)
        return _handle(nodeid)

    def _emptied(self, nodeid: int, ctx: pyfuse3.RequestContext) -> SetAttr:
        """What O_TRUNC does to a file. libfuse always has the open itself truncate (FUSE_ATOMIC_O_TRUNC), and then the
        kernel leaves it to us to take setuid and setgid off; who has CAP_FSETID we can only guess from the uid."""
        mode = None if ctx.uid == 0 else killed(self._union.getattr(nodeid).st, _caller(ctx))
        return SetAttr(size=0, mode=mode)

    @_handler
    def release(self, fh: int) -> None:
        self._union.release(fh)

    @_handler
    def read(self, fh: int, off: int, size: int) -> Op[bytes | memoryview]:
        return (yield from self._union.read(fh, size, off))

    @_handler
    def write(self, fh: int, off: int, buf: bytes) -> Op[int]:
        return (yield from self._union.write(fh, buf, off))

    @_handler
    def fsync(self, fh: int, datasync: bool) -> Op[None]:
        yield from self._union.fsync(fh, datasync)

    # Directories.

    @_handler
    def opendir(self, nodeid: int, ctx: pyfuse3.RequestContext) -> int:
        self._union.opendir(nodeid)
        return nodeid

    @_handler
    def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for dirent in self._union.listdir(fh, start_id):
            if not self._list(fh, dirent, token):
                return

    @_handler
    def releasedir(self, fh: int) -> None:
        self._union.releasedir(fh)

    @_handler
    def fsyncdir(self, fh: int, datasync: bool) -> Op[None]:
        yield from self._union.fsyncdir(fh, datasync)

    # Extended attributes. pyfuse3 has turned XATTR_CREATE and XATTR_REPLACE into a getxattr of its own.

    @_handler
    def getxattr(self, nodeid: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return self._union.getxattr(nodeid, name)

    @_handler
    def listxattr(self, nodeid: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return self._union.listxattr(nodeid, trusted=ctx.uid == 0)

    @_handler
    def setxattr(self, nodeid: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> Op[None]:
        yield from self._union.setxattr(nodeid, name, value, 0)

    @_handler
    def removexattr(self, nodeid: int, name: bytes, ctx: pyfuse3.RequestContext) -> Op[None]:
        yield from self._union.removexattr(nodeid, name)

    # From the union's values to pyfuse3's.

    def _list(self, directory: int, dirent: Dirent, token: pyfuse3.ReaddirToken) -> bool:
        """Add one entry and its node to the reply; False when the reply is full. Each added node is looked up once."""
        name, _, _, cookie = dirent
        if name in (b".", b".."):  # the kernel takes no lookup for these
            nodeid = directory if name == b"." else self._union.parent(directory)
            return pyfuse3.readdir_reply(token, name, _dot(nodeid), cookie)
        try:
            found = self._union.lookup(directory, name)
        except FileNotFoundError:
            return True  # gone since the directory was read
        if pyfuse3.readdir_reply(token, name, self._entry(found), cookie):
            return True
        self._union.forget(found.nodeid, 1)
        return False

    def _absent(self) -> pyfuse3.EntryAttributes:
        """A name that does not exist, for the kernel to remember."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = 0
        entry.entry_timeout = self._timeout
        return entry

    def _entry(self, found: Found) -> pyfuse3.EntryAttributes:
        entry = self._attributes(found.nodeid, found.attr)
        entry.generation = found.generation
        return entry

    def _attributes(self, nodeid: int, attr: Attr) -> pyfuse3.EntryAttributes:
        st = attr.st
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = nodeid  # pyfuse3 has one field for the nodeid and for st_ino, so `attr.ino` cannot be told
        entry.entry_timeout = entry.attr_timeout = self._timeout
        entry.st_mode = st.st_mode
        entry.st_nlink = attr.nlink
        entry.st_uid = st.st_uid
        entry.st_gid = st.st_gid
        entry.st_rdev = st.st_rdev
        entry.st_size = st.st_size
        entry.st_blksize = st.st_blksize
        entry.st_blocks = st.st_blocks
        entry.st_atime_ns = st.st_atime_ns
        entry.st_mtime_ns = st.st_mtime_ns
        entry.st_ctime_ns = st.st_ctime_ns
        return entry


def _dot(nodeid: int) -> pyfuse3.EntryAttributes:
    """What a listing says of "." and "..": the number and that it is a directory."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = nodeid
    entry.st_mode = stat.S_IFDIR
    return entry


def _handle(nodeid: int) -> pyfuse3.FileInfo:
    """The open file of a node; its pages stay cached over opens, for nobody but this mount changes them."""
    return pyfuse3.FileInfo(fh=nodeid, keep_cache=True)


def _who(args: tuple[Any, ...]) -> Who:
    """Who asked, where libfuse's request has it among the arguments of its handler: reading and writing have not."""
    ctx = args[-1] if args else None
    return Who(ctx.pid, ctx.uid) if isinstance(ctx, pyfuse3.RequestContext) else NOBODY


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    # Unless the file system was mounted with MS_POSIXACL, the kernel has applied the umask to the mode already;
    # applying it once more changes nothing then.
    return Caller(ctx.uid, ctx.gid, ctx.pid, ctx.umask)


def _wanted(attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields) -> SetAttr:
    """The changes asked for. pyfuse3 has put the time of day where the caller said UTIME_NOW."""
    return SetAttr(
        mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
        uid=attr.st_uid if fields.update_uid else None,
        gid=attr.st_gid if fields.update_gid else None,
        size=attr.st_size if fields.update_size else None,
        atime_ns=attr.st_atime_ns if fields.update_atime else None,
        mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
    )


def _statvfs(result: os.statvfs_result) -> pyfuse3.StatvfsData:
    data = pyfuse3.StatvfsData()
    for field in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
        setattr(data, field, getattr(result, field))
    data.f_namemax = result.f_namemax
    return data
