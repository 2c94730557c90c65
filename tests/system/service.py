"""unionfsd beneath a service manager, whose part is played here: its socket, its descriptor store."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

from tests.harness import PROJECT, Layers, Watchdog, children, has_ended, mounts, run, wait_for


class Service:
    """A daemon in front, its configuration in a file, and the socket on which it reports."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.log = layers.root / "unionfsd.log"
        self.config = layers.root / "mounts.toml"
        self.config.write_text(
            f"[mount.test]\nmountpoint = '{layers.mnt}'\nlowerdir = '{layers.lower}'\n"
            f"upperdir = '{layers.upper}'\nworkdir = '{layers.work}'\n"
        )
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(layers.root / "notify"))
        self._heard = queue.SimpleQueue[dict[str, str]]()
        self._manager = threading.Thread(target=self._listen, daemon=True)
        self._manager.start()
        self._process: subprocess.Popen[str] | None = None
        #: The descriptors that the manager keeps, by name.
        self.kept: dict[str, int] = {}

    def start(self, *prefix: str, watchdog: int | None = None, fdstore: int = 0) -> None:
        """Run it, by a command of `prefix`; `watchdog` is the manager's patience in microseconds.

        `fdstore`: how many descriptors the manager keeps; what it has is given to the process. There is no journal but
        one of a test's own.
        """
        environment = os.environ | {"PYTHONPATH": str(PROJECT), "NOTIFY_SOCKET": str(self.layers.root / "notify")}
        environment |= {} if watchdog is None else {"WATCHDOG_USEC": str(watchdog)}
        environment |= {"FDSTORE": str(fdstore)} if fdstore else {}
        with self.log.open("w") as log:
            # The manager tells by device and inode number which stream leads to its journal.
            environment["JOURNAL_STREAM"] = f"{os.fstat(log.fileno()).st_dev}:{os.fstat(log.fileno()).st_ino}"
            argv = [*prefix, sys.executable, "-m", "unionfsd", "-f", "--config", str(self.config)]
            if self.kept:
                environment |= {"LISTEN_FDS": str(len(self.kept)), "LISTEN_FDNAMES": ":".join(self.kept)}
                argv = ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", *argv]
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                env=environment,
                cwd="/",
                close_fds=False,
                preexec_fn=self._give_back,
            )

    def _give_back(self) -> None:
        """In the new process: what was kept becomes 3 and those that follow."""
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 1000) for fd in self.kept.values()]
        for number, fd in enumerate(high, 3):
            os.dup2(fd, number, inheritable=True)

    def _listen(self) -> None:
        """Hear what the process says, at once: who reports to a manager that does not, waits."""
        while True:
            text, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
            if not text:
                return
            for fd in fds:
                os.set_inheritable(fd, False)
            message = {name: value for name, _, value in (line.partition("=") for line in text.decode().split("\n"))}
            if "FDSTORE" in message and _can_be_watched(*fds):
                (self.kept[message["FDNAME"]],) = fds
            else:
                for fd in fds:  # of a barrier
                    os.close(fd)
            if "FDSTOREREMOVE" in message and message["FDNAME"] in self.kept:
                os.close(self.kept.pop(message["FDNAME"]))
            self._heard.put(message)

    def hear(self) -> dict[str, str]:
        """The next message, by the names in it."""
        try:
            return self._heard.get(timeout=20)
        except queue.Empty:
            raise AssertionError(f"it tells nothing: {self.log.read_text()}") from None

    def hear_of(self, name: str) -> dict[str, str]:
        """The next message with that name in it."""
        while name not in (message := self.hear()):
            pass
        return message

    def messages(self) -> int:
        """How many messages come until there is none for a second."""
        for heard in range(100):
            try:
                self._heard.get(timeout=1)
            except queue.Empty:
                return heard
        return 100

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def end(self) -> int:
        """Its exit code."""
        assert self._process is not None
        return self._process.wait(20)

    def kill(self) -> None:
        """End keeper and server at once, as the manager does with what hangs."""
        os.kill(self.pid, signal.SIGSTOP)
        (server,) = children(self.pid)
        for pid in (self.pid, server):
            os.kill(pid, signal.SIGKILL)
        self.end()
        wait_for(lambda: has_ended(server), "the server is there still")

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.settimeout(5)
            end.sendto(b"", str(self.layers.root / "notify"))
        self._manager.join(5)
        self._socket.close()
        for fd in self.kept.values():
            os.close(fd)


def _can_be_watched(fd: int) -> bool:
    """Whether systemd takes it: what epoll(7) cannot watch it keeps all the same, what is O_PATH it does not."""
    with select.epoll() as poll:
        try:
            poll.register(fd, 0)
        except PermissionError:
            return True
        except OSError:
            return False
        return True


@contextlib.contextmanager
def served(layers: Layers) -> Iterator[Service]:
    """A service that is not started yet, over layers with a file in the lower."""
    (layers.lower / "file").write_text("lower\n")
    service = Service(layers)
    watchdog = Watchdog(90, f"umount --force --lazy '{layers.mnt}'")
    try:
        yield service
    finally:
        service.close()
        while layers.mnt in mounts():
            run("umount", "--force", "--lazy", layers.mnt)
        assert watchdog.call_off(), "the mount hung"
