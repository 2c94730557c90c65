"""What a change of its data takes off a file: setuid and setgid, which the kernel leaves to us (HANDLE_KILLPRIV_V2).

The rule is the kernel's (fs/attr.c, setattr_should_drop_suidgid); requests tell who asks, not what they may. The kernel
does not look again at the mode of a file that it writes to, so it is told to: it would go on executing it as setuid.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Callable
from functools import partial

from unionfsd.steps import Calling
from unionfsd.typed import TYPE_CHECKING, Final, TypeVar
from unionfsd.union import SetAttr

if TYPE_CHECKING:
    from unionfsd.owners import StatLike
    from unionfsd.steps import Op
    from unionfsd.union import Caller, Union

T = TypeVar("T")

_PERMISSIONS: Final = 0o7777


def killed(st: StatLike, caller: Caller) -> int | None:
    """The permissions left to a regular file when `caller` changes its data or its owner; None: all.

    setgid without group execution is no privilege (it meant mandatory locking): root, who is taken to have CAP_FSETID
    over the file, keeps it, and so does the file's group.
    """
    mode = st.st_mode
    left = mode & _PERMISSIONS & ~stat.S_ISUID
    if mode & stat.S_ISGID and (mode & stat.S_IXGRP or not _may_set_gid(caller, st.st_gid)):
        left &= ~stat.S_ISGID
    return left if stat.S_ISREG(mode) and left != mode & _PERMISSIONS else None


def kill_first(op: Op[T], union: Union, nodeid: int, caller: Caller, tell: Callable[[int], None]) -> Op[T]:
    """`op` changes the data of a file for `caller`: suid and sgid go first.

    `tell`, in a thread, has the kernel forget the attributes of a node.
    """
    mode = killed(union.getattr(nodeid).st, caller)
    if mode is not None:
        yield from union.setattr(nodeid, SetAttr(mode=mode), caller)
        yield Calling(partial(tell, nodeid))
    return (yield from op)


def _may_set_gid(caller: Caller, gid: int) -> bool:
    if caller.uid == 0 or caller.gid == gid:
        return True
    # Who ended meanwhile, or is of another PID namespace, is in no other group.
    with contextlib.suppress(OSError), open(f"/proc/{caller.pid}/status", "rb") as status:
        for line in status:
            if line.startswith(b"Groups:"):
                return b"%d" % gid in line.split()[1:]
    return False
