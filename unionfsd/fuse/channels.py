"""Which kind of channel a mount takes."""

from __future__ import annotations

from collections.abc import Callable

from unionfsd.fuse.channel import Channel
from unionfsd.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from unionfsd.options import MountConfig
    from unionfsd.union import Union


def channel(union: Union, fuse_fd: int, config: MountConfig, started: Callable[[], None]) -> Channel:
    """The channel on `fuse_fd`, a mounted /dev/fuse descriptor: to `begin`, which needs no event loop, then to `run`.

    `started` is called once, when INIT was answered. `fuse_fd` becomes non-blocking.
    """
    kind = Channel
    if union.stack.is_remote:
        from unionfsd.fuse.patient import PatientChannel  # late, both: few mounts need them

        kind = PatientChannel
    if config.debug:
        from unionfsd.fuse.traced import traced

        kind = traced(kind)
    return kind(union, fuse_fd, config, started)
