"""Every operation that changes a union, from every state its names can be in: what the crash and fault matrix runs."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from tests.union.client import RENAME_EXCHANGE, RENAME_NOREPLACE, FileSystem
from tests.union.trees import OLD, Entry, Obj, Whiteout, directory, regular, symlink

#: What the upper and the lower have of one name.
State: TypeAlias = tuple[Entry | None, Entry | None]
Operation: TypeAlias = Callable[[FileSystem], object]

_FULL = {b"x": regular(b"in a lower")}
_LOWER_FILE = Obj(stat.S_IFREG, b"lower", 0o4755, 1000, 1000, OLD + 5, xattrs=((b"user.tag", b"kept"),))

STATES: dict[str, State] = {
    "absent": (None, None),
    "whiteout": (Whiteout(), regular(b"hidden")),
    "whiteout over directory": (Whiteout(), directory(_FULL)),
    "lower file": (None, _LOWER_FILE),
    "upper file": (regular(b"upper"), None),
    "file over file": (regular(b"upper"), _LOWER_FILE),
    "file over directory": (regular(b"upper"), directory(_FULL)),
    "lower symlink": (None, symlink()),
    "lower fifo": (None, Obj(stat.S_IFIFO)),
    "upper directory": (directory(), None),
    "upper directory, full": (directory({b"x": regular()}), None),
    "lower directory": (None, directory()),
    "lower directory, full": (None, directory(_FULL)),
    "merged directory": (directory({b"y": regular()}), directory(_FULL)),
    "merged directory, whited out": (directory({b"x": Whiteout()}), directory(_FULL)),
    "opaque directory": (directory(opaque="trusted"), directory(_FULL)),
    "opaque directory, full": (directory({b"y": regular()}, opaque="trusted"), directory(_FULL)),
    "directory over file": (directory(), regular(b"hidden")),
}

#: The operations on one name `n` in the directory `d`.
SINGLE: dict[str, Operation] = {
    "create": lambda fs: fs.create((b"d", b"n"), 0o640),
    "mkdir": lambda fs: fs.mkdir((b"d", b"n"), 0o750),
    "mknod": lambda fs: fs.mknod((b"d", b"n"), stat.S_IFIFO | 0o600, 0),
    "symlink": lambda fs: fs.symlink(b"to", (b"d", b"n")),
    "unlink": lambda fs: fs.unlink((b"d", b"n")),
    "rmdir": lambda fs: fs.rmdir((b"d", b"n")),
    "chmod": lambda fs: fs.chmod((b"d", b"n"), 0o700),
    "chown": lambda fs: fs.chown((b"d", b"n"), 12, 34),
    "utimens": lambda fs: fs.utimens((b"d", b"n"), OLD - 7, OLD - 9),
    "empty": lambda fs: fs.truncate((b"d", b"n"), 0),
    "truncate": lambda fs: fs.truncate((b"d", b"n"), 3),
    "write": lambda fs: fs.write((b"d", b"n"), b"W", 1),
    "fallocate": lambda fs: fs.fallocate((b"d", b"n"), 0, 100),
    "setxattr": lambda fs: fs.setxattr((b"d", b"n"), b"trusted.new", b"value", 0),
    "removexattr": lambda fs: fs.removexattr((b"d", b"n"), b"user.tag"),
    "tmpfile": lambda fs: fs.link_unnamed(b"whole", (b"d", b"n")),
}

#: The operations on `n` in `d` and `m` in `e`.
DOUBLE: dict[str, Operation] = {
    "rename": lambda fs: fs.rename((b"d", b"n"), (b"e", b"m"), 0),
    "rename noreplace": lambda fs: fs.rename((b"d", b"n"), (b"e", b"m"), RENAME_NOREPLACE),
    "rename exchange": lambda fs: fs.rename((b"d", b"n"), (b"e", b"m"), RENAME_EXCHANGE),
    "rename in place": lambda fs: fs.rename((b"d", b"n"), (b"d", b"m"), 0),
    "exchange in place": lambda fs: fs.rename((b"d", b"n"), (b"d", b"m"), RENAME_EXCHANGE),
    "link": lambda fs: fs.link((b"d", b"n"), (b"e", b"m")),
}

_SOURCES = (
    "lower file",
    "upper file",
    "file over file",
    "lower symlink",
    "upper directory, full",
    "opaque directory",
    "lower directory, full",
    "merged directory",
)
_TARGETS = (
    "absent",
    "whiteout",
    "whiteout over directory",
    "lower file",
    "upper file",
    "file over file",
    "upper directory",
    "lower directory",
    "merged directory, whited out",
    "opaque directory",
)


@dataclass(frozen=True)
class Scenario:
    """Layers with `d` and `e` in them, and one operation."""

    name: str
    upper: Obj
    lower: Obj
    operation: Operation


def _layers(names: Mapping[bytes, Mapping[bytes, State]], parent: str) -> tuple[Obj, Obj]:
    """An upper and a lower holding the directories `names`; the upper lacks them when `parent` is "lower"."""
    uppers: dict[bytes, Entry] = {}
    lowers: dict[bytes, Entry] = {}
    for at, states in names.items():
        uppers[at] = directory({name: upper for name, (upper, _) in states.items() if upper})
        lowers[at] = directory({name: lower for name, (_, lower) in states.items() if lower}, mode=0o751)
    return directory({} if parent == "lower" else uppers), directory({} if parent == "upper" else lowers)


def _fits(parent: str, *states: str) -> bool:
    """Whether a directory that lies in the upper, in the lower or in both can hold names in these states."""
    holds_upper = any(STATES[state][0] for state in states)
    holds_lower = any(STATES[state][1] for state in states)
    return not (parent == "lower" and holds_upper) and not (parent == "upper" and holds_lower)


def single_scenarios() -> Iterator[Scenario]:
    for parent in ("merged", "lower", "upper"):
        for state, entries in STATES.items():
            if not _fits(parent, state):
                continue
            upper, lower = _layers({b"d": {b"n": entries}}, parent)
            for name, operation in SINGLE.items():
                yield Scenario(f"{name}, {state}, {parent} parent", upper, lower, operation)


def double_scenarios(*, every: bool) -> Iterator[Scenario]:
    """Pairs of states: those that take different ways through the code, or `every` one."""
    for parent in ("merged", "lower", "upper") if every else ("merged",):
        for source in STATES if every else _SOURCES:
            for target in STATES if every else _TARGETS:
                if not _fits(parent, source, target):
                    continue
                states = {b"n": STATES[source], b"m": STATES[target]}
                apart = {b"d": {b"n": STATES[source]}, b"e": {b"m": STATES[target]}}
                for name, operation in DOUBLE.items():
                    upper, lower = _layers({b"d": states} if "in place" in name else apart, parent)
                    yield Scenario(f"{name}, {source} to {target}, {parent} parents", upper, lower, operation)
