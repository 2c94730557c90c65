"""What is ours: making it, listing it, and removing it, whatever it is."""

from __future__ import annotations

import os
import stat

from . import syscalls
from .syscalls import Fd


def open_or_make(dirfd: int, name: bytes) -> Fd:
    """A directory of our own, O_PATH; made if there is none."""
    try:
        syscalls.mkdir_at(dirfd, name, 0o700)
    except FileExistsError:
        pass
    return syscalls.open_dir(dirfd, name)


def remove_tree(dirfd: int, name: bytes) -> None:
    """Remove `name` beneath `dirfd` with all that it holds, following nothing."""
    try:
        syscalls.unlink_at(dirfd, name)
        return
    except (IsADirectoryError, PermissionError) as exc:
        if not stat.S_ISDIR(syscalls.stat_at(dirfd, name).st_mode):
            raise exc
    with syscalls.open_dir(dirfd, name) as fd:
        for child in own_names(fd.fd):
            remove_tree(fd.fd, child)
    syscalls.rmdir_at(dirfd, name)


def own_names(fd: int) -> list[bytes]:
    """Names in a directory that we may remove; without privileges it may have to be made readable for that."""
    try:
        return names_in(fd)
    except PermissionError:
        syscalls.chmod(fd, 0o700)
        return names_in(fd)


def names_in(fd: int) -> list[bytes]:
    with os.scandir(syscalls.proc_path(fd)) as entries:
        return [entry.name for entry in entries]
