"""unionfsd that dies where a test wants it to: by SIGKILL at a system call that changes a layer, or before an answer.

The file $DOOM says where, as ``NUMBER WHEN``: at the NUMBERth such call from now on, WHEN it is ``before`` or ``after``
it, or at the NUMBERth ``answer``, or when a successor is to ``resume``. Or it hangs: before the NUMBERth answer, at
work (``spin``) or in a system call (``wait``); or in the thread that is to ``fill`` a copy. The file goes when it
happens; the next process then works as ever. With ``always`` for a number it stays, and every process dies at its first
such call. Who reads or writes it holds a lock (`alone`): the daemon may be at work while a test says the next. $HUNG:
the seconds after which the keeper takes a process for hung.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

DOOM = os.environ.get("DOOM", "")


@contextmanager
def alone(doom: str) -> Iterator[None]:
    """While nobody else reads or writes the file `doom`."""
    with open(f"{doom}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def due(*moments: str) -> str | None:
    """Which of `moments` it is time to die at, if any; counts."""
    if not os.path.exists(DOOM):
        return None
    with alone(DOOM):
        return _due(moments)


def _due(moments: tuple[str, ...]) -> str | None:
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
        when = due("answer", "spin", "wait")
        if when == "answer":
            die()
        while when == "spin":
            pass
        if when == "wait":
            os.read(os.pipe()[0], 1)
        return writev(fd, parts)

    return wrapped


def resuming(resume: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def wrapped(union: Any) -> Any:
        if due("resume"):
            die()
        return resume(union)

    return wrapped


def filling(run: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **more: Any) -> Any:
        if due("fill"):
            os.read(os.pipe()[0], 1)
        return run(*args, **more)

    return wrapped


if __name__ == "__main__":
    from unionfsd import keeper, syscalls
    from unionfsd.cli import main
    from unionfsd.filling import Filling
    from unionfsd.union import Union

    if "HUNG" in os.environ:
        keeper.HUNG = float(os.environ["HUNG"])  # type: ignore[misc]
    Filling.run = filling(Filling.run)  # type: ignore[method-assign]
    Union.resume = resuming(Union.resume)  # type: ignore[method-assign, assignment]
    for name in syscalls.MUTATING:
        setattr(syscalls, name, doomed(getattr(syscalls, name)))
    os.writev = answering(os.writev)
    sys.exit(main())
