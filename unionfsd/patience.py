"""Resolution where lowers wait for somebody else (`remote`): by the rules of `lookup`, and asking only who must be.

Rules of this file:

- What a layer that answers decides, no layer below it is asked about, also where names of the lowers were not read yet.
- What is only in the upper is known to be by what the upper says, where that is enough.
- What has to be asked for one listing is asked together.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from . import format as fmt
from . import syscalls
from .inodes import DirNode, Node
from .layers import LayerStack, LowerDir, exists, has_any_xattr
from .lookup import Hit, Resolver
from .remote import AskedError, together


class PatientResolver(Resolver):
    """Answers for a `LayerStack` of which some layers wait for somebody."""

    _asked: list[AskedError]

    def stat(self, node: Node) -> os.stat_result:
        if isinstance(node, DirNode) and not node.entry.upper:
            return node.entry.lowers[0].stat(self.fds)
        return super().stat(node)

    def find_lower(self, parent: DirNode, name: bytes) -> Hit | None:
        deciding = self._deciding(parent, name)
        return super().find_lower(parent, name) if deciding is None else self._probe_lowers(deciding, name)

    def lower_has(self, parent: DirNode, name: bytes) -> bool:
        deciding = self._deciding(parent, name)
        if deciding is None:
            return super().lower_has(parent, name)
        return self._probe_lowers(deciding, name) is not None

    def _deciding(self, parent: DirNode, name: bytes) -> tuple[LowerDir, ...] | None:
        """The lowers of `parent` that decide what `name` is; None where others have to be asked, or nobody has."""
        if parent.lower_names is not None:
            return None
        for index, lower in enumerate(parent.entry.lowers):
            if lower.layer.system is not None:
                return None
            if self._ends(lower, name):
                return parent.entry.lowers[: index + 1]
        return None

    def _ends(self, lower: LowerDir, name: bytes) -> bool:
        """Whether no layer below `lower` is part of what `name` is."""
        dirfd = lower.open(self.fds)
        st = syscalls.stat_or_none(dirfd, name)
        if st is not None and (not stat.S_ISDIR(st.st_mode) or lower.child(name).marks(self.fds).opaque):
            return True
        return exists(dirfd, fmt.wh_name(name))

    def _leaf_ino(self, parent: DirNode, dirfd: int, name: bytes, st: os.stat_result, *, indexed: bool = False) -> int:
        if parent.lower_names is None and not has_any_xattr(dirfd, name, fmt.ORIGIN_NAMES):
            return self.stack.ino(st)
        return super()._leaf_ino(parent, dirfd, name, st, indexed=indexed)

    def _rows(self, node: DirNode) -> Iterator[tuple[bytes, int, int]]:
        self._asked = []
        yield from super()._rows(node)
        if self._asked:
            raise together(self._asked)

    def _listed_ino(self, node: DirNode, name: bytes, ino: int) -> int:
        try:
            return super()._listed_ino(node, name, ino)
        except AskedError as error:
            self._asked.append(error)
            return ino


def resolver_for(stack: LayerStack) -> type[Resolver]:
    """The kind of resolver that `stack` takes."""
    return PatientResolver if stack.is_remote else Resolver
