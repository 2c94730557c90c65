"""A service manager keeps what a mount needs to go on while no process of ours is there; the tests play its part."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import Layers, children, mounts, wait_for
from tests.system.service import Service, served
from unionfsd import errors

_ALL = {"estate", "fuse", "ledger", "lower0", "upper", "work", "lock0", "lock1"}


@pytest.fixture
def service(layers: Layers) -> Iterator[Service]:
    with served(layers) as service:
        yield service


def start(service: Service, store: int = 64) -> None:
    """Start it and hear until all is kept."""
    service.start(fdstore=store)
    service.hear_of("READY")
    wait_for(lambda: not store or "estate" in service.kept, "it has nothing kept")


#: Works on the mount $1 until its input ends, and tells the longest that a turn took. A process of its own: one that
#: is started inherits what is open here, and closing that asks the mount.
LOAD = """
import os, sys, threading, time
os.chdir(sys.argv[1])
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set())).start()
longest = turn = 0
with open("open", "w") as file, open("gone", "w+") as gone:
    gone.write("of no name")
    os.unlink("gone")
    print("at work", flush=True)
    while not over.is_set():
        start, turn = time.monotonic(), turn + 1
        with open("load", "w") as load:
            load.write(str(turn))
        with open("load") as load:
            assert load.read() == str(turn)
        os.rename("load", "moved")
        os.unlink("moved")
        file.write(f"{turn}\\n")
        file.flush()
        gone.seek(0)
        assert gone.read() == "of no name"
        longest = max(longest, time.monotonic() - start)
with open("open") as file:
    assert file.read() == "".join(f"{number}\\n" for number in range(1, turn + 1))
print(longest)
"""


@contextmanager
def load(mnt: Path) -> Iterator[list[float]]:
    """Somebody works on the mount meanwhile, and no error is seen; then the list has the longest time of a turn."""
    took: list[float] = []
    argv = [sys.executable, "-c", LOAD, str(mnt)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as user:
        assert user.stdout is not None
        try:
            assert user.stdout.readline() == b"at work\n"
            yield took
            said, failure = user.communicate(timeout=30)
            assert (user.returncode, failure) == (0, b"")
            took.append(float(said))
        finally:
            user.kill()


def test_all_that_a_mount_needs_is_kept_until_it_ends(service: Service) -> None:
    start(service)
    assert service.kept.keys() == _ALL
    assert os.readlink(f"/proc/self/fd/{service.kept['fuse']}") == "/dev/fuse"
    os.kill(service.pid, signal.SIGTERM)
    assert service.end() == errors.OK
    assert service.layers.mnt not in mounts()
    wait_for(lambda: not service.kept, "the manager keeps what is of no use")


def test_keeper_and_server_are_killed_and_the_mount_goes_on(service: Service) -> None:
    start(service)
    mnt = service.layers.mnt
    with load(mnt) as took:
        for _ in range(3):
            service.kill()
            service.start(fdstore=64)
            assert service.hear_of("READY")["MAINPID"] == str(service.pid)
    assert took[0] < 5
    assert mounts().count(mnt) == 1
    assert "is served again" in service.log.read_text()
    os.kill(service.pid, signal.SIGTERM)
    assert service.end() == errors.OK
    assert mnt not in mounts()
    assert os.listdir(service.layers.work / "work") == []


def test_who_took_over_has_a_keeper(service: Service) -> None:
    start(service)
    service.kill()
    service.start(fdstore=64)
    service.hear_of("READY")
    (before,) = children(service.pid)
    os.kill(before, signal.SIGKILL)
    assert (service.layers.mnt / "file").read_text() == "lower\n"
    assert children(service.pid) != [before]


def test_a_mount_that_has_ended_is_made_anew(service: Service) -> None:
    start(service)
    service.kill()
    os.close(service.kept.pop("fuse"))  # as the manager does with a descriptor that reports an error
    with pytest.raises(OSError, match="not connected"):
        os.listdir(service.layers.mnt)
    start(service)
    assert "mounted anew, and not what the service manager kept: not all of it is there" in service.log.read_text()
    assert (service.layers.mnt / "file").read_text() == "lower\n"
    assert mounts().count(service.layers.mnt) == 1
    assert service.kept.keys() == _ALL


def test_one_that_nobody_can_serve_is_taken_away(service: Service) -> None:
    """The manager keeps a connection that was aborted, or one that somebody unmounted meanwhile."""
    start(service)
    service.kill()
    os.system(f"umount --force --lazy '{service.layers.mnt}'")
    start(service)
    assert "not what the service manager kept: it has ended" in service.log.read_text()
    assert (service.layers.mnt / "file").read_text() == "lower\n"


def test_another_configuration_makes_another_mount(service: Service) -> None:
    """Whoever changes it wants it in force. Who waits on the mount before learns that it is gone."""
    start(service)
    service.kill()
    lower = service.layers.push()
    (lower / "other").write_text("other\n")
    service.config.write_text(service.config.read_text().replace(str(service.layers.lowers[1]), str(lower)))
    with subprocess.Popen(["ls", str(service.layers.mnt)], stderr=subprocess.PIPE, text=True) as waiting:
        service.start(fdstore=64)
        service.hear_of("READY")
        assert "Software caused connection abort" in waiting.communicate(timeout=20)[1]
    assert "mounted anew, and not what the service manager kept: the running mount has other options: lowerdirs" in (
        service.log.read_text()
    )
    assert os.listdir(service.layers.mnt) == ["other"]
    assert mounts().count(service.layers.mnt) == 1


def test_a_store_that_is_too_small_is_told_of(service: Service) -> None:
    service.start(fdstore=3)
    service.hear_of("READY")
    wait_for(lambda: "FileDescriptorStoreMax=3, and 8 are needed" in service.log.read_text(), "nothing is logged")
    os.kill(service.pid, signal.SIGTERM)
    assert service.end() == errors.OK
    assert service.kept == {}


def test_a_dead_mount_that_nobody_kept_is_replaced(service: Service) -> None:
    start(service, store=0)
    service.kill()
    with pytest.raises(OSError, match="not connected"):
        os.listdir(service.layers.mnt)
    service.start()
    service.hear_of("READY")
    assert (service.layers.mnt / "file").read_text() == "lower\n"
    assert mounts().count(service.layers.mnt) == 1
