"""What a process that makes room leaves to the program that takes its place: a mount goes on while it is upgraded.

The keeper executes the new program in its own place. What that needs stands in ``$UNIONFSD_ESTATE``, and the
descriptors it speaks of stay open. Or a service manager keeps them: `fdstore`.

Rules this file obeys: what is here is read once, by a program that may be newer than the one that wrote it. What it
cannot read it refuses with UserError, before it has touched anything.
"""

from __future__ import annotations

import os

from .errors import INTERNAL, LAYER, UserError
from .layers import Layer, LayerStack
from .options import MountConfig
from .syscalls import Fd
from .typed import Final, NamedTuple

_VARIABLE: Final = "UNIONFSD_ESTATE"
_VERSION: Final = 1


class Estate(NamedTuple):
    """Numbers of descriptors: the connection, the ledger, the roots of the layers, the work directory, the locks.

    `mount_id` is the mount's; `serving` the pid of a child that still serves, `lives` how many served before it.
    `directory` is where paths of the command line start. `asked` is what the mount was made with, by the names of
    options; None when that is not known. `trial`: only to see whether all can be taken over.
    """

    fuse: int
    ledger: int
    lowers: tuple[int, ...]
    data: tuple[int, ...]
    upper: int | None
    work: int | None
    locks: tuple[int, ...]
    mount_id: int | None
    serving: int
    lives: int
    directory: str
    trial: bool = False
    asked: dict[str, str] | None = None

    @property
    def fds(self) -> tuple[int, ...]:
        """All of them."""
        optional = tuple(fd for fd in (self.upper, self.work) if fd is not None)
        return (self.fuse, self.ledger, *self.lowers, *self.data, *optional, *self.locks)

    def environment(self) -> dict[str, str]:
        """The environment of the program that is to take it."""
        return {**os.environ, _VARIABLE: dumps(self)}


def of(
    stack: LayerStack, config: MountConfig, fuse: int, ledger: int, mount_id: int | None, lives: int, directory: str
) -> Estate:
    """What the keeper, whose child serves, has to leave."""
    upper = None if stack.upper is None else stack.upper.root.fd
    work = None if stack.work is None else stack.work.fd
    lowers, data = (tuple(layer.root.fd for layer in layers) for layers in (stack.lowers, stack.data))
    locks = tuple(lock.fd for lock in stack.locks)
    asked = _asked(config)
    return Estate(fuse, ledger, lowers, data, upper, work, locks, mount_id, 0, lives, directory, asked=asked)


_FREE: Final = frozenset(("log", "debug", "control", "control_group", "events"))
"""Options that whoever takes over may have otherwise: they are between us and people."""
_ALWAYS: Final = frozenset(("mountpoint", "lowerdirs", "datadirs", "upperdir", "workdir", "mount_flags"))


def _asked(config: MountConfig) -> dict[str, str]:
    """What was asked for, by name: what was not may have another default in another version."""
    names = _ALWAYS | (config.explicit - _FREE)
    return {name: repr(getattr(config, name, "")) for name in sorted(names)}


def left() -> Estate | None:
    """What was left to this process, if anything. UserError when it is of another version."""
    text = os.environ.pop(_VARIABLE, None)
    if text is None:
        return None
    estate = loads(text)
    try:
        for fd in estate.fds:
            os.set_inheritable(fd, False)
    except (OSError, TypeError) as error:
        raise refused(str(error)) from None
    return estate


def dumps(estate: Estate) -> str:
    """As text."""
    import json

    return json.dumps({"version": _VERSION, **estate._asdict()})


def loads(text: str) -> Estate:
    """What `dumps` made, whatever its version; UserError when it is one that cannot be read here."""
    import json

    try:
        values = json.loads(text)
        if values.pop("version") != _VERSION:
            raise ValueError("version")
        for name in ("lowers", "data", "locks"):
            values[name] = tuple(values[name])
        return Estate(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise refused(str(error)) from None


def refused(why: str) -> UserError:
    """What is left cannot be read by this program, which is of another version."""
    hint = "unmount it, then mount it with this version"
    return UserError(f"the running mount cannot be taken over: {why}", hint=hint, code=INTERNAL)


def check(estate: Estate, config: MountConfig) -> None:
    """UserError unless the mount is the one that `config` would make."""
    given = (len(config.lowerdirs), len(config.datadirs), config.upperdir is None)
    wrong = [] if given == (len(estate.lowers), len(estate.data), estate.upper is None) else ["layers"]
    if estate.asked is not None:
        asked = _asked(config)
        wrong += [name for name in sorted({*asked, *estate.asked}) if asked.get(name) != estate.asked.get(name)]
    if wrong:
        what = ", ".join(dict.fromkeys(wrong))
        hint = "unmount it, then mount anew"
        raise UserError(f"the running mount has other options: {what}", hint=hint, code=LAYER)


def stack_of(estate: Estate, config: MountConfig) -> LayerStack:
    """The layers that were left; UserError when they are not those of `config`."""
    check(estate, config)
    lowers = _lowers(config.lowerdirs, estate.lowers)
    data = _lowers(config.datadirs, estate.data)
    locks = tuple(Fd(fd) for fd in estate.locks)
    if config.upperdir is None or estate.upper is None or estate.work is None:
        return LayerStack(lowers, None, None, locks, data)
    upper = Layer(config.upperdir, Fd(estate.upper), writable=True, noatime=False)
    return LayerStack(lowers, upper, Fd(estate.work), locks, data)


def _lowers(paths: tuple[bytes, ...], fds: tuple[int, ...]) -> tuple[Layer, ...]:
    """The lowers whose roots are `fds`; read-only copies of their mounts, where the kernel lets us have them."""
    return tuple(
        Layer(path, Fd(fd), writable=False, noatime=bool(os.fstatvfs(fd).f_flag & os.ST_NOATIME))
        for path, fd in zip(paths, fds, strict=True)
    )
