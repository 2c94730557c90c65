"""The work directory: where everything that enters the upper is staged, and swept when it did not.

Rules this file obeys:

- Whatever appears in the upper appears whole, by one rename or link out of ``work/work`` (fs/overlayfs/super.c has the
  layout). What a crash leaves there is litter: the next mount sweeps it, and nothing else needs repair.
- A staged name is ``#`` and a number, as the kernel's are (ovl_tempname).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from . import format as fmt
from . import incompat, projects, syscalls
from .abilities import Abilities, probe
from .errors import LAYER, UserError
from .layers import LayerStack, exists, is_xattr_whiteout, optional_xattr
from .logger import get_logger
from .options import MountConfig
from .removal import names_in, open_or_make, own_names, remove_tree
from .stock import Stock
from .syscalls import Fd
from .typed import Final, NamedTuple

log = get_logger(__name__)

#: The record that `intent` keeps in work; the sweep leaves it to be acted upon.
INTENT: Final = b"#intent"

#: What has no name in the union any more, but is in use, has one in work: this and its nodeid.
_KEPT: Final = b"#o"

_OURS: Final = {fmt.WORK, fmt.INDEX, fmt.EXPORTS, fmt.EXPORTS_STAGED}


class Room(NamedTuple):
    """Where in work something is staged: the number of that directory's fd, and the project that it hands on."""

    fd: int
    project: int


class Staged:
    """An object that is not in the upper yet: `fd` refers to it, `name` is its name in work, None for an O_TMPFILE.

    One of the `publish` methods makes it visible; `abandon` takes it away. After either it is spent. What is `made`
    belongs to the project of the directory it gets into; what was there already does not change hands (EXDEV).
    """

    __slots__ = ("_made", "_room", "_work", "fd", "name")

    def __init__(self, work: Workdir, fd: Fd, name: bytes | None, *, made: bool = True) -> None:
        self._work = work
        self._room = work.fd
        self._made = made
        self.fd = fd
        self.name = name

    def publish(self, dirfd: int, name: bytes) -> None:
        """Make it `name` in the directory `dirfd`, where nothing has that name; EEXIST otherwise."""
        try:
            self._publish(dirfd, name)
        except OSError as exc:
            if not self._changes_hands(exc, dirfd):
                raise
            self._publish(dirfd, name)

    def _publish(self, dirfd: int, name: bytes) -> None:
        if self.name is None:
            syscalls.link_fd(self.fd.fd, dirfd, name)
        else:
            self._work.rename_out(self._room, self.name, dirfd, name)
            self.name = None

    def publish_over(self, dirfd: int, name: bytes) -> None:
        """Make it `name` in `dirfd` in place of the whiteout or the non-directory that is there."""
        try:
            self._publish_over(dirfd, name)
        except OSError as exc:
            if not self._changes_hands(exc, dirfd):
                raise
            self._publish_over(dirfd, name)

    def _publish_over(self, dirfd: int, name: bytes) -> None:
        if stat.S_ISDIR(os.fstat(self.fd.fd).st_mode):
            self._work.require_exchange()
            staged = self._named()
            syscalls.renameat2(self._room, staged, dirfd, name, syscalls.RENAME_EXCHANGE)
            self.abandon()
        else:
            syscalls.renameat2(self._room, self._named(), dirfd, name)
            self.name = None

    def _changes_hands(self, exc: OSError, dirfd: int) -> bool:
        """Whether it could not be published because of its project, and can now: it is of that of `dirfd`."""
        room = self._work.room(dirfd) if self._made and exc.errno == errno.EXDEV else None
        if room is None or room.fd == self._room:
            return False
        name = None if self.name is None else self._work.fresh_name()
        if projects.give(self.fd.fd, room.project):
            if name is not None:
                syscalls.renameat2(self._room, self._named(), room.fd, name)
        elif name is None:
            return False
        else:
            try:
                again = projects.make_again(self.fd.fd, room.fd, name)
            except BaseException:
                self._work.discard(name, room.fd)
                raise
            self.abandon()
            self.fd.close()
            self.fd = again
        self.name, self._room = name, room.fd
        return True

    def _named(self) -> bytes:
        if self.name is None:
            name = self._work.fresh_name()
            syscalls.link_fd(self.fd.fd, self._room, name)
            self.name = name
        return self.name

    def abandon(self) -> None:
        """Remove what stands under its name in work: itself, or what it was exchanged with."""
        name, self.name = self.name, None
        if name is not None:
            self._work.discard(name, self._room)


class Workdir:
    """The open work directory of one mount. `fd` is the number of an O_PATH fd of ``work/work``."""

    def __init__(self, directory: Fd, abilities: Abilities, *, syncs: bool) -> None:
        self._directory = directory
        self.fd = directory.fd
        self.abilities = abilities
        self.syncs = syncs
        self.litter = 0
        self._counter = 0
        self._whiteout: bytes | None = None
        self._rooms: dict[int, Fd] = {}
        self._kept: set[bytes] = set()
        self.stock = Stock(self.fd) if abilities.tmpfile else None

    def fresh_name(self) -> bytes:
        """A name that nothing in work has: work is swept at mount and locked."""
        self._counter += 1
        return b"#%x" % self._counter

    def xattr(self, suffix: bytes) -> bytes | None:
        """Full name of one of the format's xattrs on this upper; None when it keeps none."""
        namespace = self.abilities.namespace
        return None if namespace is None else namespace + suffix

    def mark(self, fd: int, suffix: bytes, value: bytes) -> None:
        """Set one of the format's xattrs on the object `fd`; EOPNOTSUPP when the upper keeps none."""
        name = self.xattr(suffix)
        if name is None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        syscalls.setxattr(fd, name, value)

    def mark_opaque(self, fd: int) -> None:
        """Make the upper directory `fd` hide everything below it, by ``.wh..wh..opq`` where there are no xattrs."""
        if self.abilities.namespace is not None:
            self.mark(fd, fmt.OPAQUE, fmt.OPAQUE_YES)
        else:
            syscalls.create_at(fd, fmt.WH_OPAQUE, 0o600).close()

    # Staging.

    def stage_file(self, mode: int) -> Staged:
        """An empty regular file, `fd` opened O_RDWR."""
        if self.stock is not None:
            return Staged(self, self.stock.take(mode), None)
        name = self.fresh_name()
        return Staged(self, syscalls.create_at(self.fd, name, mode), name)

    def stage_dir(self, mode: int) -> Staged:
        """An empty directory, `fd` O_PATH."""
        name = self.fresh_name()
        syscalls.mkdir_at(self.fd, name, mode)
        return self._staged(name, syscalls.open_dir)

    def stage_node(self, mode: int, rdev: int) -> Staged:
        """A FIFO, socket or device node, `fd` O_PATH."""
        name = self.fresh_name()
        syscalls.mknod_at(self.fd, name, mode, rdev)
        return self._staged(name, syscalls.open_object)

    def stage_symlink(self, target: bytes) -> Staged:
        """A symlink, `fd` O_PATH."""
        name = self.fresh_name()
        syscalls.symlink_at(target, self.fd, name)
        return self._staged(name, syscalls.open_object)

    def _staged(self, name: bytes, opener: Callable[[int, bytes], Fd]) -> Staged:
        try:
            return Staged(self, opener(self.fd, name), name)
        except BaseException:
            self.discard(name)
            raise

    def rename_out(self, room: int, staged: bytes, dirfd: int, name: bytes) -> None:
        """Make the object `staged` in the directory `room` of work `name` in `dirfd`; EEXIST when that is taken."""
        if self.abilities.noreplace:
            syscalls.renameat2(room, staged, dirfd, name, syscalls.RENAME_NOREPLACE)
            return
        # Nobody else changes the upper, so looking first is as good.
        if exists(dirfd, name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fsdecode(name))
        syscalls.renameat2(room, staged, dirfd, name)

    def room(self, dirfd: int) -> Room | None:
        """Where to stage what is of the project that `dirfd` of the upper hands on; None where that is nowhere."""
        number = projects.handed_on(dirfd)
        if number is None:
            return None
        if number not in self._rooms:
            name = _room_name(number)
            syscalls.mkdir_at(self.fd, name, 0o700)
            directory = syscalls.open_dir(self.fd, name)
            if not projects.give(directory.fd, number):
                directory.close()
                self.discard(name)
                return None
            self._rooms[number] = directory
        return Room(self._rooms[number].fd, number)

    def require_exchange(self) -> None:
        """EXDEV where the upper has no RENAME_EXCHANGE, before anything is tried that needs it."""
        if not self.abilities.exchange:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    # Whiteouts that are entries of their own (forms chardev and xattr).

    def replace_by_whiteout(self, dirfd: int, name: bytes, *, directory: bool) -> None:
        """Put a whiteout in the place of the object `name`, in one call; a `directory` is then emptied out of sight."""
        if directory:
            self.require_exchange()
        room, staged = self._put_whiteout(dirfd, name, syscalls.RENAME_EXCHANGE if directory else 0)
        if directory:
            self.discard(staged, room)

    def place_whiteout(self, dirfd: int, name: bytes) -> None:
        """Make `name`, which nothing has, a whiteout in one call: a link of a shared one, as the kernel does."""
        if not self._link_whiteout(dirfd, name):
            self._put_whiteout(dirfd, name, 0)

    def _link_whiteout(self, dirfd: int, name: bytes) -> bool:
        for _ in range(2):
            try:
                syscalls.link_at(self.fd, self._shared_whiteout(), dirfd, name)
                return True
            except OSError as exc:
                if exc.errno == errno.EXDEV:
                    return False  # of another project
                # A full link count, or a file system without hard links: a whiteout of its own.
                if exc.errno not in (errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP):
                    raise
                self._retire_whiteout()
        return False

    def _put_whiteout(self, dirfd: int, name: bytes, flags: int) -> tuple[int, bytes]:
        """Rename a whiteout to `name`; returns where it was staged."""
        try:
            return self._rename_whiteout(self.fd, dirfd, name, flags)
        except OSError as exc:
            room = self.room(dirfd) if exc.errno == errno.EXDEV else None
            if room is None:
                raise
        return self._rename_whiteout(room.fd, dirfd, name, flags)

    def _rename_whiteout(self, room: int, dirfd: int, name: bytes, flags: int) -> tuple[int, bytes]:
        staged = self.fresh_name()
        if room != self.fd or not self._link_whiteout(room, staged):
            staged = self._make_whiteout(room)
        try:
            syscalls.renameat2(room, staged, dirfd, name, flags)
        except BaseException:
            self.discard(staged, room)
            raise
        return room, staged

    def _shared_whiteout(self) -> bytes:
        if self._whiteout is None:
            self._whiteout = self._make_whiteout(self.fd)
        return self._whiteout

    def _make_whiteout(self, room: int) -> bytes:
        name = self.fresh_name()
        if self.abilities.whiteout == "chardev":
            syscalls.mknod_at(room, name, stat.S_IFCHR, os.makedev(0, 0))
            return name
        with syscalls.create_at(room, name, 0o600) as fd:
            try:
                self.mark(fd.fd, fmt.WHITEOUT, fmt.OPAQUE_YES)
            except BaseException:
                self.discard(name, room)
                raise
        return name

    def _retire_whiteout(self) -> None:
        name, self._whiteout = self._whiteout, None
        if name is not None:
            self.discard(name)

    # Objects that lost their names in the union while somebody may use them.

    def keep(self, dirfd: int, name: bytes, nodeid: int) -> bool:
        """Give the object `name` of the upper, which is about to lose that, a name in work, if that is possible."""
        kept = kept_name(nodeid)
        try:
            syscalls.link_at(dirfd, name, self.fd, kept)
        except OSError:
            return False  # its descriptor has to do, as where there are no hard links
        self._kept.add(kept)
        return True

    def take(self, dirfd: int, name: bytes, nodeid: int) -> bool:
        """Move the object `name` of the upper to work, if that is possible: in the upper it is gone then."""
        kept = kept_name(nodeid)
        try:
            syscalls.renameat2(dirfd, name, self.fd, kept)
        except OSError:
            return False  # no room for the name in work, say; removing the object takes none
        self._kept.add(kept)
        return True

    def keep_staged(self, staged: Staged, nodeid: int) -> None:
        """Give a staged object no other name than one in work."""
        kept = kept_name(nodeid)
        staged.publish(self.fd, kept)
        self._kept.add(kept)

    def let_go(self, nodeid: int) -> None:
        """Nobody uses what is kept of `nodeid` any more."""
        kept = kept_name(nodeid)
        if kept in self._kept:  # else all was let go of, at the end
            self._kept.remove(kept)
            self.discard(kept)

    def take_over(self, wanted: set[int]) -> set[int]:
        """Sweep what a process before this one left, but for what it kept of `wanted`; returns the nodeids of that."""
        names = {kept_name(nodeid): nodeid for nodeid in wanted}
        found = own_names(self.fd)
        self._kept = names.keys() & set(found)
        for name in found:
            if name not in self._kept and name not in (INTENT, fmt.INCOMPAT):
                self.discard(name)
        return {names[name] for name in self._kept}

    # Cleaning.

    def take_away(self, dirfd: int, name: bytes) -> None:
        """Remove the directory `name` of the upper, which the union shows empty, with what it holds: in one call."""
        room, staged = self.fd, self.fresh_name()
        try:
            syscalls.renameat2(dirfd, name, room, staged)
        except OSError as exc:
            own = self.room(dirfd) if exc.errno == errno.EXDEV else None
            if own is None:
                raise
            room = own.fd
            syscalls.renameat2(dirfd, name, room, staged)
        self.discard(staged, room)

    def discard(self, name: bytes, room: int | None = None) -> None:
        """Remove `name` from work, or a `room` there. Best effort: what stays is counted, the next mount sweeps it."""
        try:
            remove_tree(self.fd if room is None else room, name)
        except FileNotFoundError:
            pass
        except OSError as exc:
            self.litter += 1
            log.warning("work: %s stays until the next mount: %s", os.fsdecode(name), exc.strerror)

    def close(self) -> None:
        """Take the shared whiteout away and close; what is staged by others stays for the sweep."""
        self._retire_whiteout()
        for name in self._kept:
            self.discard(name)
        self._kept.clear()
        for number, directory in self._rooms.items():
            directory.close()
            self.discard(_room_name(number))
        self._rooms.clear()
        if self.stock is not None:
            self.stock.close()
        self._directory.close()


def open_workdir(stack: LayerStack, config: MountConfig, *, sweep: bool = True) -> Workdir:
    """Probe the work directory of `stack`, which has one, and `sweep` it unless it is in use.

    UserError when it is not ours to sweep.
    """
    assert stack.work is not None
    assert stack.upper is not None
    assert config.workdir is not None
    path = os.fsdecode(config.workdir)
    try:
        _refuse_foreign(stack.work.fd, path)
        _refuse_other_mount(stack.work.fd, stack.upper.root.fd, path)
        directory = open_or_make(stack.work.fd, fmt.WORK)
        own_names(directory.fd)
        if sweep:
            incompat.check(directory.fd, path, accept=config.accept_volatile)
            _sweep(directory.fd)
        projects.match(directory.fd, stack.upper.root.fd)
        abilities = probe(directory.fd, config)
        _keep_uuid(stack.upper.root.fd, abilities.namespace, config)
    except OSError as exc:
        raise UserError(f"workdir {path}: {exc.strerror}", hint="the upper must be writable", code=LAYER) from exc
    if config.volatile:
        incompat.mark_volatile(directory.fd)
    return Workdir(directory, abilities, syncs=config.syncs)


def _room_name(project: int) -> bytes:
    """The name in work of the directory for what is of that project."""
    return b"#p%x" % project


def kept_name(nodeid: int) -> bytes:
    """The name in work of what is kept of `nodeid`."""
    return _KEPT + b"%x" % nodeid


def _keep_uuid(root: int, namespace: bytes | None, config: MountConfig) -> None:
    """Give the upper a UUID of its own, if that is asked for and it has none (super.c, ovl_init_uuid_xattr)."""
    if config.uuid not in ("auto", "on"):
        return
    if namespace is None:
        log.warning("uuid=%s: the upper keeps no xattrs, so it has no UUID", config.uuid)
    elif optional_xattr(root, namespace + fmt.UUID) is None:
        used = optional_xattr(root, namespace + fmt.IMPURE) is not None
        if config.uuid == "on" or not used:
            syscalls.setxattr(root, namespace + fmt.UUID, os.urandom(16))


def _refuse_foreign(fd: int, path: str) -> None:
    foreign = sorted(set(names_in(fd)) - _OURS)
    if foreign:
        raise UserError(
            f"workdir {path} holds {os.fsdecode(foreign[0])!r}, which is not a union's",
            hint="give an empty directory: the work directory is emptied at every mount",
            code=LAYER,
        )


def _refuse_other_mount(work: int, upper: int, path: str) -> None:
    if _mount_id(work) != _mount_id(upper):
        raise UserError(
            f"workdir {path} is reached through another mount than upperdir",
            hint="put both under the same mount: nothing can be renamed between two mounts",
            code=LAYER,
        )


def _mount_id(fd: int) -> bytes:
    with open(b"/proc/self/fdinfo/%d" % fd, "rb") as info:
        return next(line for line in info if line.startswith(b"mnt_id:"))


def _sweep(fd: int) -> None:
    """Remove what a crash left staged."""
    for name in set(names_in(fd)) - {INTENT}:
        remove_tree(fd, name)


def is_whiteout(dirfd: int, name: bytes, st: os.stat_result, *, xwhiteouts: bool) -> bool:
    """Whether the entry `name` with `st` is a whiteout of one of the forms that are entries of their own."""
    if fmt.is_whiteout_device(st.st_mode, st.st_rdev):
        return True
    return xwhiteouts and stat.S_ISREG(st.st_mode) and not st.st_size and is_xattr_whiteout(dirfd, name)
