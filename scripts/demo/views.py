"""What layers and mounts show: a second opinion of the union, snapshots, and their differences.

`union_of` works the union out from the directories of the layers alone and shares no code with unionfsd, so that the
two can be held against each other. It reads the kernel's own forms of whiteouts and opaque directories only.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .report import GREEN, LAYER_COLOURS, RED, YELLOW, paint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Entry(NamedTuple):
    """An entry of the union. `places` are (layer name, place), top first; several only for a merged directory."""

    path: str
    places: list[tuple[str, Path]]

    @property
    def layers(self) -> list[str]:
        return [name for name, _ in self.places]


def is_directory(place: Path) -> bool:
    return stat.S_ISDIR(place.lstat().st_mode)


def is_whiteout(place: Path) -> bool:
    status = place.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def xattrs(place: Path) -> dict[str, bytes]:
    return {
        name: os.getxattr(place, name, follow_symlinks=False) for name in os.listxattr(place, follow_symlinks=False)
    }


def is_opaque(place: Path, prefix: str) -> bool:
    return xattrs(place).get(prefix + "opaque") == b"y"


def find(parent: Entry, name: str, prefix: str) -> Entry | None:
    """The entry `name` of a merged directory: the first place that has it, and those below that merge with it.

    Of redirects only those within a directory, which is what the demo makes.
    """
    places: list[tuple[str, Path]] = []
    called = name
    for layer, folder in parent.places:
        place = folder / called
        if not os.path.lexists(place):
            continue
        if is_whiteout(place) or (places and not is_directory(place)):
            break
        places.append((layer, place))
        if not is_directory(place) or is_opaque(place, prefix):
            break
        called = xattrs(place).get(prefix + "redirect", os.fsencode(called)).decode()
    return Entry(f"{parent.path}/{name}", places) if places else None


def descend(folder: Entry, prefix: str) -> Iterator[Entry]:
    for name in sorted({name for _, place in folder.places for name in os.listdir(place)}):
        if entry := find(folder, name, prefix):
            yield entry
            if is_directory(entry.places[0][1]):
                yield from descend(entry, prefix)


def union_of(layers: Sequence[tuple[str, Path]], prefix: str) -> dict[str, Entry]:
    """Path -> entry, of everything in the union of `layers` (top first), each folder before what it holds."""
    return {entry.path: entry for entry in descend(Entry("", list(layers)), prefix)}


class Facts(NamedTuple):
    """What must be the same about an entry in two views. The size of a directory means nothing in a union."""

    type: str
    mode: str = ""
    owner: tuple[int, int] = (0, 0)
    device: int = 0
    size: int = 0
    mtime: int = 0
    xattrs: dict[str, bytes] = {}  # noqa: RUF012  # never changed
    content: str = ""


def facts(place: Path) -> Facts:
    try:
        status = place.lstat()
    except OSError as error:
        # A view may list a name that it cannot find; that is a difference to report.
        return Facts("?", content=str(error.strerror))
    kind = stat.S_IFMT(status.st_mode)
    return Facts(
        type=stat.filemode(kind)[0],
        mode=oct(stat.S_IMODE(status.st_mode)),
        owner=(status.st_uid, status.st_gid),
        device=status.st_rdev,
        size=0 if kind == stat.S_IFDIR else status.st_size,
        mtime=status.st_mtime_ns,
        xattrs=xattrs(place),
        content=content(place, kind),
    )


def content(place: Path, kind: int) -> str:
    """The digest of a file's data, the target of a symlink."""
    if kind == stat.S_IFLNK:
        return os.readlink(place)
    if kind != stat.S_IFREG:
        return ""
    with place.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def snapshot(root: Path) -> dict[str, Facts]:
    """Path -> facts, of every entry below `root` and of `root` itself, whose path is empty."""
    found = {"": facts(root)}
    for folder, directories, files in os.walk(root):
        for place in (Path(folder) / name for name in [*directories, *files]):
            found[f"/{place.relative_to(root)}"] = facts(place)
    return found


def differences(left: dict[str, Facts], right: dict[str, Facts], names: tuple[str, str]) -> list[str]:
    """One line for each path that only one view has, and for each fact in which they differ."""
    lines = [f"{path or '/'}: only in {names[0]}" for path in sorted(left.keys() - right.keys())]
    lines += [f"{path or '/'}: only in {names[1]}" for path in sorted(right.keys() - left.keys())]
    for path in sorted(left.keys() & right.keys()):
        for field, ours, theirs in zip(Facts._fields, left[path], right[path], strict=True):
            if ours != theirs:
                lines.append(f"{path or '/'}: {field} is {ours} in {names[0]}, {theirs} in {names[1]}")
    return lines


def suffix(place: Path) -> str:
    """What a listing puts behind a name to tell the type."""
    mode = place.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f" -> {os.readlink(place)}"
    return {stat.S_IFDIR: "/", stat.S_IFIFO: "|"}.get(stat.S_IFMT(mode), "")


def rows_of(entries: Sequence[Entry]) -> Iterator[tuple[str, Entry]]:
    """(text, entry) of each line that shows a folder; all symlinks to busybox share one line."""
    applets = [entry for entry in entries if suffix(entry.places[0][1]) == " -> /bin/busybox"]
    for entry in entries:
        name = entry.path.rpartition("/")[2]
        if entry not in applets:
            yield name + suffix(entry.places[0][1]), entry
        elif entry is applets[0]:
            yield f"{name} and {len(applets) - 1} others -> /bin/busybox", entry


def show_tree(union: dict[str, Entry]) -> None:
    """Prints the union as a tree, with a column of the layers that each entry comes from."""
    children: dict[str, list[Entry]] = {}
    for entry in union.values():
        children.setdefault(entry.path.rpartition("/")[0], []).append(entry)

    def show(folder: str, indent: str) -> None:
        rows = list(rows_of(children.get(folder, [])))
        for number, (text, entry) in enumerate(rows, 1):
            last = number == len(rows)
            line = f"{indent}{'└── ' if last else '├── '}{text}"
            print(f"  {line:<54} " + " + ".join(paint(LAYER_COLOURS[layer], layer) for layer in entry.layers))
            show(entry.path, indent + ("    " if last else "│   "))

    show("", "")


def show_upper(upper: Path, lowers: dict[str, Entry], prefix: str) -> None:
    """Prints every entry of the upper as it lies on disk, and what it means over the union `lowers`."""
    for path in sorted(snapshot(upper).keys() - {""}, key=lambda path: path.split("/")):
        place = upper / path[1:]
        below = " + ".join(lowers[path].layers) if path in lowers else ""
        print(f"  {stat.filemode(place.lstat().st_mode)}  {path + suffix(place):<42} {meaning(place, below, prefix)}")


def meaning(place: Path, below: str, prefix: str) -> str:
    """What an entry of the upper does, where `below` names the lower layers that have its path."""
    if is_whiteout(place):
        return paint(RED, f"whiteout, hides {below}'s" if below else "whiteout of nothing")
    if is_directory(place) and is_opaque(place, prefix):
        return paint(RED, f"opaque, hides what {below} has in it") if below else paint(GREEN, "new, opaque")
    if not below:
        return paint(GREEN, "new")
    if is_directory(place):
        return f"merged with {below}"
    return paint(YELLOW, f"copied up from {below}" if prefix + "origin" in xattrs(place) else f"in place of {below}'s")
