"""Names in the upper: what the operations on names have in common.

Rules this file obeys:

- Whether a name is there, is a whiteout, or may be made, is asked here; what that means is decided in `lookup`.
- A new name is published by one call, over a whiteout if there is one.
- A removed object that the kernel knows is kept in work, or else held by a descriptor, first.
- What is about to be published is in the ledger before it is, so that a successor does not do it again.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import partial

from . import format as fmt
from . import syscalls
from .copyup import CopyUp
from .entries import Entry
from .errors import SCARCE
from .guard import Guard
from .inodes import DirNode, Node, NodeTable, child
from .layers import read_data_marks
from .ledger import Kind
from .logger import get_logger
from .lookup import Hit, Resolver
from .steps import Op
from .syscalls import stat_or_none
from .typed import Final, NamedTuple, TypeVar
from .workdir import Staged, Workdir

T = TypeVar("T")

log = get_logger(__name__)

#: Redirects are longer than this only rarely: the kernel's own limit (redirect_max).
_LONG_REDIRECT: Final = 256


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


def lower_path(place: Place, redirect: fmt.Redirect | None) -> fmt.Redirect:
    """What the object at `place` is called from the root of the lowers: redirects above it are what counts there."""
    names = (place.name,) if redirect is None else redirect.names
    at = place.parent
    while at.parent is not None:
        above = at.entry.redirect
        names = ((at.name,) if above is None else above.names) + names
        if above is not None and above.absolute:
            break
        at = at.parent
    return fmt.Redirect(True, names)


class Places:
    """Names in the upper of one writable mount."""

    def __init__(self, resolver: Resolver, work: Workdir, copy_up: CopyUp, table: NodeTable, guard: Guard) -> None:
        self.guard = guard
        self.ledger = table.ledger
        self._table = table
        self._resolver = resolver
        self._work = work
        self._copy_up = copy_up

    def at(self, parent: DirNode, name: bytes) -> Place:
        """The place of a name; its directory is copied up."""
        return Place(parent, self._copy_up.directory(parent), name)

    def alive(self, parent: DirNode) -> None:
        if parent.unlinked:
            raise fail(errno.ENOENT)

    def new(self, parent: DirNode, name: bytes) -> Place:
        """The place of a name that the union does not have; EEXIST, EINVAL for a reserved name."""
        self.alive(parent)
        if fmt.is_reserved(syscalls.component(name)):
            raise fail(errno.EINVAL, name)
        if len(name) > self._resolver.name_max:
            raise fail(errno.ENAMETOOLONG, name)
        if self._resolver.lower_has(parent, name) and self._resolver.find(parent, name) is not None:
            raise fail(errno.EEXIST, name)
        self.guard.add(parent)
        return Place(parent, self._copy_up.directory(parent), name)

    def victim(self, parent: DirNode, name: bytes) -> Hit:
        self.alive(parent)
        hit = self._resolver.find(parent, name, child(parent, name))
        if hit is None:
            raise fail(errno.ENOENT, name)
        self.guard.take(parent, name, hit.entry, directory=stat.S_ISDIR(hit.st.st_mode))
        return hit

    def to_upper(self, parent: DirNode, name: bytes, hit: Hit) -> Op[None]:
        """See that what `name` is has that name in the upper, not necessarily with its data."""
        node = child(parent, name)
        if node is None:
            node = self._table.add(parent, name, hit.entry.of_object, hit.ino, directory=stat.S_ISDIR(hit.st.st_mode))
        yield from self._copy_up.node(node, data=False)
        if node.entry.index is not None:
            self._copy_up.alias(parent, name, node.entry.index)
        self._table.settle(node)

    # Objects that the index has: the union's names of them are counted.

    def is_counted(self, hit: Hit) -> bool:
        """Whether a name in a lower is one of several, so that it must be in the upper before it can go."""
        return not hit.entry.upper and hit.entry.name is not None

    def before_counting(self, entry: Entry) -> None:
        """A name of the object is about to be made or removed."""
        if entry.index is not None and self._resolver.index is not None:
            self._resolver.index.settle(entry.index)

    def expect_origin(self, place: Place, entry: Entry, here: DirNode | None) -> None:
        """Mark the upper directory where an object gets a name, so that its origin is looked for: it comes from `here`.

        What depends on that is the inode number after a remount, and for an object of the index what it is.
        """
        indexed = entry.index is not None
        if indexed or (here is not None and here is not place.parent and self._resolver.impure(here)):
            self._copy_up.mark_impure(place.parent, place.dirfd, required=indexed)

    def after_counting(self, entry: Entry) -> None:
        """A name of the object was removed, perhaps the last one."""
        if entry.index is not None and self._resolver.index is not None:
            self._resolver.index.retire(entry.index)

    def whiteout(self, place: Place) -> None:
        """Hide the lowers' name: the publishing call itself where the upper has nothing under that name."""
        if self._work.abilities.whiteout == "wh":
            hidden = self._resolver.hidden(place.parent)
            if place.name not in hidden:
                syscalls.create_at(place.dirfd, fmt.wh_name(place.name), 0o600).close()
                hidden.add(place.name)
            return
        self.expect_whiteout(place)
        self._work.place_whiteout(place.dirfd, place.name)

    def expect_whiteout(self, place: Place) -> None:
        """Mark the upper directory if it takes a mark for its whiteouts to be looked at."""
        if self._work.abilities.whiteout == "xattr" and not self._resolver.xwhiteouts(place.parent):
            self._work.mark(place.dirfd, fmt.OPAQUE, fmt.OPAQUE_XWHITEOUTS)
            place.parent.xwhiteouts = True

    def hold(self, node: Node | None) -> None:
        """Keep a descriptor of an upper object that is about to lose a name, if the kernel knows it."""
        if node is None:
            return
        if isinstance(node, DirNode):
            if node.entry.upper:
                self._resolver.upper_dir(node)
                self._resolver.fds.pin(node.handle)
        elif self._loses_all(node) and not node.state().kept and node.state().orphan is None:
            self.keep_data(node)
            if node.entry.index is None and node.parent is not None:
                dirfd = self._resolver.upper_dir(node.parent)
                node.state().kept = self._work.keep(dirfd, node.name, node.nodeid)
            if not node.state().kept:
                node.state().orphan = self._resolver.fds.keep(partial(self._resolver.open_object, node))

    def take(self, node: Node | None, place: Place) -> bool:
        """Remove a name of the upper by moving the object to where it is kept; False where that is not possible."""
        if node is None or isinstance(node, DirNode) or node.entry.index is not None or not self._loses_all(node):
            return False
        self.keep_data(node)
        if not self._work.take(place.dirfd, place.name, node.nodeid):
            return False
        node.state().kept = True
        return True

    def _loses_all(self, node: Node) -> bool:
        """Whether an upper object that loses a name can be reached by no other name that is known."""
        return node.entry.upper and (node.links is None or not node.links.names)

    def keep_data(self, node: Node | None) -> None:
        """Know where the data of a file is before it loses the name that says so. One without any goes all the same."""
        if node is None or not self._resolver.follows_data:
            return
        try:
            with self._resolver.open_object(node) as fd:
                if stat.S_ISREG(syscalls.fstat(fd.fd).st_mode):
                    self._resolver.locate(node, fd.fd)
        except OSError as exc:
            if exc.errno in SCARCE:
                raise

    # Redirects: what an object that moves is called in the lowers.

    def mark_redirect(self, fd: syscalls.Fd, redirect: fmt.Redirect) -> None:
        """Set the mark; EXDEV for a path that is too long for the upper: the caller copies, as between file systems."""
        value = redirect.encode()
        try:
            self._work.mark(fd.fd, fmt.REDIRECT, value)
        except OSError as exc:
            if exc.errno in (errno.E2BIG, errno.ERANGE) or (exc.errno == errno.ENOSPC and len(value) > _LONG_REDIRECT):
                raise fail(errno.EXDEV) from exc
            raise

    def redirect_data(self, fd: syscalls.Fd, here: Place, there: Place | None) -> None:
        """Before the file `fd` of the upper, which is `here`, is `there` or gets one more name: say where its data is.

        A name is good for a file with one link that stays in its directory, a path for all others. EIO for a file
        whose data cannot be found, and never would again.
        """
        st = os.fstat(fd.fd)
        marks = read_data_marks(fd.fd) if stat.S_ISREG(st.st_mode) else None
        if marks is None or (marks.redirect is not None and marks.redirect.absolute):
            return
        if not self._resolver.metacopy:
            raise fail(errno.EIO, here.name)
        if there is None or here.parent is not there.parent or st.st_nlink > 1:
            self.mark_redirect(fd, lower_path(here, marks.redirect))
        elif marks.redirect is None:
            self.mark_redirect(fd, fmt.Redirect(False, (here.name,)))

    def require_empty(self, parent: DirNode, name: bytes, hit: Hit) -> None:
        node = child(parent, name)
        if not isinstance(node, DirNode):
            node = DirNode(0, parent, name, hit.entry, hit.ino)
        if not self._resolver.is_empty(node):
            raise fail(errno.ENOTEMPTY, name)

    def publish_new(self, staged: Staged, place: Place, linked: Node | None = None) -> None:
        """Make a new name, of a new object or of one that is `linked`."""
        parent, dirfd, name = place
        if linked is None:
            self.ledger.intend(Kind.NEW, parent.nodeid, name)
        else:
            self.ledger.intend(Kind.LINK, parent.nodeid, name, record=linked.nodeid)
        try:
            staged.publish(dirfd, name)
        except FileExistsError:
            if self._resolver.find(parent, name) is not None:
                raise
            staged.publish_over(dirfd, name)
        self.unhide(place)

    def make(self, place: Place, make: Callable[[int, bytes], T]) -> T:
        """Have `make` make a new name in its directory, whole in one call; EEXIST where anything is, a whiteout too."""
        self.ledger.intend(Kind.NEW, place.parent.nodeid, place.name)
        made = make(place.dirfd, place.name)
        self.unhide(place)
        return made

    def unhide(self, place: Place) -> None:
        """Drop the ``.wh.`` entry of a name that the upper now has. Best effort: it speaks only of lowers."""
        if not place.parent.entry.lowers:
            return
        try:
            hidden = self._resolver.hidden(place.parent)
            if place.name in hidden:
                syscalls.unlink_at(place.dirfd, fmt.wh_name(place.name))
                hidden.discard(place.name)
        except OSError as exc:
            log.warning("%r: what hides it in lowers stays beside it: %s", place.name, exc.strerror)

    def whiteout_at(self, place: Place) -> bool:
        st = stat_or_none(place.dirfd, place.name)
        return st is not None and self._resolver.is_whiteout(place.parent, place.dirfd, place.name, st)
