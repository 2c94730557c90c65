"""Why the union shows what it shows under a path: the layer that gives it, the copies it covers, and what decided.

Rules this file obeys:

- What is visible is decided by `lookup` alone. Here it is only accounted for: where else the path exists, and which
  mark keeps that from being seen.
- It works with a `Resolver` of its own, and so may run in a thread beside the mount. It changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from . import format as fmt
from . import syscalls
from .entries import Entry
from .inodes import DirNode, Node
from .layers import Layer, exists, optional_xattr, read_marks, xattr_names
from .lookup import Hit, Resolver
from .syscalls import Fd, stat_or_none
from .typed import Final, Literal, NamedTuple
from .workdir import is_whiteout

Role = Literal["gives", "merged", "covered", "hidden"]
Mark = Literal["whiteout", "opaque", "redirect", "not a directory", "covered"]

_NOT_THERE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_WHITEOUTS: Final = {"chardev": "character device 0:0", "xattr": "xattr on an empty file", "wh": "a .wh. entry"}


class LayerAt(NamedTuple):
    """A layer: its `rank` in the stack, the topmost 0, and the directory it is."""

    rank: int
    upper: bool
    path: bytes


class Decision(NamedTuple):
    """What ends a path in the layers below one: the kind of mark, the layer it is in, and the path there."""

    mark: Mark
    layer: LayerAt
    path: bytes


@dataclass(frozen=True, slots=True)
class Copy:
    """The path as it exists in one layer, or a whiteout of it.

    `role`: it gives what is seen, is merged into it, is covered by one above, or is hidden by `decided_by`. `path` is
    relative to the layer. `whiteout` is its form, None for an object. `marks` are the format's own xattrs.
    """

    layer: LayerAt
    path: bytes
    role: Role
    st: os.stat_result
    whiteout: str | None
    decided_by: Decision | None
    marks: dict[bytes, bytes]


class Number(NamedTuple):
    """The inode number the mount shows, and the object of a layer it is made from: None when that is gone."""

    shown: int
    source: Copy | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """All about one path, "/" for the root. `giver` is None when the union does not have it, `copies` go top first."""

    path: bytes
    giver: Copy | None
    copies: tuple[Copy, ...]
    decided_by: Decision | None
    xattrs: dict[bytes, bytes]
    number: Number | None


class _Cut(NamedTuple):
    """A mark that speaks for all layers beneath `rank`, found `depth` components down the path."""

    depth: int
    rank: int
    decision: Decision


def split(path: bytes) -> tuple[bytes, ...]:
    """Components of a path from the root of a union; EINVAL for dots and NULs in it."""
    return tuple(syscalls.component(name) for name in path.split(b"/") if name)


def find(resolver: Resolver, names: tuple[bytes, ...]) -> tuple[list[DirNode], Hit | None]:
    """Nodes of the directories down to the parent of `names`, as far as they go, and what the whole path is."""
    hit: Hit | None = resolver.root()
    nodes: list[DirNode] = []
    at: DirNode | None = None
    for name in (b"", *names):
        if at is not None:
            hit = resolver.find(at, name)
        if hit is None or not stat.S_ISDIR(hit.st.st_mode):
            return nodes, hit if len(nodes) == len(names) else None
        at = DirNode(0, at, name, hit.entry, hit.ino)
        nodes.append(at)
    return nodes[: len(names)], hit


def explain(resolver: Resolver, path: bytes) -> Explanation:
    """Explain `path`, from the root of the union; OSError when a layer cannot be read."""
    return _Explainer(resolver, split(path)).explanation()


class _Explainer:
    def __init__(self, resolver: Resolver, names: tuple[bytes, ...]) -> None:
        self._resolver = resolver
        self._names = names
        self._nodes, self._hit = find(resolver, names)
        stack = resolver.stack
        layers: list[Layer] = [stack.upper, *stack.lowers] if stack.upper else list(stack.lowers)
        self._layers = layers
        self._at = {id(layer): LayerAt(i, layer is stack.upper, layer.path) for i, layer in enumerate(layers)}
        self._cuts: list[_Cut] = []

    def explanation(self) -> Explanation:
        for depth in range(len(self._nodes)):
            self._cuts += self._marks_at(depth)
        copies = tuple(copy for layer in self._layers if (copy := self._copy(layer)) is not None)
        giver = next((copy for copy in copies if copy.role == "gives"), None)
        covered = next((copy for copy in copies if copy.whiteout is None), None)
        decided = covered.decided_by if covered and not giver else None
        path = b"/" + b"/".join(self._names)
        number = self._number(copies) if giver else None
        return Explanation(path, giver, copies, decided, self._xattrs(), number)

    # Where the path is in each layer.

    def _spots(self, entry: Entry, here: tuple[bytes, ...]) -> dict[int, tuple[bytes, ...]]:
        """Paths of what `entry`, a directory at `here` in the union, is made of, by the id of the layer."""
        spots = {id(lower.layer): lower.components() for lower in entry.lowers}
        if entry.upper and self._resolver.stack.upper is not None:
            spots[id(self._resolver.stack.upper)] = here
        return spots

    def _place(self, layer: Layer) -> tuple[bytes, ...]:
        """The path in `layer`: where the directory merged from it leads, else the path in the union."""
        if not self._names:
            return ()
        if len(self._nodes) < len(self._names):
            return self._names
        if self._hit is not None and stat.S_ISDIR(self._hit.st.st_mode):
            spots = self._spots(self._hit.entry, self._names)
            if id(layer) in spots:
                return spots[id(layer)]
        parent = self._spots(self._nodes[-1].entry, self._names[:-1]).get(id(layer), self._names[:-1])
        return (*parent, self._names[-1])

    def _copy(self, layer: Layer) -> Copy | None:
        """The path in `layer`, an object or a whiteout; None when it has neither."""
        place = self._place(layer)
        with _parent(layer, place) as parent:
            if parent is None:
                return None
            if not place:
                return self._object(layer, place, os.fstat(parent.fd), parent)
            st = stat_or_none(parent.fd, place[-1])
            form = _whiteout(parent.fd, place[-1], st)
            if form == "wh":
                st = syscalls.stat_at(parent.fd, fmt.wh_name(place[-1]))
            if st is None:
                return None
            if form is not None:
                path = (*place[:-1], fmt.wh_name(place[-1])) if form == "wh" else place
                return Copy(self._at[id(layer)], _join(path), "hidden", st, _WHITEOUTS[form], self._cut(layer), {})
            with syscalls.open_object(parent.fd, place[-1]) as fd:
                return self._object(layer, place, st, fd)

    def _object(self, layer: Layer, place: tuple[bytes, ...], st: os.stat_result, fd: Fd) -> Copy:
        role, decision = self._role(layer)
        marks = {name: _read(fd, name) or b"" for name in xattr_names(fd.fd) if fmt.is_internal(name)}
        return Copy(self._at[id(layer)], _join(place), role, st, None, decision, marks)

    def _role(self, layer: Layer) -> tuple[Role, Decision | None]:
        makers = self._makers()
        if makers and makers[0] is layer:
            return "gives", None
        if any(maker is layer for maker in makers):
            return "merged", None
        decision = self._cut(layer)
        if decision is None and makers:
            decision = Decision("covered", self._at[id(makers[0])], _join(self._place(makers[0])))
        return ("covered" if decision is not None and decision.mark == "covered" else "hidden"), decision

    def _makers(self) -> list[Layer]:
        """The layers that what is seen is made of, top first."""
        if self._hit is None:
            return []
        lowers = [lower.layer for lower in self._hit.entry.lowers]
        upper = self._resolver.stack.upper
        return [upper, *lowers] if self._hit.entry.upper and upper is not None else lowers

    # What decides.

    def _cut(self, layer: Layer) -> Decision | None:
        """The mark nearest to the root that keeps `layer` from being seen."""
        rank = self._at[id(layer)].rank
        cuts = [cut for cut in self._cuts if cut.rank < rank]
        return min(cuts, key=lambda cut: (cut.depth, cut.rank)).decision if cuts else None

    def _marks_at(self, depth: int) -> Iterator[_Cut]:
        """The marks on component `depth` of the path, in the layers that its directory is made of."""
        node, name = self._nodes[depth], self._names[depth]
        spots = self._spots(node.entry, self._names[:depth])
        last = depth == len(self._names) - 1
        for layer in self._layers:
            if id(layer) not in spots:
                continue
            place = (*spots[id(layer)], name)
            for mark in self._marks_in(layer, place, last=last):
                at = self._at[id(layer)]
                yield _Cut(depth, at.rank, Decision(mark, at, _join(place)))

    def _marks_in(self, layer: Layer, place: tuple[bytes, ...], *, last: bool) -> Iterator[Mark]:
        with _parent(layer, place) as parent:
            if parent is None:
                return
            name = place[-1]
            st = stat_or_none(parent.fd, name)
            if _whiteout(parent.fd, name, st) is not None:
                yield "whiteout"
            elif st is not None and not stat.S_ISDIR(st.st_mode):
                yield "covered" if last else "not a directory"
            elif st is not None:
                with syscalls.open_dir(parent.fd, name) as fd:
                    marks = read_marks(fd.fd)
                if marks.opaque:
                    yield "opaque"
                elif marks.redirect is not None:
                    yield "redirect"
            if st is not None and exists(parent.fd, fmt.wh_name(name)):
                yield "whiteout"

    # The object itself.

    def _xattrs(self) -> dict[bytes, bytes]:
        """The xattrs that users of the mount see."""
        if self._hit is None:
            return {}
        parent = self._nodes[-1] if self._names else None
        name = self._names[-1] if self._names else b""
        kind = DirNode if stat.S_ISDIR(self._hit.st.st_mode) else Node
        with self._resolver.open_object(kind(0, parent, name, self._hit.entry, self._hit.ino)) as fd:
            visible = (name for name in xattr_names(fd.fd) if not fmt.is_internal(name))
            return {fmt.unescape(name): value for name in visible if (value := _read(fd, name)) is not None}

    def _number(self, copies: tuple[Copy, ...]) -> Number | None:
        if self._hit is None:
            return None
        objects = (copy for copy in reversed(copies) if copy.whiteout is None)
        sources = [copy for copy in objects if self._resolver.stack.ino(copy.st) == self._hit.ino]
        return Number(self._hit.ino, sources[0] if sources else None)


@contextlib.contextmanager
def _parent(layer: Layer, place: tuple[bytes, ...]) -> Iterator[Fd | None]:
    """The directory that holds the last component of `place` in `layer`, opened name by name; None without one."""
    fd = syscalls.reopen(layer.root.fd, os.O_PATH | os.O_DIRECTORY)
    try:
        for name in place[:-1]:
            below = syscalls.open_dir(fd.fd, name)
            fd.close()
            fd = below
    except OSError as error:
        fd.close()
        if error.errno not in _NOT_THERE:
            raise
        yield None
    else:
        with fd:
            yield fd


def _whiteout(dirfd: int, name: bytes, st: os.stat_result | None) -> str | None:
    """The form of the whiteout that `name` is in the directory `dirfd` of a layer, None for no whiteout."""
    if st is None:
        return "wh" if exists(dirfd, fmt.wh_name(name)) else None
    if fmt.is_whiteout_device(st.st_mode, st.st_rdev):
        return "chardev"
    marked = read_marks(dirfd).xwhiteouts
    return "xattr" if is_whiteout(dirfd, name, st, xwhiteouts=marked) else None


def _read(fd: Fd, name: bytes) -> bytes | None:
    return optional_xattr(fd.fd, name)


def _join(names: tuple[bytes, ...]) -> bytes:
    return b"/" + b"/".join(names)
