"""The process that serves dies, and nobody who uses the mount sees it."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import PROJECT, Daemon, Layers, LogPolicy, Mode, children, mounts, run, wait_for
from tests.system.doomed import alone
from tests.system.torture import fingerprint, outcome, prepare, survivor, torture
from unionfsd import __version__, syscalls

_PATIENCE = 280
CHANNEL = (Mode("channel", "cached"), Mode("channel", "passthrough"), Mode("channel", "cached", "writethrough"))


@pytest.fixture(params=CHANNEL[:2], ids=str)
def options(request: pytest.FixtureRequest) -> tuple[str, ...]:
    mode: Mode = request.param
    return mode.options


@contextlib.contextmanager
def served(
    layers: Layers, *options: str, kind: type[Daemon] = Daemon, policy: LogPolicy | None = None
) -> Iterator[Daemon]:
    with kind(layers, options, log_policy=policy or survivor(), patience=_PATIENCE) as daemon:
        yield daemon


def kill(daemon: Daemon) -> None:
    """Kill the process that serves, and wait for the next one."""
    (pid,) = children(daemon.keeper)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: children(daemon.keeper) not in ([], [pid]), "nobody takes its place")


def status(daemon: Daemon) -> dict[str, object]:
    """Its own answer."""
    found: dict[str, object] = json.loads(run(sys.executable, "-m", "unionfsd.ctl", "status", "--json", daemon.path))
    return found


def state(daemon: Daemon) -> str:
    """What `unionfsctl ps` calls it."""
    rows = json.loads(run(sys.executable, "-m", "unionfsd.ctl", "ps", "--json"))
    found: str = {row["mountpoint"]: row["state"] for row in rows}[str(daemon.path)]
    return found


def _link(fd: int, directory: Path, name: str) -> None:
    """Give a file without a name one."""
    dirfd = os.open(directory, os.O_RDONLY)
    try:
        syscalls.link_fd(fd, dirfd, os.fsencode(name))
    finally:
        os.close(dirfd)


def test_another_process_serves(layers: Layers, options: tuple[str, ...]) -> None:
    (layers.lower / "file").write_text("lower\n")
    with served(layers, *options) as daemon:
        before = status(daemon)
        assert (before["pid"], before["keeper"], before["restarts"]) == (daemon.pid, daemon.keeper, 0)
        for count in (1, 2, 3):
            kill(daemon)
            (daemon / f"new{count}").write_text("new")
            after = status(daemon)
            assert (after["pid"], after["keeper"], after["restarts"]) == (daemon.pid, daemon.keeper, count)
            assert after["pid"] != before["pid"]
        assert (daemon / "file").read_text() == "lower\n"
        assert sorted(os.listdir(daemon.path)) == ["file", "new1", "new2", "new3"]
    assert sorted(os.listdir(layers.upper)) == ["new1", "new2", "new3"]


def test_what_is_open_stays_open(layers: Layers, options: tuple[str, ...]) -> None:
    (layers.lower / "lower").write_bytes(b"lower" * 10000)
    (layers.lower / "gone").write_bytes(b"gone")
    (layers.lower / "deep/er").mkdir(parents=True)
    (layers.lower / "deep/er/file").write_text("deep")
    with served(layers, *options) as daemon:
        (daemon / "upper").write_bytes(bytes(20000))
        (daemon / "locked").write_bytes(b"x")
        lower = os.open(daemon / "lower", os.O_RDONLY)
        gone = os.open(daemon / "gone", os.O_RDONLY)
        upper = os.open(daemon / "upper", os.O_RDWR)
        locked = os.open(daemon / "locked", os.O_RDWR)
        nameless = os.open(daemon.path, os.O_RDWR | os.O_TMPFILE, 0o600)
        directory = os.open(daemon / "deep/er", os.O_RDONLY)
        mapped = mmap.mmap(upper, 20000)
        fcntl.flock(locked, fcntl.LOCK_EX)
        os.write(nameless, b"nothing")
        os.unlink(daemon / "upper")
        os.unlink(daemon / "gone")
        os.rename(daemon / "deep", daemon / "moved")
        with subprocess.Popen(["sleep", "60"], cwd=daemon / "moved/er") as sleeper:
            for turn in range(2):
                kill(daemon)
                os.pwrite(upper, b"written", 100 * turn)
                mapped[500 + turn : 503 + turn] = b"map"
                mapped.flush()
                assert os.pread(upper, 3, 500 + turn) == b"map"
                assert os.fstat(upper).st_nlink == 0
                assert os.pread(gone, 10, 0) == b"gone"
                assert os.pread(lower, 50000, 0) == b"lower" * 10000
                assert os.pread(nameless, 10, 0) == b"nothing"
                assert os.listdir(directory) == ["file"]
                assert os.readlink(f"/proc/{sleeper.pid}/cwd") == str(daemon / "moved/er")
                assert Path(f"/proc/{sleeper.pid}/cwd/file").read_text() == "deep"
                other = os.open(daemon / "locked", os.O_RDWR)
                with pytest.raises(BlockingIOError):
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.close(other)
            sleeper.kill()
        _link(nameless, daemon.path, "named")
        kill(daemon)
        assert os.fstat(nameless).st_nlink == 1
        mapped.close()
        for fd in (lower, gone, upper, locked, nameless, directory):
            os.close(fd)
        assert (daemon / "named").read_bytes() == b"nothing"
    assert sorted(os.listdir(layers.upper)) == ["deep", "gone", "locked", "moved", "named"]


def test_names_of_one_file_stay_one_file(layers: Layers) -> None:
    with served(layers) as daemon:
        (daemon / "a").write_text("one")
        os.link(daemon / "a", daemon / "b")
        os.link(daemon / "a", daemon / "c")
        fd = os.open(daemon / "b", os.O_RDWR)
        kill(daemon)
        os.unlink(daemon / "b")
        os.pwrite(fd, b"two", 0)
        kill(daemon)
        assert [(daemon / name).read_text() for name in "ac"] == ["two", "two"]
        assert (os.fstat(fd).st_nlink, os.stat(daemon / "a").st_ino) == (2, os.fstat(fd).st_ino)
        os.unlink(daemon / "a")
        os.unlink(daemon / "c")
        kill(daemon)
        assert (os.pread(fd, 9, 0), os.fstat(fd).st_nlink) == (b"two", 0)
        os.close(fd)


def test_hard_links_of_a_lower_stay_one_file(layers: Layers) -> None:
    (layers.lower / "a").write_text("one")
    for name in "bcd":
        os.link(layers.lower / "a", layers.lower / name)
    with served(layers, "index=on") as daemon:
        kill(daemon)
        (daemon / "a").write_text("two")
        kill(daemon)
        assert (daemon / "b").read_text() == "two"
        os.unlink(daemon / "c")
        kill(daemon)
        with (daemon / "d").open("a") as file:
            file.write("more")
        assert [(daemon / name).read_text() for name in "abd"] == ["twomore"] * 3
        assert [(daemon / name).stat().st_nlink for name in "abd"] == [3] * 3
        assert len({(daemon / name).stat().st_ino for name in "abd"}) == 1
        kill(daemon)
        for name in "abd":
            os.unlink(daemon / name)
        kill(daemon)
        assert os.listdir(daemon.path) == []
    assert [name for name in os.listdir(layers.work / "index") if not name.startswith("#")] == []


def test_inode_numbers_and_nodes_follow_forgetting(layers: Layers) -> None:
    for number in range(300):
        (layers.lower / f"file{number}").write_text("")
    with served(layers) as daemon:
        before = {entry.name: entry.stat().st_ino for entry in os.scandir(daemon.path)}
        kill(daemon)
        assert {entry.name: entry.stat().st_ino for entry in os.scandir(daemon.path)} == before
        known = json.loads(run(sys.executable, "-m", "unionfsd.ctl", "stats", "--json", daemon.path))["nodes"]
        assert known >= 300
        Path("/proc/sys/vm/drop_caches").write_text("2")
        nodes = ["unionfsd.ctl", "stats", "--json", str(daemon.path)]

        def forgotten() -> bool:
            return int(json.loads(run(sys.executable, "-m", *nodes))["nodes"]) < 50

        wait_for(forgotten, "nothing is forgotten")


# Requests that were under way.


class Doomed(Daemon):
    """A daemon that dies at a system call of our choice."""

    program = ("-m", "tests.system.doomed")

    @property
    def doom(self) -> Path:
        return self.layers.root / "doom"

    def dooms(self, what: str) -> None:
        """Say where it dies."""
        with alone(str(self.doom)):
            self.doom.write_text(what)

    def spare(self) -> None:
        """It lives; FileNotFoundError if it died already."""
        with alone(str(self.doom)):
            self.doom.unlink()

    def mount(self) -> None:
        os.environ["DOOM"] = str(self.doom)
        try:
            super().mount()
        finally:
            del os.environ["DOOM"]


Action = Callable[[Path, int], object]


def _nothing(top: Path, turn: int) -> None:
    pass


def _open_new(top: Path, turn: int) -> None:
    os.close(os.open(top / f"n{turn}", os.O_RDWR | os.O_CREAT | os.O_EXCL))


def _create_upper(top: Path, turn: int) -> None:
    (top / f"u{turn}").write_text("upper")


def _touch_up(top: Path, turn: int) -> None:
    with (top / f"b{turn}").open("a") as file:
        file.write("more")


def _named_later(top: Path, turn: int) -> None:
    fd = os.open(top, os.O_RDWR | os.O_TMPFILE, 0o640)
    os.write(fd, b"late")
    _link(fd, top, f"n{turn}")
    os.close(fd)


def _exchange(top: Path, turn: int) -> None:
    fd = os.open(top, os.O_RDONLY)
    try:
        syscalls.renameat2(fd, b"a%d" % turn, fd, b"b%d" % turn, syscalls.RENAME_EXCHANGE)
    finally:
        os.close(fd)


def _rename(old: str, new: str) -> Action:
    return lambda top, turn: os.rename(top / f"{old}{turn}", top / f"{new}{turn}")


CASES: dict[str, tuple[Action, Action]] = {
    "create": (_nothing, _open_new),
    "mkdir": (_nothing, lambda top, turn: (top / f"n{turn}").mkdir()),
    "symlink": (_nothing, lambda top, turn: (top / f"n{turn}").symlink_to("x")),
    "mknod": (_nothing, lambda top, turn: os.mkfifo(top / f"n{turn}")),
    "tmpfile": (_nothing, _named_later),
    "link-lower": (_nothing, lambda top, turn: os.link(top / f"a{turn}", top / f"n{turn}")),
    "link-upper": (_create_upper, lambda top, turn: os.link(top / f"u{turn}", top / f"n{turn}")),
    "unlink-lower": (_nothing, lambda top, turn: os.unlink(top / f"a{turn}")),
    "unlink-upper": (_create_upper, lambda top, turn: os.unlink(top / f"u{turn}")),
    "unlink-merged": (_touch_up, lambda top, turn: os.unlink(top / f"b{turn}")),
    "rmdir-lower": (_nothing, lambda top, turn: os.rmdir(top / f"e{turn}")),
    "rmdir-upper": (lambda top, turn: (top / f"n{turn}").mkdir(), lambda top, turn: os.rmdir(top / f"n{turn}")),
    "rename-lower": (_nothing, _rename("a", "n")),
    "rename-upper": (_create_upper, _rename("u", "n")),
    "rename-over-lower": (_create_upper, _rename("u", "b")),
    "rename-over-merged": (_touch_up, _rename("a", "b")),
    "rename-directory": (_nothing, _rename("d", "n")),
    "rename-over-directory": (lambda top, turn: (top / f"n{turn}").mkdir(), _rename("n", "e")),
    "exchange": (_nothing, _exchange),
    "create-again": (lambda top, turn: os.unlink(top / f"a{turn}"), lambda top, turn: (top / f"a{turn}").touch()),
    "mkdir-again": (lambda top, turn: os.rmdir(top / f"e{turn}"), lambda top, turn: (top / f"e{turn}").mkdir()),
    "setxattr": (_nothing, lambda top, turn: os.setxattr(top / f"a{turn}", "user.x", b"1", os.XATTR_CREATE)),
    "removexattr": (
        lambda top, turn: os.setxattr(top / f"a{turn}", "user.x", b"1"),
        lambda top, turn: os.removexattr(top / f"a{turn}", "user.x"),
    ),
    "chmod": (_nothing, lambda top, turn: (top / f"a{turn}").chmod(0o640)),
    "truncate": (_nothing, lambda top, turn: os.truncate(top / f"a{turn}", 2)),
    "append": (_nothing, _touch_up),
}
_TURNS = 40


@pytest.mark.timeout(300)
def test_no_request_is_lost_or_done_twice(layers: Layers, plain: Path, expect_warning: object) -> None:
    """Each operation, with death before and after each of its system calls, and before each answer on the way."""
    for name in CASES:
        for turn in range(_TURNS):
            for file in "ab":
                (layers.lower / name).mkdir(exist_ok=True)
                (layers.lower / name / f"{file}{turn}").write_text(f"{file} {turn}")
            (layers.lower / name / f"d{turn}").mkdir()
            (layers.lower / name / f"d{turn}" / "x").write_text("x")
            (layers.lower / name / f"e{turn}").mkdir()
    run("cp", "-a", f"{layers.lower}/.", plain)
    deaths = 0
    with served(layers, kind=Doomed) as daemon:
        assert isinstance(daemon, Doomed)
        for name, (before, action) in CASES.items():
            tops = daemon / name, plain / name
            turn = 0
            for when in ("before", "after", "answer"):
                for number in range(1, _TURNS):
                    for top in tops:
                        before(top, turn)
                    daemon.dooms(f"{number} {when}")
                    ours, expected = (outcome(lambda top=top: action(top, turn)) for top in tops)  # type: ignore[misc]  # noqa: B023
                    assert ours == expected, (
                        f"{name} with death {when} {number}: {ours}, {daemon.log.read_text()[-2000:]}"
                    )
                    turn += 1
                    try:
                        daemon.spare()
                        break
                    except FileNotFoundError:
                        deaths += 1
            assert fingerprint(tops[0]) == fingerprint(tops[1]), name
        restarts = status(daemon)["restarts"]
        assert isinstance(restarts, int)
        assert 0 < restarts <= deaths, "a death between two operations counts once, and may be seen twice"
    assert deaths > 5 * len(CASES)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", CHANNEL, ids=str)
def test_a_load_sees_no_error(how: Mode, layers: Layers, plain: Path) -> None:
    prepare(layers, plain)
    with served(layers, *how.options) as daemon:
        done, _, wrong = torture(daemon, plain, 20, seed=1)
    assert not wrong
    assert done["operations"] > 40


# The end of all patience.


def test_a_request_that_kills_is_refused_in_the_end(layers: Layers) -> None:
    policy = survivor()
    policy.expect(r"request 9 \(MKDIR\) ended the process that had it: not tried again")
    with served(layers, kind=Doomed, policy=policy) as daemon:
        assert isinstance(daemon, Doomed)
        daemon.dooms("always before")
        with pytest.raises(OSError, match="Input/output"):
            (daemon / "poison").mkdir()
        daemon.spare()
        (daemon / "poison").mkdir()
        assert os.listdir(daemon.path) == ["poison"]


def test_a_crash_loop_ends_in_errors_and_not_in_silence(layers: Layers) -> None:
    policy = survivor()
    policy.expect("every request fails from now on")
    daemon = Doomed(layers, [], log_policy=policy)
    daemon.mount()
    daemon.dooms("always resume")
    os.kill(daemon.pid, signal.SIGKILL)
    with pytest.raises(OSError, match="Input/output"):
        (daemon / "any").touch()
    assert state(daemon) == "failed"
    run(sys.executable, "-m", "unionfsd.ctl", "reap", daemon.path)
    assert daemon.path not in mounts()
    wait_for(lambda: not Path(f"/proc/{daemon.keeper}").exists() or not children(daemon.keeper), "the keeper stays")
    daemon.kill()
    daemon._call_off()


@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("how", ["spin", "wait"])
def test_a_process_that_hangs_is_replaced(
    how: str, others: bool, layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it computes for ever or waits for something; until then `ps` calls it hung. The log has its stacks."""
    monkeypatch.setenv("HUNG", "8")
    policy = survivor()
    policy.expect("for 8 s no request was answered. What the process was doing:")
    policy.expect(r"most recent call first")
    policy.expect(r'  File ".*doomed.py", line \d+ in wrapped')
    policy.expect(r'^(  File ".*", line \d+ in .*)?$')
    with served(layers, kind=Doomed, policy=policy) as daemon:
        assert isinstance(daemon, Doomed)
        before = daemon.pid
        daemon.dooms(f"1 {how}")
        # A process of its own: whoever waits for the mount with this interpreter's lock would keep us waiting, too.
        with subprocess.Popen(["mkdir", daemon / "made"]) as user:
            if others:
                wait_for(lambda: state(daemon) == "hung", "it is not called hung")
            assert user.wait(60) == 0
        assert state(daemon) == "serving"
        assert (status(daemon)["restarts"], daemon.pid != before) == (1, True)
        assert os.listdir(daemon.path) == ["made"]


def test_the_keeper_may_die(layers: Layers) -> None:
    with Daemon(layers) as daemon:
        pid = daemon.pid
        os.kill(daemon.keeper, signal.SIGKILL)
        (daemon / "file").write_text("still served")
        answer = status(daemon)
        assert (answer["pid"], answer["keeper"]) == (pid, None)
        daemon.killed = True


def test_without_a_keeper_a_mount_dies_with_its_daemon(layers: Layers) -> None:
    with Daemon(layers, ["keeper=off"]) as daemon:
        assert status(daemon)["keeper"] is None
        daemon.kill()
        with pytest.raises(OSError, match="not connected"):
            os.listdir(daemon.path)


# Another program.


def test_the_program_is_replaced_beneath_a_load(layers: Layers, options: tuple[str, ...]) -> None:
    (layers.lower / "file").write_text("lower\n")
    policy = LogPolicy()
    policy.expect(r"is served again")
    with served(layers, *options, policy=policy) as daemon:
        stop, failed = threading.Event(), []

        def load() -> None:
            for turn in itertools.count():
                if stop.is_set():
                    return
                try:
                    (daemon / "load").write_text(f"{turn}")
                    assert (daemon / "load").read_text() == f"{turn}"
                    os.rename(daemon / "load", daemon / "moved")
                    os.unlink(daemon / "moved")
                except (OSError, AssertionError) as error:
                    failed.append(error)
                    return

        user = threading.Thread(target=load)
        user.start()
        with (daemon / "open").open("w") as file:
            for turn in range(3):
                said = run(sys.executable, "-m", "unionfsd.ctl", "reexec", daemon.path)
                assert said == f"served by process {daemon.pid}, unionfsd {__version__}\n"
                file.write(f"{turn}\n")
                file.flush()
        stop.set()
        user.join()
        assert failed == []
        assert (daemon / "open").read_text() == "0\n1\n2\n"
        after = status(daemon)
        assert (after["keeper"], after["restarts"]) == (daemon.keeper, 3)
        os.kill(daemon.pid, signal.SIGKILL)
        assert (daemon / "file").read_text() == "lower\n"
        daemon._policy.expect("was killed by SIGKILL")


def test_the_program_is_replaced_while_it_is_replaced(layers: Layers) -> None:
    """Whoever asks while the next program still starts has another one after it."""
    policy = LogPolicy()
    policy.expect(r"is served again")
    with served(layers, policy=policy) as daemon:
        for _ in range(40):
            os.kill(daemon.keeper, signal.SIGUSR1)
            time.sleep(0.02)
        wait_for(lambda: daemon.log.read_text().count("is served again") > 1, "nobody has taken over twice")
        (daemon / "file").write_text("served")


def test_a_copy_up_does_not_hold_up_who_takes_over(layers: Layers) -> None:
    """It is begun again: the mount would answer nobody until it is done."""
    (layers.lower / "large").write_bytes(bytes(1 << 20))
    policy = LogPolicy()
    policy.expect(r"is served again")
    with served(layers, kind=Doomed, policy=policy) as daemon:
        assert isinstance(daemon, Doomed)
        daemon.dooms("1 fill")
        with subprocess.Popen(["truncate", "--size=+1", daemon / "large"]) as user:
            wait_for(lambda: not daemon.doom.exists(), "nothing is copied")
            run(sys.executable, "-m", "unionfsd.ctl", "reexec", daemon.path)
            assert user.wait(60) == 0
        assert (daemon / "large").stat().st_size == (1 << 20) + 1


def test_a_program_that_cannot_take_over_is_refused(layers: Layers) -> None:
    with Daemon(layers) as daemon:
        estate = {"version": 99}
        text = subprocess.run(
            [sys.executable, "-m", "unionfsd", "-f", "-o", layers.options(), str(layers.mnt)],
            env=os.environ | {"UNIONFSD_ESTATE": json.dumps(estate), "PYTHONPATH": str(PROJECT)},
            capture_output=True,
            text=True,
            check=False,
        ).stderr
        assert text.startswith("unionfsd: the running mount cannot be taken over: version (unmount it")
        (daemon / "file").write_text("served as ever")


def test_what_another_version_wrote_down_is_not_taken_over(layers: Layers) -> None:
    with Daemon(layers) as daemon:
        fds = Path(f"/proc/{daemon.keeper}/fd")
        ledger = next(fd for fd in fds.iterdir() if os.readlink(fd).startswith("/memfd:unionfsd "))
        with ledger.open("r+b", buffering=0) as memory:
            version = os.pread(memory.fileno(), 1, 7)
            os.pwrite(memory.fileno(), b"\xff", 7)
            done = subprocess.run(
                [sys.executable, "-m", "unionfsd.ctl", "reexec", str(daemon.path)],
                capture_output=True,
                text=True,
                check=False,
            )
            os.pwrite(memory.fileno(), version, 7)
        assert done.returncode == 1
        assert "the running mount cannot be taken over: what the kernel was told is written down in" in done.stderr
        assert "Traceback" not in done.stderr
        (daemon / "file").write_text("served as ever")


def test_without_a_keeper_nothing_is_replaced(layers: Layers) -> None:
    with Daemon(layers, ["keeper=off"]) as daemon:
        done = subprocess.run(
            [sys.executable, "-m", "unionfsd.ctl", "reexec", str(daemon.path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, "the mount has no keeper" in done.stderr) == (1, True)
