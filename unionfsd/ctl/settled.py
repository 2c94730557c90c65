"""A container whose upper is read while it is mounted: what was written is there first, and nothing comes meanwhile.

The kernel keeps what was written for a while (``writeback``), so an upper that is merely read lacks the latest of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from unionfsd.control.client import CallFailedError, GoneError
from unionfsd.control.protocol import BUSY as FROZEN
from unionfsd.control.protocol import UNSUPPORTED
from unionfsd.ctl import find
from unionfsd.errors import BUSY, UserError
from unionfsd.images import containers
from unionfsd.typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from unionfsd.control.client import Client
    from unionfsd.images.containers import Container
    from unionfsd.images.store import Store

#: Seconds after which a mount thaws by itself, should we be killed.
_FREEZE: Final = 600.0


@contextlib.contextmanager
def settled(store: Store, container: Container) -> Iterator[None]:
    """Keep the upper of a container still, and whole, for as long as the context lasts.

    UserError for one that is mounted and cannot be asked.
    """
    socket = _socket(container)
    if socket is None:
        if containers.in_use(store, container):
            raise UserError(
                f"{container.name}: mounted, and nobody can be asked for what its kernel still keeps",
                hint="unmount it first, or mount it with a control socket",
                code=BUSY,
            )
        yield
        return
    with find.connect(socket, None) as client:
        try:
            frozen = _freeze(client)
        except (CallFailedError, GoneError) as error:
            raise UserError(f"{container.name}: what was written in it cannot be had: {error}", code=BUSY) from None
        try:
            yield
        finally:
            lasted = not frozen or _thaw(client)
        if not lasted:
            raise UserError(
                f"{container.name}: it was changed again while it was read, which took too long",
                hint="unmount it first",
                code=BUSY,
            )


def _thaw(client: Client) -> bool:
    """Let changes begin again; whether none could until now."""
    try:
        return bool(client.call("thaw")["frozen_for"])
    except GoneError:  # unmounted meanwhile
        return True


def _socket(container: Container) -> bytes | None:
    """The control socket of the mount that has the container's upper, in whatever mount namespace it is."""
    upper = os.stat(container.upper)
    for seen in find.everything():
        for layer in (seen.status or {}).get("layers", ()):
            if layer["role"] == "upper" and _is(layer["path"], upper):
                return seen.socket
    return None


def _is(path: str, st: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), st)
    except OSError:
        return False


def _freeze(client: Client) -> bool:
    """Have no change begin; whether that is ours to end. Where it cannot be, what there is now is handed over."""
    try:
        client.call("freeze", timeout=_FREEZE)
    except CallFailedError as error:
        if error.code not in (FROZEN, UNSUPPORTED):
            raise
        client.call("sync", progress=False)
        return False
    return True
