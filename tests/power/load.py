"""The load of the long run: what each of its users does, again and again, in a directory of his own.

`python -m tests.power.load ROOT SECONDS SEED DIRECTORIES` is one user.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.trees import errno_of

#: How many directories `lowerN` he has of a lower.
directories = 1

# Each round leaves nothing behind that the next one finds.


def copied_up(root: Path, number: int, rng: random.Random) -> None:
    """A directory of the lower is read, changed in every way and removed."""
    there = root / f"lower{number % directories}"
    with contextlib.suppress(FileNotFoundError):  # gone since the first time round
        names = sorted(os.listdir(there))
        for name in names:
            (there / name).read_bytes()
        os.chmod(there / names[0], 0o600)
        with (there / names[1]).open("r+b") as file:
            file.write(b"changed")
        os.rename(there / names[2], there / "renamed")
        os.truncate(there / "renamed", 3)
        os.link(there / "renamed", there / "linked")
        for name in sorted(os.listdir(there)):
            os.unlink(there / name)
        os.rmdir(there)


def written(root: Path, number: int, rng: random.Random) -> None:
    """Files of all sizes, written in pieces, synced now and then, replaced by renaming."""
    path = root / "file"
    for size in (0, 10, 5000, rng.randrange(300_000)):
        data = rng.randbytes(size)
        with path.with_suffix(".new").open("wb") as file:
            for start in range(0, size, 4000):
                file.write(data[start : start + 4000])
            if not rng.randrange(8):
                os.fsync(file.fileno())
        os.replace(path.with_suffix(".new"), path)
        assert path.read_bytes() == data
    if path.stat().st_size:
        with path.open("r+b") as mapped, mmap.mmap(mapped.fileno(), 0) as memory:
            memory[0:1] = b"m"
    path.unlink()


def trees(root: Path, number: int, rng: random.Random) -> None:
    """A tree is made, moved, listed and removed."""
    top = root / f"tree{number}"
    for branch in range(4):
        (top / f"b{branch}" / "c").mkdir(parents=True)
        for leaf in range(6):
            (top / f"b{branch}" / "c" / f"l{leaf}").write_bytes(b"leaf")
        os.symlink("nowhere", top / f"b{branch}" / "s")
    os.rename(top / "b0", top / "moved")
    os.rename(top, root / "moved")
    seen = sum(len(files) for _, _, files in os.walk(root / "moved"))
    assert seen == 4 * 7, seen
    for place, directories, files in os.walk(root / "moved", topdown=False):
        for name in files:
            os.unlink(os.path.join(place, name))
        for name in directories:
            os.rmdir(os.path.join(place, name))
    os.rmdir(root / "moved")


def deleted_in_use(root: Path, number: int, rng: random.Random) -> None:
    """Files are used after they were deleted."""
    with contextlib.ExitStack() as stack:
        for index in range(20):
            path = root / f"deleted{index}"
            file = stack.enter_context(path.open("w+b"))
            file.write(b"before")
            path.unlink()
            file.write(b"after")
            file.flush()
            assert os.pread(file.fileno(), 20, 0) == b"beforeafter"


def attributes(root: Path, number: int, rng: random.Random) -> None:
    """Extended attributes and times come and go."""
    path = root / "attributes"
    path.touch()
    for index in range(10):
        os.setxattr(path, f"user.a{index}", rng.randbytes(50))
    assert len(os.listxattr(path)) == 10
    os.utime(path, ns=(number, number))
    os.removexattr(path, "user.a3")
    path.unlink()
    for _ in range(50):
        assert not path.exists()


def refused(root: Path, number: int, rng: random.Random) -> None:
    """What fails, fails as it should."""
    (root / "d").mkdir()
    (root / "d" / "x").touch()
    calls: tuple[tuple[Callable[[], object], int], ...] = (
        (lambda: os.rmdir(root / "d"), errno.ENOTEMPTY),
        (lambda: os.mkdir(root / "d"), errno.EEXIST),
        (lambda: os.unlink(root / "none"), errno.ENOENT),
        (lambda: os.mkdir(root / ("n" * 256)), errno.ENAMETOOLONG),
        (lambda: os.open(root / "d" / "x" / "y", os.O_RDONLY), errno.ENOTDIR),
    )
    assert [errno_of(call) for call, _ in calls] == [errno.errorcode[wanted] for _, wanted in calls]
    (root / "d" / "x").unlink()
    (root / "d").rmdir()


ROUNDS: Final[tuple[Callable[[Path, int, random.Random], None], ...]] = (
    copied_up,
    written,
    trees,
    deleted_in_use,
    attributes,
    refused,
)


def main(root: str, seconds: str, seed: str, count: str) -> None:
    """One user at work; prints how many rounds were made."""
    global directories
    directories = int(count)
    rng = random.Random(int(seed))
    end = time.monotonic() + float(seconds)
    for number in itertools.count():
        if time.monotonic() > end:
            print(number)
            return
        ROUNDS[number % len(ROUNDS)](Path(root), number // len(ROUNDS), rng)


if __name__ == "__main__":
    main(*sys.argv[1:])
