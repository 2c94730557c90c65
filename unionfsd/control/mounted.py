"""What the control socket is told of its mount by the daemon."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from unionfsd.steps import Op
    from unionfsd.union import Union


@dataclass(frozen=True, slots=True)
class Mounted:
    """One mount that is served. `number` is the minor of its device number, `since` a time of the monotonic clock.

    `mount_id` is None when somebody else made the mount. `drive` runs an operation of the union to its end. `unmount`
    says "gone", "detached" or "busy"; a mount in use is detached only when its argument, `lazy`, is true.
    """

    union: Union
    mount_id: int | None
    number: int | None
    transport: Literal["channel", "pyfuse3"]
    io: Literal["cached", "passthrough"]
    socket: bytes
    since: float
    drive: Callable[[Op[None]], Awaitable[None]]
    unmount: Callable[[bool], Awaitable[str]]
