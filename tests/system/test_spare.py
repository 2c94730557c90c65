"""A spare process mounts for others that are as it is (`spare=`), and for nobody else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import PROJECT, Layers, mounts, run, wait_for
from unionfsd import errors, spare
from unionfsd.control.client import Client
from unionfsd.ctl import find

_SECONDS = 4


def mount(layers: Layers, *prefix: str, seconds: float = _SECONDS, lower: str = "") -> subprocess.CompletedProcess[str]:
    """Mount by the command line, from within the directory of the layers, by a command of `prefix`."""
    options = f"lowerdir={lower or layers.lower.name},upperdir=upper,workdir=work,spare={seconds}"
    return subprocess.run(
        [*prefix, sys.executable, "-m", "unionfsd", "-o", options, "mnt"],
        cwd=layers.root,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def maker(layers: Layers) -> int:
    """The process that started the keeper of the mount."""
    with Client(find.locate(os.fsencode(layers.mnt)).socket) as client:
        keeper = client.call("status")["keeper"]
    return int(Path(f"/proc/{keeper}/stat").read_text().rpartition(") ")[2].split()[1])


def there() -> bool:
    return os.path.exists(spare.address(spare.directory()))


@pytest.fixture
def mounted(layers: Layers) -> Iterator[Layers]:
    """Mounted once and unmounted; a spare waits."""
    wait_for(lambda: not there(), "an older spare does not go away")
    (layers.lower / "file").write_text("lower\n")
    done = mount(layers)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    alone = maker(layers)
    run("umount", layers.mnt)
    wait_for(there, "no spare is there")
    yield layers
    while layers.mnt in mounts():
        run("umount", "--lazy", layers.mnt)
    assert alone != 0


def test_the_spare_mounts(mounted: Layers) -> None:
    makers = set()
    for _ in range(2):
        assert mount(mounted).returncode == 0
        assert (mounted.mnt / "file").read_text() == "lower\n"
        (mounted.mnt / "new").write_text("new\n")
        makers.add(maker(mounted))
        run("umount", mounted.mnt)
    (pid,) = makers
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert b"-m\0unionfsd\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    assert (mounted.upper / "new").read_text() == "new\n"


def test_what_goes_wrong_is_told_the_same(mounted: Layers) -> None:
    done = mount(mounted, lower="nowhere")
    assert done.returncode == errors.LAYER
    assert done.stderr == (
        f"unionfsd: lowerdir {mounted.root}/nowhere: No such file or directory (name an existing directory)\n"
    )
    assert mounted.mnt not in mounts()


def test_a_warning_is_seen(mounted: Layers) -> None:
    done = mount(mounted, lower=f"{mounted.lower.name},frobnicate")
    assert (done.returncode, done.stderr) == (0, "unionfsd: warning: unknown option ignored: frobnicate\n")


@pytest.mark.parametrize(
    "prefix",
    [
        ("setpriv", "--bounding-set=-sys_boot"),
        ("setpriv", "--no-new-privs"),
        ("prlimit", "--nofile=2000:2000"),
        ("unshare", "--uts"),
    ],
    ids=" ".join,
)
def test_who_is_otherwise_goes_on_alone(mounted: Layers, prefix: tuple[str, ...]) -> None:
    assert mount(mounted).returncode == 0
    pid = maker(mounted)
    run("umount", mounted.mnt)
    assert mount(mounted, *prefix).returncode == 0
    assert maker(mounted) != pid
    assert (mounted.mnt / "file").read_text() == "lower\n"


def test_it_goes_when_nobody_wants_it(mounted: Layers) -> None:
    assert there()
    wait_for(lambda: not there(), "it waits for ever", seconds=_SECONDS + 10)


def test_what_a_spare_left_that_was_killed_is_removed(mounted: Layers) -> None:
    wait_for(lambda: not there(), "it waits for ever", seconds=_SECONDS + 10)
    left = Path(os.fsdecode(spare.directory())) / "spare.1.0"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    assert mount(mounted).returncode == 0
    wait_for(there, "no spare is there")
    assert not left.exists()


def pair(layers: Layers) -> tuple[int, int]:
    """The pids of the spare and of who stands by, once a mount that it made is gone."""
    assert mount(layers).returncode == 0
    pid = maker(layers)
    run("umount", layers.mnt)
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_for(lambda: len(children.read_text().split()) == 1, "one stands by, and the keeper has ended")
    return pid, int(children.read_text())


def test_who_stands_by_ends_with_the_spare(mounted: Layers) -> None:
    pid, child = pair(mounted)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{child}").exists(), "it waits for ever")
    assert mount(mounted).returncode == 0
    assert maker(mounted) != pid
    wait_for(there, "no spare is there")


def test_a_killed_stand_in_is_no_loss(mounted: Layers) -> None:
    pid, child = pair(mounted)
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "a spare that loses who stands by ends")
    assert mount(mounted).returncode == 0
    wait_for(there, "no spare is there")


def test_without_the_option_there_is_none(layers: Layers) -> None:
    wait_for(lambda: not there(), "an older spare does not go away")
    assert mount(layers, seconds=0).returncode == 0
    time.sleep(0.5)
    assert not there()
    run("umount", layers.mnt)


def test_who_hangs_up_has_nothing_mounted(mounted: Layers) -> None:
    """As Ctrl-C does: the spare cannot tell how it went, and takes down what it mounted."""
    options = f"lowerdir={mounted.lower},upperdir={mounted.upper},workdir={mounted.work}"
    words = [sys.executable, "-m", "unionfsd", "-o", options, str(mounted.mnt)]
    script = (
        "import sys; from unionfsd import spare; sys.orig_argv = sys.argv = sys.argv[1:];"
        "_recv = spare._socket.socket;"
        "spare._socket.socket = type('Hasty', (_recv,), {'recv': lambda self, size: self.close() or b''});"
        "print(spare.ask())"
    )
    done = run("env", f"PYTHONPATH={PROJECT}", sys.executable, "-c", script, *words)
    assert done == "None\n"
    time.sleep(1)
    wait_for(lambda: mounted.mnt not in mounts(), "it stays mounted")
    assert mount(mounted).returncode == 0
