"""Immutable and append-only files on a mount: nothing is changed, whatever the kernel's page cache took before."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.harness import WRITETHROUGH, Layers, Mode, MountFactory, run, wait_for
from tests.trees import errno_of

MORE_MODES = (WRITETHROUGH,)

pytestmark = pytest.mark.privileged


@pytest.fixture
def flagged() -> Iterator[Callable[[str, Path], Path]]:
    """Write a file and give it one of the letters of chattr(1), for the time of the test."""
    with contextlib.ExitStack() as stack:

        def make(letter: str, path: Path) -> Path:
            path.write_bytes(b"data\n")
            run("chattr", f"+{letter}", path)
            stack.callback(run, "chattr", f"-{letter}", path)
            return path

        yield make


def write_twice(path: Path, offset: int) -> list[str]:
    """How it goes to open a file, write to it, sync it, write and sync once more, and close it."""
    try:
        fd = os.open(path, os.O_WRONLY)
    except PermissionError:
        return ["EPERM"]
    calls = (partial(os.pwrite, fd, b"XXXX", offset), partial(os.fsync, fd)) * 2
    return [errno_of(call) for call in (*calls, partial(os.close, fd))]


@pytest.mark.parametrize("letter", ["i", "a"])
def test_nothing_of_what_was_refused_arrives(
    letter: str, mode: Mode, layers: Layers, flagged: Callable[[str, Path], Path], mounted: MountFactory
) -> None:
    flagged(letter, layers.lower / "file")
    mount = mounted()
    path = mount / "file"
    for offset in (0, 2, 5) if letter == "i" else (0, 2):
        assert "EPERM" in write_twice(path, offset)
    assert errno_of(os.open, path, os.O_WRONLY | os.O_TRUNC) == "EPERM"
    wait_for(lambda: path.read_bytes() == b"data\n", "what was refused is still seen")
    if letter == "i" or (mode.transport, mode.io) != ("channel", "cached"):  # there an open is no message
        assert not (layers.upper / "file").exists()
    mount.remount()
    assert path.read_bytes() == b"data\n"


def test_what_was_touched_is_append_only_still(
    mode: Mode, layers: Layers, flagged: Callable[[str, Path], Path], mounted: MountFactory
) -> None:
    flagged("a", layers.lower / "file")
    mount = mounted()
    path = mount / "file"
    # Over pyfuse3 the time to set is one that somebody named, for all we are told.
    assert errno_of(os.utime, path) == ("EPERM" if mode.transport == "pyfuse3" else "ok")
    assert (layers.upper / "file").exists() == (mode.transport != "pyfuse3")
    assert "EPERM" in write_twice(path, 0)
    wait_for(lambda: path.read_bytes() == b"data\n", "what was refused is still seen")
    with path.open("ab") as file:
        file.write(b"more\n")
    assert path.read_bytes() == b"data\nmore\n"


def test_what_was_written_before_the_flag_is_kept(mode: Mode, mounted: MountFactory) -> None:
    path = mounted() / "file"
    with path.open("wb", buffering=0) as file:
        file.write(b"before\n")
        outcome = subprocess.run(["chattr", "+i", path], capture_output=True, text=True, check=False)
        if mode.transport == "pyfuse3":
            assert "not supported" in outcome.stderr
            return
        os.fsync(file.fileno())
    assert path.read_bytes() == b"before\n"
    run("chattr", "-i", path)
    path.unlink()
