"""Hypothesis strategies for layers: few names, so that layers collide, and every kind of object."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from tests.harness import ROOTLESS
from tests.union.trees import OLD, Entry, Obj, Whiteout

NAMES = (b"a", b"b", b"c", b"\xff\xe9", b"n" * 255)
#: Names to look for: also one that is too long to exist.
WANTED_NAMES = (*NAMES, b"a", b"b", b"c", b"m" * 256)

_times = st.integers(0, 10**9).map(lambda n: OLD + n)
_owners = st.sampled_from([0, 0, 1000, 65534])
# What somebody without rights over the machine cannot make is left out for them.
_trusted = () if ROOTLESS else ((b"trusted.tag", b"\0x"),)
_xattrs = st.sampled_from([(), (), ((b"user.tag", b"1"),), (*_trusted, (b"user.tag", b""))])
_nodes = [] if ROOTLESS else [(stat.S_IFCHR, os.makedev(1, 3)), (stat.S_IFBLK, os.makedev(7, 300))]
_devices = [*_nodes, (stat.S_IFIFO, 0), (stat.S_IFSOCK, 0)]

modes = st.sampled_from([0o644, 0o600, 0o755, 0o4755, 0o2711, 0o1777, 0o000])
contents = st.binary(max_size=12)

_files = st.builds(
    Obj, st.just(stat.S_IFREG), contents, modes, uid=_owners, gid=_owners, mtime_ns=_times, xattrs=_xattrs
)
_symlinks = st.builds(
    Obj, st.just(stat.S_IFLNK), st.sampled_from([b"nowhere/x", b"nowhere/" * 500]), st.just(0o777), mtime_ns=_times
)
_specials = st.sampled_from(_devices).flatmap(
    lambda device: st.builds(Obj, st.just(device[0]), mode=modes, mtime_ns=_times, rdev=st.just(device[1]))
)


def _directories(children: st.SearchStrategy[Entry]) -> st.SearchStrategy[Obj]:
    return st.builds(
        Obj,
        st.just(stat.S_IFDIR),
        mode=modes,
        uid=_owners,
        gid=_owners,
        mtime_ns=_times,
        xattrs=_xattrs,
        children=st.dictionaries(st.sampled_from(NAMES), children, max_size=4),
        opaque=st.sampled_from([None, None, None, "user" if ROOTLESS else "trusted"]),
    )


_leaves: st.SearchStrategy[Entry] = st.one_of(_files, _files, _symlinks, _specials, st.builds(Whiteout))
_entries: st.SearchStrategy[Entry] = st.recursive(
    _leaves, lambda inner: st.one_of(inner, _directories(inner)), max_leaves=8
)


@st.composite
def stacks(draw: st.DrawFn, max_lowers: int = 3) -> list[Obj]:
    """An upper and one or more lowers, the top one first, as overlayfs itself could have left them."""
    layers = draw(st.lists(_directories(_entries), min_size=2, max_size=max_lowers + 1))
    return sane([replace(layer, opaque=None) for layer in layers])


def sane(layers: Sequence[Obj]) -> list[Obj]:
    """The layers without whiteouts that hide nothing: where no directory is merged the kernel would show them raw."""
    return [_sane_directory(layer, layers[index + 1 :]) for index, layer in enumerate(layers)]


def _sane_directory(obj: Obj, below: Sequence[Obj]) -> Obj:
    if obj.opaque:
        below = ()
    children: dict[bytes, Entry] = {}
    for name, child in obj.children.items():
        beneath = _merged_beneath(name, below)
        if isinstance(child, Whiteout):
            if any(name in layer.children for layer in below):
                children[name] = child
        elif child.type == stat.S_IFDIR:
            children[name] = _sane_directory(child, beneath)
        else:
            children[name] = child
    return replace(obj, children=children)


def _merged_beneath(name: bytes, below: Sequence[Obj]) -> list[Obj]:
    """The directories `name` of the layers `below` that a directory of that name would be merged with."""
    found: list[Obj] = []
    for layer in below:
        child = layer.children.get(name)
        if child is not None:
            if isinstance(child, Whiteout) or child.type != stat.S_IFDIR:
                break
            found.append(child)
            if child.opaque:
                break
        if layer.opaque:
            break
    return found
