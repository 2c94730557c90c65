"""An upper without space: what cannot be done is refused, nothing is lost, and it works when there is space again."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Daemon, Layers, Mode, litter, run, small_disk
from tests.trees import errno_of

pytestmark = pytest.mark.privileged


@contextlib.contextmanager
def memory(root: Path, megabytes: int) -> Iterator[Path]:
    """A tmpfs of that size."""
    place = root / "memory"
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", place)
    try:
        yield place
    finally:
        run("umount", "--lazy", place)


def fill(place: Path) -> None:
    """Take all the space there is, in ever smaller pieces."""
    with (place / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"b" * size)
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())


@pytest.mark.parametrize("make", [small_disk, memory])
def test_no_space(
    make: Callable[[Path, int], contextlib.AbstractContextManager[Path]],
    disk: Path,
) -> None:
    (disk / "union").mkdir()
    with make(disk, 8) as place:
        layers = Layers(disk / "union", upper_root=place)
        for number in range(200):
            (layers.lower / f"f{number}").write_bytes(b"lower" * 4000)
        (layers.lower / "d").mkdir()
        with Daemon(layers) as union:
            work_without_space(union, layers, place)


def work_without_space(union: Daemon, layers: Layers, place: Path) -> None:
    (union / "mine").write_bytes(b"m" * 5000)
    os.chmod(union / "f0", 0o600)
    run("sync", "-f", place)
    fill(place)

    def write(name: str) -> None:
        with (union / name).open("r+b", buffering=0) as file:
            file.write(b"W" * 8000)
            os.fsync(file.fileno())

    refused = {
        "copy-up": errno_of(os.chmod, union / "f1", 0o600),
        "cut": errno_of(os.truncate, union / "f2", 10_000),
        "rename": errno_of(os.rename, union / "f3", union / "moved"),
        "write": errno_of(write, "f4"),
        "append": errno_of((union / "new").write_bytes, b"n" * 100_000),
    }
    assert set(refused.values()) <= {"ok", "ENOSPC"}
    assert refused["copy-up"] == refused["rename"] == refused["write"] == "ENOSPC"
    deleted = [number for number in range(5, 150) if errno_of(os.unlink, union / f"f{number}") == "ok"]
    left = {f"f{number}" for number in (1, 3, 4, *range(5, 200)) if number not in deleted}
    assert left <= set(os.listdir(union.path))
    for name in left:
        assert (union / name).read_bytes() == b"lower" * 4000
    assert (union / "mine").read_bytes() == b"m" * 5000
    assert (union / "f0").read_bytes() == b"lower" * 4000
    assert [name for name in litter(layers.work) if name != "#1"] == []

    (place / "ballast").unlink()
    os.chmod(union / "f1", 0o600)
    os.rename(union / "f3", union / "moved")
    write("f4")
    union.remount()
    assert (union / "f1").read_bytes() == (union / "moved").read_bytes() == b"lower" * 4000
    assert (union / "f4").read_bytes() == b"W" * 8000 + b"lower" * 2400
    assert not {f"f{number}" for number in deleted} & set(os.listdir(union.path))


def test_no_descriptors(mode: Mode, layers: Layers) -> None:
    """The process that serves may open nothing more: EMFILE, as it is, nothing changed, and all is well afterwards."""
    for number in range(20):
        (layers.lower / f"d{number}").mkdir()
        (layers.lower / f"d{number}/f").write_bytes(b"lower")
    with Daemon(layers, mode.options) as union:
        union.settle()
        names = sorted(os.listdir(union.path))
        before = resource.prlimit(union.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(union.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        refused = {
            "read": errno_of((union / "d1/f").read_bytes),
            "list": errno_of(os.listdir, union / "d2"),
            "copy-up": errno_of(os.chmod, union / "d3/f", 0o600),
            "create": errno_of((union / "d4/new").write_bytes, b"new"),
            "mkdir": errno_of(os.mkdir, union / "new"),
            "unlink": errno_of(os.unlink, union / "d5/f"),
            "rename": errno_of(os.rename, union / "d6/f", union / "d6/g"),
        }
        assert set(refused.values()) == {"EMFILE"}, refused
        assert errno_of(os.stat, union.path) == "ok"
        resource.prlimit(union.pid, resource.RLIMIT_NOFILE, before)
        assert sorted(os.listdir(union.path)) == names
        assert os.listdir(layers.upper) == []
        assert litter(layers.work) == []
        for number in range(20):
            assert (union / f"d{number}/f").read_bytes() == b"lower"
        os.chmod(union / "d3/f", 0o600)
        os.rename(union / "d6/f", union / "d6/g")
        (union / "d4/new").write_bytes(b"new")
