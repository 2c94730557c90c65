"""The union: what a transport talks to. It composes the floors below and keeps no rules of its own.

Rules this file obeys:

- Objects are nodeids, names are single components of bytes, failures are OSError.
- Calls that cannot block are plain functions; the others are operations (`steps.Op`) that a transport drives.
- It is entered from one thread. There is no lock: what runs between two yields is atomic, and copy-ups of one node wait
  for each other at its gate.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from functools import partial

from . import syscalls
from .abilities import Abilities
from .attributes import Attr, Attributes, Found, SetAttr
from .copyup import CopyUp
from .entries import UPPER
from .errors import LAYER, UserError
from .estate import Estate
from .events import Events
from .exports import Exports, Register
from .fdcache import FdCache, fd_budget
from .guard import Guard
from .handles import Handles
from .heir import Heir, Inheritance
from .inodes import ROOT_ID, DirNode, Node, NodeTable, child, path_of, path_to
from .integrity import integrity
from .layers import LayerStack
from .listing import Dirent
from .logger import get_logger
from .lookup import Hit, Resolver
from .metadata import Keeping
from .metrics import Counters, Holdings, Statistics
from .mutations import Caller, Mutations
from .options import MountConfig
from .owners import Owners, StatLike
from .parts import Parts, open_parts, take_parts
from .patience import resolver_for
from .places import Places, fail
from .readers import Readers
from .refresh import Memory
from .renames import Renames
from .steps import Blocking, Freeze, Op
from .typed import Final, TypeVar

__all__ = ["ROOT_ID", "Attr", "Caller", "Dirent", "Found", "SetAttr", "StatLike", "Union"]

T = TypeVar("T")

log = get_logger(__name__)


class Union:
    """One union of layers. `work` is None when nothing can be written."""

    root: Final = ROOT_ID

    def __init__(self, parts: Parts, config: MountConfig) -> None:
        stack, work, index, seen, ledger = parts
        self.config = config
        self.counters = Counters()
        self.events = Events(always=config.events == "on")
        self.stack = stack
        self._work = work
        self._touched = False
        self._freeze = Freeze()
        self._fds = FdCache(*fd_budget(), who=lambda: self.events.who().uid)
        self._resolver = resolver_for(stack)(stack, self._fds, **config.rules)
        self._resolver.index = self._index = index
        self._resolver.kept_in = -1 if work is None else work.fd
        self._resolver.integrity = integrity(stack, self._fds, self.counters, self.events)
        root = self._resolver.root()
        self._readers = Readers(self._resolver)
        register = None if seen is None else Register.new()
        ledger, let_go = register or ledger, work.let_go if work else None
        self._table = NodeTable(root.entry, root.ino, self._fds, self._dropped, ledger, let_go)
        self.ledger = self._table.ledger
        #: Set where nodeids mean the same after they were forgotten: then `reach` finds them.
        self.exports: Exports | None = None
        if seen is not None and register is not None:
            self.exports = Exports(seen, register, self._resolver, self._table, self._node)
        owners = Owners(config)
        guard = Guard(self._resolver, work)
        copy_up = None
        if work is not None and stack.upper is not None:
            metacopy = config.metacopy == "on"
            if metacopy and not work.abilities.can_redirect:
                log.warning("metacopy=on: the upper cannot keep what it takes, data is copied up with metadata")
            rekey = self._table.rekey
            keeping = Keeping(owners, stack.upper.override)
            copy_up = CopyUp(
                self._resolver, work, self._fds, self.counters, keeping, self.events, metacopy=metacopy, rekey=rekey
            )
        self._mutations = None
        if work is not None and copy_up is not None:
            places = Places(self._resolver, work, copy_up, self._table, guard)
            redirects = config.redirect_dir == "on" and work.abilities.can_redirect
            self._mutations = Mutations(self._resolver, self._table, work, copy_up, places, noacl=config.noacl)
            self._renames = Renames(self._resolver, self._table, work, copy_up, places, redirects=redirects)
        self._handles = Handles(self._resolver, self._table, self._fds, copy_up, guard, work, syncs=config.syncs)
        self._attributes = Attributes(
            self._resolver, self._handles, copy_up, owners, guard if work else None, self.ledger, config
        )

    @classmethod
    def mount(cls, config: MountConfig, estate: Estate | None = None) -> Union:
        """Open the layers of `config`, or take those that were left and go on with `resume`; UserError."""
        parts = open_parts(config) if estate is None else take_parts(estate, config)
        try:
            return cls(parts, config)
        except OSError as exc:
            parts.stack.close()
            raise UserError(f"layers: {exc}", hint="a layer cannot be read", code=LAYER) from exc
        except BaseException:
            parts.stack.close()
            raise

    def _dropped(self, node: DirNode) -> None:
        self._resolver.kept.released(node)
        self._readers.end(node)

    def resume(self) -> Inheritance:
        """Go on where the process stopped that had the ledger before, and changed something perhaps."""
        self._touched = True
        if self._index is not None:
            self._index.reload()
        return Heir(self._resolver, self._table, self._work).resume()

    def freeze(self) -> None:
        """From now on no change begins; what has begun is not waited for. Once at a time."""
        self._freeze.begin()

    def thaw(self) -> None:
        """Let changes begin again, those first that waited."""
        self._freeze.end()

    @property
    def frozen(self) -> bool:
        """Whether no change may begin."""
        return self._freeze.gate is not None

    def _change(self) -> Mutations:
        """What changes names; EROFS, and FrozenError. Every operation that changes anything comes here first."""
        self._freeze.check()
        if self._mutations is None or self.config.ro:
            raise fail(errno.EROFS)
        self._touched = True
        return self._mutations

    def _changed(self, kind: str, parent: DirNode, name: bytes, to: tuple[DirNode, bytes] | None = None) -> None:
        if self.events.recording:
            self.events.record(kind, path_to(parent, name), None if to is None else path_to(*to))

    def _altered(self, kind: str, node: Node, *fields: str) -> None:
        if self.events.recording:
            self.events.record(kind, path_of(node), fields=fields)

    def _writing(self, node: Node, op: Op[T]) -> Op[T]:
        return self._written(node, op) if self.events.recording else op

    def _written(self, node: Node, op: Op[T]) -> Op[T]:
        done = yield from op
        if self.events.is_first_write(node.nodeid):
            self.events.record("write", path_of(node))
        return done

    # Names.

    def lookup(self, parent: int, name: bytes) -> Found:
        """The object `name` in the directory `parent`; ENOENT, ENOTDIR, ENAMETOOLONG."""
        directory = self._table.directory(parent)
        if directory.unlinked:
            raise fail(errno.ENOENT, name)
        node = child(directory, name)
        if node is not None:
            try:
                return self._found(node, self._resolver.stat(node))
            except FileNotFoundError:
                log.warning("%r vanished from its layer: layers changed underneath the mount", name)
                self._table.unname(directory, name)
        hit = self._resolver.find(directory, name)
        if hit is None:
            raise fail(errno.ENOENT, name)
        return self._found(self._node(directory, name, hit), hit.st)

    def _node(self, parent: DirNode, name: bytes, hit: Hit) -> Node:
        """The node of what was found under a name that no node has."""
        if stat.S_ISDIR(hit.st.st_mode):
            return self._table.add(parent, name, hit.entry, hit.ino, directory=True)
        entry = hit.entry.of_object
        several = entry.index is not None or entry.name is not None or (entry.upper and hit.st.st_nlink > 1)
        key = (hit.st.st_dev, hit.st.st_ino)
        node = self._table.by_inode(key) if several else None
        if node is not None:
            self._table.alias(node, parent, name)
            return node
        node = self._table.add(parent, name, entry, hit.ino, directory=False)
        if several:
            self._table.know_inode(key, node)
        return node

    def _found(self, node: Node, st: os.stat_result) -> Found:
        attr = self._attributes.show_new(node, st, self._table)
        self._table.looked_up(node)
        generation = 0 if self.exports is None else self.exports.generation(node)
        return Found(node.nodeid, generation, attr)

    def reach(self, nodeid: int, name: bytes) -> Found:
        """The object `nodeid`, known or not (`name` "."), or the parent of such a directory (".."); ESTALE."""
        assert self.exports is not None
        node = self.exports.reach(nodeid)
        if name == b"..":
            node = self.exports.reach(self.parent(node.nodeid))
        return self._found(node, self._resolver.stat(node))

    def _made(self, parent: DirNode, name: bytes) -> Found:
        """What was just made under a name that was free: it is in the upper alone, whatever lowers have."""
        self._table.unname(parent, name)  # of something that went underneath the mount
        st = syscalls.stat_at(self._resolver.upper_dir(parent), name)
        return self._found(self._node(parent, name, Hit(UPPER, st, self.stack.ino(st))), st)

    def forget(self, nodeid: int, count: int) -> None:
        """The kernel takes back `count` lookups."""
        self._table.forget(nodeid, count)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Found:
        directory = self._table.directory(parent)
        self._change().mknod(directory, name, mode, rdev, caller)
        self._changed("create" if stat.S_ISREG(mode) else "mknod", directory, name)
        return self._made(directory, name)

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Found:
        directory = self._table.directory(parent)
        self._change().mkdir(directory, name, mode, caller)
        self._changed("mkdir", directory, name)
        return self._made(directory, name)

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Found:
        directory = self._table.directory(parent)
        self._change().symlink(directory, name, target, caller)
        self._changed("symlink", directory, name)
        return self._made(directory, name)

    def unlink(self, parent: int, name: bytes) -> Op[None]:
        directory = self._table.directory(parent)
        yield from self._change().unlink(directory, name)
        self._changed("unlink", directory, name)

    def rmdir(self, parent: int, name: bytes) -> None:
        directory = self._table.directory(parent)
        self._change().rmdir(directory, name)
        self._changed("rmdir", directory, name)

    def link(self, nodeid: int, newparent: int, newname: bytes) -> Op[Found]:
        """A further name for `nodeid`; its lookup is counted."""
        node, directory = self._table.get(nodeid), self._table.directory(newparent)
        yield from self._change().link(node, directory, newname)
        if self.events.recording:
            self.events.record("link", path_of(node), path_to(directory, newname))
        return self._found(node, self._resolver.stat(node))

    def rename(self, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> Op[None]:
        """renameat2(2) with RENAME_NOREPLACE or RENAME_EXCHANGE."""
        source, target = self._table.directory(parent), self._table.directory(newparent)
        self._change()
        yield from self._renames.rename(source, name, target, newname, flags)
        kind = "exchange" if flags & syscalls.RENAME_EXCHANGE else "rename"
        self._changed(kind, source, name, (target, newname))

    def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> Op[Found]:
        """open(2) with O_CREAT: create the file unless it is there and O_EXCL is not asked for; counts an open."""
        directory = self._table.directory(parent)
        try:
            fd = self._change().create(directory, name, stat.S_IFREG | stat.S_IMODE(mode), caller)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            found = self.lookup(parent, name)
            yield from self._handles.open_found(self._table.get(found.nodeid), flags)
            return found
        self._changed("create", directory, name)
        found = self._made(directory, name)
        self._handles.opened(self._table.get(found.nodeid), fd)
        return found

    def tmpfile(self, parent: int, mode: int, flags: int, caller: Caller) -> Op[Found]:
        """open(2) with O_TMPFILE; counts a lookup and an open."""
        directory = self._table.directory(parent)
        node, fd = self._change().tmpfile(directory, stat.S_IFREG | stat.S_IMODE(mode), caller)
        found = self._found(node, os.fstat(fd.fd))
        self._handles.opened(node, fd)
        yield from ()
        return found

    # Attributes.

    def getattr(self, nodeid: int) -> Attr:
        return self._attributes.get(self._table.get(nodeid))

    def birth_time(self, nodeid: int) -> int | None:
        """When the object was made, in ns since the epoch; None where its layer does not know."""
        with self._resolver.open_object(self._table.get(nodeid)) as fd:
            return syscalls.birth_time(fd.fd)

    def setattr(self, nodeid: int, change: SetAttr, caller: Caller) -> Op[Attr]:
        """Change attributes; the caller's right to do so was checked by the kernel."""
        self._change()
        node = self._table.get(nodeid)
        attr = yield from self._attributes.set(node, change)
        if self.events.recording and (fields := change.fields()):
            self._altered("setattr", node, *fields)
        return attr

    def readlink(self, nodeid: int) -> bytes:
        """Target of a symlink; EINVAL for anything else."""
        with self._resolver.open_object(self._table.get(nodeid)) as fd:
            return syscalls.readlink(fd.fd)

    def getxattr(self, nodeid: int, name: bytes) -> bytes:
        return self._attributes.getxattr(self._table.get(nodeid), name)

    def listxattr(self, nodeid: int, *, trusted: bool = True) -> list[bytes]:
        """Names of the xattrs; those of the namespace ``trusted`` only for callers with CAP_SYS_ADMIN (xattr(7))."""
        names = self._attributes.listxattr(self._table.get(nodeid))
        return names if trusted else [name for name in names if not name.startswith(b"trusted.")]

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int) -> Op[None]:
        self._change()
        node = self._table.get(nodeid)
        yield from self._attributes.setxattr(node, name, value, flags)
        self._altered("setxattr", node, os.fsdecode(name))

    def removexattr(self, nodeid: int, name: bytes) -> Op[None]:
        self._change()
        node = self._table.get(nodeid)
        yield from self._attributes.removexattr(node, name)
        self._altered("removexattr", node, os.fsdecode(name))

    def statfs(self, nodeid: int) -> os.statvfs_result:
        """Space of the upper, or of the topmost lower when there is no upper."""
        return syscalls.fstatvfs(self.stack.top.root.fd)

    # Data.

    def open(self, nodeid: int, flags: int) -> Op[None]:
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            self._change()
        yield from self._handles.open(self._table.get(nodeid), flags)

    def release(self, nodeid: int) -> None:
        self._handles.release(self._table.get(nodeid))

    def read(self, nodeid: int, size: int, offset: int) -> Op[memoryview]:
        return self._handles.read(self._table.get(nodeid), size, offset)

    def readinto(self, nodeid: int, buffer: memoryview, offset: int) -> Op[int]:
        return self._handles.readinto(self._table.get(nodeid), buffer, offset)

    def write(self, nodeid: int, data: bytes | bytearray | memoryview, offset: int) -> Op[int]:
        self._change()
        node = self._table.get(nodeid)
        return self._writing(node, self._handles.write(node, data, offset))

    def write_late(self, nodeid: int, data: memoryview, offset: int) -> Op[int]:
        """As `write`, of what the kernel has kept since it was written: the mtime, which it knows, is left alone."""
        self._change()
        node = self._table.get(nodeid)
        return self._writing(node, self._handles.write_late(node, data, offset))

    def flush(self, nodeid: int) -> Op[None]:
        return self._handles.flush(self._table.get(nodeid))

    def fsync(self, nodeid: int, datasync: bool) -> Op[None]:
        return self._handles.fsync(self._table.get(nodeid), datasync)

    def fsyncdir(self, nodeid: int, datasync: bool) -> Op[None]:
        return self._handles.fsync(self._table.directory(nodeid), datasync)

    def fallocate(self, nodeid: int, mode: int, offset: int, length: int, *, late: bool = False) -> Op[None]:
        """`late`: the mtime, which the kernel keeps, is left alone."""
        self._change()
        node = self._table.get(nodeid)
        op = self._handles.fallocate(node, mode, offset, length)
        return self._writing(node, self._handles.late(node, op) if late else op)

    def lseek(self, nodeid: int, offset: int, whence: int) -> Op[int]:
        return self._handles.lseek(self._table.get(nodeid), offset, whence)

    def backing(self, nodeid: int) -> syscalls.Fd | None:
        """The file the kernel may use in place of us while `nodeid` is open; None where it must ask."""
        return self._handles.backing(self._table.get(nodeid))

    def ioctl(self, nodeid: int, command: int, data: bytes) -> Op[bytes]:
        """FS_IOC_GETFLAGS, SETFLAGS, FSGETXATTR, FSSETXATTR or GETVERSION; ENOTTY for others."""
        if command in syscalls.FLAG_CHANGES:
            self._change()
        return self._handles.ioctl(self._table.get(nodeid), command, data)

    def copy_file_range(self, source: int, at: int, target: int, to: int, size: int, *, late: bool = False) -> Op[int]:
        self._change()
        read, written = self._table.get(source), self._table.get(target)
        op = self._handles.copy_file_range(read, at, written, to, size)
        return self._writing(written, self._handles.late(written, op) if late else op)

    # Directories.

    def opendir(self, nodeid: int) -> None:
        """ENOTDIR unless `nodeid` is a directory."""
        self._table.directory(nodeid)

    def listdir(self, nodeid: int, cookie: int) -> Iterator[Dirent]:
        """The entries after `cookie`, of a fresh snapshot when it is 0; "." and ".." come first."""
        return self._readers.read(self._table.directory(nodeid), cookie)

    def eager(self, nodeid: int) -> bool:
        """Whether who lists the directory is better told everything of its entries, and not their names alone."""
        return self._readers.eager(self._table.directory(nodeid))

    def parent(self, nodeid: int) -> int:
        """nodeid of the directory that "." of `nodeid` has as ".."; the root is its own."""
        node = self._table.directory(nodeid)
        return node.nodeid if node.parent is None else node.parent.nodeid

    def releasedir(self, nodeid: int) -> None:
        """No reader is in the middle of the directory's listing any more."""
        self._readers.end(self._table.directory(nodeid))

    # As a whole.

    def shutdown(self) -> Op[None]:
        """The last operation: puts the upper on disk if it was changed, as the kernel asks nobody to when it unmounts.

        The next mount of the upper need not wait for that: the locks go first.
        """
        if self._work is not None:
            self._work.close()
        self.stack.unlock()
        if self._touched:
            yield from self.syncfs()

    def syncfs(self) -> Op[None]:
        """Put the upper on disk, unless the mount never syncs."""
        upper = self.stack.upper
        if upper is None or not self.config.syncs:
            return
        with syscalls.reopen(upper.root.fd, os.O_RDONLY | os.O_DIRECTORY) as fd:
            yield Blocking(partial(syscalls.syncfs, fd.fd))

    def close(self) -> None:
        """Close every descriptor and give up the locks."""
        self._table.close()
        self._fds.close()
        if self.exports is not None:
            self.exports.close()
        if self._index is not None:
            self._index.close()
        if self._work is not None:
            self._work.close()
        self.stack.close()

    def statistics(self) -> Statistics:
        """What the mount did so far."""
        return self.counters.statistics()

    def known(self) -> int:
        """How many objects the kernel knows."""
        return len(self._table)

    def holdings(self) -> Holdings:
        """What the mount holds now."""
        fds = self._fds
        return Holdings(len(self._table), len(fds), fds.capacity, *fds.usage(), *self._resolver.kept.held())

    @property
    def abilities(self) -> Abilities | None:
        """What the upper can do; None when nothing can be written."""
        return None if self._work is None else self._work.abilities

    def place(self, nodeid: int) -> tuple[int, bytes] | None:
        """nodeid of its parent, and its name there; None for what has no name. ESTALE."""
        node = self._table.get(nodeid)
        return None if node.unlinked or node.parent is None else (node.parent.nodeid, node.name)

    @property
    def memory(self) -> Memory:
        """What is remembered of the layers, for who knows that it is wrong or no longer wanted."""
        return Memory(self._resolver, self._table, self._fds)

    def reader(self) -> Resolver:
        """A resolver for one thread: it shares with the mount's own only the layers' roots, open until `close`."""
        stack = LayerStack(self.stack.lowers, self.stack.upper, None, (), self.stack.data)
        resolver = Resolver(stack, FdCache(FdCache.MINIMUM), **self.config.rules)
        resolver.index = self._index
        return resolver
