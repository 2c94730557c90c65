"""What the control socket is told of its mount by the daemon."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from unionfsd.typed import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from unionfsd.steps import Op
    from unionfsd.union import Union


class Notifier(Protocol):
    """Tells the kernel what not to believe any longer. OSError EINVAL: the kernel is too old for it."""

    async def inval_inode(self, nodeid: int, offset: int = 0, length: int = 0) -> bool: ...
    async def hand_over(self, nodeids: list[int]) -> None: ...
    async def inval_entry(self, parent: int, name: bytes) -> bool: ...
    async def prune(self, nodeids: list[int]) -> bool: ...
    async def inc_epoch(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Mounted:
    """One mount that is served. `number` is the minor of its device number, `since` a time of the monotonic clock.

    `mount_id` is None when somebody else made the mount. `drive` runs an operation of the union to its end, `quiesce`
    waits for the end of those under way. `unmount` says "gone", "detached" or "busy"; a mount in use is detached only
    when its argument, `lazy`, is true. `requests` has the names of the kinds of requests. `keeper` is the
    pid of the process that would start another, `restarts` how often it did. `trial` says why a newer program could not
    take the mount over, or None.
    """

    union: Union
    mount_id: int | None
    number: int | None
    transport: Literal["channel", "pyfuse3"]
    io: Literal["cached", "passthrough"]
    socket: bytes
    since: float
    notifier: Notifier
    drive: Callable[[Op[None]], Awaitable[None]]
    quiesce: Callable[[], Awaitable[None]]
    unmount: Callable[[bool], Awaitable[str]]
    requests: Mapping[int, str]
    keeper: int | None = None
    restarts: int = 0
    trial: Callable[[], str | None] = lambda: None
