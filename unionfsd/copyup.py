"""Copy-up: the same object, in the upper.

Rules this file obeys:

- Copy-up changes nothing that a user can see. It is staged in work and published by one call; the parent's times are
  put back. When it fails, the object stays where it was.
- Ancestors by a loop, after the data is staged: a copy-up that runs out of space leaves no empty directories.
- Everything comes along or the copy-up fails: data with its holes, owner, mode, times, xattrs, ACLs, capabilities.
  What the upper cannot keep and nobody's security depends on is left out, and counted.
- Data is on disk before its name is, unless the mount never syncs. Where there is none, or what there is is shared with
  the lower, nothing is synced.
- With metacopy, what is done to a file but to its data copies up no data, but a file with a hole and a mark. The data
  follows when it is needed: a file with one name is replaced by a whole one in one call, one with several is filled and
  then loses the mark.
- One copy-up of a node at a time: others wait at its gate.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from functools import partial

from . import format as fmt
from . import owners, protection, remote, syscalls, verity
from .entries import UPPER, Entry, Source
from .events import Events
from .fdcache import FdCache
from .filling import Check, Filling, fill_data, restore_privileges, staging_mode
from .index import Index
from .inodes import DirNode, Node, OpenState, path_of
from .integrity import UnsoundError, see
from .layers import LowerDir, exists, optional_xattr, read_data_marks, xattr_names
from .logger import get_logger
from .lookup import Resolver
from .metadata import Keeping, Metadata, apply_metadata, read_metadata
from .metrics import Counters
from .steps import Blocking, Gate, Op
from .syscalls import UTIME_NOW, UTIME_OMIT, Fd
from .typed import Final
from .workdir import Staged, Workdir

log = get_logger(__name__)

#: Files up to this size are copied without a thread where the page cache has them.
_INLINE: Final = 64 * 1024


class CopyUp:
    """Copies nodes up for one mount."""

    def __init__(
        self,
        resolver: Resolver,
        work: Workdir,
        fds: FdCache,
        counters: Counters,
        keeping: Keeping,
        events: Events | None = None,
        *,
        metacopy: bool = False,
        rekey: Callable[[Node, tuple[int, int]], None] = lambda node, key: None,
    ) -> None:
        """`rekey` is told which object of the upper a node has become that is in the index."""
        self._rekey = rekey
        self._metacopy = metacopy and work.abilities.can_redirect
        self._resolver = resolver
        self._work = work
        self._fds = fds
        self._counters = counters
        self.keeping = keeping
        self._events = Events() if events is None else events
        self._room = memoryview(bytearray(_INLINE))

    def directory(self, node: DirNode) -> int:
        """See that `node` and all above it are in the upper; returns the number of the upper directory's fd."""
        missing: list[DirNode] = []
        at = node
        while not at.entry.upper:
            assert at.parent is not None
            missing.append(at)
            at = at.parent
        for step in reversed(missing):
            self._one_directory(step)
        return self._resolver.upper_dir(node)

    def node(self, node: Node, size: int | None = None, *, data: bool = True) -> Op[None]:
        """See that `node` is in the upper. With `size`, of a regular file only so many bytes, as if truncated now.

        Without `data`, that may be left where it is.
        """
        while not node.entry.upper:
            gate = None if node.open is None else node.open.gate
            if gate is not None:
                yield gate
            elif isinstance(node, DirNode):
                self.directory(node)
            else:
                yield from self._leaf(node, size, data=data)

    def data(self, node: Node, size: int | None = None) -> Op[None]:
        """See that `node`, a file of the upper, has its data itself. With `size`, as `node` has it, if that can be."""
        while node.entry.data is not None:
            gate = None if node.open is None else node.open.gate
            if gate is not None:
                yield gate
            else:
                yield from self._data(node, node.entry.data, size)

    def _one_directory(self, node: DirNode) -> None:
        lower = node.entry.lowers[0]
        source = lower.open(self._fds)
        staged = self._work.stage_dir(0o700)
        try:
            metadata = self._metadata(source, lower, b"")
            apply_metadata(staged.fd.fd, metadata, self.keeping)
            protection.carry_object(source, staged.fd.fd, self._work)
            self._record_origin(staged.fd.fd, lower, source, b"")
            self._publish(staged, node)
        except BaseException:
            staged.abandon()
            raise
        self._fds.admit(node.handle, staged.fd)

    def _metadata(self, fd: int, lower: LowerDir, name: bytes) -> Metadata:
        """Metadata of `name` in `lower`, or of that itself, as the upper is to have them."""
        if self._resolver.integrity is not None:
            self._resolver.integrity.vouch(lower, name, fd)
        metadata = read_metadata(fd, lower.layer.override)
        if not lower.layer.idmapped:
            return metadata
        owners = self.keeping.owners
        xattrs = {name: owners.keep_xattr(name, value) for name, value in metadata.xattrs.items()}
        return Metadata(owners.keep(metadata.st), xattrs, elsewhere=metadata.elsewhere)

    def _leaf(self, node: Node, size: int | None, *, data: bool) -> Op[None]:
        lower = node.entry.lowers[0]
        own = self._readable(node, lower) if data or not self._metacopy else None
        if own is not None:
            metadata = self._metadata(own.fd, lower, _below(node))
        else:
            with syscalls.open_object(lower.open(self._fds), _below(node)) as source:
                metadata = self._metadata(source.fd, lower, _below(node))
                if not stat.S_ISREG(metadata.st.st_mode):
                    self._special(node, lower, source, metadata)
                    return
                if not data and self._metadata_only(node, lower, source, metadata):
                    return
            own = lower.layer.open_data(lower.open(self._fds), _below(node))
        yield from self._regular(node, lower, own, metadata, size)

    def _readable(self, node: Node, lower: LowerDir) -> Fd | None:
        """A descriptor to read a lower file by; None for what is, or may stand for, no regular file."""
        if lower.layer.override is not None:
            return None
        if node.open is not None and node.open.fd is not None and node.entry.data is None:
            return node.open.fd
        dirfd, name = lower.open(self._fds), _below(node)
        is_file = stat.S_ISREG(syscalls.stat_at(dirfd, name).st_mode)
        return lower.layer.open_data(dirfd, name) if is_file else None

    def _metadata_only(self, node: Node, lower: LowerDir, object_: Fd, metadata: Metadata) -> bool:
        """Copy a regular file up without its data, if that may be: the data will be where it is now."""
        if not self._metacopy:
            return False
        digest = self._recorded_digest(lower, object_, _below(node))
        if digest is None and self._resolver.verity == "require":
            return False
        source = self._resolver.locate(node, object_.fd) or Source(lower, _below(node), None)
        staged = self._work.stage_file(0o600)
        try:
            indexed = self._record_leaf_origin(staged.fd.fd, lower, node)
            self._work.mark(staged.fd.fd, fmt.METACOPY, fmt.encode_metacopy(digest))
            syscalls.truncate(staged.fd.fd, metadata.st.st_size)
            apply_metadata(staged.fd.fd, metadata, self.keeping)
            protection.carry_object(object_.fd, staged.fd.fd, self._work)
            self._finish(node, staged, metadata.st.st_nlink if indexed else None)
        except BaseException:
            staged.abandon()
            raise
        node.entry = node.entry.with_data(source)
        self._counters.copy_ups += 1
        return True

    def _recorded_digest(self, lower: LowerDir, object_: Fd, name: bytes) -> fmt.Digest | None:
        """What is known of the data of a lower file that another digest of it could be compared with."""
        if self._resolver.verity == "off":
            return None
        marks = read_data_marks(object_.fd)
        if marks is not None:
            return marks.digest
        with lower.layer.open_data(lower.open(self._fds), name) as fd:
            measured = remote.ask(verity.measure_verity, fd.fd)
        return None if measured is None else fmt.Digest(*measured)

    def _special(self, node: Node, lower: LowerDir, source: Fd, metadata: Metadata) -> None:
        mode, rdev = metadata.st.st_mode, metadata.st.st_rdev
        if stat.S_ISLNK(mode):
            staged = self._work.stage_symlink(syscalls.readlink(source.fd))
        elif owners.is_file_on_disk(mode, self.keeping.form):
            staged = self._work.stage_file(0o600)
        else:
            staged = self._work.stage_node(mode, rdev)
        try:
            apply_metadata(staged.fd.fd, metadata, self.keeping)
            indexed = self._record_leaf_origin(staged.fd.fd, lower, node)
            self._finish(node, staged, metadata.st.st_nlink if indexed else None)
        except BaseException:
            staged.abandon()
            raise

    def _regular(self, node: Node, lower: LowerDir, own: Fd, metadata: Metadata, size: int | None) -> Op[None]:
        state = node.state()
        gate = state.gate = Gate()
        try:
            source = own
            elsewhere = self._resolver.locate(node, own.fd) if metadata.elsewhere else None
            if elsewhere is not None:
                source = elsewhere.open(self._fds)
            place = (lower, _below(node)) if elsewhere is None else elsewhere[:2]
            check = self._check(*place)
            self._foresee(node)
            staged = self._work.stage_file(staging_mode(metadata, self.keeping))
            try:
                guarded = protection.carry(own.fd, staged.fd.fd, self._work)
                indexed = self._record_leaf_origin(staged.fd.fd, lower, node)
                yield from self._fill(
                    Filling(staged.fd, source, elsewhere, metadata, size, self.keeping, check), node, place
                )
                # The gate kept the node a lower one; names and parents are looked at only from here on.
                self._finish(node, staged, metadata.st.st_nlink if indexed else None)
            except BaseException:
                staged.abandon()
                raise
            self._fds.admit(state, staged.fd)
            state.writable = not guarded  # whoever writes to what is protected is asked first
            self._counters.copy_ups += 1
        finally:
            state.gate = None
            gate.open()

    def _foresee(self, node: Node) -> None:
        """Have what `_finish` asks of lowers asked before the data is copied, where that makes a difference."""
        at = node.parent
        while at is not None and not at.entry.upper:
            lower = at.entry.lowers[0]
            if lower.layer.system is not None:
                source = lower.open(self._fds)
                self._metadata(source, lower, b"")
                protection.foresee(source)
                with contextlib.suppress(OSError, ValueError):
                    syscalls.file_handle(source, b"")
            at = at.parent

    def _data(self, node: Node, source: Source, size: int | None) -> Op[None]:
        state = node.state()
        gate = state.gate = Gate()
        try:
            if self._is_alone(node):
                yield from self._replace(node, state, source, size)
            else:
                yield from self._fill_in_place(node, state, source)
        finally:
            state.gate = None
            gate.open()

    def _is_alone(self, node: Node) -> bool:
        """Whether another object may take the place of an upper file: it has one name, and nobody may know others."""
        several = node.unlinked or node.links is not None or node.entry.index is not None
        return not several and self._resolver.stat(node).st_nlink == 1

    def _replace(self, node: Node, state: OpenState, source: Source, size: int | None) -> Op[None]:
        """Stage a whole file and publish it in place of the one without data."""
        staged = self._work.stage_file(0o600)
        try:
            length = self._resolver.stat(node).st_size if size is None else size
            data, check = source.open(self._fds), self._check(source.lower, source.name)
            filling = partial(fill_data, staged.fd, data, source, length, check, sync=self._work.syncs)
            yield from self._run(filling, length, node, staged.fd, data, source[:2])
            # Meanwhile its attributes may have changed, and its names.
            if not self._is_alone(node):
                staged.abandon()
                return
            with self._resolver.open_object(node) as old:
                self._keep_origin(staged.fd.fd, old.fd)
                apply_metadata(staged.fd.fd, read_metadata(old.fd, self.keeping.form), self.keeping)
                protection.keep(old.fd, staged.fd.fd, self._work)
            if size is not None:
                syscalls.utimens(staged.fd.fd, UTIME_OMIT, UTIME_NOW)
            assert node.parent is not None
            dirfd = self._resolver.upper_dir(node.parent)
            before = os.fstat(dirfd)
            staged.publish_over(dirfd, node.name)
            node.entry = UPPER
            self._restore_times(dirfd, before)
        except BaseException:
            staged.abandon()
            raise
        self._fds.admit(state, staged.fd)
        state.writable = True

    def _keep_origin(self, target: int, source: int) -> None:
        for name in fmt.ORIGIN_NAMES:
            value = optional_xattr(source, name)
            if value is not None:
                syscalls.setxattr(target, name, value)

    def _fill_in_place(self, node: Node, state: OpenState, source: Source) -> Op[None]:
        """Give a file that has several names, or none, its data, and then take the mark away: that publishes it."""
        with self._resolver.open_object(node) as found:
            target = syscalls.reopen(found.fd, os.O_RDWR)
        form = self.keeping.form
        before = read_metadata(target.fd, form)
        length, sync = before.st.st_size, self._work.syncs
        data, check = source.open(self._fds), self._check(source.lower, source.name)
        filling = partial(fill_data, target, data, source, length, check, sync=sync)
        yield from self._run(filling, length, node, target, data, source[:2])
        restore_privileges(target.fd, before, form)
        syscalls.utimens(target.fd, before.st.st_atime_ns, before.st.st_mtime_ns)
        for name in xattr_names(target.fd):
            if name in fmt.METACOPY_NAMES:
                syscalls.removexattr(target.fd, name)
        node.entry = node.entry.with_data(None)
        self._fds.admit(state, target)
        state.writable = True

    def _check(self, lower: LowerDir, name: bytes) -> Check | None:
        """What raises UnsoundError for a file that has not the data that `name` in `lower` must have."""
        wanted = None if self._resolver.integrity is None else self._resolver.integrity.data(lower, name)
        return None if wanted is None else partial(see, wanted)

    def _fill(self, filling: Filling, node: Node, place: tuple[LowerDir, bytes]) -> Op[None]:
        """Fill a file that nobody sees yet with the data that is at `place`."""
        copied = filling.at_once(self._room) if remote.system_of(filling.source) is None else None
        if copied is None:
            run = partial(filling.run, sync=self._work.syncs)
            yield from self._run(run, filling.length, node, filling.target, filling.source, place)
            return
        self._counters.copied_bytes += copied
        if copied and self._work.syncs:
            stock, mode = self._work.stock, staging_mode(filling.metadata, self.keeping)
            then = None if stock is None else partial(stock.add, mode)
            yield Blocking(partial(_sync, filling.target), then=then)

    def _run(
        self, fill: Callable[[], int], size: int, node: Node, target: Fd, source: Fd, place: tuple[LowerDir, bytes]
    ) -> Op[None]:
        """In a thread, have `fill` give a file that nobody sees yet the data of `source`, which is at `place`."""
        try:
            with self._counters.working("copy-up", path_of(node), size, partial(_size, target)):
                self._counters.copied_bytes += yield Blocking(fill, source)
        except UnsoundError:
            assert self._resolver.integrity is not None
            raise self._resolver.integrity.fail(*place, "data") from None

    def _finish(self, node: Node, staged: Staged, names: int | None) -> None:
        """Publish under the name that `node` has now; one that has none lives on in work.

        `names`: how many the lower has, if they are to be kept together.
        """
        if names is not None and self._resolver.index is not None and not node.unlinked:
            self._publish_in_index(self._resolver.index, node, staged, names)
        elif node.unlinked:
            self._work.keep_staged(staged, node.nodeid)
            node.state().kept = True
            node.entry = UPPER
        else:
            assert node.parent is not None
            self.directory(node.parent)
            self._publish(staged, node)

    def _publish_in_index(self, index: Index, node: Node, staged: Staged, lower_nlink: int) -> None:
        """Publish an object whose lower has several names: from then on it is that, under all of them."""
        lower = node.entry.lowers[0]
        name_there = index.name_of(lower.layer, lower.open(self._fds), _below(node))
        index.mark_new(staged.fd.fd)
        staged.publish(index.prepare(), name_there)
        index.added(name_there, lower_nlink)
        node.entry = Entry(True, (), index=name_there)
        st = os.fstat(staged.fd.fd)
        self._rekey(node, (st.st_dev, st.st_ino))
        assert node.parent is not None
        self.alias(node.parent, node.name, name_there, lower_nlink)

    def alias(self, parent: DirNode, name: bytes, index_name: bytes, lower_nlink: int | None = None) -> None:
        """Give an object of the index a `name` in the upper that the union has of it already, by a lower."""
        index = self._resolver.index
        assert index is not None
        dirfd = self.directory(parent)
        if exists(dirfd, name):
            return
        if lower_nlink is None:
            found = self._resolver.find_lower(parent, name)
            assert found is not None
            lower_nlink = syscalls.stat_at(found.entry.lowers[0].open(self._fds), name).st_nlink
        before = os.fstat(dirfd)
        self.mark_impure(parent, dirfd)
        index.link(index_name, lower_nlink, dirfd, name)
        self._restore_times(dirfd, before)

    def _publish(self, staged: Staged, node: Node) -> None:
        assert node.parent is not None
        dirfd = self._resolver.upper_dir(node.parent)
        before = os.fstat(dirfd)
        self.mark_impure(node.parent, dirfd)
        staged.publish(dirfd, node.name)
        if isinstance(node, DirNode):
            node.own_entry(Entry(True, node.entry.lowers))
        else:
            node.entry = UPPER
        self._restore_times(dirfd, before)
        if self._events.recording:
            self._events.record("copy-up", path_of(node))

    def _restore_times(self, dirfd: int, before: os.stat_result) -> None:
        """Put the times of the parent back. Best effort: the copy is published, and failing now would deny it."""
        try:
            syscalls.utimens(dirfd, before.st_atime_ns, before.st_mtime_ns)
        except OSError as exc:
            self._skip("times of the parent", exc)

    def restore_mtime(self, fd: int, mtime_ns: int) -> None:
        """Put the mtime of an upper file back. Best effort: its data is written, and failing now would deny it."""
        try:
            # What is written soon after it was made moves no time: clocks of file systems are coarse.
            if os.fstat(fd).st_mtime_ns != mtime_ns:
                syscalls.utimens(fd, UTIME_OMIT, mtime_ns)
        except OSError as exc:
            self._skip("mtime of a file", exc)

    def mark_impure(self, parent: DirNode, dirfd: int, *, required: bool = False) -> None:
        """Say that an upper directory holds copied-up objects (ovl_set_impure). Best effort, unless `required`."""
        if self._resolver.impure(parent):
            return
        try:
            self._work.mark(dirfd, fmt.IMPURE, fmt.OPAQUE_YES)
        except OSError as exc:
            if required:
                raise
            self._skip("impure mark", exc)
        parent.impure = True

    def _record_leaf_origin(self, fd: int, lower: LowerDir, node: Node) -> bool:
        """Record where a file or the like came from; returns whether it goes to the index, which needs that."""
        indexed = self._resolver.index is not None and node.entry.name is not None
        recorded = self._record_origin(fd, lower, lower.open(self._fds), _below(node), required=indexed)
        return indexed and recorded

    def _record_origin(self, fd: int, lower: LowerDir, dirfd: int, name: bytes, *, required: bool = False) -> bool:
        """Record where the object came from. Best effort: without it the inode number changes at the next mount.

        Where it is `required`, only what cannot have the mark at all goes without.
        """
        try:
            kind, handle = syscalls.file_handle(dirfd, name)
            origin = fmt.encode_origin(fmt.Origin(kind, handle, lower.layer.uuid))
            self._work.mark(fd, fmt.ORIGIN, origin)
        except (OSError, ValueError) as exc:
            if required and isinstance(exc, OSError) and exc.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                raise
            self._skip("origin", exc)
            return False
        return True

    def _skip(self, what: str, exc: Exception) -> None:
        self._counters.skipped_marks += 1
        log.debug("copy-up: no %s: %s", what, exc)


def _below(node: Node) -> bytes:
    """What the lower calls a node that is there."""
    return node.entry.name or node.name


def _sync(fd: Fd) -> None:
    syscalls.fsync(fd.fd)


def _size(fd: Fd) -> int:
    """How far a copy into the file is: it grows."""
    return os.fstat(fd.fd).st_size
