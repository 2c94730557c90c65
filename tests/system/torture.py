"""A load that knows what it should see, while the process that serves it is killed again and again, or replaced.

Everything is done twice, on the mount and on a plain directory; every outcome, every byte and in the end the whole tree
must be the same. Files stay open after they lost their name; some are mapped. Beside it programs that people run are at
work (`loads`). Run by `make torture`, in short by test_survival.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import stat
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.harness import PROJECT, Daemon, Layers, children, remove, run
from tests.system.loads import LOADS
from tests.system.pulse import Pulse
from unionfsd.keeper import BLAMED, STRIKES

_THREADS: Final = 4
_OPENS: Final = 6
_SHORTEST: Final = 0.05
_LONGEST: Final = 0.5
#: Deaths in a row before something must have been answered: more of them are a crash loop, which is to end in errors.
_IN_A_ROW: Final = min(BLAMED, STRIKES) - 1
#: Seconds that an answer may take.
_SLOWEST: Final = 120.0

Outcome = tuple[str, Any]


def fill(directory: Path, depth: int = 2) -> None:
    """A small tree: files of several sizes, directories, a symlink."""
    for number in range(12):
        (directory / f"f{number}").write_bytes(random.Random(number).randbytes(number * 3000))
    for number in range(3 if depth else 0):
        (directory / f"d{number}").mkdir()
        fill(directory / f"d{number}", depth - 1)
    (directory / "s").symlink_to("f1")


def fingerprint(root: Path) -> dict[str, tuple[object, ...]]:
    """What a tree shows, by path: mode, links, content."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        st = path.lstat()
        if stat.S_ISREG(st.st_mode):
            content: object = hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
        else:
            content = os.readlink(path) if stat.S_ISLNK(st.st_mode) else None
        links = None if stat.S_ISDIR(st.st_mode) else st.st_nlink
        found[str(path.relative_to(root))] = (st.st_mode, links, content)
    return found


def outcome(action: Callable[[], object]) -> Outcome:
    """("ok", what it returned), or ("error", errno)."""
    try:
        return "ok", action()
    except OSError as error:
        return "error", error.errno


class Worker(threading.Thread):
    """One user of both trees, in a directory of its own and in one that comes from the lower."""

    def __init__(self, number: int, mount: Path, plain: Path, seed: int, stop: threading.Event) -> None:
        super().__init__(name=f"user {number}")
        self._random = random.Random(seed * 1000 + number)
        self._stop_at = stop
        self._tops = [(mount / f"w{number}", plain / f"w{number}")]
        if number < 3:
            self._tops.append((mount / f"d{number}", plain / f"d{number}"))
        self._opens: list[tuple[int, int]] = []
        self.operations = 0
        self.differences: list[str] = []
        for top in self._tops[0]:
            top.mkdir()

    def run(self) -> None:
        try:
            while not self._stop_at.is_set() and not self.differences:
                self._step()
            for pair in self._opens:
                self._same("close", *(outcome(lambda fd=fd: os.close(fd)) for fd in pair))  # type: ignore[misc]
        except Exception as error:
            self.differences.append(repr(error))
        if self.differences:
            self._stop_at.set()

    def _same(self, what: str, ours: Outcome, expected: Outcome) -> bool:
        self.operations += 1
        if ours != expected:
            self.differences.append(f"{what}: {str(ours)[:600]}, expected {str(expected)[:600]}")
        return ours[0] == "ok"

    def _step(self) -> None:
        choose = self._random
        tops = choose.choice(self._tops)
        name, other = self._pick(), self._pick()
        data, offset = choose.randbytes(choose.choice((10, 4000, 100000))), choose.randrange(50000)
        action = choose.choice(_ACTIONS)
        good = self._same(
            f"{action.__name__} {name} {other}",
            *(outcome(lambda top=top: action(str(top / name), str(top / other), data, offset)) for top in tops),  # type: ignore[misc]
        )
        if good and action is _rewrite and not choose.randrange(4):
            pair = [os.open(top / name, os.O_RDWR) for top in tops]
            self._opens.append((pair[0], pair[1]))
            self._same(f"unlink of {name}, open", *(outcome((top / name).unlink) for top in tops))
        if self._opens and not choose.randrange(8):
            pair = list(choose.choice(self._opens))
            self._same("nameless", *(outcome(lambda fd=fd: _use(fd, data, offset)) for fd in pair))  # type: ignore[misc]
        if len(self._opens) > _OPENS:
            for fd in self._opens.pop(0):
                os.close(fd)

    def _pick(self) -> str:
        above = "".join(f"d{self._random.randrange(3)}/" for _ in range(self._random.randrange(3)))
        return f"{above}{self._random.choice('fgh')}{self._random.randrange(12)}"


def _rewrite(path: str, other: str, data: bytes, offset: int) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _create(path: str, other: str, data: bytes, offset: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.write(fd, data)
    os.close(fd)


def _append(path: str, other: str, data: bytes, offset: int) -> None:
    with open(path, "ab") as file:
        file.write(data)


def _change(path: str, other: str, data: bytes, offset: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, data, offset)
        os.ftruncate(fd, offset + 5)
    finally:
        os.close(fd)


def _read(path: str, other: str, data: bytes, offset: int) -> str:
    with open(path, "rb") as file:
        return hashlib.sha1(file.read(), usedforsecurity=False).hexdigest()


def _unlink(path: str, other: str, data: bytes, offset: int) -> None:
    os.unlink(path)


def _rename(path: str, other: str, data: bytes, offset: int) -> None:
    os.rename(path, other)


def _rename_directory(path: str, other: str, data: bytes, offset: int) -> None:
    os.rename(f"{os.path.dirname(path)}/d{offset % 3}", f"{os.path.dirname(other)}/d{offset % 5}")


def _mkdir(path: str, other: str, data: bytes, offset: int) -> None:
    os.mkdir(f"{os.path.dirname(path)}/d{offset % 3}")


def _rmdir(path: str, other: str, data: bytes, offset: int) -> None:
    os.rmdir(f"{os.path.dirname(path)}/d{offset % 3}")


def _link(path: str, other: str, data: bytes, offset: int) -> None:
    os.link(path, other)


def _symlink(path: str, other: str, data: bytes, offset: int) -> None:
    os.symlink(os.path.basename(path), other)


def _chmod(path: str, other: str, data: bytes, offset: int) -> None:
    os.chmod(path, 0o600 | offset % 64)


def _list(path: str, other: str, data: bytes, offset: int) -> list[str]:
    return sorted(os.listdir(os.path.dirname(path)))


def _setxattr(path: str, other: str, data: bytes, offset: int) -> None:
    os.setxattr(path, "user.x", b"1", os.XATTR_CREATE)


def _removexattr(path: str, other: str, data: bytes, offset: int) -> None:
    os.removexattr(path, "user.x")


_ACTIONS: Final = (
    *(_rewrite, _rewrite, _rewrite, _create, _create, _append, _change, _change, _read, _read, _unlink, _unlink),
    *(_rename, _rename, _rename_directory, _mkdir, _mkdir, _rmdir, _link, _symlink, _chmod, _list),
    *(_setxattr, _removexattr),
)


def _use(fd: int, data: bytes, offset: int) -> tuple[int, int, int, list[str]]:
    """Write to a file that has no name any more: links, length, and what it holds, by pieces."""
    before = os.fstat(fd)
    os.pwrite(fd, data, offset)
    held = os.pread(fd, 1 << 24, 0)
    pieces = [
        hashlib.sha1(held[at : at + 4096], usedforsecurity=False).hexdigest()[:4] for at in range(0, len(held), 4096)
    ]
    return before.st_nlink, before.st_size, len(held), pieces


class Stalls(NamedTuple):
    """The longest that anything took, in seconds: in spans without a disturbance, and in those with one."""

    calm: list[float]
    disturbed: list[float]

    def __str__(self) -> str:
        calm, disturbed = (
            f"median {statistics.median(spans) * 1000:.0f} ms, worst {max(spans) * 1000:.0f} ms" if spans else "none"
            for spans in self
        )
        return f"longest wait: {disturbed}; undisturbed: {calm}"


def torture(
    daemon: Daemon, plain: Path, times: int, seed: int, how: str = "kill"
) -> tuple[dict[str, int], Stalls, list[str]]:
    """Disturb the process that serves so many times beneath a load.

    Returns what was done, by user or program, how long they waited, and what was not as it should be.
    """
    stop = threading.Event()
    workers = [Worker(number, daemon.path, plain, seed, stop) for number in range(_THREADS)]
    loads = [load(daemon.path, plain, daemon.layers.root, stop) for load in LOADS]
    users = [*workers, *loads]
    for user in users:
        user.start()
    for load in loads:
        load.prepared.wait()
    stalls = Stalls([], [])
    with Pulse(daemon.path / "pulse") as pulse:
        wrong = _disturb(_Disturbance(daemon, workers, random.Random(seed), stop), pulse, stalls, times, HOW[how])
    stop.set()
    for user in users:
        user.join(300)
    wrong += [f"{user.name}: {what}" for user in users for what in user.differences]
    wrong += [f"{user.name} waits for ever" for user in users if user.is_alive()]
    for user in users:
        if not user.operations:
            wrong.append(f"{user.name} has come to nothing")
    if not wrong:
        for load in loads:
            load.remove()
        ours, expected = fingerprint(daemon.path), fingerprint(plain)
        different = [path for path in ours.keys() | expected.keys() if ours.get(path) != expected.get(path)]
        wrong += [f"{path}: {ours.get(path)}, expected {expected.get(path)}" for path in sorted(different)]
    done = {"operations": _operations(workers)}
    return done | {load.name: load.operations for load in loads}, stalls, wrong


class _Disturbance(NamedTuple):
    """Whom to disturb, and beneath whom."""

    daemon: Daemon
    workers: list[Worker]
    chance: random.Random
    stop: threading.Event

    def pause(self) -> None:
        """For as long as the next one is away."""
        time.sleep(self.chance.uniform(_SHORTEST, _LONGEST))


def _disturb(
    of: _Disturbance, pulse: Pulse, stalls: Stalls, times: int, how: Callable[[_Disturbance], int]
) -> list[str]:
    """Do so until it was done so many times, or something else calls for a stop; what went wrong, if anything."""
    while times > 0 and not of.stop.is_set():
        pulse.longest()
        of.pause()
        stalls.calm.append(pulse.longest())
        try:
            times -= how(of)
        except AssertionError as error:
            return [str(error)]
        # As many as there are users may have been on their way since before.
        wanted = _operations(of.workers) + 2 * len(of.workers)
        end = time.monotonic() + _SLOWEST
        while _operations(of.workers) < wanted and not of.stop.is_set():
            if time.monotonic() > end:
                return [f"nothing was answered for {_SLOWEST:.0f} s"]
            time.sleep(_SHORTEST)
        stalls.disturbed.append(pulse.longest())
    return []


def _kill(of: _Disturbance) -> int:
    """End the process that serves, a few times."""
    for _ in range(_IN_A_ROW):
        of.pause()
        _kill_once(of)
    return _IN_A_ROW


def _kill_once(of: _Disturbance) -> None:
    for pid in children(of.daemon.keeper):
        os.kill(pid, signal.SIGKILL)


_REEXEC: Final = (sys.executable, "-m", "unionfsd.ctl", "reexec")


def _reexec(of: _Disturbance) -> int:
    """Have another program take over, as its user would."""
    said = run(*_REEXEC, of.daemon.path, seconds=_SLOWEST)
    assert said.startswith("served by process"), said
    return 1


def _both(of: _Disturbance) -> int:
    """The process that serves is killed at some moment of an upgrade, perhaps of two at once.

    Whoever asked for one may be told that nobody answers.
    """
    several = [
        subprocess.Popen([*_REEXEC, of.daemon.path], cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(of.chance.choice((1, 1, 2)))
    ]
    for _ in range(_IN_A_ROW - 1):
        of.pause()
        _kill_once(of)
    for each in several:
        each.wait(_SLOWEST)
    return 1


HOW: Final = {"kill": _kill, "reexec": _reexec, "both": _both}


def _operations(workers: list[Worker]) -> int:
    return sum(worker.operations for worker in workers)


def prepare(layers: Layers, plain: Path) -> None:
    """The same tree in the lower and in the plain directory."""
    fill(layers.lower)
    run("cp", "-a", f"{layers.lower}/.", plain)


def main() -> int:
    """`make torture`: every mode in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", "--times", type=int, default=500, help="in each mode (500)")
    parser.add_argument("--how", choices=HOW, default="kill", help="kill it, have it replaced, or both (kill)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the load and the moments (the time)")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where the layers are made (/var/tmp)")
    parser.add_argument("modes", nargs="*", default=["io=cached", "io=passthrough", "writeback=off"])
    given = parser.parse_args()
    bad = 0
    for mode in given.modes:
        root = given.dir / f"unionfsd-torture-{os.getpid()}"
        root.mkdir()
        plain = root / "plain"
        plain.mkdir()
        layers = Layers(root)
        prepare(layers, plain)
        start = time.monotonic()
        try:
            with Daemon(layers, [mode], patience=24 * 3600, log_policy=survivor(given.how)) as daemon:
                done, stalls, wrong = torture(daemon, plain, given.kills, given.seed, given.how)
        finally:
            remove(root)
        bad += len(wrong)
        figures = ", ".join(f"{count} {what}" for what, count in done.items())
        print(f"{mode}: {given.how} {given.kills}, {time.monotonic() - start:.0f} s, seed {given.seed}; {figures}")
        print(f"  {stalls}")
        print("\n".join(wrong) or "  no error was seen, and the trees are equal", flush=True)
    return min(bad, 1)


def survivor(how: str = "kill") -> Any:
    """What the log of a daemon may have whose processes are killed, or replaced."""
    from tests.harness import LogPolicy

    policy = LogPolicy()
    if how != "reexec":
        policy.expect(r"was killed by SIGKILL; another takes its place")
    policy.expect(r"is served again")
    return policy


if __name__ == "__main__":
    sys.exit(main())
