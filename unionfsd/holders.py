"""Which processes hold something of a mount, as /proc tells it (proc(5)): what lsof and fuser look at, for one device.

Rules this file obeys:

- No file system is asked anything: what a link of /proc means is seen by statx(2) without synchronisation, which a
  network or FUSE file system answers from what the kernel knows. A mount that hangs holds nobody up here.
- Processes come and go meanwhile. One that cannot be looked into is counted, not an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from . import syscalls
from .typed import Final, NamedTuple

#: Of a line "flags:" in /proc/PID/fdinfo/N.
_ACCESS: Final = {os.O_RDONLY: "r", os.O_WRONLY: "w", os.O_RDWR: "rw"}
_GONE: Final = b" (deleted)"


class Held(NamedTuple):
    """One thing that a process holds: `how` is "fd", "cwd", "root", "exe" or "mapped".

    `path` is as the caller would see it, without `deleted`'s mark. `fd` is the number of a descriptor and `access` what
    it may do: "r", "w", "rw", or "path" (O_PATH).
    """

    pid: int
    uid: int
    command: bytes
    how: str
    fd: int | None
    access: str | None
    path: bytes
    deleted: bool


class Unseen:
    """How many processes could not be looked into: only root sees those of others."""

    def __init__(self) -> None:
        self.count = 0


def holders(device: tuple[int, int], unseen: Unseen, tick: Callable[[], None] = lambda: None) -> Iterator[Held]:
    """All that processes hold of the file system `device`, (major, minor), process by process."""
    for name in os.listdir(b"/proc"):
        if not name.isdigit():
            continue
        tick()
        at = b"/proc/" + name
        try:
            uid = os.stat(at).st_uid
            held = list(_of(at, device))
            command = _read(at + b"/comm").rstrip(b"\n")
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError:
            unseen.count += 1
            continue
        for how, fd, access, path in held:
            gone = path.endswith(_GONE)
            yield Held(int(name), uid, command, how, fd, access, path[: -len(_GONE)] if gone else path, gone)


def _of(at: bytes, device: tuple[int, int]) -> Iterator[tuple[str, int | None, str | None, bytes]]:
    known = set()
    for how in ("cwd", "root", "exe"):
        link = at + b"/" + how.encode()
        if _lies_on(link, device):
            path = os.readlink(link)
            known.add(path)
            yield how, None, None, path
    for fd in os.listdir(at + b"/fd"):
        link = at + b"/fd/" + fd
        if _lies_on(link, device):
            try:
                yield "fd", int(fd), _access(at + b"/fdinfo/" + fd), os.readlink(link)
            except FileNotFoundError:
                continue  # closed meanwhile
    for path in _mapped(at, device) - known:
        yield "mapped", None, None, path


def _lies_on(link: bytes, device: tuple[int, int]) -> bool:
    try:
        return syscalls.device_of(link) == device
    except OSError as error:
        if isinstance(error, PermissionError):
            raise
        return False  # gone, or it is none of a process: kernel threads have no exe


def _access(info: bytes) -> str:
    for line in _read(info).splitlines():
        if line.startswith(b"flags:"):
            flags = int(line.split()[1], 8)
            return "path" if flags & os.O_PATH else _ACCESS.get(flags & os.O_ACCMODE, "r")
    return "r"


def _mapped(at: bytes, device: tuple[int, int]) -> set[bytes]:
    """Files in the memory of a process. The kernel writes a newline in a name as an escape, and nothing else."""
    wanted = b"%02x:%02x" % device
    found = set()
    for line in _read(at + b"/maps").splitlines():
        words = line.split(None, 5)
        if len(words) == 6 and words[3] == wanted:
            found.add(words[5].replace(b"\\012", b"\n"))
    return found


def _read(path: bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read()
