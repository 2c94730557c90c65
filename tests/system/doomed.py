"""unionfsd that dies where a test wants it to: by SIGKILL at a system call that changes a layer, or before an answer.

The file $DOOM says where, as ``NUMBER WHEN``: at the NUMBERth such call from now on, WHEN it is ``before`` or ``after``
it, or at the NUMBERth ``answer``, or when a successor is to ``resume``. The file goes when it happens; the next process
then works as ever. With ``always`` for a number it stays, and every process dies at its first such call.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from unionfsd import syscalls
from unionfsd.cli import main
from unionfsd.union import Union

DOOM = os.environ["DOOM"]


def due(*moments: str) -> str | None:
    """Which of `moments` it is time to die at, if any; counts."""
    try:
        with open(DOOM) as file:
            number, when = file.read().split()
    except FileNotFoundError:
        return None
    if when not in moments:
        return None
    if number == "always":
        return when
    if number == "1":
        os.unlink(DOOM)
        return when
    with open(f"{DOOM}.new", "w") as file:
        file.write(f"{int(number) - 1} {when}")
    os.rename(f"{DOOM}.new", DOOM)
    return None


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def doomed(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call, with death before or after it."""

    def wrapped(*args: Any, **more: Any) -> Any:
        when = due("before", "after")
        if when == "before":
            die()
        result = call(*args, **more)
        if when == "after":
            die()
        return result

    return wrapped


def answering(writev: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
    def wrapped(fd: int, parts: Any) -> int:
        if due("answer"):
            die()
        return writev(fd, parts)

    return wrapped


def resuming(resume: Callable[[Union], Any]) -> Callable[[Union], Any]:
    def wrapped(union: Union) -> Any:
        if due("resume"):
            die()
        return resume(union)

    return wrapped


Union.resume = resuming(Union.resume)  # type: ignore[method-assign, assignment]
for name in syscalls.MUTATING:
    setattr(syscalls, name, doomed(getattr(syscalls, name)))
os.writev = answering(os.writev)
sys.exit(main())
