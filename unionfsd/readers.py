"""Directories that somebody is in the middle of listing.

A listing is read in parts, and each part goes on in the snapshot that the first one made. A snapshot that was dropped,
because too many are in use or its reader never came back, is made anew: cookies mean the same in all of them. It is
kept past its last entry, because who has got that asks once more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from .inodes import DirNode
from .listing import Dirent
from .lookup import Resolver
from .typed import Final

_MOST: Final = 64
"""Snapshots kept."""
_FEW: Final = 10_000
"""Entries that are looked up with their listing whether or not anybody wants them; more, once some were sought."""
_SOUGHT: Final = 64


class Readers:
    """The listings under way in one mount."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._reading: OrderedDict[DirNode, None] = OrderedDict()

    def read(self, node: DirNode, cookie: int) -> Iterator[Dirent]:
        """The entries after `cookie`, of a fresh snapshot when it is 0; "." and ".." come first."""
        if node.snapshot is None or cookie == 0:
            node.snapshot = self._resolver.listing(node)
            self._reading[node] = None
            if len(self._reading) > _MOST:
                self._reading.popitem(last=False)[0].snapshot = None
        return node.snapshot.after(cookie)

    def eager(self, node: DirNode) -> bool:
        """Whether who lists `node` is better told everything of its entries, and not their names alone.

        So it is unless they are many; then, if entries have been looked up.
        """
        few = node.snapshot is None or len(node.snapshot) <= _FEW
        return few or (node.children is not None and len(node.children) >= _SOUGHT)

    def end(self, node: DirNode) -> None:
        """Nobody is in the middle of `node` any more."""
        self._reading.pop(node, None)
        node.snapshot = None
