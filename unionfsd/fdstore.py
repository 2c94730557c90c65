"""What a service manager keeps while no process of ours is there: the next one that it starts goes on with the mount.

systemd's file descriptor store (sd_notify(3), FDSTORE=1) gets copies of all that `estate` speaks of once the mount
answers, each under a name of its own, and hands them to the next process of the unit (sd_listen_fds_with_names(3)):
after keeper and server were killed, and when the unit is restarted.

Rules this file obeys:

- `ESTATE`, a memfd that says what the others are, is sent last: without it they are not all there.
- systemd watches what it keeps by epoll(7), which takes no O_PATH: the roots of layers are opened once more for it.
- What is not taken over is let go of by all who have it before anything is mounted in its place: until then the
  connection lives, and whoever asks the mount something waits.
"""

from __future__ import annotations

import os

from . import estate, syscalls, systemd
from .errors import INTERNAL, UserError
from .estate import Estate
from .inuse import unlock
from .logger import get_logger
from .syscalls import Fd
from .typed import Final

log = get_logger(__name__)

_ESTATE: Final = "estate"
_ROOTS: Final = ("lower", "data", "upper", "work")
_PATIENCE: Final = 5.0


def keep(left: Estate) -> None:
    """Have the service manager keep what is left, if it keeps anything."""
    names = _named(left)
    room = systemd.room_for_fds()
    if not room:
        return
    if room <= len(names):
        log.warning(
            "the mount ends with its processes: FileDescriptorStoreMax=%d, and %d are needed", room, len(names) + 1
        )
        return
    for name, fd in names.items():
        if name.startswith(_ROOTS):
            with syscalls.reopen(fd, os.O_RDONLY | os.O_DIRECTORY) as root:
                systemd.store(name, root.fd)
        else:
            systemd.store(name, fd)
    will = os.memfd_create(_ESTATE, os.MFD_CLOEXEC)
    try:
        os.write(will, estate.dumps(left).encode())
        systemd.store(_ESTATE, will)
    finally:
        os.close(will)


def let_go(left: Estate) -> None:
    """Have the service manager let go of it: the mount ends."""
    for name in (_ESTATE, *_named(left)):
        systemd.forget(name)


def _named(left: Estate) -> dict[str, int]:
    """The descriptors by the names that they are kept under."""
    names = {"fuse": left.fuse, "ledger": left.ledger}
    for name, fd in (("upper", left.upper), ("work", left.work)):
        if fd is not None:
            names[name] = fd
    for name, fds in (("lower", left.lowers), ("data", left.data), ("lock", left.locks)):
        names |= {f"{name}{number}": fd for number, fd in enumerate(fds)}
    return names


class Kept:
    """What the service manager gave back to this process."""

    def __init__(self) -> None:
        self._fds = systemd.stored()

    def __bool__(self) -> bool:
        return bool(self._fds)

    def estate(self) -> Estate:
        """All of it; UserError when that does not make a mount."""
        fds = self._fds
        try:
            text = os.pread(fds[_ESTATE], 1 << 20, 0).decode()
            left = estate.loads(text)
            for name, fd in fds.items():
                if name.startswith(_ROOTS):
                    with syscalls.reopen(fd, os.O_PATH | os.O_DIRECTORY) as root:
                        os.dup2(root.fd, fd, inheritable=False)
            return left._replace(
                fuse=fds["fuse"],
                ledger=fds["ledger"],
                upper=None if left.upper is None else fds["upper"],
                work=None if left.work is None else fds["work"],
                lowers=tuple(fds[f"lower{number}"] for number in range(len(left.lowers))),
                data=tuple(fds[f"data{number}"] for number in range(len(left.data))),
                locks=tuple(fds[f"lock{number}"] for number in range(len(left.locks))),
            )
        except (KeyError, OSError, ValueError) as error:
            raise UserError(f"not all of it is there: {error}", code=INTERNAL) from None

    def give_up(self) -> None:
        """Let go of it, and have the service manager do so, too."""
        for name, fd in self._fds.items():
            systemd.forget(name)
            if name.startswith("lock"):
                unlock(Fd(fd))
            else:
                os.close(fd)
        self._fds = {}
        if not systemd.settle(_PATIENCE):
            log.warning("the service manager does not say that it let go of the mount before")
