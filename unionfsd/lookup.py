"""Resolution: what a name in a merged directory is, and where an object lies. Nowhere else.

The rules (Documentation/filesystems/overlayfs.rst, fs/overlayfs/namei.c):

- The upper decides first. A whiteout there, or a ``.wh.`` entry, hides the name in all lowers.
- Then the lowers, top first. The first that has the name decides; a whiteout ends the search.
- Directories merge down to the first that is opaque, and end at the first object that is not a directory.
- A redirect of a directory says what it is called in the layers below: another name in the same directory, or a path
  from the root of those layers. Names on that path are looked up by these same rules.
- A file with the mark metacopy has its data in the next layer below that has it, under the same name or that of its
  redirect; from the root, also in a data-only layer.
- An upper directory has the very path that it has in the union; a lower one a chain of names of its own.

A name in lowers costs no system call per layer once the lowers of the directory were read (`LowerNames`): small
directories are read at the first question, large ones when questions repeat.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from . import format as fmt
from . import listing, syscalls
from .entries import UPPER, Entry, Source, Spot
from .errors import SCARCE
from .fdcache import FdCache
from .index import Index
from .inodes import DirNode, Node
from .integrity import Integrity
from .layers import DataMarks, LayerStack, LowerDir, exists, optional_xattr, read_data_marks, read_marks
from .listing import DT_DIR, DT_REG, DT_UNKNOWN, Listing, LowerNames, Row, UpperNames, merge, read_lowers, read_upper
from .logger import get_logger
from .options import Verity
from .typed import Final, NamedTuple
from .workdir import is_whiteout, kept_name

log = get_logger(__name__)

#: Lower directories of at most this size in all (st_size, bytes) are read at the first lookup in them.
_READ_AT_ONCE: Final = 64 * 1024
#: Others after this many lookups.
_READ_AFTER: Final = 16
#: At most this many merged names are kept in all directories together.
_KEEP_NAMES: Final = 1_000_000


class Hit(NamedTuple):
    """What a name is: its entry, the stat of the object that decides, and the inode number the mount shows."""

    entry: Entry
    st: os.stat_result
    ino: int


class Resolver:
    """Answers for one `LayerStack`; `fds` counts the directory descriptors it opens."""

    def __init__(
        self, stack: LayerStack, fds: FdCache, *, follow_redirects: bool, metacopy: bool = False, verity: Verity = "off"
    ) -> None:
        """`metacopy`: data of files is looked for in lowers, too. `verity`: what is done about its digest."""
        #: Set where names of one lower object are kept together, and where lowers are checked.
        self.index: Index | None = None
        self.integrity: Integrity | None = None
        #: The directory where objects without a name are kept, if anywhere.
        self.kept_in = -1
        self.follow_redirects = follow_redirects
        self.metacopy = metacopy
        self.verity = verity
        #: Whether files may have their data elsewhere.
        self.follows_data = metacopy or bool(stack.data)
        self.stack = stack
        self.fds = fds
        self.name_max = os.fstatvfs(stack.top.root.fd).f_namemax
        #: The layer roots that are merged, top first: where absolute redirects start.
        self._roots: tuple[LowerDir, ...] = ()
        #: The directories whose merged names of lowers are kept.
        self.kept = listing.KeptNames(_KEEP_NAMES)

    def root(self) -> Hit:
        """The root of the union: all layer roots, down to the first opaque one."""
        upper = self.stack.upper
        opaque = upper is not None and read_marks(upper.root.fd).opaque
        roots = () if opaque else tuple(layer.root_dir for layer in self.stack.lowers)
        if self.integrity is not None:
            self.integrity.directories(roots)
        opaque_at = (depth for depth, root in enumerate(roots[:-1], 1) if root.marks(self.fds).opaque)
        self._roots = roots[: next(opaque_at, len(roots))]
        st = syscalls.fstat(self.stack.top.root.fd)
        return Hit(Entry(upper is not None, self._roots), st, self._dir_ino(self._roots, st))

    # Where things are.

    def upper_dir(self, node: DirNode) -> int:
        """Number of the O_PATH fd of the upper directory of `node`, which is in the upper."""
        holder = node.handle
        if holder.fd is not None:
            holder.hot += 1
            return holder.fd.fd
        if node.unlinked:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        missing: list[DirNode] = []
        at: DirNode | None = node
        while at is not None and at.handle.fd is None and at.parent is not None:
            missing.append(at)
            at = at.parent
        number = self._top_fd(at)
        for step in reversed(missing):
            number = self.fds.admit(step.handle, syscalls.open_dir(number, step.name))
        return number

    def _top_fd(self, node: DirNode | None) -> int:
        if node is None or node.handle.fd is None:
            assert self.stack.upper is not None
            return self.stack.upper.root.fd
        return node.handle.fd.fd

    def directory(self, node: DirNode) -> int:
        """Number of the O_PATH fd of the topmost directory that `node` is made of."""
        return self.upper_dir(node) if node.entry.upper else node.entry.lowers[0].open(self.fds)

    def spot(self, node: Node) -> Spot:
        """Where the object of `node` can be reached; ESTALE for one without a name that nobody kept."""
        if isinstance(node, DirNode):
            return Spot(self.directory(node), b"")
        entry = node.entry
        if entry.index is not None and self.index is not None and not node.unlinked:
            return Spot(self.index.fd, entry.index)
        if not entry.upper:
            return Spot(entry.lowers[0].open(self.fds), entry.name or node.name)
        if node.unlinked:
            return self._nameless(node)
        assert node.parent is not None
        return Spot(self.upper_dir(node.parent), node.name)

    def _nameless(self, node: Node) -> Spot:
        state = node.open
        if state is not None and state.kept:
            return Spot(self.kept_in, kept_name(node.nodeid))
        if state is None or state.orphan is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return Spot(state.orphan.fd, b"")

    def stat(self, node: Node) -> os.stat_result:
        """lstat of the object of `node`."""
        dirfd, name = self.spot(node)
        return syscalls.stat_at(dirfd, name) if name else syscalls.fstat(dirfd)

    def open_object(self, node: Node) -> syscalls.Fd:
        """A new O_PATH fd of the object of `node`."""
        dirfd, name = self.spot(node)
        return syscalls.open_object(dirfd, name) if name else syscalls.reopen(dirfd, os.O_PATH)

    # Where data is.

    def locate(self, node: Node, fd: int) -> Source | None:
        """Where the data of a file is whose object is `fd`, None when it is there itself; kept in the node's entry.

        EIO when it is nowhere, or may not be followed. Of a file without a name it has to be known before it lost it.
        """
        if node.entry.data is not None:
            return node.entry.data
        try:
            marks = read_data_marks(fd)
            if marks is None:
                return None
            source = None if node.unlinked else self._data_of(node, marks)
        except OSError as exc:
            if exc.errno in SCARCE:
                raise
            log.error("%r: where its data is (metacopy) cannot be found out: %s", node.name, exc)
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from exc
        if source is None:
            hint = "" if self.metacopy else "; it is looked for in lowers with metacopy=on"
            log.error("%r: its data is in another layer (metacopy) and was not found%s", node.name, hint)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.verity == "require" and source.digest is None:
            log.error("%r: no digest was recorded of its data, and verity=require", node.name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        node.entry = node.entry.with_data(source)
        return source

    def _data_of(self, node: Node, marks: DataMarks) -> Source | None:
        assert node.parent is not None
        beside, roots, name = node.parent.entry.lowers, self._roots, node.name
        if not node.entry.upper:
            lower, name = node.entry.lowers[0], node.entry.name or name
            above = [at.layer for at in beside].index(lower.layer)
            beside, roots = beside[above + 1 :], self._roots_below(lower)
        digest = None if self.verity == "off" else marks.digest
        found = self._data_below(beside, roots, name, marks.redirect)
        return None if found is None else Source(*found, digest)

    def _data_below(
        self, dirs: tuple[LowerDir, ...], roots: tuple[LowerDir, ...], name: bytes, redirect: fmt.Redirect | None
    ) -> tuple[LowerDir, bytes] | None:
        """The file with data that a file without means: `name` in the directories `dirs`, unless redirected."""
        if redirect is not None:
            name = redirect.names[-1]
            if redirect.absolute:
                dirs = self._walk(roots, redirect.names[:-1])
        for index, lower in enumerate(dirs if self.metacopy else ()):
            dirfd = lower.open(self.fds)
            st = syscalls.stat_or_none(dirfd, name)
            if st is not None:
                if not stat.S_ISREG(st.st_mode) or is_whiteout(
                    dirfd, name, st, xwhiteouts=lower.marks(self.fds).xwhiteouts
                ):
                    return None
                with syscalls.open_object(dirfd, name) as fd:
                    marks = read_data_marks(fd.fd)
                if marks is None:
                    return lower, name
                return self._data_below(dirs[index + 1 :], self._roots_below(lower), name, marks.redirect)
            if exists(dirfd, fmt.wh_name(name)):
                return None
        return None if redirect is None or not redirect.absolute else self.stack.find_data(redirect.names, self.fds)

    # What names are.

    def find(self, parent: DirNode, name: bytes, known: Node | None = None) -> Hit | None:
        """What `name` in `parent` is, if anything; ENAMETOOLONG. The number of `known`, its node, is believed."""
        if len(syscalls.component(name)) > self.name_max:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), os.fsdecode(name))
        if fmt.is_reserved(name):
            return None
        entry = parent.entry
        if entry.upper:
            dirfd = self.upper_dir(parent)
            st = syscalls.stat_or_none(dirfd, name)
            if st is not None:
                return self._upper_hit(parent, dirfd, name, st, known)
            if not entry.lowers or name in self.hidden(parent):
                return None
        return self._checked(parent, name, self.find_lower(parent, name))

    def _checked(self, parent: DirNode, name: bytes, hit: Hit | None) -> Hit | None:
        """What the lowers of `parent` say of `name`; EIO where they are checked, and are not what they must be."""
        if self.integrity is not None:
            found = () if hit is None else hit.entry.lowers
            directory = hit is not None and stat.S_ISDIR(hit.st.st_mode)
            if parent.lower_names is None:
                self.integrity.resolved(parent.entry.lowers, name, found, directory=directory)
            if directory:
                self.integrity.directories(found)
            elif hit is not None and hit.entry.index is None:
                self.integrity.leaf(found[0], name)
        return hit

    def _upper_hit(
        self, parent: DirNode, dirfd: int, name: bytes, st: os.stat_result, known: Node | None
    ) -> Hit | None:
        if stat.S_ISDIR(st.st_mode):
            entry = self._upper_dir_entry(parent, dirfd, name)
            return Hit(entry, st, self._dir_ino(entry.lowers, st))
        if self.is_whiteout(parent, dirfd, name, st):
            return None
        indexed = None
        if self.index is not None and st.st_nlink > 1 and (self.impure(parent) or self.lower_has(parent, name)):
            with syscalls.open_object(dirfd, name) as fd:
                indexed = self.index.find_upper(fd.fd, st)
        entry = UPPER if indexed is None else Entry(True, (), index=indexed)
        if known is not None:
            return Hit(entry, st, known.ino)
        return Hit(entry, st, self._leaf_ino(parent, dirfd, name, st, indexed=indexed is not None))

    def _upper_dir_entry(self, parent: DirNode, dirfd: int, name: bytes) -> Entry:
        """What the upper directory `name` is merged with."""
        if not self._roots:
            return UPPER
        with syscalls.open_dir(dirfd, name) as fd:
            marks = read_marks(fd.fd)
        if marks.opaque or (parent.entry.lowers and name in self.hidden(parent)):
            return UPPER
        if marks.redirect is not None:
            lowers = self._follow(parent.entry.lowers, self._roots, marks.redirect)
            if self.integrity is not None:
                self.integrity.directories(lowers)
            return Entry(True, lowers, marks.redirect)
        found = self._checked(parent, name, self.find_lower(parent, name)) if parent.entry.lowers else None
        return UPPER if found is None or not stat.S_ISDIR(found.st.st_mode) else Entry(True, found.entry.lowers)

    def _follow(
        self, beside: tuple[LowerDir, ...], roots: tuple[LowerDir, ...], redirect: fmt.Redirect
    ) -> tuple[LowerDir, ...]:
        """The directories that `redirect` means: relative to the directories `beside`, or from `roots`.

        EPERM when redirects are not followed, as the kernel has it.
        """
        if not self.follow_redirects:
            raise OSError(errno.EPERM, "redirect_dir=nofollow, but a layer has a redirect")
        return self._walk(roots if redirect.absolute else beside, redirect.names)

    def _walk(self, dirs: tuple[LowerDir, ...], names: tuple[bytes, ...]) -> tuple[LowerDir, ...]:
        """The directories that the path `names` beneath `dirs` leads to, by the rules for lowers; none when it ends."""
        for name in names:
            hit = self._probe_lowers(dirs, name)
            if hit is None or not stat.S_ISDIR(hit.st.st_mode):
                return ()
            dirs = hit.entry.lowers
        return dirs

    def is_whiteout(self, parent: DirNode, dirfd: int, name: bytes, st: os.stat_result) -> bool:
        """Whether the entry `name` of the upper directory `dirfd` of `parent` is a whiteout."""
        if stat.S_ISREG(st.st_mode):
            return not st.st_size and is_whiteout(dirfd, name, st, xwhiteouts=self.xwhiteouts(parent))
        return fmt.is_whiteout_device(st.st_mode, st.st_rdev)

    def xwhiteouts(self, node: DirNode) -> bool:
        """Whether the upper directory of `node` may hold xattr whiteouts."""
        if node.xwhiteouts is None:
            node.xwhiteouts = read_marks(self.upper_dir(node)).xwhiteouts
        return node.xwhiteouts

    def hidden(self, node: DirNode) -> set[bytes]:
        """The names that ``.wh.`` entries of the upper directory of `node` hide in its lowers."""
        if node.hidden is None:
            assert self.stack.upper is not None
            found = self.stack.upper.scan(self.upper_dir(node))
            node.hidden = {target for name, _ in found if (target := fmt.wh_target(name))}
        return node.hidden

    def find_lower(self, parent: DirNode, name: bytes) -> Hit | None:
        """What `name` would be in `parent` if the upper had nothing."""
        names = self.lower_names(parent, may_read=True)
        if names is None:
            return self._probe_lowers(parent.entry.lowers, name)
        low = names.get(name)
        if low is None:
            return None
        if low.type == DT_DIR:
            return self._lower_dir_hit(parent.entry.lowers, list(names.indices(name)), name)
        lower = parent.entry.lowers[low.lower]
        st = syscalls.stat_at(lower.open(self.fds), name)
        if self.index is not None and st.st_nlink > 1:
            return self._linked(self.index, lower, name, st)
        return Hit(parent.leaf_entry(lower), st, self.stack.ino(st))

    def _linked(self, index: Index, lower: LowerDir, name: bytes, st: os.stat_result) -> Hit:
        """A leaf of a lower that has other names, by any of which it may have been copied up."""
        found = index.find(lower.layer, lower.open(self.fds), name)
        entry = Entry(False, (lower,), name=name, index=None if found is None else found.name)
        return Hit(entry, st if found is None else found.st, self.stack.ino(st))

    def lower_has(self, parent: DirNode, name: bytes) -> bool:
        """Whether a lower of `parent` has `name`, so that deleting it takes a whiteout."""
        if not parent.entry.lowers:
            return False
        names = self.lower_names(parent, may_read=True)
        if names is not None:
            return name in names
        return self._probe_lowers(parent.entry.lowers, name) is not None

    def _lower_dir_hit(self, parents: tuple[LowerDir, ...], indices: list[int], name: bytes) -> Hit:
        """The directory `name` of those of `parents` that have it, whose `indices` are given, top first."""
        lowers: list[LowerDir] = []
        for index in indices:
            lower = parents[index].child(name)
            lowers.append(lower)
            if lower.layer is self.stack.lowers[-1]:
                break  # nothing is below that its marks could speak of
            marks = lower.marks(self.fds)
            if marks.opaque:
                break
            if marks.redirect is not None:
                lowers += self._follow(parents[index + 1 :], self._roots_below(lower), marks.redirect)
                break
        st = lowers[0].stat(self.fds)
        return Hit(Entry(False, tuple(lowers)), st, self.stack.ino(st))

    def _roots_below(self, lower: LowerDir) -> tuple[LowerDir, ...]:
        layers = [root.layer for root in self._roots]
        return self._roots[layers.index(lower.layer) + 1 :] if lower.layer in layers else ()

    def _probe_lowers(self, lowers: tuple[LowerDir, ...], name: bytes) -> Hit | None:
        """`find_lower` by asking each layer."""
        indices: list[int] = []
        for index, lower in enumerate(lowers):
            dirfd = lower.open(self.fds)
            st = syscalls.stat_or_none(dirfd, name)
            if st is not None:
                if is_whiteout(dirfd, name, st, xwhiteouts=lower.marks(self.fds).xwhiteouts):
                    break
                if not stat.S_ISDIR(st.st_mode):
                    if indices:
                        break
                    if self.index is not None and st.st_nlink > 1:
                        return self._linked(self.index, lower, name, st)
                    return Hit(Entry(False, (lower,)), st, self.stack.ino(st))
                indices.append(index)
            if exists(dirfd, fmt.wh_name(name)):
                break
        return self._lower_dir_hit(lowers, indices, name) if indices else None

    # Inode numbers.

    def _dir_ino(self, lowers: tuple[LowerDir, ...], st: os.stat_result) -> int:
        """A directory keeps the number of the topmost lower it is merged with, so copy-up does not change it."""
        return self.stack.ino(lowers[0].stat(self.fds) if lowers else st)

    def _leaf_ino(self, parent: DirNode, dirfd: int, name: bytes, st: os.stat_result, *, indexed: bool = False) -> int:
        """A copied-up object keeps the number of the lower it came from.

        Where that has several names they share it only if they are one object, by the index.
        """
        if self._roots and (self.impure(parent) or self.lower_has(parent, name)):
            with syscalls.open_object(dirfd, name) as fd:
                values = (optional_xattr(fd.fd, attr) for attr in fmt.ORIGIN_NAMES)
                origin = next((fmt.decode_origin(value) for value in values if value), None)
            if origin is not None:
                was = self._origin_at(parent, name, origin) or self.stack.find_origin(origin)
                if was is not None and (was.st_nlink == 1 or indexed) and not stat.S_IFMT(was.st_mode ^ st.st_mode):
                    return self.stack.ino(was)
        return self.stack.ino(st)

    def _origin_at(self, parent: DirNode, name: bytes, origin: fmt.Origin) -> os.stat_result | None:
        """The object that `origin` means if it lies under `name` in a lower of `parent`, where most do."""
        below = self.find_lower(parent, name) if parent.entry.lowers else None
        if below is None or below.entry.lowers[0].layer.uuid != origin.uuid:
            return None
        try:
            handle = syscalls.file_handle(below.entry.lowers[0].open(self.fds), name)
        except OSError:
            return None
        if handle != (origin.kind, origin.handle):
            return None
        return below.st if below.entry.index is None else syscalls.stat_at(below.entry.lowers[0].open(self.fds), name)

    def impure(self, node: DirNode) -> bool:
        """Whether the upper directory of `node` says that it holds copied-up objects."""
        if node.impure is None:
            fd = self.upper_dir(node)
            node.impure = any(optional_xattr(fd, attr) is not None for attr in fmt.IMPURE_NAMES)
        return node.impure

    # Directories as a whole.

    def lower_names(self, node: DirNode, *, may_read: bool = False, read: bool = False) -> LowerNames | None:
        """Merged names of the lowers of `node`, if read before, or read now when it pays (`may_read`) or must be."""
        if node.lower_names is not None:
            return node.lower_names
        if not node.entry.lowers or not (read or (may_read and self._pays(node))):
            return None
        if self.integrity is not None and not all(map(self.integrity.names, node.entry.lowers)):
            if read:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return None  # each is looked up by itself, and checked
        names = read_lowers(node.entry.lowers, self.stack, self.fds)
        node.lower_names = names
        self.kept.keep(node)
        return names

    def _pays(self, node: DirNode) -> bool:
        if not node.probes:
            size = sum(lower.stat(self.fds).st_size for lower in node.entry.lowers)
            node.probes = 1
            return size <= _READ_AT_ONCE
        node.probes += 1
        return node.probes > _READ_AFTER

    def _read_upper(self, node: DirNode) -> UpperNames | None:
        if not node.entry.upper:
            return None
        assert self.stack.upper is not None
        return read_upper(self.upper_dir(node), self.stack.upper, self.stack, xwhiteouts=self.xwhiteouts(node))

    def listing(self, node: DirNode) -> Listing:
        """A fresh snapshot of the directory `node`; one that was removed is empty."""
        parent = node if node.parent is None else node.parent
        return Listing(node.ino, parent.ino, () if node.unlinked else self._rows(node))

    def _rows(self, node: DirNode) -> Iterator[Row]:
        """Rows of a listing, with the inode numbers that stat shows."""
        lowers, upper = self.lower_names(node, read=True), self._read_upper(node)
        as_they_are = not (node.children or self.stack.overrides or (upper is not None and upper.names))
        return merge(upper, lowers) if as_they_are else self._numbered(node, upper, lowers)

    def _numbered(self, node: DirNode, upper: UpperNames | None, lowers: LowerNames | None) -> Iterator[Row]:
        known = node.children or {}
        impure = upper is not None and self.impure(node)
        for name, ino, kind in merge(upper, lowers):
            if kind == DT_REG and self.stack.overrides:
                kind = DT_UNKNOWN  # an empty file may stand for a device node
            if name in known:
                ino = known[name].ino
            elif upper is not None and name in upper.names and (impure or (lowers and name in lowers)):
                ino = self._listed_ino(node, name, ino)
            yield name, ino, kind

    def _listed_ino(self, node: DirNode, name: bytes, ino: int) -> int:
        """The inode number of a name of an upper directory that says `ino`."""
        hit = self.find(node, name)
        return ino if hit is None else hit.ino

    def is_empty(self, node: DirNode) -> bool:
        """Whether the union shows nothing in `node`."""
        return next(merge(self._read_upper(node), self.lower_names(node, read=True)), None) is None
