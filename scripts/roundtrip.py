"""What a message between kernel and daemon costs on this machine, with a daemon in C that does nothing (roundtrip.c).

    python -m scripts.roundtrip

Prints microseconds for each of three calls, the least of some rounds, for a daemon that sleeps between two requests and
for one that looks for the next without a pause: what no FUSE file system here is faster than. Needs root and gcc.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Final

SOURCE: Final = Path(__file__).with_suffix(".c")
CALLS: Final = 3000
ROUNDS: Final = 5


def absent(mountpoint: Path, number: int) -> None:
    """One message: a name that is not there."""
    os.path.exists(mountpoint / f"n{number}")


def stat(mountpoint: Path, number: int) -> None:
    """One message: a name that is there."""
    os.stat(mountpoint / f"s{number}")


def read(mountpoint: Path, number: int) -> None:
    """Two messages: a name that is there, and its data; opening and closing takes none."""
    fd = os.open(mountpoint / f"r{number}", os.O_RDONLY)
    os.read(fd, 4096)
    os.close(fd)


WORK: Final[tuple[Callable[[Path, int], None], ...]] = (absent, stat, read)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "roundtrip"
        subprocess.run(["gcc", "-O2", "-Wall", "-o", program, SOURCE], check=True)
        print(f"{'microseconds':20}" + "".join(f"{work.__name__:>10}" for work in WORK))
        for name, arguments in (("sleeping", ()), ("spinning", ("spin",))):
            best = [min(figures) for figures in zip(*(once(program, arguments) for _ in range(ROUNDS)), strict=True)]
            print(f"{name:20}" + "".join(f"{figure:10.1f}" for figure in best))


def once(program: Path, arguments: tuple[str, ...]) -> list[float]:
    """One round, of all calls, over a fresh mount."""
    mountpoint = program.parent / "mnt"
    mountpoint.mkdir(exist_ok=True)
    before = mountpoint.stat().st_dev
    daemon = subprocess.Popen([program, mountpoint, *arguments])
    deadline = monotonic() + 10
    while os.stat(mountpoint).st_dev == before:
        if daemon.poll() is not None or monotonic() > deadline:
            raise SystemExit("roundtrip: nothing was mounted")
        sleep(0.01)
    try:
        read(mountpoint, -1)  # the kernel learns that there is no OPEN
        figures = []
        for work in WORK:
            start = perf_counter()
            for number in range(CALLS):
                work(mountpoint, number)
            figures.append((perf_counter() - start) / CALLS * 1e6)
        return figures
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=False)
        daemon.wait(10)


if __name__ == "__main__":
    main()
