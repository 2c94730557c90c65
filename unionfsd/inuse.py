"""Whether somebody has a directory already: locks among our own mounts, the mount table for the kernel's.

Rules this file obeys: what is refused, is refused before anything is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

from .errors import BUSY, UserError
from .logger import get_logger
from .syscalls import Fd
from .typed import Final

log = get_logger(__name__)

#: Seconds to wait for the lock of a mount that is ending: umount(8) returns before its daemon has.
_LOCK_PATIENCE: Final = 2.0


def lock(fd: Fd, path: bytes, what: str) -> None:
    """Lock the directory `fd`; UserError when another mount has it. A warning where there are no locks."""
    try:
        _flock(fd.fd)
    except BlockingIOError as exc:
        raise UserError(
            f"{what} {os.fsdecode(path)} is in use by another mount",
            hint="unmount that first, or give another",
            code=BUSY,
        ) from exc
    except OSError as exc:
        log.warning("%s %s: cannot be locked (%s); do not mount it twice", what, os.fsdecode(path), exc.strerror)


def unlock(fd: Fd) -> None:
    """Give up a lock, also where other processes have copies of the descriptor."""
    if fd.fd >= 0:
        with contextlib.suppress(OSError):  # where there are no locks
            fcntl.flock(fd.fd, fcntl.LOCK_UN)
    fd.close()


def _flock(fd: int) -> None:
    """Take the lock; BlockingIOError when it stays taken for longer than a daemon needs that was just unmounted."""
    end = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(0.01)


def refuse_kernel_mount(upper: bytes, st: os.stat_result) -> None:
    """UserError when the kernel's overlayfs has the directory `upper`, whose stat is `st`."""
    for directory in _kernel_uppers():
        try:
            other = os.stat(directory)
        except OSError:
            continue
        if (other.st_dev, other.st_ino) == (st.st_dev, st.st_ino):
            raise UserError(
                f"upperdir {os.fsdecode(upper)} is in use by a kernel overlayfs mount",
                hint="unmount that first",
                code=BUSY,
            )


def _kernel_uppers() -> Iterator[bytes]:
    """Upper directories of the overlayfs mounts that this process can see (proc_pid_mountinfo(5))."""
    try:
        with open("/proc/self/mountinfo", "rb") as table:
            lines = [line.split(b" - ", 1)[1] for line in table if b" - overlay " in line]
    except OSError:
        return
    if not lines:
        return
    import re  # late: few machines have mounts of overlayfs

    for line in lines:
        for option in line.split(b" ")[2].strip().split(b","):
            if option.startswith(b"upperdir="):
                # The table escapes with octals what overlayfs had been given escaped with backslashes.
                path = option[len(b"upperdir=") :].decode("unicode_escape").encode("latin-1")
                yield re.sub(rb"\\(.)", rb"\1", path, flags=re.DOTALL)
