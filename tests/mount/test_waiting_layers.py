"""Lowers that wait for somebody else: a FUSE file system whose server is stopped, and what goes on meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import PROJECT, Daemon, Layers, LogPolicy, Mode, run, wait_for
from unionfsd.control.client import Client
from unionfsd.ctl import find

pytestmark = [pytest.mark.privileged, pytest.mark.deviates]

#: Seconds in which what needs no answer of the server has to be over: a hundred times what it takes.
SOON = 5


#: The daemon with a keeper that takes a process for hung after 3 s.
IMPATIENT = """
import sys
from unionfsd import cli, keeper
keeper.HUNG, keeper._LOOK = 3.0, 0.5
sys.exit(cli.main())
"""


class Far:
    """A directory `behind` a server, which `root` shows: a union of ours, of one layer, that nothing is cached of."""

    def __init__(self, place: Path) -> None:
        self.layers = Layers(place)
        self.root = self.layers.mnt
        self.behind = self.layers.lower

    def __enter__(self) -> Far:
        options = f"{self.layers.options(upper=False)},timeout=0,keeper=off,io=cached"
        command = [sys.executable, "-m", "unionfsd", "-f", "-o", options, str(self.root)]
        log = self.layers.root / "log"
        with log.open("wb") as file:
            environment = os.environ | {"PYTHONPATH": str(PROJECT)}
            process = self._process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        wait_for(lambda: os.path.ismount(self.root) or process.poll() is not None, "the far file system")
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()  # whoever waits is told that there is nobody
        self._process.wait()
        run("umount", "--lazy", self.root)

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """The server does not answer."""
        self._process.send_signal(signal.SIGSTOP)
        wait_for(lambda: state_of(self._process.pid) == "T", "the server goes on")
        try:
            yield
        finally:
            self.resume()

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


class Union:
    """The union of an upper, a lower that answers, and one that may not."""

    def __init__(self, far: Far, daemon: Daemon) -> None:
        self.far = far
        self.daemon = daemon
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """A command in the mount that will wait."""
        process = subprocess.Popen(words, cwd=self.daemon.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._started.append(process)
        return process

    def do(self, script: str) -> str:
        """The output of a shell script in the mount, which has to be over soon."""
        command = ["timeout", "--signal=KILL", str(SOON), "sh", "-ec", script]
        done = subprocess.run(command, cwd=self.daemon.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, (done.returncode, done.stdout)
        return done.stdout.decode()

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate(timeout=30)


@pytest.fixture
def far(disk: Path) -> Iterator[Far]:
    (disk / "far").mkdir()
    with Far(disk / "far") as far:
        for name in ("read", "large", "changed", "stat", "linked"):
            (far.behind / name).write_bytes(name.encode() * (200_000 if name == "large" else 1))
        (far.behind / "d").mkdir()
        (far.behind / "d/below").write_bytes(b"below")
        (far.behind / "unlisted").mkdir()
        (far.behind / "unlisted/file").write_bytes(b"unlisted")
        yield far


CHANNELS = (Mode("channel", "cached"), Mode("channel", "passthrough"))


@pytest.fixture(params=CHANNELS, ids=str)
def union(request: pytest.FixtureRequest, far: Far, disk: Path, log_policy: LogPolicy) -> Iterator[Union]:
    (disk / "union").mkdir()
    near = disk / "near"
    (near / "d").mkdir(parents=True)
    for name in ("near", "d/beside", "rewritten"):
        (near / name).write_bytes(name.encode())
    layers = Layers(disk / "union", lowers=[near, far.root])
    options = [*request.param.options, "timeout=1"]
    with Daemon(layers, options, log_policy=log_policy, program=("-c", IMPATIENT)) as daemon:
        union = Union(far, daemon)
        try:
            yield union
        finally:
            union.end()


def waits(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process is still there after a moment."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.5)
    return process.returncode is None


def test_only_those_wait_who_need_it(union: Union) -> None:
    os.listdir(union.daemon.path)
    os.listdir(union.daemon / "d")
    used = os.open(
        union.daemon / "d", os.O_PATH
    )  # what the kernel forgets, with all that was read of it, is asked anew
    forget(union.daemon.path)
    with union.far.silent():
        waiting = [
            union.start("cat", "read"),
            union.start("stat", "stat"),
            union.start("sh", "-c", "echo more >> changed"),
            union.start("ls", "unlisted"),
            union.start("cat", "d/below"),
            union.start("cmp", "large", "/dev/null"),
        ]
        assert all(waits(process) for process in waiting)
        for _ in range(3):
            assert "near" in union.do("ls")
            assert union.do("cat near") == "near"
            assert union.do("cat d/beside") == "d/beside"
            union.do("! stat none 2>/dev/null")
            union.do("echo new > new; cat new; mv new newer; ln newer again; rm newer again")
            union.do("mkdir made; echo x > made/file; rm -r made")
            union.do("echo again > rewritten; chmod 600 rewritten; cat rewritten")
            union.do("sync -f near")
            assert union.do("cd d; ls | sort") == "below\nbeside\n"
        assert not any(process.poll() for process in waiting)
        assert all(process.poll() is None for process in waiting)
    for process, expected in zip(waiting, (b"read", b"  File: stat", b"", b"file\n", b"below", b"cmp"), strict=True):
        assert process.communicate(timeout=30)[0].startswith(expected)
    assert (union.daemon / "changed").read_bytes() == b"changedmore\n"
    os.close(used)
    union.daemon.unmount()


def forget(path: Path) -> None:
    """Have the kernel forget what it has cached of names and pages."""
    Path("/proc/sys/vm/drop_caches").write_text("3")


def test_who_is_killed_while_he_waits_is_gone(union: Union) -> None:
    os.listdir(union.daemon.path)
    forget(union.daemon.path)
    serving = union.daemon.pid
    with union.far.silent():
        waiting = [union.start(*words) for words in (("cat", "read"), ("stat", "stat"), ("ls", "unlisted"))]
        reading = union.start("sh", "-c", "exec cat large > /dev/null")
        asleep = union.start("sleep", "1000")
        assert all(waits(process) for process in (*waiting, reading))
        for process in (*waiting, reading):
            process.kill()
        for process in (*waiting, reading):
            assert process.wait(SOON) == -signal.SIGKILL
        assert waits(asleep)
        assert union.do("cat near") == "near"
    assert union.daemon.pid == serving
    assert union.do("cat read") == "read"
    assert union.do("cat unlisted/file") == "unlisted"


#: stat(2) after a signal that is handled: os.stat does not try again.
HANDLING = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *args: None)
print("ready", flush=True)
print(os.stat(sys.argv[1]).st_size)
"""


def test_a_signal_alone_does_not_end_the_waiting(union: Union) -> None:
    """A program may not expect EINTR of stat(2); and who got a signal can be killed later."""
    with union.far.silent():
        first, second = (union.start(sys.executable, "-I", "-c", HANDLING, name) for name in ("d/below", "stat"))
        for process in (first, second):
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        assert waits(first)
        for process in (first, second):
            process.send_signal(signal.SIGUSR1)
        assert waits(first)
        assert waits(second)
        second.kill()
        assert second.wait(SOON) == -signal.SIGKILL
    assert first.communicate(timeout=30)[0] == b"5\n"


def test_a_long_silence_ends_no_process(union: Union) -> None:
    """The keeper takes a process that answers nobody for long for one that hangs; this one answers."""
    os.listdir(union.daemon.path)
    forget(union.daemon.path)
    serving = union.daemon.pid
    with union.far.silent():
        waiting = [union.start("cat", "read") for _ in range(40)]
        end = time.monotonic() + 8
        while time.monotonic() < end:
            assert union.do("cat near") == "near"
            time.sleep(1)
    for process in waiting:
        assert process.communicate(timeout=30)[0] == b"read"
    assert union.daemon.pid == serving


def test_it_is_unmounted_while_a_layer_is_silent(union: Union, log_policy: LogPolicy) -> None:
    log_policy.expect("busy: detached, and served until its last user leaves")
    os.listdir(union.daemon.path)
    forget(union.daemon.path)
    with union.far.silent():
        waiting = union.start("stat", "stat")
        changing = union.start("sh", "-c", "echo more >> changed")
        assert waits(waiting)
        assert waits(changing)
        start = time.monotonic()
        os.kill(union.daemon.keeper, signal.SIGTERM)
        wait_for(lambda: not union.daemon.mounted, "it is mounted", SOON)
        wait_for(lambda: "busy: detached" in union.daemon.log.read_text(), "nothing is said", SOON)
        waiting.kill()
        changing.kill()
        assert time.monotonic() - start < SOON


def test_control_goes_on(union: Union) -> None:
    os.listdir(union.daemon.path)
    forget(union.daemon.path)
    union.daemon.settle()
    with union.far.silent(), Client(find.locate(os.fsencode(union.daemon.path)).socket) as client:
        # Not for what is read: then the kernel has pages that a freeze waits for.
        waiting = [union.start("stat", "stat"), union.start("ls", "unlisted")]
        assert all(waits(process) for process in waiting)
        for method in ("status", "stats", "options", "work", "events"):
            client.call(method)
        if "io=cached" in union.daemon._options:
            client.call("freeze", timeout=10)
            client.call("thaw")
        with ThreadPoolExecutor(1) as pool:
            refreshed = pool.submit(refresh, union)
            assert union.do("cat near") == "near"
            assert not refreshed.done()
            union.far.resume()
            refreshed.result(30)
    for process in waiting:
        assert process.wait(30) == 0


def refresh(union: Union) -> None:
    with Client(find.locate(os.fsencode(union.daemon.path)).socket) as client:
        client.call("refresh")


def test_a_successor_serves_while_a_layer_is_silent(union: Union, log_policy: LogPolicy) -> None:
    """Nothing of the layer is open: the kernel keeps a process until its files there are closed.

    What was read of directories is read anew, so names that nobody had are for later.
    """
    log_policy.expect("was killed by SIGKILL; another takes its place")
    log_policy.expect("is served again")
    os.listdir(union.daemon.path)
    before = union.daemon.pid
    with union.far.silent():
        waiting = [union.start("stat", "stat"), union.start("cat", "d/below")]
        assert all(waits(process) for process in waiting)
        os.kill(before, signal.SIGKILL)
        assert union.do("cat near; echo again 1<> near; chmod 600 near; cat near") == "nearagain\n"
        assert union.daemon.pid != before
        assert all(waits(process) for process in waiting)
    assert [process.wait(30) for process in waiting] == [0, 0]
    assert union.do("cat d/below") == "below"
