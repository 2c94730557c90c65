"""The mount table of this mount namespace: /proc/self/mountinfo (proc_pid_mountinfo(5)).

Reading it asks no file system anything, so it works with mounts that hang or are dead. Who imports this pays for
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

from unionfsd.typed import NamedTuple


class MountLine(NamedTuple):
    """One mount. `device` is ``(major, minor)``, `root` the directory of the file system that is mounted on `path`."""

    mount_id: int
    parent_id: int
    device: tuple[int, int]
    root: bytes
    path: bytes
    fstype: bytes
    source: bytes
    super_options: bytes
    options: bytes = b""
    """Those of this mount alone, joined by commas."""


def read(table: bytes | None = None) -> Iterator[MountLine]:
    """The mounts in the order of mounting: of several on one path the last is on top. `table` is for tests."""
    if table is None:
        with open("/proc/self/mountinfo", "rb") as file:
            table = file.read()
    for line in table.splitlines():
        head, _, tail = line.partition(b" - ")
        mount_id, parent_id, device, root, path, own = head.split(b" ", 6)[:6]
        fstype, source, options = tail.split(b" ")[:3]
        major, _, minor = device.partition(b":")
        number = int(major), int(minor)
        ids = int(mount_id), int(parent_id)
        yield MountLine(*ids, number, plain(root), plain(path), fstype, source, options, own)


def plain(field: bytes) -> bytes:
    """A field of the table without its octal escapes: of space, tab, line end, backslash and number sign."""
    if b"\\" not in field:
        return field
    first, *others = field.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in others)


def at(path: bytes, table: bytes | None = None) -> MountLine | None:
    """The mount that the absolute `path`, without symlinks and dots, lies on."""
    found: MountLine | None = None
    for line in read(table):
        if _contains(line.path, path) and (found is None or len(line.path) >= len(found.path)):
            found = line
    return found


def _contains(directory: bytes, path: bytes) -> bool:
    return path == directory or path.startswith(directory.rstrip(b"/") + b"/")


def within(line: MountLine, path: bytes) -> bytes:
    """`path`, which lies on the mount `line`, as a path from the root of its file system: ``/`` or ``/a/b``."""
    below = path[len(line.path.rstrip(b"/")) :].lstrip(b"/")
    return b"/" + b"/".join(part for part in (line.root.strip(b"/"), below) if part)
