"""A local user who wants to do harm: what he asks too much of is bounded or denied, and others go on.

Escapes through symlinks and races inside the layers are in tests/union/test_containment.py, what permissions deny in
test_permissions.py.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import USER, Daemon, Layers, LogPolicy, Mode, as_user
from tests.trees import errno_of
from unionfsd.control.client import Client
from unionfsd.ctl import find

pytestmark = [pytest.mark.privileged, pytest.mark.deviates]

#: The daemon with few descriptors.
FEW = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (600, 600))
from unionfsd import cli
sys.exit(cli.main())
"""

#: Requests that wait at once.
WAITING = 10_000 if os.environ.get("UNIONFSD_SOAK_SECONDS") else 600


def hoard(directory: Path, count: int) -> tuple[list[int], int]:
    """Open files and directories and delete them; the descriptors, and how many were deleted."""
    held, deleted = [], 0
    for number in range(count):
        path = directory / f"h{number}"
        if number % 2:
            path.mkdir()
            held.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
        else:
            held.append(os.open(path, os.O_CREAT | os.O_RDWR))
        with contextlib.suppress(OSError):
            path.rmdir() if number % 2 else path.unlink()
            deleted += 1
    return held, deleted


@contextlib.contextmanager
def hoarder(directory: Path) -> Iterator[int]:
    """An ordinary user at work in `directory`: how many deleted things he has open. Then he writes to his files."""
    told, tell = os.pipe()
    over, end = os.pipe()

    def work() -> None:
        os.close(end)
        held, deleted = hoard(directory, 900)
        os.write(tell, b"%d\n" % deleted)
        os.read(over, 1)
        for fd in held[::2]:
            os.write(fd, b"still there")

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        child = pool.submit(as_user, work)
        try:
            yield int(os.read(told, 10))
        finally:
            os.close(end)
            child.result()
            for fd in (told, tell, over):
                os.close(fd)


def test_deleted_files_in_use_leave_descriptors_to_others(mode: Mode, layers: Layers, log_policy: LogPolicy) -> None:
    log_policy.expect(rf"user {USER} keeps \d+ deleted objects open")
    for number in range(50):
        (layers.lower / f"d{number}").mkdir()
        (layers.lower / f"d{number}" / "f").write_bytes(b"lower")
    with Daemon(layers, mode.options, log_policy=log_policy, program=("-c", FEW)) as daemon:
        (daemon / "his").mkdir()
        (daemon / "his").chmod(0o777)
        with hoarder(daemon / "his") as deleted:
            assert 450 <= deleted < 750  # files have a name in work, directories a descriptor
            for number in range(50):
                there = daemon / f"d{number}"
                assert (there / "f").read_bytes() == b"lower"
                assert os.listdir(there) == ["f"]
                (there / "f").chmod(0o600)
                with (there / "g").open("wb") as file:
                    (there / "g").unlink()
                    file.write(b"mine")
        for number in range(50):
            (daemon / f"d{number}" / "f").unlink()


def test_many_requests_wait_and_others_go_on(layers: Layers) -> None:
    """Changes of a frozen mount wait. Each is of a file of its own: those of one wait for each other in the kernel."""
    count = WAITING
    (layers.lower / "d").mkdir()
    for number in range(count):
        (layers.lower / "d" / f"f{number}").touch()
    (layers.lower / "other").write_bytes(b"other")
    with Daemon(layers, ["volatile"]) as mount:
        mount.settle()
        change_all_at_once(mount, count)


def change_all_at_once(mount: Daemon, count: int) -> None:
    stacksize = threading.stack_size(65536)
    failures: list[OSError] = []

    def change(number: int) -> None:
        try:
            os.chmod(mount / f"d/f{number}", 0o600)
        except OSError as exc:
            failures.append(exc)

    with Client(find.locate(os.fsencode(mount.path)).socket) as client:
        before = mount.resident()
        client.call("freeze", timeout=60.0)
        threads = [threading.Thread(target=change, args=(number,)) for number in range(count)]
        try:
            for thread in threads:
                thread.start()
            assert (mount / "other").read_bytes() == b"other"
            assert len(os.listdir(mount / "d")) == count
            assert mount.resident() - before < 64 << 20
            assert len(os.listdir(f"/proc/{mount.pid}/task")) < 40
        finally:
            client.call("thaw")
            for thread in threads:
                thread.join()
            threading.stack_size(stacksize)
    assert failures == []
    assert {os.stat(mount / f"d/f{number}").st_mode & 0o777 for number in range(0, count, 97)} == {0o600}


def test_a_tree_deeper_than_any_path(layers: Layers) -> None:
    """Each level is reached by a descriptor of the one above; all of it is copied up, moved and removed."""
    levels, name = 1010, "a" * 100
    os.close(descend(layers.lower, name, 80, make=True))
    with Daemon(layers) as union:
        use_deep_tree(union, name, levels)


def use_deep_tree(union: Daemon, name: str, levels: int) -> None:
    bottom = descend(union.path, name, levels, make=True)
    try:
        fd = os.open("file", os.O_CREAT | os.O_RDWR, dir_fd=bottom)
        os.write(fd, b"deep")
        os.close(fd)
        os.mkdir("sub", dir_fd=bottom)
        os.rename("file", "sub/renamed", src_dir_fd=bottom, dst_dir_fd=bottom)
        assert sorted(os.listdir(bottom)) == ["sub"]
    finally:
        os.close(bottom)
    os.rename(union / name, union / "moved")
    os.mkdir(union / "other")
    middle = descend(union / "moved", name, 70)
    try:
        # A redirect cannot hold such a path.
        assert errno_of(lambda: os.rename(name, union / "other/x", src_dir_fd=middle)) == "EXDEV"
    finally:
        os.close(middle)
    assert subprocess.run(["rm", "-r", str(union / "moved")], check=False).returncode == 0
    assert sorted(os.listdir(union.path)) == ["other"]


def descend(root: Path, name: str, levels: int, *, make: bool = False) -> int:
    """Descriptor of the directory so many levels down."""
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(levels):
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=at)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=at)
        os.close(at)
        at = below
    return at


def test_xattrs_until_nothing_more_fits(layers: Layers, plain: Path) -> None:
    (layers.lower / "f").touch()
    (plain / "f").touch()

    def fill(path: Path) -> list[str]:
        return [errno_of(os.setxattr, path, f"user.{number}", b"v" * 900) for number in range(20)]

    def large(path: Path) -> str:
        return errno_of(os.setxattr, path, "user.large", b"v" * 65536)

    with Daemon(layers) as union:
        assert large(union / "f") == large(plain / "f") != "ok"
        results = fill(union / "f")
        assert set(results) == {"ok", "ENOSPC"}
        assert len(os.listxattr(union / "f")) == results.count("ok")
        os.chmod(union / "f", 0o600)
        (union / "g").touch()


def test_the_daemon_is_not_his_to_signal(layers: Layers) -> None:
    with Daemon(layers) as mount:
        pid = mount.pid

        def signals() -> list[str]:
            return [errno_of(os.kill, pid, number) for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP)]

        assert as_user(signals) == ["EPERM"] * 3
        assert as_user(lambda: errno_of(os.listdir, f"/proc/{pid}/fd")) == "EACCES"
        assert os.listdir(mount.path) == []
