"""What an upper's file system can do: tried, not looked up."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from . import format as fmt
from . import syscalls
from .errors import LAYER, UserError
from .logger import get_logger
from .options import MountConfig
from .removal import remove_tree
from .typed import Final, Literal, NamedTuple

log = get_logger(__name__)

WhiteoutForm = Literal["chardev", "xattr", "wh"]

_UNSUPPORTED: Final = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EISDIR}


class Abilities(NamedTuple):
    """What the upper can do. `namespace` is the prefix of the format's xattrs, None when the upper keeps none."""

    namespace: bytes | None
    whiteout: WhiteoutForm
    tmpfile: bool
    noreplace: bool
    exchange: bool
    rename_whiteout: bool

    @property
    def can_redirect(self) -> bool:
        """Whether merged directories can be renamed: a ``.wh.`` entry beside one would hide its own lowers first."""
        return self.namespace is not None and self.whiteout != "wh"


def probe(fd: int, config: MountConfig) -> Abilities:
    """Try everything in the work directory `fd`; what is missing, and nobody asked to do without, is warned of.

    With as few files as can be: ext4 gives the numbers of removed ones to nobody for some seconds, and looks through
    them whenever it makes another.
    """
    a, b = b"#probe-a", b"#probe-w"
    try:
        namespace = _probe_namespace(fd, a, config)
        form = _probe_whiteout(fd, b, config, namespace)
        if form != "chardev":
            b = b"#probe-b"  # a name of which nothing was made yet
            syscalls.create_at(fd, b, 0o600).close()
        exchange = _renames(fd, a, b, syscalls.RENAME_EXCHANGE)
        remove_tree(fd, b)
        noreplace = _renames(fd, a, b, syscalls.RENAME_NOREPLACE)
        here, there = (b, a) if noreplace else (a, b)
        whiteout = form == "chardev" and _renames(fd, here, there, syscalls.RENAME_WHITEOUT)
    finally:
        for name in (a, b):
            with contextlib.suppress(FileNotFoundError):
                remove_tree(fd, name)
    found = Abilities(namespace, form, _probe_tmpfile(fd), noreplace, exchange, whiteout)
    _report(found, config)
    return found


def _report(found: Abilities, config: MountConfig) -> None:
    """One warning for each thing that the upper lacks and nobody asked to do without."""
    if found.namespace is None:
        log.warning(
            "upper keeps no xattrs: no origins, directories of a lower cannot be renamed (EXDEV), opaque ones are "
            "written as .wh..wh..opq"
        )
    if config.whiteout == "auto" and found.whiteout != "chardev":
        form = "empty files with an xattr" if found.whiteout == "xattr" else ".wh. files"
        log.warning("upper takes no device nodes 0:0: deletions are recorded as %s", form)
    if found.whiteout == "chardev" and not found.rename_whiteout:
        log.warning("upper has no RENAME_WHITEOUT: after a crash in some renames only unionfsd can put it right")
    if not found.exchange:
        log.warning("upper has no RENAME_EXCHANGE: what replaces a directory or its whiteout is refused with EXDEV")
    if not found.noreplace:
        log.warning("upper has no RENAME_NOREPLACE: nobody else may change it while it is mounted")
    if not found.tmpfile:
        log.warning("upper has no O_TMPFILE: neither has the mount")


def _probe_namespace(fd: int, name: bytes, config: MountConfig) -> bytes | None:
    wanted = (fmt.USER,) if config.userxattr else (fmt.TRUSTED, fmt.USER)
    with syscalls.create_at(fd, name, 0o600) as probe:
        return next((ns for ns in wanted if _accepts(probe.fd, ns)), None)


def _accepts(fd: int, namespace: bytes) -> bool:
    """Whether a mark can be set and is there then: a union that has marks of its own may keep it to itself."""
    name = namespace + fmt.OPAQUE
    try:
        syscalls.setxattr(fd, name, fmt.OPAQUE_YES)
        return syscalls.getxattr(fd, name) == fmt.OPAQUE_YES
    except OSError as exc:
        if exc.errno in (*_UNSUPPORTED, errno.ENODATA):
            return False
        raise


def _probe_whiteout(fd: int, name: bytes, config: MountConfig, namespace: bytes | None) -> WhiteoutForm:
    if config.whiteout == "wh":
        return _probe_wh(fd)
    if config.whiteout in ("auto", "chardev"):
        try:
            _make_device(fd, name)
            return "chardev"
        except OSError as exc:
            if exc.errno not in (*_UNSUPPORTED, errno.ENOENT, errno.EEXIST):
                raise
            if config.whiteout == "chardev":
                raise _no_whiteouts("chardev", exc.strerror) from exc
    if namespace is not None:
        return "xattr"
    if config.whiteout == "xattr":
        raise _no_whiteouts("xattr", "it keeps no xattrs")
    return _probe_wh(fd)


def _probe_wh(fd: int) -> Literal["wh"]:
    """UserError on a union to which such a file is a whiteout already: there deletions cannot be recorded at all."""
    name = fmt.wh_name(b"#probe")
    try:
        syscalls.create_at(fd, name, 0o600).close()
    except OSError as exc:
        raise UserError(
            f"upper cannot record deletions, not even as .wh. files: {exc.strerror}",
            hint="is it on a union itself? put upperdir and workdir on a file system beneath that",
            code=LAYER,
        ) from exc
    remove_tree(fd, name)
    return "wh"


def _make_device(fd: int, name: bytes) -> None:
    """Make a device node 0:0. ENOENT, and EEXIST the next time, on a union to which it is a whiteout."""
    syscalls.mknod_at(fd, name, stat.S_IFCHR, os.makedev(0, 0))
    st = syscalls.stat_at(fd, name)
    if not fmt.is_whiteout_device(st.st_mode, st.st_rdev):
        remove_tree(fd, name)
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def _no_whiteouts(form: str, why: str | None) -> UserError:
    return UserError(f"upper cannot keep whiteouts of the form {form}: {why}", hint="use whiteout=auto", code=LAYER)


def _renames(fd: int, a: bytes, b: bytes, flag: int) -> bool:
    try:
        syscalls.renameat2(fd, a, fd, b, flag)
        return True
    except OSError as exc:
        if exc.errno not in _UNSUPPORTED:
            raise
        return False


def _probe_tmpfile(fd: int) -> bool:
    name = b"#probe-t"
    try:
        with syscalls.tmpfile_at(fd, 0o600) as probe:
            syscalls.link_fd(probe.fd, fd, name)
    except OSError:
        return False
    remove_tree(fd, name)
    return True
