"""How long a mount keeps its users waiting: somebody who does one small thing after the other, and looks at the clock.

A process of its own, so that nobody holds its interpreter while it waits.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.harness import PROJECT

_TURN: Final = 0.001
"""Seconds between two things: many enough to meet a stall, few enough to leave the mount to others."""


class Pulse:
    """Somebody at work in a directory of a mount, which is his, for as long as the context lasts."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.pulse", str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
        )

    def longest(self) -> float:
        """The longest that anything took, in seconds, since this was asked last."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        said = self._process.stdout.readline()
        assert said, "an operation of the pulse failed, see above"
        return float(said)

    def __enter__(self) -> Self:
        self.longest()
        return self

    def __exit__(self, et: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._process.communicate("")
        if et is None:
            assert self._process.returncode == 0, "an operation of the pulse failed, see above"
            self._directory.rmdir()


def main(directory: str) -> None:
    """Tell the longest turn for each line of the input; until it ends."""
    asked, over = threading.Semaphore(0), threading.Event()

    def listen() -> None:
        for _ in sys.stdin:
            asked.release()
        over.set()

    threading.Thread(target=listen, daemon=True).start()
    os.chdir(directory)
    longest = 0.0
    while not over.is_set():
        start = time.monotonic()
        with open("new", "wb") as made:
            made.write(b"here")
        os.rename("new", "old")
        with open("old", "rb") as file:
            assert file.read() == b"here"
        os.unlink("old")
        longest = max(longest, time.monotonic() - start)
        if asked.acquire(blocking=False):
            print(longest, flush=True)
            longest = 0.0
        time.sleep(_TURN)


if __name__ == "__main__":
    main(*sys.argv[1:])
