"""Changing names: one function per operation, and one view-changing system call in each.

Rules this file obeys:

- Steps that nobody can see come first (copy up, stage, mark opaque), then the one call that publishes, then cleaning
  that nobody can see. A crash anywhere leaves the view before or the view after: docs/recovery.md has the table.
- Deleting a name leaves a whiteout exactly when a lower has the name.
- A directory made over a name of a lower is opaque before it gets there.
"""

from __future__ import annotations

import errno
import os
import stat
from functools import partial

from . import acl, owners, syscalls
from . import format as fmt
from .acl import Heritage
from .copyup import CopyUp
from .guard import layer_of
from .inodes import DirNode, Node, NodeTable, child
from .layers import optional_xattr
from .ledger import Kind
from .lookup import Hit, Resolver
from .owners import Owners
from .places import Place, Places, fail
from .steps import Op
from .typed import Final, NamedTuple
from .workdir import Staged, Workdir

_NO_HERITAGE: Final = Heritage(None, None)
_SPECIAL: Final = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX


class Caller(NamedTuple):
    """Who asks. `umask` is applied to new objects unless a default ACL takes its place."""

    uid: int
    gid: int
    pid: int
    umask: int


class Mutations:
    """The operations on names of one writable mount."""

    def __init__(
        self,
        resolver: Resolver,
        table: NodeTable,
        work: Workdir,
        copy_up: CopyUp,
        places: Places,
        *,
        noacl: bool = False,
    ) -> None:
        self._noacl = noacl
        self._places = places
        self._resolver = resolver
        self._table = table
        self._work = work
        self._copy_up = copy_up
        self._owners: Owners = copy_up.keeping.owners
        self._form = copy_up.keeping.form

    # New objects.

    def mknod(self, parent: DirNode, name: bytes, mode: int, rdev: int, caller: Caller) -> None:
        """Create a regular file, FIFO, socket or device node; EEXIST; EPERM for the device 0:0, a whiteout."""
        if stat.S_ISREG(mode):
            self.create(parent, name, mode, caller)
            return
        if fmt.is_whiteout_device(mode, rdev):
            raise fail(errno.EPERM, name)
        place = self._places.new(parent, name)
        bits, access = self._inherit(parent, mode, caller)
        if owners.is_file_on_disk(mode, self._form):
            staged = self._work.stage_file(owners.disk_mode(bits, self._form))
        else:
            staged = self._work.stage_node(bits, rdev)
        self._own_and_publish(staged, place, bits, access, caller, rdev)

    def create(self, parent: DirNode, name: bytes, mode: int, caller: Caller) -> syscalls.Fd:
        """Create a regular file; returns its fd, opened O_RDWR."""
        place = self._places.new(parent, name)
        bits, access = self._inherit(parent, mode, caller)
        if self._is_whole(parent, bits, caller):
            try:
                return self._places.make(place, partial(syscalls.create_at, mode=stat.S_IMODE(bits)))
            except FileExistsError:
                pass  # a whiteout
        staged = self._work.stage_file(owners.disk_mode(bits, self._form))
        self._own_and_publish(staged, place, bits, access, caller)
        return staged.fd

    def tmpfile(self, parent: DirNode, mode: int, caller: Caller) -> tuple[Node, syscalls.Fd]:
        """A regular file without a name, and its fd, O_RDWR; EOPNOTSUPP where the upper has no O_TMPFILE."""
        if not self._work.abilities.tmpfile:
            raise fail(errno.EOPNOTSUPP)
        self._places.alive(parent)
        bits, access = self._inherit(parent, mode, caller)
        staged = self._work.stage_file(owners.disk_mode(bits, self._form))
        self._own(staged, parent, bits, access, caller)
        node = self._table.add_unnamed(parent, self._resolver.stack.ino(os.fstat(staged.fd.fd)))
        try:
            self._work.keep_staged(staged, node.nodeid)
        except BaseException:
            self._table.settle(node)
            raise
        node.state().kept = True
        return node, staged.fd

    def symlink(self, parent: DirNode, name: bytes, target: bytes, caller: Caller) -> None:
        place = self._places.new(parent, name)
        if self._is_whole(parent, 0, caller):
            try:
                return self._places.make(place, partial(syscalls.symlink_at, target))
            except FileExistsError:
                pass
        self._own_and_publish(self._work.stage_symlink(target), place, stat.S_IFLNK | 0o777, None, caller)

    def mkdir(self, parent: DirNode, name: bytes, mode: int, caller: Caller) -> None:
        place = self._places.new(parent, name)
        bits, access = self._inherit(parent, mode | stat.S_IFDIR, caller)
        heritage = self._heritage(parent)
        if heritage.gid is not None:
            bits |= stat.S_ISGID
        if self._is_whole(parent, bits, caller) and not self._resolver.lower_has(parent, name):
            try:
                return self._places.make(place, partial(syscalls.mkdir_at, mode=stat.S_IMODE(bits)))
            except FileExistsError:
                pass
        staged = self._work.stage_dir(owners.disk_mode(bits, self._form))
        try:
            if heritage.default_acl is not None:
                syscalls.setxattr(staged.fd.fd, self._acl_name(fmt.ACL_DEFAULT), heritage.default_acl)
            if self._resolver.lower_has(parent, name):
                self._work.mark_opaque(staged.fd.fd)
        except BaseException:
            staged.abandon()
            raise
        self._own_and_publish(staged, place, bits, access, caller)

    def _is_whole(self, parent: DirNode, mode: int, caller: Caller) -> bool:
        """Whether what is made in the upper directory of `parent` is at once what it is to be, with nothing to set.

        Then to make it is to publish it.
        """
        if self._form is not None or self._noacl or self._heritage(parent) != _NO_HERITAGE or mode & _SPECIAL:
            return False
        makes = self._owners.uid_of_maker(caller.uid), self._owners.gid_of_maker(caller.gid)
        return makes == (os.geteuid(), os.getegid())

    def _inherit(self, parent: DirNode, mode: int, caller: Caller) -> acl.Inherited:
        default = self._heritage(parent).default_acl
        if default is None:
            return acl.Inherited(mode & ~caller.umask, None)
        return acl.inherit(default, mode)

    def _heritage(self, parent: DirNode) -> Heritage:
        if parent.heritage is None:
            fd = self._resolver.directory(parent)
            form = layer_of(self._resolver, parent).override
            st = owners.recorded(fd, syscalls.fstat(fd), form)
            gid = st.st_gid if st.st_mode & stat.S_ISGID else None
            parent.heritage = Heritage(gid, None if self._noacl else _default_acl(fd, form))
        return parent.heritage

    def _acl_name(self, name: bytes) -> bytes:
        return fmt.name_in_layer(name, self._form)

    def _own(
        self, staged: Staged, parent: DirNode, mode: int, access: bytes | None, caller: Caller, rdev: int = 0
    ) -> None:
        """Give a staged object its owner, and then the bits that a change of owner drops."""
        heritage = self._heritage(parent)
        uid = self._owners.uid_of_maker(caller.uid)
        gid = self._owners.gid_of_maker(caller.gid) if heritage.gid is None else heritage.gid
        if self._form is not None:
            owners.record(staged.fd.fd, self._form, fmt.Override(uid, gid, mode, rdev))
            if access is not None:
                syscalls.setxattr(staged.fd.fd, self._acl_name(fmt.ACL_ACCESS), access)
            return
        if (uid, gid) != (os.geteuid(), os.getegid()):
            self._owners.forgive(lambda: syscalls.chown(staged.fd.fd, uid, gid))
        if access is not None:
            syscalls.setxattr(staged.fd.fd, fmt.ACL_ACCESS, access)
        if mode & (stat.S_ISUID | stat.S_ISGID) and not stat.S_ISLNK(mode):
            syscalls.chmod(staged.fd.fd, stat.S_IMODE(mode))

    def _own_and_publish(
        self, staged: Staged, place: Place, mode: int, access: bytes | None, caller: Caller, rdev: int = 0
    ) -> None:
        try:
            self._own(staged, place.parent, mode, access, caller, rdev)
            self._places.publish_new(staged, place)
        except BaseException:
            staged.abandon()
            raise

    # Removing.

    def unlink(self, parent: DirNode, name: bytes) -> Op[None]:
        """Remove a name that is not a directory; ENOENT, EISDIR."""
        while True:
            hit = self._places.victim(parent, name)
            if stat.S_ISDIR(hit.st.st_mode):
                raise fail(errno.EISDIR, name)
            if not self._places.is_counted(hit):
                break  # nothing was awaited since it was looked at
            yield from self._places.to_upper(parent, name, hit)
        below = self._resolver.lower_has(parent, name)
        place = Place(parent, self._copy_up.directory(parent), name)
        node = child(parent, name)
        if not hit.entry.upper:
            self._places.keep_data(node)
            self._intend_gone(parent, name, hit)
            self._places.whiteout(place)
        else:
            self._places.before_counting(hit.entry)
            self._intend_gone(parent, name, hit)
            if below or not self._places.take(node, place):
                self._places.hold(node)
                self._remove_upper(place, below)
        self._table.unname(parent, name)
        self._table.ledger.done()
        self._places.after_counting(hit.entry)

    def _intend_gone(self, parent: DirNode, name: bytes, hit: Hit) -> None:
        record, lower = self._table.record_of(parent, name), hit.entry.in_lowers
        self._table.ledger.intend(Kind.GONE, parent.nodeid, name, record=record, lower=lower)

    def _remove_upper(self, place: Place, below: bool) -> None:
        if not below:
            syscalls.unlink_at(place.dirfd, place.name)
        elif self._work.abilities.whiteout == "wh":
            self._places.whiteout(place)
            syscalls.unlink_at(place.dirfd, place.name)
        else:
            self._places.expect_whiteout(place)
            self._work.replace_by_whiteout(place.dirfd, place.name, directory=False)

    def rmdir(self, parent: DirNode, name: bytes) -> None:
        """Remove an empty directory; ENOENT, ENOTDIR, ENOTEMPTY."""
        hit = self._places.victim(parent, name)
        if not stat.S_ISDIR(hit.st.st_mode):
            raise fail(errno.ENOTDIR, name)
        self._places.require_empty(parent, name, hit)
        below = self._resolver.lower_has(parent, name)
        place = Place(parent, self._copy_up.directory(parent), name)
        self._intend_gone(parent, name, hit)
        if not hit.entry.upper:
            self._places.whiteout(place)
        else:
            self._places.hold(child(parent, name))
            self._remove_upper_dir(place, below)
        self._table.unname(parent, name)
        self._table.ledger.done()

    def _remove_upper_dir(self, place: Place, below: bool) -> None:
        if below and self._work.abilities.whiteout != "wh":
            self._places.expect_whiteout(place)
            self._work.replace_by_whiteout(place.dirfd, place.name, directory=True)
            return
        if below:
            self._places.whiteout(place)
        try:
            syscalls.rmdir_at(place.dirfd, place.name)
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # It holds whiteouts: out of sight in one call, and emptied there.
            self._work.take_away(place.dirfd, place.name)

    # Second names.

    def link(self, node: Node, parent: DirNode, name: bytes) -> Op[None]:
        """Give `node`, which is not a directory, a further name; EEXIST, EPERM."""
        if isinstance(node, DirNode):
            raise fail(errno.EPERM, name)
        self._places.guard.change(node)
        yield from self._copy_up.node(node, data=False)
        place = self._places.new(parent, name)
        with self._resolver.open_object(node) as fd:
            st = os.fstat(fd.fd)
            staged = Staged(self._work, fd, None, made=node.unlinked)
            try:
                if node.parent is not None and not node.unlinked:
                    self._places.redirect_data(fd, Place(node.parent, -1, node.name), None)
                self._places.before_counting(node.entry)
                self._places.expect_origin(place, node.entry, None if node.unlinked else node.parent)
                self._places.publish_new(staged, place, node)
            except BaseException:
                staged.abandon()
                raise
        self._table.know_inode((st.st_dev, st.st_ino), node)
        self._table.alias(node, parent, name)
        self._table.ledger.done()


def _default_acl(fd: int, form: fmt.OverrideForm | None) -> bytes | None:
    names = dict.fromkeys((fmt.name_in_layer(fmt.ACL_DEFAULT, form), fmt.ACL_DEFAULT))
    return next((value for name in names if (value := optional_xattr(fd, name)) is not None), None)
