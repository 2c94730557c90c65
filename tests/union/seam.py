"""The seam of `syscalls`: counting the calls that change a file system, and cutting an operation off at one of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Self

import pytest

from unionfsd import syscalls

#: Exit status of a process that crashed on purpose.
CRASHED = 42


class StoppedError(BaseException):
    """The machine stopped: no handler may take it for a failed call."""


#: Functions of `syscalls` that open or read something, and those of `os` that do and that the core calls itself.
READING = (
    "open_dir",
    "open_object",
    "open_data",
    "reopen",
    "stat_at",
    "getxattr",
    "getxattr_at",
    "listxattr",
    "readlink",
    "attributes_at",
    "file_handle",
    "open_by_handle",
    "fstat",
    "fstatvfs",
    "lseek",
    "preadv",
)
READING_OF_OS = ("pread", "preadv", "scandir", "fstat", "lseek")


class Seam:
    """While entered, lists the calls of `syscalls.MUTATING` in `calls`; `event` comes in front of number `index`.

    With `everything` also the calls that only read.
    """

    def __init__(self, index: int = -1, *, everything: bool = False) -> None:
        self.calls: list[str] = []
        self._index = index
        self._patch = pytest.MonkeyPatch()
        self._everything = everything

    def __enter__(self) -> Self:
        for name in (*syscalls.MUTATING, *(READING if self._everything else ())):
            self._patch.setattr(syscalls, name, self._wrapped(name, getattr(syscalls, name)))
        for name in READING_OF_OS if self._everything else ():
            self._patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        return self

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == self._index + 1:
                self.event()
            return self.perform(function, *args, **kwargs)

        return call

    def event(self) -> None:
        raise NotImplementedError

    def perform(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def __exit__(self, *exc: object) -> None:
        self._patch.undo()


class Failing(Seam):
    """The call fails with `number`; what comes after it works."""

    def __init__(self, index: int, number: int, *, everything: bool = False) -> None:
        super().__init__(index, everything=everything)
        self._number = number

    def event(self) -> None:
        raise OSError(self._number, os.strerror(self._number))


class Exiting(Seam):
    """The process is gone, for good: to be used in a child."""

    def event(self) -> None:
        os._exit(CRASHED)


class Stopping(Seam):
    """The machine stops, as far as the disk can tell: nothing that is called later changes anything.

    A child that exits costs ten times as much; that both leave the same behind is tested with one of each operation.
    """

    stopped = False

    def event(self) -> None:
        self.stopped = True
        raise StoppedError

    def perform(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return None if self.stopped else function(*args, **kwargs)
