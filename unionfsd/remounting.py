"""Changing the flags of a mount that is there (``mount -o remount,ro``), which mount(8) leaves to its helper.

As with the kernel's overlayfs, options that are not flags of mount(2) stay as they were, whatever is said of them:
mount(8) repeats those of fstab.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from unionfsd import errors, mountinfo, options, syscalls
from unionfsd.errors import MOUNT, UserError
from unionfsd.options.mountflags import MS_RDONLY, MS_REMOUNT
from unionfsd.options.text import split_options
from unionfsd.typed import Final

_WORD: Final = "remount"
_PULSE: Final = 2.0
"""Seconds for the mount to say what it is."""


def flags(texts: Iterable[str]) -> int:
    """The flags for mount(2) that the texts of -o ask for; UserError for wrong values.

    Without one about access times the kernel keeps those the mount has.
    """
    pieces = [piece for text in texts for piece in split_options(text) if piece != _WORD]
    fields = options.parse(pieces).fields
    others: int = fields.get("mount_flags", 0)
    return MS_REMOUNT | others | (MS_RDONLY if fields.get("ro") else 0)


def remount(mountpoint: str, texts: Iterable[str]) -> None:
    """Change the mount at `mountpoint`; UserError where that is none of FUSE's, or cannot be changed so."""
    wanted = flags(texts)
    path = os.path.realpath(os.fsencode(mountpoint))
    line = mountinfo.at(path)
    if line is None or line.path != path or not line.fstype.startswith(b"fuse"):
        raise UserError(f"cannot remount {mountpoint}: no union is mounted there", code=MOUNT)
    if not wanted & MS_RDONLY and _takes_no_writes(path):
        hint = "unmount it, and mount it with an upperdir and without ro"
        raise UserError(f"cannot remount {mountpoint}: {os.strerror(errno.EROFS)}", hint=hint, code=MOUNT)
    try:
        syscalls.mount("", os.fsdecode(path), "", wanted, "")
    except OSError as error:
        raise UserError(f"cannot remount {mountpoint}: {errors.reason(error)}", code=MOUNT) from None


def _takes_no_writes(path: bytes) -> bool:
    """Whether the mount says that it has no upper, or was made read-only; one that says nothing is taken to write."""
    from unionfsd.control.client import CallFailedError, Client, GoneError
    from unionfsd.ctl import find

    try:
        with Client(find.locate(path).socket, silence=_PULSE) as client:
            return bool(client.call("status")["read_only"])
    except (UserError, OSError, CallFailedError, GoneError):
        return False
