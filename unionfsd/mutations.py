"""Changing names: one function per operation, and one view-changing system call in each.

Rules this file obeys:

- Steps that nobody can see come first (copy up, stage, mark opaque), then the one call that publishes, then cleaning
  that nobody can see. A crash anywhere leaves the view before or the view after: docs/recovery.md has the table.
- Deleting a name leaves a whiteout exactly when a lower has the name.
- A directory that comes to lie over a name of a lower is opaque before it gets there.
- A removed object that the kernel knows is held by a descriptor first.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final, NamedTuple

from . import acl, intent, syscalls
from . import format as fmt
from .copyup import CopyUp, apply_metadata, read_metadata
from .inodes import UPPER, DirNode, Heritage, Node, NodeTable, child
from .layers import optional_xattr
from .lookup import Hit, Resolver, stat_or_none
from .steps import Op
from .workdir import Staged, Workdir

RENAME_FLAGS: Final = syscalls.RENAME_NOREPLACE | syscalls.RENAME_EXCHANGE


class Caller(NamedTuple):
    """Who asks. `umask` is applied to new objects unless a default ACL takes its place."""

    uid: int
    gid: int
    pid: int
    umask: int


class Place(NamedTuple):
    """A name in the upper: its directory, the number of that directory's fd, and the name."""

    parent: DirNode
    dirfd: int
    name: bytes


def fail(number: int, name: bytes = b"") -> OSError:
    """The OSError of an errno."""
    return OSError(number, os.strerror(number), os.fsdecode(name)) if name else OSError(number, os.strerror(number))


def path_of(place: Place) -> tuple[bytes, ...]:
    """Its path from the root of the upper."""
    names = [place.name]
    at = place.parent
    while at.parent is not None:
        names.append(at.name)
        at = at.parent
    return tuple(reversed(names))


class Mutations:
    """The operations on names of one writable mount."""

    def __init__(self, resolver: Resolver, table: NodeTable, work: Workdir, copy_up: CopyUp) -> None:
        self._resolver = resolver
        self._table = table
        self._work = work
        self._copy_up = copy_up

    # New objects.

    def mknod(self, parent: DirNode, name: bytes, mode: int, rdev: int, caller: Caller) -> None:
        """Create a regular file, FIFO, socket or device node; EEXIST; EPERM for the device 0:0, a whiteout."""
        if stat.S_ISREG(mode):
            self.create(parent, name, mode, caller)
            return
        if fmt.is_whiteout_device(mode, rdev):
            raise fail(errno.EPERM, name)
        place = self._new(parent, name)
        bits, access = self._inherit(parent, mode, caller)
        self._own_and_publish(self._work.stage_node(bits, rdev), place, bits, access, caller)

    def create(self, parent: DirNode, name: bytes, mode: int, caller: Caller) -> syscalls.Fd:
        """Create a regular file; returns its fd, opened O_RDWR."""
        place = self._new(parent, name)
        bits, access = self._inherit(parent, mode, caller)
        staged = self._work.stage_file(stat.S_IMODE(bits))
        self._own_and_publish(staged, place, bits, access, caller)
        return staged.fd

    def tmpfile(self, parent: DirNode, mode: int, caller: Caller) -> syscalls.Fd:
        """A regular file without a name, opened O_RDWR; EOPNOTSUPP where the upper has no O_TMPFILE."""
        if not self._work.abilities.tmpfile:
            raise fail(errno.EOPNOTSUPP)
        self._alive(parent)
        bits, access = self._inherit(parent, mode, caller)
        staged = self._work.stage_file(stat.S_IMODE(bits))
        self._own(staged, parent, bits, access, caller)
        return staged.fd

    def symlink(self, parent: DirNode, name: bytes, target: bytes, caller: Caller) -> None:
        place = self._new(parent, name)
        self._own_and_publish(self._work.stage_symlink(target), place, stat.S_IFLNK | 0o777, None, caller)

    def mkdir(self, parent: DirNode, name: bytes, mode: int, caller: Caller) -> None:
        place = self._new(parent, name)
        bits, access = self._inherit(parent, mode | stat.S_IFDIR, caller)
        heritage = self._heritage(parent)
        if heritage.gid is not None:
            bits |= stat.S_ISGID
        staged = self._work.stage_dir(stat.S_IMODE(bits))
        try:
            if heritage.default_acl is not None:
                syscalls.setxattr(staged.fd.fd, fmt.ACL_DEFAULT, heritage.default_acl)
            if self._resolver.lower_has(parent, name):
                self._work.mark_opaque(staged.fd.fd)
        except BaseException:
            staged.abandon()
            raise
        self._own_and_publish(staged, place, bits, access, caller)

    def _alive(self, parent: DirNode) -> None:
        if parent.unlinked:
            raise fail(errno.ENOENT)

    def _new(self, parent: DirNode, name: bytes) -> Place:
        """The place of a name that the union does not have; EEXIST, EINVAL for a reserved name."""
        self._alive(parent)
        if fmt.is_reserved(syscalls.component(name)):
            raise fail(errno.EINVAL, name)
        if len(name) > self._resolver.name_max:
            raise fail(errno.ENAMETOOLONG, name)
        if self._resolver.lower_has(parent, name) and self._resolver.find(parent, name) is not None:
            raise fail(errno.EEXIST, name)
        return Place(parent, self._copy_up.directory(parent), name)

    def _inherit(self, parent: DirNode, mode: int, caller: Caller) -> acl.Inherited:
        default = self._heritage(parent).default_acl
        if default is None:
            return acl.Inherited(mode & ~caller.umask, None)
        return acl.inherit(default, mode)

    def _heritage(self, parent: DirNode) -> Heritage:
        if parent.heritage is None:
            fd = self._resolver.directory(parent)
            st = os.fstat(fd)
            gid = st.st_gid if st.st_mode & stat.S_ISGID else None
            parent.heritage = Heritage(gid, optional_xattr(fd, fmt.ACL_DEFAULT))
        return parent.heritage

    def _own(self, staged: Staged, parent: DirNode, mode: int, access: bytes | None, caller: Caller) -> None:
        """Give a staged object its owner, and then the bits that a change of owner drops."""
        heritage = self._heritage(parent)
        gid = caller.gid if heritage.gid is None else heritage.gid
        if (caller.uid, gid) != (os.geteuid(), os.getegid()):
            syscalls.chown(staged.fd.fd, caller.uid, gid)
        if access is not None:
            syscalls.setxattr(staged.fd.fd, fmt.ACL_ACCESS, access)
        if mode & (stat.S_ISUID | stat.S_ISGID) and not stat.S_ISLNK(mode):
            syscalls.chmod(staged.fd.fd, stat.S_IMODE(mode))

    def _own_and_publish(self, staged: Staged, place: Place, mode: int, access: bytes | None, caller: Caller) -> None:
        try:
            self._own(staged, place.parent, mode, access, caller)
            self._publish_new(staged, place)
        except BaseException:
            staged.abandon()
            raise

    def _publish_new(self, staged: Staged, place: Place) -> None:
        parent, dirfd, name = place
        try:
            staged.publish(dirfd, name)
        except FileExistsError:
            if self._resolver.find(parent, name) is not None:
                raise
            staged.publish_over(dirfd, name)
        self._unhide(place)

    def _unhide(self, place: Place) -> None:
        """Drop the ``.wh.`` entry of a name that the upper now has; until then it speaks only of lowers."""
        if not place.parent.entry.lowers:
            return
        hidden = self._resolver.hidden(place.parent)
        if place.name in hidden:
            syscalls.unlink_at(place.dirfd, fmt.wh_name(place.name))
            hidden.discard(place.name)

    # Removing.

    def unlink(self, parent: DirNode, name: bytes) -> None:
        """Remove a name that is not a directory; ENOENT, EISDIR."""
        hit = self._victim(parent, name)
        if stat.S_ISDIR(hit.st.st_mode):
            raise fail(errno.EISDIR, name)
        below = self._resolver.lower_has(parent, name)
        place = Place(parent, self._copy_up.directory(parent), name)
        if not hit.entry.upper:
            self._whiteout(place)
        else:
            self._hold(child(parent, name))
            self._remove_upper(place, below)
        self._table.unname(parent, name)

    def _remove_upper(self, place: Place, below: bool) -> None:
        if not below:
            syscalls.unlink_at(place.dirfd, place.name)
        elif self._work.abilities.whiteout == "wh":
            self._whiteout(place)
            syscalls.unlink_at(place.dirfd, place.name)
        else:
            self._expect_whiteout(place)
            self._work.replace_by_whiteout(place.dirfd, place.name, directory=False)

    def _victim(self, parent: DirNode, name: bytes) -> Hit:
        self._alive(parent)
        hit = self._resolver.find(parent, name)
        if hit is None:
            raise fail(errno.ENOENT, name)
        return hit

    def _whiteout(self, place: Place) -> None:
        """Hide the lowers' name: the publishing call itself where the upper has nothing under that name."""
        if self._work.abilities.whiteout == "wh":
            hidden = self._resolver.hidden(place.parent)
            if place.name not in hidden:
                syscalls.create_at(place.dirfd, fmt.wh_name(place.name), 0o600).close()
                hidden.add(place.name)
            return
        self._expect_whiteout(place)
        self._work.place_whiteout(place.dirfd, place.name)

    def _expect_whiteout(self, place: Place) -> None:
        """Mark the upper directory if it takes a mark for its whiteouts to be looked at."""
        if self._work.abilities.whiteout == "xattr" and not self._resolver.xwhiteouts(place.parent):
            self._work.mark(place.dirfd, fmt.OPAQUE, fmt.OPAQUE_XWHITEOUTS)
            place.parent.xwhiteouts = True

    def _hold(self, node: Node | None) -> None:
        """Keep a descriptor of an upper object that is about to lose a name, if the kernel knows it."""
        if node is None:
            return
        if isinstance(node, DirNode):
            if node.entry.upper:
                self._resolver.upper_dir(node)
                node.handle.pinned = True
        elif node.entry.upper and node.state().orphan is None:
            node.state().orphan = self._resolver.open_object(node)

    def rmdir(self, parent: DirNode, name: bytes) -> None:
        """Remove an empty directory; ENOENT, ENOTDIR, ENOTEMPTY."""
        hit = self._victim(parent, name)
        if not stat.S_ISDIR(hit.st.st_mode):
            raise fail(errno.ENOTDIR, name)
        self._require_empty(parent, name, hit)
        below = self._resolver.lower_has(parent, name)
        place = Place(parent, self._copy_up.directory(parent), name)
        if not hit.entry.upper:
            self._whiteout(place)
        else:
            self._hold(child(parent, name))
            self._remove_upper_dir(place, below)
        self._table.unname(parent, name)

    def _require_empty(self, parent: DirNode, name: bytes, hit: Hit) -> None:
        node = child(parent, name)
        if not isinstance(node, DirNode):
            node = DirNode(0, parent, name, hit.entry, hit.ino)
        if not self._resolver.is_empty(node):
            raise fail(errno.ENOTEMPTY, name)

    def _remove_upper_dir(self, place: Place, below: bool) -> None:
        if below and self._work.abilities.whiteout != "wh":
            self._expect_whiteout(place)
            self._work.replace_by_whiteout(place.dirfd, place.name, directory=True)
            return
        if below:
            self._whiteout(place)
        try:
            syscalls.rmdir_at(place.dirfd, place.name)
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # It holds whiteouts: out of sight in one call, and emptied there.
            staged = self._work.fresh_name()
            syscalls.renameat2(place.dirfd, place.name, self._work.fd, staged)
            self._work.discard(staged)

    # Second names.

    def link(self, node: Node, parent: DirNode, name: bytes) -> Op[None]:
        """Give `node`, which is not a directory, a further name; EEXIST, EPERM."""
        if isinstance(node, DirNode):
            raise fail(errno.EPERM, name)
        yield from self._copy_up.node(node)
        place = self._new(parent, name)
        with self._resolver.open_object(node) as fd:
            st = os.fstat(fd.fd)
            staged = Staged(self._work, fd, None)
            try:
                self._publish_new(staged, place)
            except BaseException:
                staged.abandon()
                raise
        self._table.know_inode((st.st_dev, st.st_ino), node)
        self._table.alias(node, parent, name)
        self._release_orphan(node)

    def _release_orphan(self, node: Node) -> None:
        if node.open is not None and not node.unlinked:
            node.open.orphan = None

    # Renaming.

    def rename(self, parent: DirNode, name: bytes, new_parent: DirNode, new_name: bytes, flags: int) -> Op[None]:
        """Rename as renameat2(2) does, with NOREPLACE and EXCHANGE; EXDEV for a directory that has a lower."""
        if flags & ~RENAME_FLAGS or flags == RENAME_FLAGS:
            raise fail(errno.EINVAL)
        while True:
            source = self._victim(parent, name)
            self._alive(new_parent)
            target = self._resolver.find(new_parent, new_name)
            self._check_rename(source, target, new_name, flags)
            exchange = bool(flags & syscalls.RENAME_EXCHANGE)
            if not source.entry.upper:
                yield from self._to_upper(parent, name, source)
            elif exchange and target is not None and not target.entry.upper:
                yield from self._to_upper(new_parent, new_name, target)
            else:
                break  # nothing was awaited since both were looked at
        here = Place(parent, self._copy_up.directory(parent), name)
        there = Place(new_parent, self._copy_up.directory(new_parent), new_name)
        if exchange:
            self._exchange(here, there, source, target)
        elif not self._same_object(here, there):
            self._rename(here, there, source, target)

    def _to_upper(self, parent: DirNode, name: bytes, hit: Hit) -> Op[None]:
        node = child(parent, name)
        if node is None:
            node = self._table.add(parent, name, hit.entry, hit.ino, directory=False)
        yield from self._copy_up.node(node)
        self._table.settle(node)

    def _check_rename(self, source: Hit, target: Hit | None, new_name: bytes, flags: int) -> None:
        if fmt.is_reserved(new_name):
            raise fail(errno.EINVAL, new_name)
        exchange = flags & syscalls.RENAME_EXCHANGE
        is_dir = stat.S_ISDIR(source.st.st_mode)
        if is_dir and (source.entry.lowers or not source.entry.upper):
            raise fail(errno.EXDEV, new_name)
        if target is None:
            if exchange:
                raise fail(errno.ENOENT, new_name)
            return
        target_is_dir = stat.S_ISDIR(target.st.st_mode)
        if exchange:
            if target_is_dir and (target.entry.lowers or not target.entry.upper):
                raise fail(errno.EXDEV, new_name)
            return
        if flags & syscalls.RENAME_NOREPLACE:
            raise fail(errno.EEXIST, new_name)
        if is_dir != target_is_dir:
            raise fail(errno.EISDIR if target_is_dir else errno.ENOTDIR, new_name)

    def _same_object(self, here: Place, there: Place) -> bool:
        """Whether both names are one upper object already: then rename(2) does nothing."""
        target = stat_or_none(there.dirfd, there.name)
        return target is not None and os.path.samestat(target, syscalls.stat_at(here.dirfd, here.name))

    def _exchange(self, here: Place, there: Place, source: Hit, target: Hit | None) -> None:
        assert target is not None
        self._opaque_before(here, there, source)
        self._opaque_before(there, here, target)
        self._swap(here, there)
        self._table.exchange(here.parent, here.name, there.parent, there.name)

    def _opaque_before(self, here: Place, there: Place, hit: Hit) -> None:
        """A directory without lowers that goes where a lower has the name must hide it first."""
        if stat.S_ISDIR(hit.st.st_mode) and self._resolver.lower_has(there.parent, there.name):
            with syscalls.open_dir(here.dirfd, here.name) as fd:
                self._work.mark_opaque(fd.fd)

    def _rename(self, here: Place, there: Place, source: Hit, target: Hit | None) -> None:
        if target is not None and stat.S_ISDIR(target.st.st_mode):
            self._require_empty(there.parent, there.name, target)
            self._clear(there, target)
        self._opaque_before(here, there, source)
        if target is not None:
            self._hold(child(there.parent, there.name))
        if self._resolver.lower_has(here.parent, here.name):
            self._move_and_whiteout(here, there, target)
        else:
            self._move(here, there, stat.S_ISDIR(source.st.st_mode))
        self._table.unname(there.parent, there.name)
        self._table.move(here.parent, here.name, there.parent, there.name)
        self._unhide(there)

    def _clear(self, place: Place, hit: Hit) -> None:
        """Make a directory that the union shows empty empty in the upper, so that a rename can replace it."""
        if hit.entry.upper and not hit.entry.lowers:
            with syscalls.open_dir(place.dirfd, place.name) as fd, os.scandir(syscalls.proc_path(fd.fd)) as entries:
                if next(entries, None) is None:
                    return
        with self._directory_of(place, hit) as fd:
            metadata = read_metadata(fd.fd)
        staged = self._work.stage_dir(0o700)
        try:
            if self._resolver.lower_has(place.parent, place.name):
                self._work.mark_opaque(staged.fd.fd)
            apply_metadata(staged.fd.fd, metadata)
            if hit.entry.upper:
                staged.publish_over(place.dirfd, place.name)
            else:
                staged.publish(place.dirfd, place.name)
        except BaseException:
            staged.abandon()
            raise
        node = child(place.parent, place.name)
        if isinstance(node, DirNode):
            node.handle.drop()
            node.own_entry(UPPER)

    def _directory_of(self, place: Place, hit: Hit) -> syscalls.Fd:
        if hit.entry.upper:
            return syscalls.open_dir(place.dirfd, place.name)
        return syscalls.reopen(hit.entry.lowers[0].open(self._resolver.fds), os.O_PATH | os.O_DIRECTORY)

    def _move(self, here: Place, there: Place, is_dir: bool) -> None:
        """The publishing call of a rename that leaves no whiteout behind."""
        if is_dir and self._whiteout_at(there):
            self._swap(here, there)
            syscalls.unlink_at(here.dirfd, here.name)
        else:
            syscalls.renameat2(here.dirfd, here.name, there.dirfd, there.name)

    def _swap(self, here: Place, there: Place) -> None:
        self._work.require_exchange()
        syscalls.renameat2(here.dirfd, here.name, there.dirfd, there.name, syscalls.RENAME_EXCHANGE)

    def _whiteout_at(self, place: Place) -> bool:
        st = stat_or_none(place.dirfd, place.name)
        return st is not None and self._resolver.is_whiteout(place.parent, place.dirfd, place.name, st)

    def _move_and_whiteout(self, here: Place, there: Place, target: Hit | None) -> None:
        """The publishing call of a rename whose old name a lower has."""
        self._copy_up.mark_impure(there.parent, there.dirfd)
        if self._work.abilities.whiteout == "wh":
            self._whiteout(here)
            syscalls.renameat2(here.dirfd, here.name, there.dirfd, there.name)
        elif self._whiteout_at(there):
            self._expect_whiteout(here)
            self._swap(here, there)
        elif self._work.abilities.rename_whiteout:
            syscalls.renameat2(here.dirfd, here.name, there.dirfd, there.name, syscalls.RENAME_WHITEOUT)
        elif target is None:
            self._expect_whiteout(here)
            self._expect_whiteout(there)
            # Nobody sees a whiteout where there is nothing; exchanged, it is the one the old name needs.
            self._work.require_exchange()
            self._work.place_whiteout(there.dirfd, there.name)
            self._swap(here, there)
        else:
            self._replace_and_whiteout(here, there)

    def _replace_and_whiteout(self, here: Place, there: Place) -> None:
        """Where there is no RENAME_WHITEOUT: two calls, made one by a record that the next mount would act upon."""
        self._expect_whiteout(here)
        old = syscalls.stat_at(there.dirfd, there.name)
        self._work.require_exchange()
        intent.record(self._work, path_of(here), old.st_ino)
        try:
            self._swap(here, there)
            try:
                self._work.replace_by_whiteout(here.dirfd, here.name, directory=stat.S_ISDIR(old.st_mode))
            except BaseException:
                self._swap(here, there)
                raise
        finally:
            intent.retire(self._work)
