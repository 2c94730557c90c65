"""Trees of files as values: what a layer holds, what a stack of layers must show, and what a directory does show.

`Obj` describes a layer to build (`build`); `merged` says, from the descriptions alone, what their union must look like;
`snapshot` reads a directory, mounted or not. The last two give the same kind of value, a `Tree`, compared by `diff`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

#: A time before any test began, in ns; what is written by a test is later.
OLD = 1_500_000_000_123_456_789
#: What `settled` puts for the time of something that changed during the test.
CHANGED = -1

WhiteoutForm: TypeAlias = Literal["chardev", "xattr", "wh"]
OpaqueForm: TypeAlias = Literal["trusted", "user", "fuseoverlayfs", "wh"]

_OPAQUE_XATTR = {
    "trusted": (b"trusted.overlay.opaque", b"y"),
    "user": (b"user.overlay.opaque", b"y"),
    "fuseoverlayfs": (b"user.fuseoverlayfs.opaque", b"y"),
}


@dataclass(frozen=True, slots=True)
class Whiteout:
    """An entry of a layer that hides its name in the layers below."""

    form: WhiteoutForm = "chardev"


@dataclass(frozen=True, slots=True, repr=False)
class Obj:
    """An object of a layer. `type` is one of stat.S_IF*; `data` the content or a symlink's target; times in ns."""

    type: int
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = OLD
    rdev: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    children: Mapping[bytes, Obj | Whiteout] = field(default_factory=dict)
    opaque: OpaqueForm | None = None

    def __repr__(self) -> str:
        """Only what differs from the defaults: failing layers are read by people."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        words = (f"{key}={oct(value) if key in ('type', 'mode') else repr(value)}" for key, value in given.items())
        return f"Obj({', '.join(word for word in words if word != 'children={}')})"


Entry: TypeAlias = Obj | Whiteout


class Record(NamedTuple):
    """What stat, the content and the xattrs of one object say; the size of a directory is its own business: 0."""

    type: int
    mode: int
    uid: int
    gid: int
    rdev: int
    size: int
    mtime_ns: int
    data: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]


#: Path relative to the root, no leading slash, b"" the root itself -> its record.
Tree: TypeAlias = dict[bytes, Record]


def directory(
    children: Mapping[bytes, Entry] | None = None, *, opaque: OpaqueForm | None = None, mode: int = 0o755
) -> Obj:
    return Obj(stat.S_IFDIR, mode=mode, children=children or {}, opaque=opaque)


def regular(data: bytes = b"content", *, mode: int = 0o644) -> Obj:
    return Obj(stat.S_IFREG, data, mode=mode)


def symlink(target: bytes = b"nowhere/at/all") -> Obj:
    return Obj(stat.S_IFLNK, target, mode=0o777)


# Building a layer.


def build(path: bytes, root: Obj) -> None:
    """Make the directory `path` as `root` says; device nodes and trusted xattrs need privileges."""
    os.mkdir(path)
    _fill(path, root)
    _dress(path, root)


def _fill(path: bytes, obj: Obj) -> None:
    for name, child in obj.children.items():
        if isinstance(child, Whiteout):
            _build_whiteout(path, name, child.form)
        else:
            _build_object(path + b"/" + name, child)
    if obj.opaque == "wh":
        Path(os.fsdecode(path), ".wh..wh..opq").touch()
    elif obj.opaque:
        os.setxattr(path, *_OPAQUE_XATTR[obj.opaque])


def _build_whiteout(parent: bytes, name: bytes, form: WhiteoutForm) -> None:
    if form == "chardev":
        os.mknod(parent + b"/" + name, stat.S_IFCHR, 0)
    elif form == "wh":
        Path(os.fsdecode(parent + b"/.wh." + name)).touch()
    else:
        Path(os.fsdecode(parent + b"/" + name)).touch()
        os.setxattr(parent + b"/" + name, b"trusted.overlay.whiteout", b"y")
        os.setxattr(parent, b"trusted.overlay.opaque", b"x")


def _build_object(path: bytes, obj: Obj) -> None:
    if obj.type == stat.S_IFDIR:
        build(path, obj)
        return
    if obj.type == stat.S_IFLNK:
        os.symlink(obj.data, path)
    elif obj.type == stat.S_IFREG:
        Path(os.fsdecode(path)).write_bytes(obj.data)
    else:
        os.mknod(path, obj.type, obj.rdev)
    _dress(path, obj)


def _dress(path: bytes, obj: Obj) -> None:
    os.chown(path, obj.uid, obj.gid, follow_symlinks=False)
    if obj.type != stat.S_IFLNK:
        os.chmod(path, obj.mode)
    for name, value in obj.xattrs:
        os.setxattr(path, name, value, follow_symlinks=False)
    os.utime(path, ns=(obj.mtime_ns, obj.mtime_ns), follow_symlinks=False)


def plant(root: bytes, tree: Tree) -> None:
    """Make a plain directory that looks like `tree`."""
    for path, record in sorted(tree.items()):
        at = join(root, path) if path else root
        if record.type == stat.S_IFDIR:
            os.mkdir(at)
        elif record.type == stat.S_IFLNK:
            os.symlink(record.data, at)
        elif record.type == stat.S_IFREG:
            with open(at, "xb") as file:
                file.write(record.data)
        else:
            os.mknod(at, record.type, record.rdev)
    for path, record in sorted(tree.items(), reverse=True):
        at = join(root, path) if path else root
        os.chown(at, record.uid, record.gid, follow_symlinks=False)
        if record.type != stat.S_IFLNK:
            os.chmod(at, record.mode)
        for name, value in record.xattrs:
            os.setxattr(at, name, value, follow_symlinks=False)
        os.utime(at, ns=(record.mtime_ns, record.mtime_ns), follow_symlinks=False)


# What a stack of layers must show.


def merged(layers: Sequence[Obj]) -> Tree:
    """The union of `layers`, the top one first, as the overlayfs documentation defines it."""
    tree: Tree = {}
    _merge_directory(layers, b"", tree)
    return tree


def _merge_directory(stack: Sequence[Obj], path: bytes, tree: Tree) -> None:
    tree[path] = record_of(stack[0])
    visible = _until_opaque(stack)
    for name in {name: None for layer in visible for name in layer.children}:
        entries = [layer.children[name] for layer in visible if name in layer.children]
        _merge_entry(entries, join(path, name), tree)


def _merge_entry(entries: Sequence[Entry], path: bytes, tree: Tree) -> None:
    top = entries[0]
    if isinstance(top, Whiteout):
        return
    if top.type != stat.S_IFDIR:
        tree[path] = record_of(top)
        return
    _merge_directory(list(_leading_directories(entries)), path, tree)


def _leading_directories(entries: Sequence[Entry]) -> Iterator[Obj]:
    for entry in entries:
        if isinstance(entry, Whiteout) or entry.type != stat.S_IFDIR:
            return
        yield entry


def _until_opaque(stack: Sequence[Obj]) -> Sequence[Obj]:
    for index, layer in enumerate(stack):
        if layer.opaque:
            return stack[: index + 1]
    return stack


def record_of(obj: Obj) -> Record:
    size = 0 if obj.type == stat.S_IFDIR else len(obj.data)
    return Record(
        obj.type, obj.mode, obj.uid, obj.gid, obj.rdev, size, obj.mtime_ns, obj.data, tuple(sorted(obj.xattrs))
    )


# What a directory does show.


def snapshot(root: bytes) -> Tree:
    """Read everything beneath the directory `root`, itself included."""
    tree: Tree = {}
    pending = [b""]
    while pending:
        relative = pending.pop()
        path = root + b"/" + relative if relative else root
        tree[relative] = read_record(path)
        if tree[relative].type == stat.S_IFDIR:
            with os.scandir(path) as entries:
                pending += [join(relative, entry.name) for entry in entries]
    return tree


def read_record(path: bytes) -> Record:
    st = os.stat(path, follow_symlinks=False)
    kind = stat.S_IFMT(st.st_mode)
    data = b""
    if kind == stat.S_IFREG:
        with open(path, "rb") as file:
            data = file.read()
    elif kind == stat.S_IFLNK:
        data = os.readlink(path)
    names = sorted(os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False))
    xattrs = tuple(
        (name, os.getxattr(path, name, follow_symlinks=False)) for name in names if name != b"security.selinux"
    )
    size = 0 if kind == stat.S_IFDIR else st.st_size
    return Record(kind, stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_rdev, size, st.st_mtime_ns, data, xattrs)


def settled(tree: Tree, since_ns: int) -> Tree:
    """The tree with every time from `since_ns` on replaced by CHANGED: two runs change things at different times."""
    return {
        path: record._replace(mtime_ns=CHANGED) if record.mtime_ns >= since_ns else record
        for path, record in tree.items()
    }


def timeless(tree: Tree) -> Tree:
    """The tree without the times of directories."""
    return {
        path: record._replace(mtime_ns=CHANGED) if record.type == stat.S_IFDIR else record
        for path, record in tree.items()
    }


def join(path: bytes, name: bytes) -> bytes:
    """The path of `name` in the directory `path`, where b"" is the root."""
    return path + b"/" + name if path else name


def diff(left: Tree, right: Tree) -> list[str]:
    """One line for every path where two trees differ; empty when they are the same."""
    lines = []
    for path in sorted(left.keys() | right.keys()):
        a, b = left.get(path), right.get(path)
        if a is None or b is None:
            lines.append(f"{path!r}: {'only right' if a is None else 'only left'}: {a or b}")
        elif a != b:
            fields = [f"{name} {x!r} != {y!r}" for name, x, y in zip(Record._fields, a, b, strict=True) if x != y]
            lines.append(f"{path!r}: {', '.join(fields)}")
    return lines
