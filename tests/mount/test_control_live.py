"""What a person watches of live mounts: who holds them, what is under way, the live screen. In a terminal."""

from __future__ import annotations

import fcntl
import mmap
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import PROJECT, Daemon, DaemonFactory, Layers, Mode, as_user, wait_for
from tests.mount.test_control import ctl

pytestmark = pytest.mark.deviates  # the kernel's overlayfs has no such thing


@pytest.fixture
def mount(layers: Layers, daemon: DaemonFactory) -> Daemon:
    (layers.lower / "d").mkdir()
    (layers.lower / "d/file").write_bytes(b"x" * 5000)
    return daemon()


class Terminal:
    """A program of ours in a terminal of its own, 120 columns by 40 lines."""

    def __init__(self, *words: str | Path) -> None:
        self._fd, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.before = termios.tcgetattr(end)
        environment = os.environ | {"PYTHONPATH": str(PROJECT), "TERM": "xterm-256color"}
        command = [sys.executable, "-m", "unionfsd.ctl", *map(str, words)]
        self.process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=environment)
        self._end = end
        self.said = ""

    def wait_for(self, pattern: str, seconds: float = 30) -> None:
        """Read until what was printed, without its escape sequences, has `pattern`."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.said):
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.said!r}"
            if select.select([self._fd], [], [], left)[0]:
                text = os.read(self._fd, 1 << 16).decode(errors="replace")
                self.said = self.said[-8000:] + re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)

    def press(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def ended(self) -> int:
        """Its exit code; the terminal is as it was."""
        code = self.process.wait(30)
        assert termios.tcgetattr(self._end) == self.before
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)
        os.close(self._end)


@pytest.fixture
def load(mount: Daemon) -> Iterator[None]:
    """Something goes on in the mount, as long as the test lasts."""
    done = threading.Event()

    def work() -> None:
        number = 0
        while not done.wait(0.002):
            number += 1
            (mount / "d" / str(number)).write_text("text")
            os.stat(mount / "d/file")

    thread = threading.Thread(target=work)
    thread.start()
    yield
    done.set()
    thread.join()


def test_open_names_who_holds_what(mount: Daemon, mode: Mode) -> None:
    assert ctl("open", "--json", mount.path).json["holders"] == []
    script = "exec 7<>d/file 8<d/file; echo ready; exec sleep 1000"
    with (
        subprocess.Popen(["sh", "-c", script], cwd=mount.path, stdout=subprocess.PIPE, text=True) as holder,
        open(mount / "d/file", "r+b") as file,
        mmap.mmap(file.fileno(), 0) as mapped,
    ):
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            wait_for(lambda: Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n", "the exec")
            assert mapped[0] == ord("x")
            found = ctl("open", "--json", mount.path).json
            held = {(row["pid"], row["how"], row["fd"], row["access"], row["path"]) for row in found["holders"]}
            assert held >= {
                (holder.pid, "cwd", None, None, "/"),
                (holder.pid, "fd", 7, "rw", "/d/file"),
                (holder.pid, "fd", 8, "r", "/d/file"),
                (os.getpid(), "fd", file.fileno(), "rw", "/d/file"),
                (os.getpid(), "mapped", None, None, "/d/file"),
            }
            assert {row["pid"] for row in found["holders"]} == {holder.pid, os.getpid()}
            if mode == Mode("channel", "cached"):
                assert found["handles"] is None
            else:
                assert sum(row["opens"] for row in found["handles"] if row["path"] == "/d/file") >= 2
            os.unlink(mount / "d/file")
            rows = ctl("open", mount / "d").out.splitlines()[1:]
            assert any(re.search(r"sleep +7rw +/d/file \(deleted\)$", row) for row in rows), rows
            assert not any("cwd" in row for row in rows)
        finally:
            holder.kill()


def test_open_tells_an_ordinary_user_what_it_did_not_see(layers: Layers) -> None:
    if not os.access("/dev/fuse", os.W_OK):
        pytest.skip("no /dev/fuse")
    from unionfsd.holders import Unseen, holders

    def look() -> int:
        unseen = Unseen()
        list(holders((0, 1), unseen))
        return unseen.count

    assert as_user(look) > 0


def test_top_shows_what_goes_on(mount: Daemon, load: None) -> None:
    terminal = Terminal("top", "--interval", "0.2", mount.path)
    try:
        terminal.wait_for(re.escape(mount.path.name) + r" serving for")
        terminal.wait_for(r"CREATE +[1-9][0-9,]* +[0-9.]+ [um]s +< ")
        terminal.wait_for(r"[0-9]+%.*/d")
        terminal.wait_for(r"pid [0-9]+ +create +/d/[0-9]+")
        terminal.press(b"q")
        assert terminal.ended() == 0
    finally:
        terminal.close()


def test_top_ends_by_an_interrupt_and_with_its_mount(mount: Daemon) -> None:
    interrupted, orphan = Terminal("top", mount.path), Terminal("top", "--interval", "0.2", mount.path)
    try:
        for terminal in (interrupted, orphan):
            terminal.wait_for("q quits")
        interrupted.process.send_signal(signal.SIGINT)
        assert interrupted.ended() == 130
        mount.unmount()
        assert orphan.ended() == 5
        orphan.wait_for("the daemon does not answer")
    finally:
        interrupted.close()
        orphan.close()


def test_top_needs_a_terminal_or_prints_json(mount: Daemon) -> None:
    said = ctl("top", mount.path)
    assert (said.code, said.out) == (2, "")
    assert "not a terminal" in said.err
    assert ctl("top", "--interval", "0", mount.path).code == 2


def test_a_large_copy_up_is_seen_by_work(layers: Layers, daemon: DaemonFactory) -> None:
    with open(layers.lower / "large", "wb") as file:
        for _ in range(24):
            file.write(os.urandom(1 << 20) * 8)
    mount = daemon()
    assert ctl("work", mount.path).out == "nothing is under way\n"
    seen: list[tuple[str, int]] = []
    changer = threading.Thread(target=os.utime, args=(mount / "large",))
    changer.start()
    while changer.is_alive():
        seen += [(row["path"], row["total"]) for row in ctl("work", "--json", mount.path).json["work"]]
    changer.join()
    assert set(seen) <= {("/large", 24 << 23)}
    assert seen
