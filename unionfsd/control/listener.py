"""The listening end of a control socket: made before the mount answers, served later.

Rules this file obeys:

- Directories are opened before the mount is made, which may cover them: once there is a mount, finding the socket's
  place must not ask it.
- A socket appears under its name by a rename, already listening and with its mode, over what a dead mount left there.
- A place that was asked for must do, or the mount is refused. One that was not is a convenience: without it the mount
  lives without a socket.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat

from unionfsd import syscalls
from unionfsd.control import places
from unionfsd.errors import BUSY, UserError, reason
from unionfsd.logger import get_logger
from unionfsd.options import MountConfig
from unionfsd.syscalls import Fd, proc_path
from unionfsd.typed import Final

log = get_logger(__name__)

#: Clients that wait to be accepted; the kernel refuses more.
_BACKLOG: Final = 16


class Control:
    """The socket of one mount, from before the mount is made until after it is gone. `listener` is None without one."""

    def __init__(self, config: MountConfig, *, taken: bool = False) -> None:
        """Open the places for it. UserError: what was asked for cannot be. `taken`: by a process that makes room."""
        self.listener: Listener | None = None
        self._gid = None if config.control_group is None else _gid(config.control_group)
        self._usual = None if config.control == "off" else _usual_directory()
        self._wanted = None if config.control in ("auto", "off") else _wanted(os.fsencode(config.control), taken=taken)
        if config.control == "auto" and self._usual is None:
            log.info("no control socket: there is no directory for it; say where with control=PATH")

    def listen(self, mount: int | None) -> None:
        """Listen for clients of `mount`, the minor of its device; what is in the way is logged."""
        try:
            self.listener = self._listen(mount)
        except OSError as error:
            log.warning("no control socket: %s", reason(error))

    def _listen(self, mount: int | None) -> Listener | None:
        usual = None if mount is None or self._usual is None else (*self._usual, places.name(mount))
        if self._wanted is not None:
            directory, path, filename = self._wanted
            listener = _listen_at(directory, filename, os.path.join(path, filename), self._gid)
            if usual is not None:
                _link(usual[0], usual[2], listener.path)
                listener.also(usual[0], usual[2])
            return listener
        if usual is None:
            return None
        directory, path, filename = usual
        return _listen_at(directory, filename, os.path.join(path, filename), self._gid)

    def asked(self) -> bool:
        """Whether a client waits to be heard."""
        if self.listener is None:
            return False
        poll = select.poll()
        poll.register(self.listener.fd.fd, select.POLLIN)
        return bool(poll.poll(0))

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.listener is not None:
            self.listener.close()


class Listener:
    """A listening socket and the names it has; `gid` is the group that may use it."""

    __slots__ = ("_names", "fd", "gid", "path")

    def __init__(self, fd: Fd, path: bytes, gid: int | None) -> None:
        self.fd = fd
        self.path = path
        self.gid = gid
        self._names: list[tuple[Fd, bytes, int]] = []

    def also(self, directory: Fd, filename: bytes) -> None:
        """Take `filename` away, too, when the socket is closed."""
        self._names.append((directory, filename, _inode(directory, filename)))

    def close(self) -> None:
        """Stop listening and remove the names, unless somebody else has taken them meanwhile."""
        self.fd.close()
        for directory, filename, inode in self._names:
            with contextlib.suppress(OSError):
                if _inode(directory, filename) == inode:
                    os.unlink(filename, dir_fd=directory.fd)
        self._names.clear()


def _wanted(path: bytes, *, taken: bool) -> tuple[Fd, bytes, bytes]:
    """(directory, its path, file name) of a socket that was asked for."""
    directory, filename = os.path.split(path)
    try:
        fd = Fd(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        raise UserError(f"control={os.fsdecode(path)}: {reason(error)}", hint="name a file in a directory") from None
    if not filename or filename in (b".", b".."):
        raise UserError(f"control={os.fsdecode(path)}: no file name", hint="name a file that may be made")
    if not taken:
        _check_free(fd, filename, path)
    return fd, directory, filename


def _check_free(directory: Fd, filename: bytes, path: bytes) -> None:
    """A socket that nobody listens on may be replaced; anything else stays."""
    try:
        mode = os.stat(filename, dir_fd=directory.fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UserError(f"control={os.fsdecode(path)}: exists and is no socket", hint="name another file")
    import socket  # late: few ask for a place

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, contextlib.suppress(ConnectionRefusedError):
        client.connect(proc_path(directory.fd) + b"/" + filename)
        raise UserError(f"control={os.fsdecode(path)}: in use", hint="name another file", code=BUSY)


def _gid(group: str) -> int:
    if group.isascii() and group.isdigit():
        return int(group)
    import grp  # late: few ask for a group

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise UserError(f"control_group={group}: no such group", hint="name a group or its number") from None


def _usual_directory() -> tuple[Fd, bytes] | None:
    for path in places.own():
        try:
            return private_directory(path), path
        except OSError as error:
            log.debug("no control socket in %s: %s", os.fsdecode(path), reason(error))
    return None


def private_directory(path: bytes) -> Fd:
    """The directory `path`, made if need be, where nobody but us can put anything."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o755 if path == places.SYSTEM else 0o700)
    fd = Fd(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
    st = os.fstat(fd.fd)
    if st.st_uid != os.geteuid() or st.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(1, "it belongs to somebody else, or others can write in it")
    return fd


def _listen_at(directory: Fd, filename: bytes, path: bytes, gid: int | None) -> Listener:
    hidden = _hidden(directory, filename)
    # By way of the descriptor also because an address has room for 107 bytes only.
    address = proc_path(directory.fd) + b"/" + hidden
    fd = syscalls.listen_unix(address, 0o600 if gid is None else 0o660, _BACKLOG)
    if gid is not None:
        os.chown(address, -1, gid, follow_symlinks=False)
    os.rename(hidden, filename, src_dir_fd=directory.fd, dst_dir_fd=directory.fd)
    listener = Listener(fd, path, gid)
    listener.also(directory, filename)
    return listener


def _hidden(directory: Fd, filename: bytes) -> bytes:
    """A name for what is to be renamed to `filename`, free now."""
    hidden = b".%s.%d" % (filename, os.getpid())
    with contextlib.suppress(FileNotFoundError):
        os.unlink(hidden, dir_fd=directory.fd)
    return hidden


def _link(directory: Fd, filename: bytes, target: bytes) -> None:
    hidden = _hidden(directory, filename)
    os.symlink(target, hidden, dir_fd=directory.fd)
    os.rename(hidden, filename, src_dir_fd=directory.fd, dst_dir_fd=directory.fd)


def _inode(directory: Fd, filename: bytes) -> int:
    return os.stat(filename, dir_fd=directory.fd, follow_symlinks=False).st_ino
