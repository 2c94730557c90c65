"""Where the control socket of a mount is. For both ends, and cheap to import.

The socket of a mount is ``ID.sock``, where ID is the minor of the mount's device number: what stat and mountinfo show
for everything in it, and its name in /sys/fs/fuse/connections. It lies in /run/unionfsd as root, else in
``$XDG_RUNTIME_DIR/unionfsd``; a socket elsewhere (``control=PATH``) has a symlink there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from unionfsd.typed import Final

SYSTEM: Final = b"/run/unionfsd"
_SUFFIX: Final = b".sock"


def name(number: int) -> bytes:
    """File name of the socket of mount `number`."""
    return b"%d%s" % (number, _SUFFIX)


def number(filename: bytes) -> int | None:
    """The mount whose socket `filename` is; None for other files."""
    digits = filename.removesuffix(_SUFFIX)
    return int(digits) if digits != filename and digits.isdigit() and len(digits) < 10 else None


def own() -> list[bytes]:
    """Directories for the sockets of mounts that this process makes, the best first."""
    return [SYSTEM, _personal(os.geteuid())] if os.geteuid() == 0 else [_personal(os.geteuid())]


def everywhere(owner: int | None = None) -> list[bytes]:
    """Directories where the sockets of mounts may be that this process can ask about; `owner` made the mount."""
    found = [SYSTEM, _personal(os.geteuid()), _of_user(os.geteuid())]
    if owner is not None:
        found.append(_of_user(owner))
    return list(dict.fromkeys(found))


def known(directories: list[bytes]) -> Iterator[tuple[int, bytes]]:
    """(mount, path) of every socket in `directories`, whether or not somebody listens."""
    for directory in directories:
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        for filename in names:
            mount = number(filename)
            if mount is not None:
                yield mount, os.path.join(directory, filename)


def _personal(uid: int) -> bytes:
    directory = os.environb.get(b"XDG_RUNTIME_DIR", b"")
    return os.path.join(directory, b"unionfsd") if directory[:1] == b"/" else _of_user(uid)


def _of_user(uid: int) -> bytes:
    return b"/run/user/%d/unionfsd" % uid
