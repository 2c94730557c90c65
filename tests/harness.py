"""What the mount tests are made with: layers on a real disk, daemons and peers mounted over them, other users.

Rules this file obeys:

- A test never serves a mount from its own process: a page fault on one's own mount, taken with the interpreter locked,
  hangs for good. The daemon is always a subprocess.
- Whatever was mounted is gone after the test. A mount that does not answer is forced off by a watchdog in a process of
  its own, for a system call that waits for a dead daemon cannot be interrupted from inside.
- After each daemon: it exited 0, logged nothing that the test did not declare, left no litter in the work directory,
  and changed nothing in any lower.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, Self, TypeVar

from tests.trees import fingerprint
from unionfsd.control.client import Client
from unionfsd.ctl import find

T = TypeVar("T")

PROJECT: Final = Path(__file__).resolve().parent.parent

#: Where layers are built: on a disk with xattrs, ACLs, holes and whiteouts; /tmp may be a tmpfs.
DISK: Final = Path(os.environ.get("UNIONFSD_TEST_DIR", "/var/tmp"))

#: An ordinary user, unknown to the system, for tests of access.
USER: Final = 54321
GROUP: Final = 54322


#: Set when the tests run without root's rights (tests/system/rootless.py): who runs them.
ROOTLESS: Final = os.environ.get("UNIONFSD_TEST_ROOTLESS", "")

#: How a mount is taken away, and how by force.
UNMOUNT: Final = ("umount",) if os.geteuid() == 0 else ("fusermount3", "-u")
DETACH: Final = ("umount", "--force", "--lazy") if os.geteuid() == 0 else ("fusermount3", "-u", "-z")


class Mode(NamedTuple):
    """How a union is mounted: the daemon's transport and io mode, or the kernel's own overlayfs as the reference."""

    transport: str
    io: str
    writing: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, self))

    @property
    def options(self) -> tuple[str, ...]:
        more = ("writeback=off",) if self.writing else ()
        return (f"transport={self.transport}", f"io={self.io}", *more)


#: Every mount test runs over each of these.
MODES: Final = (Mode("pyfuse3", "cached"), Mode("channel", "cached"), Mode("channel", "passthrough"))

#: Tests of data run over this one, too: those of modules that have it in `MORE_MODES`.
WRITETHROUGH: Final = Mode("channel", "cached", "writethrough")

#: Not a mode of the daemon: `--mode overlayfs-kernel` holds what the tests expect against the kernel's overlayfs.
REFERENCE: Final = Mode("overlayfs", "kernel")


def run(*command: str | Path, seconds: float = 30) -> str:
    """Output of a command that must succeed."""
    argv = [str(part) for part in command]
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, check=False)
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{' '.join(argv)}: exit {done.returncode}: {text}"
    return text


# Layers.


class Layers:
    """The directories of one union under `root`: `lowers` top first, `upper`, `work`, and `mnt` to mount it on.

    Upper and work may be put elsewhere, on a file system of their own, by `upper_root`.
    """

    def __init__(self, root: Path, *, lowers: Sequence[Path] = (), upper_root: Path | None = None) -> None:
        self.root = root
        self.upper = (upper_root or root) / "upper"
        self.work = (upper_root or root) / "work"
        self.mnt = root / "mnt"
        self.lowers = list(lowers)
        for directory in (self.upper, self.work, self.mnt):
            directory.mkdir(exist_ok=True)
        if not self.lowers:
            self.push()

    @property
    def lower(self) -> Path:
        """The topmost lower."""
        return self.lowers[0]

    def push(self) -> Path:
        """A new, empty lower on top of the others."""
        lower = self.root / f"lower{len(self.lowers)}"
        lower.mkdir()
        self.lowers.insert(0, lower)
        return lower

    def options(self, *, upper: bool = True) -> str:
        """The layers as a string of mount options."""
        text = "lowerdir=" + ":".join(map(str, self.lowers))
        return f"{text},upperdir={self.upper},workdir={self.work}" if upper else text

    def copy(self, name: str) -> Layers:
        """A second set of layers with the same content in every respect, beneath this one's root."""
        root = self.root / name
        root.mkdir()
        for directory in (*self.lowers, self.upper):
            run("cp", "-a", directory, root / directory.name)
        return Layers(root, lowers=[root / lower.name for lower in self.lowers])


# Mounts.


def mounts() -> list[Path]:
    """All mountpoints, in the order of mounting."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    return [Path(os.fsdecode(_unescape(line.split()[4]))) for line in lines]


def _unescape(text: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), text)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Poll until `condition` holds; fails with `what` when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s: {what}"
        time.sleep(0.01)


class Watchdog:
    """A process that runs a shell command unless it is called off within `seconds`; also when the tests are killed."""

    def __init__(self, seconds: float, command: str) -> None:
        script = f'[ "$(timeout {seconds} head -c 1)" = x ] && exit 0; {command}; exit 1'
        self._shell = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE)

    def call_off(self) -> bool:
        """Whether it had not run yet."""
        with contextlib.suppress(BrokenPipeError):
            self._shell.communicate(b"x")
        return self._shell.wait() == 0


class Mount:
    """A union mounted on `layers.mnt`, for as long as `with` lasts; `mount / name` is a path in it.

    After `patience` seconds it is taken to hang and forced off, so that whoever waits for it fails.
    """

    def __init__(self, layers: Layers, patience: float = 60) -> None:
        self.layers = layers
        self.path = layers.mnt
        self._patience = patience
        self._watchdog: Watchdog | None = None

    def __truediv__(self, name: str | bytes) -> Path:
        return self.path / os.fsdecode(name)

    def mount(self) -> None:
        raise NotImplementedError

    def unmount(self) -> None:
        """Unmount the ordinary way; whatever was still held open fails it."""
        run(*UNMOUNT, self.path)
        self._call_off()

    def _watch(self, *pids: int) -> None:
        """Have the mount forced off, `pids` and their children killed, when it is still there after `patience`."""
        kill = "".join(f"kill -KILL {pid} $(cat /proc/{pid}/task/{pid}/children); " for pid in pids)
        self._watchdog = Watchdog(self._patience, f"{kill}{' '.join(DETACH)} '{self.path}'")

    def _call_off(self) -> None:
        watchdog, self._watchdog = self._watchdog, None
        assert watchdog is None or watchdog.call_off(), "the mount hung and was forced off"

    def remount(self) -> None:
        """Unmount and mount again: nothing stays cached."""
        self.unmount()
        self.mount()

    @property
    def mounted(self) -> bool:
        return self.path in mounts()

    def __enter__(self) -> Self:
        try:
            self.mount()
        except BaseException:
            self.detach()
            raise
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        try:
            self.end()
        finally:
            self.detach()

    def end(self) -> None:
        """What is right to do with it once the test is over."""
        if self.mounted:
            self.unmount()

    def detach(self) -> None:
        """Take the mount away whatever state it is in: requests in flight fail, open files become useless."""
        while self.mounted:
            try:
                run(*DETACH, self.path)
            except AssertionError:
                if self.mounted:
                    raise
                # The watchdog was at it, too, and faster.
        self._call_off()


class OverlayFS(Mount):
    """The kernel's overlayfs over the same layers."""

    def __init__(self, layers: Layers, *options: str, upper: bool = True) -> None:
        super().__init__(layers)
        self._options = ",".join([layers.options(upper=upper), *options])

    def mount(self) -> None:
        run("mount", "-t", "overlay", "overlay", "-o", self._options, self.path)


class FuseOverlayFS(Mount):
    """fuse-overlayfs over the same layers."""

    def __init__(self, layers: Layers, *options: str, upper: bool = True, patience: float = 60) -> None:
        super().__init__(layers, patience)
        self._options = ",".join([layers.options(upper=upper), *options])

    def mount(self) -> None:
        self._watch()
        run("fuse-overlayfs", "-o", self._options, self.path)


class MountFactory(Protocol):
    """Mounts the layers of the test, or others, with more options; `upper` false makes a read-only union."""

    def __call__(self, *options: str, layers: Layers | None = None, upper: bool = True) -> Mount: ...


class LogPolicy:
    """Which lines of a daemon's log may be more than information; any other line that is fails the test."""

    _QUIET: Final = re.compile(r"unionfsd: (info|debug): ")

    def __init__(self) -> None:
        self._declared: dict[str, bool] = {}

    def expect(self, pattern: str) -> None:
        """Declare a warning that must come: a line that matches the regular expression `pattern`."""
        self._declared[pattern] = False

    def undeclared(self, lines: Iterable[str]) -> list[str]:
        """The loud lines that nobody declared."""
        return [line for line in lines if not self._expected(line) and not self._QUIET.match(line)]

    def missing(self) -> list[str]:
        """The declared patterns that no line matched."""
        return [pattern for pattern, seen in self._declared.items() if not seen]

    def _expected(self, line: str) -> bool:
        matches = [pattern for pattern in self._declared if re.search(pattern, line)]
        self._declared.update(dict.fromkeys(matches, True))
        return bool(matches)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits only for its parent to take note: all of its threads have ended."""
    try:
        is_zombie = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
        return is_zombie and len(os.listdir(f"/proc/{pid}/task")) == 1
    except (FileNotFoundError, ProcessLookupError):
        return True


def children(pid: int) -> list[int]:
    """The processes that `pid` has started and not waited for."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


class Daemon(Mount):
    """unionfsd over the layers, in front (`-f`), its log in a file; `program` is what the interpreter runs."""

    program: Sequence[str] = ("-m", "unionfsd")

    def __init__(
        self,
        layers: Layers,
        options: Sequence[str] = (),
        *,
        upper: bool = True,
        log_policy: LogPolicy | None = None,
        patience: float = 60,
        program: Sequence[str] = (),
    ) -> None:
        super().__init__(layers, patience)
        self.program = program or self.program
        self._options = [layers.options(upper=upper), *options]
        self._policy = log_policy or LogPolicy()
        self._lowers: dict[Path, dict[bytes, tuple[object, ...]]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self.log = layers.root / "unionfsd.log"
        self.killed = False

    @property
    def keeper(self) -> int:
        """The process that was started."""
        assert self._process is not None
        return self._process.pid

    @property
    def pid(self) -> int:
        """The process that serves: the keeper's child, or what was started where there is no keeper."""
        return next(iter(children(self.keeper)), self.keeper)

    def mount(self) -> None:
        if not self._lowers:
            self._lowers = {lower: fingerprint(lower) for lower in self.layers.lowers}
        command = [sys.executable, *self.program, "-f", "-o", ",".join(self._options), str(self.path)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=_daemon_environment()
            )
        self._watch(self.keeper)
        wait_for(lambda: self.mounted or self._exited, "not mounted")
        assert not self._exited, f"exit {self._process.poll()} without a mount: {self.log.read_text()}"
        os.stat(self.path)

    @property
    def _exited(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def unmount(self) -> None:
        super().unmount()
        self._ended()

    def end(self) -> None:
        super().end()
        self._ended()

    def _ended(self) -> None:
        """Wait for the daemon, which puts the whole upper on disk first, and with it what others write there."""
        assert self._process is not None
        expected = -signal.SIGKILL if self.killed else 0
        assert self._process.wait(60) == expected, f"exit {self._process.returncode}: {self.log.read_text()}"

    def kill(self) -> None:
        """End the daemon the hard way, and the keeper before it, who would start another; the mount stays, dead."""
        self._kill()
        self.killed = True

    def _kill(self) -> None:
        assert self._process is not None
        os.kill(self.keeper, signal.SIGSTOP)  # from here on it starts nobody
        served = children(self.keeper)
        self._process.kill()
        self._process.wait()
        for pid in served:
            os.kill(pid, signal.SIGKILL)
            wait_for(partial(has_ended, pid), f"{pid} is there still")

    def fds(self) -> int:
        """Descriptors the daemon has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def settle(self) -> None:
        """Have it end its start: it answers before all of it is there, and the rest waits until somebody wants it."""
        with Client(find.locate(os.fsencode(self.path)).socket) as client:
            client.call("status")

    def open_files(self) -> list[str]:
        """What the daemon's descriptors refer to; one closed meanwhile is left out."""
        found = []
        for number in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/{self.pid}/fd/{number}"))
        return found

    def resident(self) -> int:
        """Resident memory of the daemon in bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def detach(self) -> None:
        if not self._exited:
            self._kill()
        super().detach()

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        super().__exit__(exc_type, *rest)
        if exc_type is None:
            self.check()

    def check(self) -> None:
        """What holds after every daemon that ended as it should."""
        lines = self.log.read_text(errors="replace").splitlines()
        loud = self._policy.undeclared(lines)
        assert not loud, "undeclared in the daemon's log:\n" + "\n".join(lines)
        assert not self._policy.missing(), f"no line of the log matches {self._policy.missing()}"
        for lower, before in self._lowers.items():
            assert fingerprint(lower) == before, f"{lower} was changed"
        if not self.killed:
            assert litter(self.layers.work) == []


def _daemon_environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}


def litter(work: Path) -> list[str]:
    """What is left staged in a work directory; the mark of a volatile mount is meant to stay."""
    stage = work / "work"
    return sorted(set(os.listdir(stage)) - {"incompat"}) if stage.exists() else []


class DaemonFactory(Protocol):
    """A `MountFactory` for tests that look at the daemon."""

    def __call__(self, *options: str, layers: Layers | None = None, upper: bool = True) -> Daemon: ...


# Other users.


def in_child(
    fn: Callable[[], T],
    *,
    uid: int | None = None,
    gid: int | None = None,
    groups: Sequence[int] = (),
    umask: int = 0o022,
) -> T:
    """Result of `fn` in a forked child with those credentials; what it raises is raised here.

    Without `uid` and `gid`, root's, or those of an ordinary user who runs the tests.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(fn, writer, uid, gid, groups, umask)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as pipe:
            raw = pipe.read()
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(pid, 0)
    assert raw, f"the child ended with wait status {status}"
    good, value = pickle.loads(raw)
    if good:
        result: T = value
        return result
    raise value


def _child(
    fn: Callable[[], Any], writer: int, uid: int | None, gid: int | None, groups: Sequence[int], umask: int
) -> None:
    try:
        if ROOTLESS != "user" or (uid, gid) != (None, None):
            os.setgroups(groups)
            os.setresgid(gid or 0, gid or 0, gid or 0)
            os.setresuid(uid or 0, uid or 0, uid or 0)
        os.umask(umask)
        outcome = (True, fn())
    except BaseException as exc:  # the parent raises it
        outcome = (False, exc)
    with contextlib.suppress(BaseException), os.fdopen(writer, "wb") as pipe:
        pipe.write(pickle.dumps(outcome))
    os._exit(0)


def as_user(fn: Callable[[], T], *, groups: Sequence[int] = (), umask: int = 0o022) -> T:
    """Result of `fn` run by an ordinary user."""
    return in_child(fn, uid=USER, gid=GROUP, groups=groups, umask=umask)


# Disks.


@contextlib.contextmanager
def small_disk(root: Path, megabytes: int) -> Iterator[Path]:
    """An ext4 of that size, mounted for as long as `with` lasts."""
    image, mountpoint = root / "disk.img", root / "disk"
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    run("mkfs.ext4", "-q", "-m", "0", image)
    mountpoint.mkdir()
    run("mount", "-o", "loop", image, mountpoint)
    try:
        yield mountpoint
    finally:
        run("umount", mountpoint)


def remove(root: Path) -> None:
    """Remove a tree of test layers, anything still mounted beneath it first."""
    for mountpoint in reversed(mounts()):
        if mountpoint.is_relative_to(root):
            run(*DETACH, mountpoint)
    shutil.rmtree(root)
