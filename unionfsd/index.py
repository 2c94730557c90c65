"""The index: one object in work for all names of a lower object that has several, so that copy-up does not part them.

Rules this file obeys (Documentation/filesystems/overlayfs.rst, "Inode properties"; fs/overlayfs/namei.c, util.c,
super.c):

- ``work/index`` holds a link to each copied-up object whose lower has several names. It is called like the lower's file
  handle, as the xattr origin has it, in hexadecimal. A name of the lower that the upper has not yet is that object all
  the same.
- How many names the union has of it stands in the xattr nlink, relative to the upper object's own link count: ``U-1``.
  That stays right when a name is made or removed, in the same call. Relative to the lower's, ``L+0``, it stays right
  when a name that the union had before is linked in the upper.
- An object of which the union has no name is removed; what a crash left of such, at the next mount.
- An index belongs to one upper and to one topmost lower: both say so in xattrs, the first time it is used.
"""

from __future__ import annotations

import errno
import os
import stat

from . import format as fmt
from . import projects, syscalls
from .errors import LAYER, UserError
from .layers import Layer, LayerStack, exists, optional_xattr
from .logger import get_logger
from .removal import remove_tree
from .typed import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from .options import MountConfig
    from .syscalls import Fd
    from .workdir import Workdir

log = get_logger(__name__)

_STAGED: Final = b"#"


class Indexed(NamedTuple):
    """An object of the index: its name there, and its stat."""

    name: bytes
    st: os.stat_result


class Index:
    """The index of one upper. `fd` is the number of an O_PATH fd of it; -1 as long as there is none."""

    def __init__(self, stack: LayerStack, work: Workdir) -> None:
        self._stack = stack
        self._work = work
        self._directory: Fd | None = None
        self._names: set[bytes] = set()
        #: What is to be added to an object's st_nlink, where that is known.
        self._extra: dict[bytes, int] = {}
        #: Those whose xattr says so relative to the upper.
        self._settled: set[bytes] = set()

    @property
    def fd(self) -> int:
        return -1 if self._directory is None else self._directory.fd

    # What is in it.

    def name_of(self, layer: Layer, dirfd: int, name: bytes) -> bytes:
        """What an object of a lower is called here; OSError where it has no file handle."""
        kind, handle = syscalls.file_handle(dirfd, name)
        return fmt.encode_origin(fmt.Origin(kind, handle, layer.uuid)).hex().encode()

    def find(self, layer: Layer, dirfd: int, name: bytes) -> Indexed | None:
        """The object of the upper that an object of a lower has become, under whatever name; None when it has not."""
        if not self._names:
            return None
        try:
            return self._stat(self.name_of(layer, dirfd, name))
        except (OSError, ValueError):
            return None

    def find_upper(self, fd: int, st: os.stat_result) -> bytes | None:
        """What the object `fd` of the upper, whose fstat is `st`, is called here; None when it is not here."""
        if not self._names:
            return None
        for attr in fmt.ORIGIN_NAMES:
            value = optional_xattr(fd, attr)
            found = None if value is None else self._stat(value.hex().encode())
            if found is not None:
                return found.name if os.path.samestat(found.st, st) else None
        return None

    def _stat(self, name: bytes) -> Indexed | None:
        if name not in self._names:
            return None
        st = syscalls.stat_at(self.fd, name)
        return None if fmt.is_whiteout_device(st.st_mode, st.st_rdev) else Indexed(name, st)

    # How many names the union has.

    def extra(self, name: bytes) -> int:
        """The union has as many names of the object `name` as it has links, and so many more."""
        known = self._extra.get(name)
        if known is None:
            with syscalls.open_object(self.fd, name) as fd:
                known = self._extra[name] = self._read(name, fd.fd)
        return known

    def _read(self, name: bytes, fd: int) -> int:
        values = (optional_xattr(fd, attr) for attr in fmt.NLINK_NAMES)
        nlink = next((fmt.decode_nlink(value) for value in values if value is not None), None)
        if nlink is None:
            return 0
        if not nlink.of_lower:
            self._settled.add(name)
            return nlink.difference
        lower = self._lower(name)
        return 0 if lower is None else lower.st_nlink + nlink.difference - os.fstat(fd).st_nlink

    def _lower(self, name: bytes) -> os.stat_result | None:
        """The lower object that `name` stands for; None without CAP_DAC_READ_SEARCH, or when it is gone."""
        origin = fmt.decode_origin(bytes.fromhex(name.decode("ascii")))
        for layer in self._stack.lowers:
            if origin is not None and layer.uuid == origin.uuid:
                st = layer.stat_handle(origin.kind, origin.handle)
                if st is not None:
                    return st
        return None

    def settle(self, name: bytes) -> None:
        """Before a link of the object is made or removed: have the xattr speak of the upper's links."""
        extra = self.extra(name)
        if name not in self._settled:
            with syscalls.open_object(self.fd, name) as fd:
                self._work.mark(fd.fd, fmt.NLINK, fmt.encode_nlink(fmt.Nlink(False, extra)))
            self._settled.add(name)

    def retire(self, name: bytes) -> None:
        """Remove the object `name` if the union has no name of it any more."""
        if syscalls.stat_at(self.fd, name).st_nlink + self.extra(name) > 0:
            return
        self._names.discard(name)
        try:
            syscalls.unlink_at(self.fd, name)
        except OSError as exc:
            # Seen by nobody; the next mount removes it.
            log.warning("index: %s stays until the next mount: %s", os.fsdecode(name), exc.strerror)

    # Adding.

    def mark_new(self, fd: int) -> None:
        """Mark the staged copy `fd` of a lower object: the union has as many names of it as the lower has."""
        self._work.mark(fd, fmt.NLINK, fmt.encode_nlink(fmt.Nlink(True, 0)))

    def added(self, name: bytes, lower_nlink: int) -> None:
        """A copy of a lower object with `lower_nlink` names was published as `name`, with one link."""
        self._names.add(name)
        self._extra[name] = lower_nlink - 1
        self._settled.discard(name)

    def link(self, name: bytes, lower_nlink: int, dirfd: int, alias: bytes) -> None:
        """Link the object `name` into the upper under a name that the union has already."""
        with syscalls.open_object(self.fd, name) as fd:
            names = os.fstat(fd.fd).st_nlink + self.extra(name)
            if name in self._settled or names != lower_nlink:
                self._work.mark(fd.fd, fmt.NLINK, fmt.encode_nlink(fmt.Nlink(True, names - lower_nlink)))
                self._settled.discard(name)
            self._link(fd.fd, name, dirfd, alias)
            self._extra[name] -= 1
        self.settle(name)

    def _link(self, fd: int, name: bytes, dirfd: int, alias: bytes) -> None:
        """linkat(2). An object that was just made belongs to the project of the first directory it gets into."""
        try:
            syscalls.link_at(self.fd, name, dirfd, alias)
        except OSError as exc:
            project = projects.handed_on(dirfd) if exc.errno == errno.EXDEV and os.fstat(fd).st_nlink == 1 else None
            if project is None or not projects.give(fd, project):
                raise
            syscalls.link_at(self.fd, name, dirfd, alias)

    def prepare(self) -> int:
        """See that there is an index, and that it says whose it is; returns its fd."""
        if self._directory is None:
            assert self._stack.work is not None
            assert self._stack.upper is not None
            root = self._stack.upper.root.fd
            self._claim(root, fmt.ORIGIN, fmt.ORIGIN_NAMES, _handle(self._stack.lowers[0], 0))
            try:
                syscalls.mkdir_at(self._stack.work.fd, fmt.INDEX, 0o700)
            except FileExistsError:
                pass
            directory = syscalls.open_dir(self._stack.work.fd, fmt.INDEX)
            projects.match(directory.fd, root)
            self._claim(directory.fd, fmt.UPPER, fmt.UPPER_NAMES, _handle(self._stack.upper, fmt.ORIGIN_OF_UPPER))
            self._directory = directory
        return self.fd

    def _claim(self, fd: int, mark: bytes, names: tuple[bytes, ...], value: bytes) -> None:
        if all(optional_xattr(fd, name) is None for name in names):
            self._work.mark(fd, mark, value)

    # Mounting.

    def load(self) -> None:
        """Open what is there and clean it: what was staged in it, and objects without names."""
        assert self._stack.work is not None
        if not exists(self._stack.work.fd, fmt.INDEX):
            return
        directory = syscalls.open_dir(self._stack.work.fd, fmt.INDEX)
        with os.scandir(syscalls.proc_path(directory.fd)) as entries:
            names = [entry.name for entry in entries]
        self._directory = directory
        for name in names:
            if name.startswith(_STAGED):
                remove_tree(directory.fd, name)
            elif self._is_name(name):
                self._names.add(name)
                self._clean(name)

    def reload(self) -> None:
        """Forget what was known, and `load`: somebody else has used it since."""
        self.close()
        self._directory = None
        self._names.clear()
        self._extra.clear()
        self._settled.clear()
        self.load()

    def _is_name(self, name: bytes) -> bool:
        try:
            return fmt.decode_origin(bytes.fromhex(name.decode("ascii"))) is not None
        except ValueError:
            return False

    def _clean(self, name: bytes) -> None:
        st = syscalls.stat_at(self.fd, name)
        if stat.S_ISDIR(st.st_mode) or fmt.is_whiteout_device(st.st_mode, st.st_rdev):
            self._names.discard(name)  # of nfs_export=on, for which whoever made them has a use
        else:
            self.retire(name)

    def close(self) -> None:
        if self._directory is not None:
            self._directory.close()


def _handle(layer: Layer, flags: int) -> bytes:
    kind, handle = syscalls.file_handle(layer.root.fd, b"")
    return fmt.encode_origin(fmt.Origin(kind, handle, layer.uuid), flags)


def open_index(stack: LayerStack, work: Workdir, config: MountConfig, *, load: bool = True) -> Index | None:
    """The index of the mount. None when it is not wanted, or not possible: a warning if it was asked for.

    One that is in use is not to be loaded, which cleans it, until it is not.
    UserError when index=on and the upper's index was made with another upper or topmost lower.
    """
    if config.index == "off":
        return None
    wanted = config.index == "on"
    why = _impossible(stack, work)
    if why is not None:
        (log.warning if wanted else log.debug)("index=off: %s", why)
        return None
    stranger = _stranger(stack)
    if stranger is not None:
        if wanted:
            raise UserError(stranger, hint="index=off accepts it: names of hard links may then part", code=LAYER)
        log.warning("index=off: %s", stranger)
        return None
    index = Index(stack, work)
    try:
        if load:
            index.load()
            if wanted:
                index.prepare()
    except BaseException:
        index.close()
        raise
    return index


def _impossible(stack: LayerStack, work: Workdir) -> str | None:
    """Why there can be no index; None when there can."""
    assert stack.upper is not None
    if work.abilities.namespace is None:
        return "the upper keeps no xattrs"
    lowers = {layer.dev: layer for layer in stack.lowers}
    for layer in (stack.upper, *lowers.values()):
        try:
            _handle(layer, 0)
        except (OSError, ValueError):
            return f"{os.fsdecode(layer.path)} is on a file system without file handles"
    if len({layer.uuid for layer in lowers.values()}) < len(lowers):
        return "lowers are on file systems that no UUID tells apart"
    return None


def _stranger(stack: LayerStack) -> str | None:
    """What is wrong if the upper's index is not of these layers (ovl_verify_set_fh); None when all is well."""
    assert stack.upper is not None
    assert stack.work is not None
    top = stack.lowers[0]
    if not _is_of(stack.upper.root.fd, fmt.ORIGIN_NAMES, top):
        return (
            f"upperdir {os.fsdecode(stack.upper.path)} was used with another topmost lowerdir than "
            f"{os.fsdecode(top.path)}"
        )
    if exists(stack.work.fd, fmt.INDEX):
        with syscalls.open_dir(stack.work.fd, fmt.INDEX) as directory:
            if not _is_of(directory.fd, fmt.UPPER_NAMES, stack.upper):
                return f"the index in workdir is not that of upperdir {os.fsdecode(stack.upper.path)}"
    return None


def _is_of(fd: int, names: tuple[bytes, ...], layer: Layer) -> bool:
    """Whether the root of `layer` is what the handle in one of the xattrs `names` means, if there is one."""
    for name in names:
        value = optional_xattr(fd, name)
        origin = None if value is None else fmt.decode_origin(value)
        if origin is not None:
            same = (origin.kind, origin.handle) == syscalls.file_handle(layer.root.fd, b"")
            return same and (origin.uuid == layer.uuid or not any(origin.uuid) or not any(layer.uuid))
    return True
