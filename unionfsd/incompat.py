"""What a work directory says that not every mount can live with: that the upper was mounted `volatile`."""

from __future__ import annotations

import os

from . import format as fmt
from . import syscalls
from .errors import LAYER, UserError
from .removal import names_in, open_or_make


def check(fd: int, path: str, *, accept: bool) -> None:
    """UserError for an upper that was volatile (ovl.rst, "Volatile mount"), unless that is to be accepted.

    `fd` is work in the work directory `path`.
    """
    try:
        with syscalls.open_dir(fd, fmt.INCOMPAT) as incompat:
            features = set(names_in(incompat.fd))
    except FileNotFoundError:
        return
    unknown = sorted(features - {fmt.VOLATILE})
    if unknown:
        raise UserError(
            f"workdir {path}: the upper takes {os.fsdecode(unknown[0])!r}, whatever that is",
            hint="mount it with what made it",
            code=LAYER,
        )
    if features and not accept:
        raise UserError(
            f"workdir {path}: the last mount of this upper was volatile, and a crash may have damaged it",
            hint=f"check the upper, then accept it by the option accept_volatile, once, or remove {path}/work/incompat",
            code=LAYER,
        )


def mark_volatile(fd: int) -> None:
    with open_or_make(fd, fmt.INCOMPAT) as incompat:
        open_or_make(incompat.fd, fmt.VOLATILE).close()
