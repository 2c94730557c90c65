"""Unpacking the tar of a layer into a directory in overlayfs's format (image-spec, layer.md).

Rules this file obeys:

- Everything is made beneath one directory descriptor, a component at a time (`beneath`); what is made lies in
  directories that this archive made, or implied, and in nothing else.
- What stands in the archive's order matters only for what it says twice. Whiteouts are about the layers below alone,
  so they wait for the end (`finish`), when the layers below are there: then a name that hides nothing leaves nothing.
- What the system cannot keep is either refused or told (`notes`), never lost in silence.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable

from unionfsd import format as fmt
from unionfsd import syscalls
from unionfsd.errors import UserError, reason
from unionfsd.images import beneath
from unionfsd.images.below import Below
from unionfsd.images.beneath import Path, Tree
from unionfsd.images.inodedigests import InodeDigests
from unionfsd.images.tarread import HARD_LINK, Extent, Limits, Member, TarError, TarReader
from unionfsd.syscalls import Fd
from unionfsd.typed import Final, NamedTuple

_NAME_MAX: Final = 255
_ZEROS: Final = bytes(1 << 16)
_KIND_NAMES: Final = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFIFO: "pipe"}


class Attributes(NamedTuple):
    """What a directory will have when all that is in it is made."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: dict[bytes, bytes]


_IMPLIED: Final = Attributes(0o755, 0, 0, 0, {})


def path_of(name: bytes) -> Path:
    """The components of a name in an archive, none for the root; TarError for one that leads elsewhere.

    A slash at the beginning, and ``.``, mean nothing: every name is beneath the root.
    """
    path = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
    for part in path:
        if part == b"..":
            raise TarError(f"a name that leads out of its directory: {name[:200]!r}")
        if len(part) > _NAME_MAX:
            raise TarError(f"a name that is too long: {name[:200]!r}")
    return path


class Unpacker:
    """Makes the objects of one layer in the directory `root`, which is empty.

    `digests` has the sha256 of every regular file by its inode number, `size` the bytes of all files, `notes` what
    could not be kept, and how often.
    """

    def __init__(self, root: Fd, limits: Limits | None = None) -> None:
        self._tree = Tree(root)
        self._limits = limits or Limits()
        self._privileged = os.geteuid() == 0
        self._directories: dict[Path, Attributes | None] = {(): None}
        self._whiteouts: set[Path] = set()
        self._opaque: set[Path] = set()
        self.digests = InodeDigests()
        self.size = 0
        self.notes: Counter[str] = Counter()

    def unpack(self, reader: TarReader) -> None:
        """Make everything that `reader` has; `finish` is still to come."""
        for member in reader:
            try:
                self._add(member, reader)
            except OSError as error:
                if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENOENT):
                    raise TarError(f"{member.name[:200]!r}: lies beneath what is no directory") from error
                raise _failed(member.name, member, error) from error

    def _add(self, member: Member, reader: TarReader) -> None:
        path = path_of(member.name)
        if self._take_mark(path, member.name):
            return
        self.size += member.size
        if self.size > self._limits.size:
            raise TarError(f"the layer has more than {self._limits.size} bytes", hint="--max-layer raises the limit")
        if member.kind == stat.S_IFDIR:
            self._add_directory(path, member)
            return
        if not path:
            raise TarError("the root of the layer is not a directory")
        directory = self._parent(path)
        if member.kind == HARD_LINK:
            self._add_link(directory, path, path_of(member.target))
            return
        if path in self._directories:
            self._replace_directory(directory, path)
        if member.kind == stat.S_IFREG:
            self._add_file(directory, path[-1], member, reader)
        elif member.kind == stat.S_IFLNK:
            self._add_symlink(directory, path[-1], member)
        else:
            self._add_node(directory, path[-1], member)

    # Marks.

    def _take_mark(self, path: Path, name: bytes) -> bool:
        """Note what an entry named ``.wh.`` says; whether there is nothing more to do with it."""
        for at, part in enumerate(path):
            if not fmt.is_reserved(part):
                continue
            last = at == len(path) - 1
            if last and part == fmt.WH_OPAQUE:
                self._opaque.add(path[:-1])
            elif part.startswith(fmt.WH + fmt.WH):
                pass  # what AUFS kept for itself
            elif (target := fmt.wh_target(part)) is None or target in (b".", b"..") or not last:
                raise TarError(f"not the name of a whiteout: {name[:200]!r}")
            else:
                self._whiteouts.add((*path[:-1], target))
            return True
        return False

    # Objects.

    def _parent(self, path: Path) -> Fd:
        """The directory that `path` lies in, made if nothing in the archive made it yet."""
        self._imply(path[:-1])
        return self._tree.directory(path[:-1])

    def _imply(self, path: Path) -> None:
        known = len(path)
        while path[:known] not in self._directories:
            known -= 1
        for depth in range(known + 1, len(path) + 1):
            try:
                syscalls.mkdir_at(self._tree.directory(path[: depth - 1]).fd, path[depth - 1], 0o700)
            except FileExistsError:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
            self._directories[path[:depth]] = None

    def _add_directory(self, path: Path, member: Member) -> None:
        if path not in self._directories:
            directory = self._parent(path)
            try:
                syscalls.mkdir_at(directory.fd, path[-1], 0o700)
            except FileExistsError:
                syscalls.unlink_at(directory.fd, path[-1])
                syscalls.mkdir_at(directory.fd, path[-1], 0o700)
        self._directories[path] = Attributes(member.mode, member.uid, member.gid, member.mtime_ns, member.xattrs)

    def _replace_directory(self, directory: Fd, path: Path) -> None:
        """Take a directory away for what comes in its place, with all in it (layer.md, "existing files")."""
        self._tree.forget(path)
        with syscalls.open_dir(directory.fd, path[-1]) as top:
            gone = [inner for inner, _, _, st in beneath.walk(top) if stat.S_ISDIR(st.st_mode)]
        beneath.remove(directory.fd, path[-1])
        for inner in ((), *gone):
            del self._directories[(*path, *inner)]

    def _add_file(self, directory: Fd, name: bytes, member: Member, reader: TarReader) -> None:
        with self._create(directory, name, member.mode & 0o777 if self._privileged else 0o600) as fd:
            made = hashlib.sha256()
            at = 0
            for extent, piece in _placed(member.extents, reader.data()):
                if extent > at:
                    _hash_zeros(made, extent - at)
                _write(fd.fd, piece, extent)
                made.update(piece)
                at = extent + len(piece)
            if at < member.size:
                _hash_zeros(made, member.size - at)
                syscalls.truncate(fd.fd, member.size)
            st = os.fstat(fd.fd)
            self._finish(fd.fd, stat.S_IFREG, member, st)
            self.digests.add(st.st_ino, made.digest())

    @staticmethod
    def _create(directory: Fd, name: bytes, mode: int) -> Fd:
        try:
            return syscalls.create_at(directory.fd, name, mode)
        except FileExistsError:
            syscalls.unlink_at(directory.fd, name)
            return syscalls.create_at(directory.fd, name, mode)

    def _add_symlink(self, directory: Fd, name: bytes, member: Member) -> None:
        if not member.target:
            raise TarError(f"{member.name[:200]!r}: a symlink to nothing")
        try:
            syscalls.symlink_at(member.target, directory.fd, name)
        except FileExistsError:
            syscalls.unlink_at(directory.fd, name)
            syscalls.symlink_at(member.target, directory.fd, name)
        with syscalls.open_object(directory.fd, name) as fd:
            if self._privileged:
                syscalls.chown(fd.fd, member.uid, member.gid)
            elif (member.uid, member.gid) != (0, 0):
                self.notes["owner of a symlink"] += 1
            self._set_xattrs(fd.fd, member.xattrs)
            syscalls.utimens(fd.fd, member.mtime_ns, member.mtime_ns)

    def _add_node(self, directory: Fd, name: bytes, member: Member) -> None:
        """A device or a FIFO; where devices cannot be made, a file that says what it stands for."""
        rdev = os.makedev(*member.rdev)
        if fmt.is_whiteout_device(member.kind, rdev):
            raise TarError(f"{member.name[:200]!r}: a device 0:0, which hides what is below it")
        kind = member.kind
        try:
            self._make_node(directory, name, kind, rdev)
        except PermissionError:
            kind = stat.S_IFREG
            self._make_node(directory, name, kind, 0)
        with syscalls.open_object(directory.fd, name) as fd:
            if kind != member.kind:
                letter = "block" if member.kind == stat.S_IFBLK else "char"
                self._override(fd.fd, member, "{}-{}-{}".format(letter, *member.rdev))
                self.notes["device kept as a file"] += 1
            self._finish(fd.fd, kind, member)
            if kind == stat.S_IFREG:
                self.digests.add(os.fstat(fd.fd).st_ino, hashlib.sha256().digest())

    @staticmethod
    def _make_node(directory: Fd, name: bytes, kind: int, rdev: int) -> None:
        try:
            syscalls.mknod_at(directory.fd, name, kind | 0o600, rdev)
        except FileExistsError:
            syscalls.unlink_at(directory.fd, name)
            syscalls.mknod_at(directory.fd, name, kind | 0o600, rdev)

    def _add_link(self, directory: Fd, path: Path, target: Path) -> None:
        shown = b"/".join(target)[:200]
        if not target or any(fmt.is_reserved(part) for part in target) or target in self._directories:
            raise TarError(f"a hard link to what can have none: {shown!r}")
        if path == target:
            return
        if path in self._directories:
            self._replace_directory(directory, path)
        if target[:-1] not in self._directories:
            raise TarError(f"a hard link to what is not in the layer: {shown!r}")
        source = self._tree.directory(target[:-1])
        try:
            try:
                syscalls.link_at(source.fd, target[-1], directory.fd, path[-1])
            except FileExistsError:
                # Looked at first: when there is nothing to link to, what is there stays.
                syscalls.stat_at(source.fd, target[-1])
                syscalls.unlink_at(directory.fd, path[-1])
                syscalls.link_at(source.fd, target[-1], directory.fd, path[-1])
        except FileNotFoundError:
            raise TarError(f"a hard link to what is not in the layer: {shown!r}") from None

    # Attributes.

    def _finish(self, fd: int, kind: int, found: Member | Attributes, had: os.stat_result | None = None) -> None:
        """Owner, mode, xattrs and times, in an order in which none undoes another; what it `had` is not set again."""
        mode = found.mode
        if self._privileged:
            if had is None or (had.st_uid, had.st_gid) != (found.uid, found.gid):
                syscalls.chown(fd, found.uid, found.gid)
        else:
            # The owner must stay able to read what it owns, and nobody may become it by running it.
            mode = mode & 0o1777 | (0o700 if kind == stat.S_IFDIR else 0o600)
            if (found.uid, found.gid, mode) != (0, 0, found.mode) and kind in (stat.S_IFREG, stat.S_IFDIR):
                self._override(fd, found, _KIND_NAMES[kind], keep=True)
        if had is None or stat.S_IMODE(had.st_mode) != mode:
            syscalls.chmod(fd, mode)
        self._set_xattrs(fd, found.xattrs)
        syscalls.utimens(fd, found.mtime_ns, found.mtime_ns)

    def _override(self, fd: int, found: Member | Attributes, kind: str, *, keep: bool = False) -> None:
        if keep and _has(fd, fmt.OVERRIDE_STAT):
            return
        value = f"{found.uid}:{found.gid}:{found.mode:o}:{kind}".encode()
        syscalls.setxattr(fd, fmt.OVERRIDE_STAT, value)

    def _set_xattrs(self, fd: int, xattrs: dict[bytes, bytes]) -> None:
        for name, value in sorted(xattrs.items()):
            if fmt.is_forbidden(name) or name == fmt.OVERRIDE_STAT:
                self.notes[f"xattr {name.decode(errors='replace')}, which is not for images"] += 1
                continue
            stored = fmt.escape(name)
            if not self._privileged and name.startswith((b"security.", b"trusted.")):
                stored = fmt.OVERRIDE + name
            try:
                syscalls.setxattr(fd, stored, value)
            except OSError as error:
                said = f"xattr {name.decode(errors='replace')}: {error.strerror}"
                if error.errno not in (errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL):
                    raise OSError(error.errno, said) from None
                self.notes[said] += 1

    # The end.

    def finish(self, below: Below) -> None:
        """Do what depends on the layers `below`: whiteouts, opaque directories, directories that were only implied."""
        opaque = {path for path in self._whiteouts | self._opaque if path in self._directories}
        opaque |= self._opaque - self._whiteouts
        hidden: set[Path] = set()
        for path in sorted(opaque, key=len):
            if (path in self._directories or not _beneath(path, hidden)) and self._make_opaque(path, below):
                hidden.add(path)
        for path in sorted(self._whiteouts - opaque, key=len):
            if not _beneath(path, hidden) and self._make_whiteout(path, below):
                hidden.add(path)
        for path in sorted(self._directories, key=len, reverse=True):
            found = self._directories[path] or _inherited(below, path)
            try:
                self._finish(self._tree.directory(path).fd, stat.S_IFDIR, found)
            except OSError as error:
                raise _failed(b"/".join(path), found, error) from error
        self._tree.close()
        self._directories.clear()  # what is still to be done with the layer takes room, too

    def _make_opaque(self, path: Path, below: Below) -> bool:
        if not below.directory(path) or not self._reach(path):
            return path in self._directories
        fd = self._tree.directory(path).fd
        self._mark(fd, fmt.OPAQUE_NAMES, fmt.OPAQUE_YES)
        return True

    def _make_whiteout(self, path: Path, below: Below) -> bool:
        if below.find(path) is None or not self._reach(path[:-1]):
            return False
        directory = self._tree.directory(path[:-1])
        try:
            syscalls.mknod_at(directory.fd, path[-1], stat.S_IFCHR, 0)
        except FileExistsError:
            return False  # the layer has a file of that name, which hides what is below anyway
        except PermissionError:
            with syscalls.create_at(directory.fd, path[-1], 0o600) as fd:
                self._mark(fd.fd, fmt.WHITEOUT_NAMES, fmt.OPAQUE_YES)
            self._mark(directory.fd, fmt.OPAQUE_NAMES, fmt.OPAQUE_XWHITEOUTS)
        with syscalls.open_object(directory.fd, path[-1]) as fd:
            syscalls.utimens(fd.fd, 0, 0)  # so that a layer is the same whenever it is unpacked
        return True

    def _reach(self, path: Path) -> bool:
        """Whether there is, or now is, a directory at `path`; not beneath what this layer has as something else."""
        try:
            self._imply(path)
        except NotADirectoryError:
            return False
        return True

    def _mark(self, fd: int, names: Iterable[bytes], value: bytes) -> None:
        trusted, user = list(names)[:2]
        syscalls.setxattr(fd, trusted if self._privileged and _may_trust(fd, trusted) else user, value)


def _failed(name: bytes, found: Member | Attributes, error: OSError) -> UserError:
    """What to say of an object that could not be made."""
    if error.errno == errno.EINVAL and (found.uid or found.gid):
        return TarError(
            f"{name[:200]!r}: owner {found.uid}:{found.gid} does not exist in this user namespace",
            hint="give it more subordinate ids (subuid(5)), or unpack without a namespace",
        )
    return UserError(f"{name[:200]!r}: {reason(error)}", code=1)


def _may_trust(fd: int, name: bytes) -> bool:
    """Whether trusted xattrs can be set: not in a user namespace."""
    try:
        syscalls.setxattr(fd, name, b"y")
    except PermissionError:
        return False
    return True


def _has(fd: int, name: bytes) -> bool:
    return name in syscalls.listxattr(fd)


def _beneath(path: Path, hidden: set[Path]) -> bool:
    """Whether what is below `path` is hidden already by one of the directories it lies in."""
    return any(path[:depth] in hidden for depth in range(len(path)))


def _inherited(below: Below, path: Path) -> Attributes:
    """What a directory is like that the archive did not describe: as it is below, so that the layer changes nothing."""
    found = below.directory(path)
    if not found:
        return _IMPLIED
    fd = found[0].fd
    st = os.stat(fd)
    xattrs = {
        fmt.unescape(name): syscalls.getxattr(fd, name) for name in syscalls.listxattr(fd) if not fmt.is_internal(name)
    }
    return Attributes(stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns, xattrs)


def _placed(extents: tuple[Extent, ...] | None, data: Iterable[memoryview]) -> Iterable[tuple[int, memoryview]]:
    """(offset in the file, bytes) of the pieces of `data`."""
    if extents is None:
        at = 0
        for piece in data:
            yield at, piece
            at += len(piece)
        return
    places = iter(extents)
    offset = left = 0
    for piece in data:
        while piece:
            while not left:
                offset, left = next(places)
            part = piece[:left]
            yield offset, part
            offset, left, piece = offset + len(part), left - len(part), piece[len(part) :]


def _write(fd: int, piece: memoryview, offset: int) -> None:
    while piece:
        count = syscalls.pwrite(fd, piece, offset)
        piece, offset = piece[count:], offset + count


def _hash_zeros(made: hashlib._Hash, count: int) -> None:
    while count > 0:
        made.update(_ZEROS[:count])
        count -= len(_ZEROS)
