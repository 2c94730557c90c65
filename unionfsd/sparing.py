"""A spare process: it has imported what a mount takes and waits for somebody who wants one, for as long as it was told.

It is forked off by a process that mounted, and forks for each further mount, before somebody asks for it: a child
stands by. `spare` is the other end.

Rules this file obeys:

- It mounts only for who is as it is itself: the same user, groups and capabilities, namespaces, root, control groups,
  limits and confinement (`_SAME`). What it does, that process could have done, and would have, the same way.
- Who asks is told nothing, and goes on by itself, whenever something is not right.
- It holds nothing of any mount, and no directory.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
from collections.abc import Callable

from unionfsd import errors, spare
from unionfsd.control.listener import private_directory
from unionfsd.typed import Final, NoReturn

_MOST: Final = 1 << 20
_PATIENCE: Final = 5.0
_DOTS: Final = 2
"""In the name of a spare that listens; one that is about to has more."""
_LINKS: Final = ("ns/cgroup", "ns/ipc", "ns/mnt", "ns/net", "ns/pid", "ns/user", "ns/uts", "root")
_FILES: Final = ("cgroup", "limits", "attr/current", "loginuid", "oom_score_adj")
_STATUS: Final = (b"Uid", b"Gid", b"Groups", b"Cap", b"NoNewPrivs", b"Seccomp", b"SigIgn", b"Cpus_allowed:")


def begin(seconds: float, mount: Callable[[int], NoReturn]) -> None:
    """Leave a spare behind that waits for so long at a time, unless there is one.

    `mount` mounts what the command line says, and tells over a descriptor how it went.
    """
    if os.fork():
        return
    try:
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2:
                with contextlib.suppress(OSError):  # the one that listed the others
                    os.close(fd)
        _serve(seconds, mount)
    finally:
        os._exit(errors.OK)


def _serve(seconds: float, mount: Callable[[int], NoReturn]) -> None:
    path = spare.address(spare.directory())
    private_directory(os.path.dirname(path)).close()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    _sweep(os.path.dirname(path))
    if os.path.exists(path):
        return
    _load()
    own = b"%s.%d" % (path, os.getpid())
    listener.bind(own)
    os.chmod(own, 0o600)
    listener.listen(16)
    os.rename(own, path)
    inode = os.stat(path).st_ino
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    while _leave_one(listener, seconds, mount):
        pass
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


def _leave_one(listener: socket.socket, seconds: float, mount: Callable[[int], NoReturn]) -> bool:
    """Have a child stand by for who asks next, who need not wait for the fork. False when nobody came."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if not os.fork():
            ours.close()
            _stand_by(listener, theirs, mount)
        theirs.close()
        ours.settimeout(seconds)
        try:
            return bool(ours.recv(1))
        except TimeoutError:
            return False


def _stand_by(listener: socket.socket, parent: socket.socket, mount: Callable[[int], NoReturn]) -> NoReturn:
    """In a child: stand in for who asks next, or end with the parent."""
    try:
        _likeness("/proc/self")  # so that nothing of it is done for the first time when somebody waits
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(parent, select.POLLIN)
        if listener.fileno() in dict(poll.poll()):
            client, _ = listener.accept()
            listener.close()
            parent.send(b"1")
            parent.close()
            _stand_in(client, mount)
    finally:
        os._exit(errors.INTERNAL)


def _sweep(directory: bytes) -> None:
    """Remove what spares have left that were killed."""
    for name in os.listdir(directory):
        if name.startswith(b"spare.") and name.count(b".") == _DOTS and not _is_there(directory + b"/" + name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(directory + b"/" + name)


def _is_there(path: bytes) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def _load() -> None:
    """Import what a mount takes."""
    import faulthandler  # noqa: F401

    import unionfsd.fuse.channels
    import unionfsd.logs
    import unionfsd.union  # noqa: F401


def _stand_in(client: socket.socket, mount: Callable[[int], NoReturn]) -> None:
    """Become the process that the client would have been, or end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    client.settimeout(_PATIENCE)
    try:
        message, fds = _receive(client)
        raw = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4)
        if len(fds) == 2 and _is_like_us(int.from_bytes(raw, sys.byteorder)):
            _become(message, *fds)
            client.settimeout(None)
            mount(client.detach())
    finally:
        os._exit(errors.INTERNAL)


def _receive(client: socket.socket) -> tuple[bytes, list[int]]:
    message, fds, _, _ = socket.recv_fds(client, _MOST, 2)
    for fd in fds:
        os.set_inheritable(fd, False)
    while more := client.recv(_MOST):
        message += more
    return message, fds


def _is_like_us(pid: int) -> bool:
    """Whether the process `pid` can do, and be charged for, exactly what this one can.

    It may execute another program after it connected. What that could gain in doing so, it could have gained before.
    """
    return _likeness(f"/proc/{pid}") == _likeness("/proc/self")


def _likeness(process: str) -> list[object]:
    found: list[object] = []
    for name in _LINKS:
        st = os.stat(f"{process}/{name}")
        found.append((st.st_dev, st.st_ino))
    for name in (*_FILES, "status"):
        try:
            lines = _read(f"{process}/{name}").splitlines()
        except OSError as error:
            lines = [str(error.errno).encode()]
        found.append([line for line in lines if name != "status" or line.startswith(_STATUS)])
    return found


def _read(path: str) -> bytes:
    """A file of /proc, which is there whole at the first read(2): half the time that `open` takes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def _become(message: bytes, here: int, stderr: int) -> None:
    """Take over the words, the environment, the directory and the standard error of who asks."""
    head, *rest = message.split(b"\0")
    original, words = map(int, head.split())
    sys.orig_argv = [os.fsdecode(word) for word in rest[:original]]
    sys.argv = [os.fsdecode(word) for word in rest[original : original + words]]
    settings = dict(setting.split(b"=", 1) for setting in rest[original + words :])
    for name in os.environb.keys() - settings.keys():
        del os.environb[name]
    for name, value in settings.items():
        if os.environb.get(name) != value:
            os.environb[name] = value
    os.fchdir(here)
    os.close(here)
    os.dup2(stderr, 2)
    os.close(stderr)
    _show(rest[:original])


def _show(words: list[bytes]) -> None:
    """Have ps(1) show these words, as far as there is room for them; what was mounted is looked for there."""
    with contextlib.suppress(OSError, ValueError):
        start, end = map(int, _read("/proc/self/stat").rpartition(b") ")[2].split()[45:47])
        text = b"\0".join(words)[: end - start - 1]
        memory = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(memory, text.ljust(end - start, b"\0"), start)
        finally:
            os.close(memory)
