"""Renaming: one view-changing system call, whatever is renamed over whatever.

Rules this file obeys:

- A directory that comes to lie over a name of a lower is opaque before it gets there, unless it has lowers of its own:
  those it keeps by a redirect, which until the rename says no more than its own path.
- A name of a lower that goes leaves a whiteout, by the very call that renames.
- What is renamed over is empty in the upper first, if it is a directory, and held by a descriptor.
"""

from __future__ import annotations

import errno
import os
import stat

from . import format as fmt
from . import intent, syscalls
from .copyup import CopyUp
from .entries import UPPER, Entry
from .inodes import DirNode, NodeTable, child
from .layers import has_any_xattr
from .ledger import Kind
from .logger import get_logger
from .lookup import Hit, Resolver
from .metadata import apply_metadata, read_metadata
from .places import Place, Places, fail, lower_path, path_of
from .steps import Op
from .syscalls import stat_or_none
from .typed import Final
from .workdir import Workdir

#: At most so much space do xattrs take that are outside of the inode; a file without data takes no more.
_XATTR_BYTES: Final = 1 << 16

RENAME_FLAGS: Final = syscalls.RENAME_NOREPLACE | syscalls.RENAME_EXCHANGE

log = get_logger(__name__)


class Renames:
    """The rename operation of one writable mount. `redirects`: directories that have lowers can be renamed."""

    def __init__(
        self, resolver: Resolver, table: NodeTable, work: Workdir, copy_up: CopyUp, places: Places, *, redirects: bool
    ) -> None:
        self._resolver = resolver
        self._table = table
        self._work = work
        self._copy_up = copy_up
        self._places = places
        self._redirects = redirects

    def rename(self, parent: DirNode, name: bytes, new_parent: DirNode, new_name: bytes, flags: int) -> Op[None]:
        """Rename as renameat2(2) does, with NOREPLACE and EXCHANGE; EXDEV for a merged directory without redirects."""
        if flags & ~RENAME_FLAGS or flags == RENAME_FLAGS:
            raise fail(errno.EINVAL)
        while True:
            source = self._places.victim(parent, name)
            self._places.alive(new_parent)
            target = self._resolver.find(new_parent, new_name, child(new_parent, new_name))
            self._guard(new_parent, new_name, target)
            self._check_rename(source, target, new_name, flags)
            exchange = bool(flags & syscalls.RENAME_EXCHANGE)
            if not source.entry.upper:
                yield from self._places.to_upper(parent, name, source)
            elif target is not None and not target.entry.upper and (exchange or self._places.is_counted(target)):
                yield from self._places.to_upper(new_parent, new_name, target)
            else:
                break  # nothing was awaited since both were looked at
        here = Place(parent, self._copy_up.directory(parent), name)
        there = Place(new_parent, self._copy_up.directory(new_parent), new_name)
        if exchange:
            self._exchange(here, there, source, target)
        elif not self._same_object(here, there):
            self._rename(here, there, source, target)

    def _guard(self, parent: DirNode, name: bytes, target: Hit | None) -> None:
        guard = self._places.guard
        if target is None:
            guard.add(parent)
        else:
            guard.take(parent, name, target.entry, directory=stat.S_ISDIR(target.st.st_mode))

    def _check_rename(self, source: Hit, target: Hit | None, new_name: bytes, flags: int) -> None:
        if fmt.is_reserved(new_name):
            raise fail(errno.EINVAL, new_name)
        exchange = flags & syscalls.RENAME_EXCHANGE
        is_dir = stat.S_ISDIR(source.st.st_mode)
        self._check_movable(source, new_name)
        if target is None:
            if exchange:
                raise fail(errno.ENOENT, new_name)
            return
        target_is_dir = stat.S_ISDIR(target.st.st_mode)
        if exchange:
            self._check_movable(target, new_name)
            return
        if flags & syscalls.RENAME_NOREPLACE:
            raise fail(errno.EEXIST, new_name)
        if is_dir != target_is_dir:
            raise fail(errno.EISDIR if target_is_dir else errno.ENOTDIR, new_name)

    def _check_movable(self, hit: Hit, name: bytes) -> None:
        if stat.S_ISDIR(hit.st.st_mode) and hit.entry.lowers and not self._redirects:
            raise fail(errno.EXDEV, name)

    def _same_object(self, here: Place, there: Place) -> bool:
        """Whether both names are one upper object already: then rename(2) does nothing."""
        target = stat_or_none(there.dirfd, there.name)
        return target is not None and os.path.samestat(target, syscalls.stat_at(here.dirfd, here.name))

    def _exchange(self, here: Place, there: Place, source: Hit, target: Hit | None) -> None:
        assert target is not None
        self._prepare(here, there, source)
        self._prepare(there, here, target)
        self._intend(Kind.EXCHANGE, here, there, source, target)
        self._swap(here, there)
        self._table.exchange(here.parent, here.name, there.parent, there.name)
        self._table.ledger.done()

    def _intend(self, kind: Kind, here: Place, there: Place, source: Hit, target: Hit | None) -> None:
        table = self._table
        table.ledger.intend(
            kind,
            here.parent.nodeid,
            here.name,
            record=table.record_of(here.parent, here.name),
            other=table.record_of(there.parent, there.name),
            new_parent=there.parent.nodeid,
            new_name=there.name,
            ino=source.st.st_ino,
            lower=target is not None and target.entry.in_lowers,
        )

    def _prepare(self, here: Place, there: Place, hit: Hit) -> None:
        """Before an object moves: one with lowers says what they call it, a directory without hides what it covers."""
        self._places.expect_origin(there, hit.entry, here.parent)
        if not stat.S_ISDIR(hit.st.st_mode):
            if stat.S_ISREG(hit.st.st_mode) and hit.st.st_blocks * 512 < max(hit.st.st_size, _XATTR_BYTES):
                self._redirect_data(here, there)
            return
        if hit.entry.lowers:
            self._redirect(here, hit, relative=here.parent is there.parent)
        elif self._resolver.lower_has(there.parent, there.name):
            with syscalls.open_dir(here.dirfd, here.name) as fd:
                self._work.mark_opaque(fd.fd)

    def _redirect_data(self, here: Place, there: Place) -> None:
        if self._resolver.impure(here.parent) and has_any_xattr(here.dirfd, here.name, fmt.METACOPY_NAMES):
            with syscalls.open_object(here.dirfd, here.name) as fd:
                self._places.redirect_data(fd, here, there)

    def _redirect(self, here: Place, hit: Hit, *, relative: bool) -> None:
        """Record what the directory `here` is called in the lowers, if it is not recorded yet (ovl_set_redirect)."""
        redirect = hit.entry.redirect
        if redirect is None or not (relative or redirect.absolute):
            redirect = fmt.Redirect(False, (here.name,)) if relative else lower_path(here, redirect)
            with syscalls.open_dir(here.dirfd, here.name) as fd:
                self._places.mark_redirect(fd, redirect)
        node = child(here.parent, here.name)
        if node is not None:
            node.entry = Entry(True, hit.entry.lowers, redirect)

    def _rename(self, here: Place, there: Place, source: Hit, target: Hit | None) -> None:
        if target is not None and stat.S_ISDIR(target.st.st_mode):
            self._places.require_empty(there.parent, there.name, target)
            self._clear(there, target)
        self._prepare(here, there, source)
        if target is not None:
            self._places.hold(child(there.parent, there.name))
            self._places.before_counting(target.entry)
        is_dir = stat.S_ISDIR(source.st.st_mode)
        self._intend(Kind.RENAME, here, there, source, target)
        if self._resolver.lower_has(here.parent, here.name):
            self._move_and_whiteout(here, there, target, is_dir)
        else:
            self._move(here, there, is_dir)
        self._table.unname(there.parent, there.name)
        self._table.move(here.parent, here.name, there.parent, there.name)
        self._table.ledger.done()
        if target is not None:
            self._places.after_counting(target.entry)
        self._places.unhide(there)

    def _clear(self, place: Place, hit: Hit) -> None:
        """Make a directory that the union shows empty empty in the upper, so that a rename can replace it."""
        if hit.entry.upper and not hit.entry.lowers:
            with syscalls.open_dir(place.dirfd, place.name) as fd, os.scandir(syscalls.proc_path(fd.fd)) as entries:
                if next(entries, None) is None:
                    return
        with self._directory_of(place, hit) as fd:
            form = self._copy_up.keeping.form if hit.entry.upper else hit.entry.lowers[0].layer.override
            metadata = read_metadata(fd.fd, form)
        staged = self._work.stage_dir(0o700)
        try:
            if self._resolver.lower_has(place.parent, place.name):
                self._work.mark_opaque(staged.fd.fd)
            apply_metadata(staged.fd.fd, metadata, self._copy_up.keeping)
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
        if is_dir and self._places.whiteout_at(there):
            self._swap(here, there)
            try:
                syscalls.unlink_at(here.dirfd, here.name)
            except OSError as exc:  # it is renamed, and a whiteout of what no lower has hides nothing
                log.warning("%r: a whiteout stays where it was: %s", here.name, exc.strerror)
        else:
            syscalls.renameat2(here.dirfd, here.name, there.dirfd, there.name)

    def _swap(self, here: Place, there: Place) -> None:
        self._work.require_exchange()
        syscalls.renameat2(here.dirfd, here.name, there.dirfd, there.name, syscalls.RENAME_EXCHANGE)

    def _move_and_whiteout(self, here: Place, there: Place, target: Hit | None, is_dir: bool) -> None:
        """The publishing call of a rename whose old name a lower has."""
        self._copy_up.mark_impure(there.parent, there.dirfd)
        if self._work.abilities.whiteout == "wh":
            self._places.whiteout(here)
            self._move(here, there, is_dir)
        elif self._places.whiteout_at(there):
            self._places.expect_whiteout(here)
            self._swap(here, there)
        elif self._work.abilities.rename_whiteout:
            syscalls.renameat2(here.dirfd, here.name, there.dirfd, there.name, syscalls.RENAME_WHITEOUT)
        elif target is None:
            self._places.expect_whiteout(here)
            self._places.expect_whiteout(there)
            # Nobody sees a whiteout where there is nothing; exchanged, it is the one the old name needs.
            self._work.require_exchange()
            self._work.place_whiteout(there.dirfd, there.name)
            self._swap(here, there)
        else:
            self._replace_and_whiteout(here, there)

    def _replace_and_whiteout(self, here: Place, there: Place) -> None:
        """Where there is no RENAME_WHITEOUT: two calls, made one by a record that the next mount would act upon."""
        self._places.expect_whiteout(here)
        old = stat_or_none(there.dirfd, there.name)
        if old is None:
            self._cover_and_whiteout(here, there)
            return
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

    def _cover_and_whiteout(self, here: Place, there: Place) -> None:
        """The same where what is replaced is only in a lower, so that the upper has nothing to exchange with."""
        intent.record(self._work, path_of(here), 0)
        try:
            syscalls.renameat2(here.dirfd, here.name, there.dirfd, there.name)
            try:
                self._work.place_whiteout(here.dirfd, here.name)
            except BaseException:
                syscalls.renameat2(there.dirfd, there.name, here.dirfd, here.name)
                raise
        finally:
            intent.retire(self._work)
