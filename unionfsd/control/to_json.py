"""Values of the union as the control socket has them: JSON, as `schema` says."""

from __future__ import annotations

import base64
import errno
import os
import stat

from unionfsd import changes, explain, holders, metrics, refresh, syscalls
from unionfsd.control.protocol import Json
from unionfsd.options.text import TreeFile
from unionfsd.typed import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from unionfsd.layers import Layer
    from unionfsd.options import MountConfig


def text(path: bytes) -> str:
    """A name as JSON has it, see `protocol`."""
    return path.decode("utf-8", "surrogateescape")


def _encoded(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _xattrs(values: dict[bytes, bytes]) -> Json:
    return {text(name): _encoded(value) for name, value in values.items()}


def layer(rank: int, of: Layer, upper: bool) -> Json:
    return {"index": rank, "role": "upper" if upper else "lower", "path": text(of.path)}


def layers(rows: list[tuple[int, Layer, bool]]) -> Json:
    """Layers with what their file systems say; for a thread, because a file system may be slow to."""
    return [_describe_layer(*row) for row in rows]


def _describe_layer(rank: int, of: Layer, upper: bool) -> Json:
    space = os.fstatvfs(of.root.fd)
    return {
        **layer(rank, of, upper),
        "dev": _device(of.dev),
        "filesystem_uuid": of.uuid.hex() if any(of.uuid) else None,
        "private": of.noatime,
        "size": space.f_blocks * space.f_frsize,
        "available": space.f_bavail * space.f_frsize,
    }


def _device(number: int) -> str:
    return f"{os.major(number)}:{os.minor(number)}"


_TYPES: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def _type(mode: int) -> str:
    return _TYPES.get(stat.S_IFMT(mode), "unknown")


def change(change: changes.Change) -> Json:
    return {
        "kind": change.kind,
        "path": text(change.path),
        "type": _type(change.mode),
        "fields": list(change.fields),
        "renamed_from": None if change.renamed_from is None else text(change.renamed_from),
    }


def explanation(found: explain.Explanation) -> Json:
    giver = found.giver
    return {
        "path": text(found.path),
        "exists": giver is not None,
        "layer": None if giver is None else _layer_at(giver.layer),
        "source": None if giver is None else _outside(giver),
        "copies": [_copy(copy) for copy in found.copies],
        "decided_by": _decision(found.decided_by),
        "xattrs": _xattrs(found.xattrs),
        "ino": None if found.number is None else _number(found.number),
    }


def _layer_at(at: explain.LayerAt) -> Json:
    return {"index": at.rank, "role": "upper" if at.upper else "lower", "path": text(at.path)}


def _outside(copy: explain.Copy) -> str:
    """Where a copy is for those who are not in the mount."""
    return text(os.path.join(copy.layer.path, copy.path.lstrip(b"/")))


def _number(number: explain.Number) -> Json:
    source = number.source
    return {
        "number": number.shown,
        "layer": None if source is None else _layer_at(source.layer),
        "source": None if source is None else _outside(source),
    }


def _decision(decision: explain.Decision | None) -> Json:
    if decision is None:
        return None
    return {"mark": decision.mark, "layer": _layer_at(decision.layer), "path": text(decision.path)}


def _copy(copy: explain.Copy) -> Json:
    st = copy.st
    return {
        "layer": _layer_at(copy.layer),
        "path": _outside(copy),
        "role": copy.role,
        "type": _type(st.st_mode) if copy.whiteout is None else "whiteout",
        "mode": stat.S_IMODE(st.st_mode),
        "uid": st.st_uid,
        "gid": st.st_gid,
        "size": st.st_size,
        "mtime_ns": st.st_mtime_ns,
        "ino": st.st_ino,
        "dev": _device(st.st_dev),
        "whiteout": copy.whiteout,
        "decided_by": _decision(copy.decided_by),
        "marks": _xattrs(copy.marks),
    }


#: Of the bits of a time in ns, those that bound a column of a histogram: 2 us to 17 s.
_BITS: Final = range(11, 35)
BOUNDS: Final = tuple(2**bits / 1e9 for bits in _BITS)
"""Upper bounds of the columns of a histogram, in seconds; what took longer has a column more."""


def operations(counted: metrics.Operations, names: Mapping[int, str]) -> Json:
    """Requests by the name of their kind."""
    return {
        names.get(of.kind, "OTHER"): {
            "count": sum(of.times),
            "seconds": of.total_ns / 1e9,
            "errors": {errno.errorcode.get(number, str(number)): count for number, count in of.errors.items()},
            "histogram": _columns(of.times),
        }
        for of in counted.snapshot()
    }


def _columns(times: tuple[int, ...]) -> list[int]:
    first, last = _BITS[0], _BITS[-1]
    return [sum(times[: first + 1]), *times[first + 1 : last + 1], sum(times[last + 1 :])]


def held(row: holders.Held, mountpoint: bytes) -> Json:
    top = mountpoint.rstrip(b"/")
    inside = row.path == top or row.path.startswith(top + b"/")
    return {
        "pid": row.pid,
        "uid": row.uid,
        "command": text(row.command),
        "how": row.how,
        "fd": row.fd,
        "access": row.access,
        "path": text((row.path[len(top) :] or b"/") if inside else row.path),
        "deleted": row.deleted,
    }


def opened(file: refresh.Opened) -> Json:
    return {"path": None if file.path is None else text(file.path), "opens": file.opens}


def work(under_way: metrics.Work, now: float) -> Json:
    try:
        done = under_way.done()
    except OSError:  # it has just ended
        done = under_way.total or 0
    return {
        "kind": under_way.kind,
        "path": None if under_way.path is None else text(under_way.path),
        "done": done,
        "total": under_way.total,
        "seconds": round(now - under_way.since, 3),
    }


_NO_OPTIONS: Final = ("explicit", "warnings", "mountpoint", "lowerdirs", "datadirs", "mount_flags")
_FLAGS: Final = {name[3:].lower(): getattr(syscalls, name) for name in dir(syscalls) if name.startswith("MS_")}


def options(config: MountConfig) -> dict[str, Json]:
    """Options by name; those that are flags of mount(2) together under "flags"."""
    values = config._asdict()
    flags = [name for name, bit in _FLAGS.items() if config.mount_flags & bit]
    shown = {name: _plain(value) for name, value in values.items() if name not in _NO_OPTIONS}
    return {"lowerdir": _plain(config.lowerdirs), "datadir": _plain(config.datadirs), **shown, "flags": flags}


def _plain(value: Any) -> Json:
    if isinstance(value, bytes):
        return text(value)
    if isinstance(value, TreeFile):
        return text(value.path if value.digest is None else value.digest.hex().encode() + b"@" + value.path)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
