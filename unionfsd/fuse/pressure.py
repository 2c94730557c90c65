"""Memory pressure of our own: when very many nodes are known, the kernel is asked to forget some.

The kernel forgets what it has cached when the machine runs short of memory. That is late for a daemon whose memory is
what it spends on every node that the kernel knows: so from `MOST_NODES` on, those known for longest are offered to it
(FUSE_NOTIFY_PRUNE, Linux 6.18). It lets go of those that nobody uses, and says so by FORGET. And when most of them are
gone, what they took is given back to the system.
"""

from __future__ import annotations

import gc

import trio

from unionfsd.logger import get_logger
from unionfsd.typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from unionfsd.fuse.notify import Notifier
    from unionfsd.union import Union

log = get_logger(__name__)

MOST_NODES: Final = 1_000_000
"""About 400 MB; the kernel spends three times that on the same objects."""
_BATCH: Final = 1024
"""Nodes in one notification: some milliseconds of a thread's time."""
_WORTH: Final = 20_000
"""Nodes, about 8 MB, that must have gone before memory is given back."""
_CALM: Final = 0.5
"""Seconds."""
_SETTLING: Final = 0.01
"""Seconds between two, in which what was forgotten is heard of."""


class Pressure:
    """Keeps the number of nodes of one mount in bounds."""

    def __init__(self, union: Union, notifier: Notifier) -> None:
        self._union = union
        self._notifier = notifier
        self._bound = MOST_NODES
        self._peak = 0

    def due(self) -> bool:
        """Whether to `relieve` now; false until that has ended."""
        return self._union.known() > self._bound

    def spare(self) -> bool:
        """Whether so much was forgotten that to `give_back` what it took is worth its time."""
        known = self._union.known()
        self._peak = max(self._peak, known)
        if self._peak - known < _WORTH or known * 4 > self._peak:
            return False
        self._peak = known
        return True

    async def give_back(self) -> None:
        """Return free memory to the system, once things have calmed down.

        What is left of it, the interpreter's free lists above all, lies scattered over its arenas and holds them all; a
        full collection of garbage empties those lists.
        """
        await trio.sleep(_CALM)
        gc.collect()
        self._union.ledger.give_back()

    async def relieve(self) -> None:
        """Offer nodes to the kernel until a quarter of them is gone, or all were offered."""
        bound, self._bound = self._bound, 1 << 63
        nodes = self._union.memory.nodeids()
        try:
            for start in range(0, len(nodes), _BATCH):
                if self._union.known() < bound * 3 // 4:
                    break
                await self._notifier.prune(nodes[start : start + _BATCH])
                await trio.sleep(_SETTLING)
        except OSError as exc:
            log.debug("the kernel cannot be asked to forget: %s", exc)
            return
        left = self._union.known()
        log.debug("%d of %d nodes were forgotten", len(nodes) - left, len(nodes))
        # What is left is in use: asked again only when there is a quarter more.
        self._bound = max(MOST_NODES, left * 5 // 4)
