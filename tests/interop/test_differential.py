"""The same random program of system calls on a mount, on kernel overlayfs and on a plain directory.

Results, errnos and, every so often, whole trees are compared, as root and as an ordinary user. One difference is
allowed: a directory whose path makes too long a redirect is not renamed (EXDEV), which the kernel says sooner. A
failure prints the seed and the calls that succeeded; UNIONFSD_DIFFERENTIAL_SEED=N runs one program again,
UNIONFSD_SOAK_SECONDS=N runs random ones for that long.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import random
import re
import stat
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests.harness import GROUP, USER, Layers, Mode, MountFactory, OverlayFS, run
from tests.trees import Snapshot, differences, snapshot

SOAK_SECONDS: Final = float(os.environ.get("UNIONFSD_SOAK_SECONDS", "0"))
SEED: Final = os.environ.get("UNIONFSD_DIFFERENTIAL_SEED")
#: Whole programs without a soak, as many on every machine: what it finds does not depend on how fast that is.
PROGRAMS: Final = 12
PROGRAM_STEPS: Final = 400
COMPARE_EVERY: Final = 50

TRUNCATED: Final = (0, 7, 9000)
NAMES: Final = ("a", "b", "c", "dd", os.fsdecode(b"\xff\xe9"), "n" * 255, "m" * 256)
OLD_NS: Final = 1_400_000_000_000_000_000
FLAGS: Final = (os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_DIRECTORY, os.O_NOFOLLOW, os.O_PATH, os.O_NOATIME)


class Call(NamedTuple):
    """One step of a program: a function of this module, its arguments with paths relative, and who makes it."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    user: bool

    def __repr__(self) -> str:
        words = ", ".join(_LONG.sub("\\1...", repr(argument)) for argument in self.arguments)
        return f"{self.function.__name__}({words}){' by the user' if self.user else ''}"


#: What is too long to read: names of NAME_MAX, and data.
_LONG: Final = re.compile(r"((.)\2)\2{98,}|(?<=^b.{30})()().*")


class Place:
    """One of the three directories, and the descriptors the program has open in it."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.root = root
        self.open: list[int] = []

    def run(self, call: Call) -> str:
        """What the call gave: its value, or its errno's name."""
        with as_user() if call.user else contextlib.nullcontext():
            try:
                return f"ok {call.function(self, *call.arguments)!r}"
            except OSError as exc:
                return errno.errorcode[exc.errno or 0]

    def __truediv__(self, path: str) -> str:
        return f"{self.root}/{path}"

    def close_all(self) -> None:
        while self.open:
            os.close(self.open.pop())


@contextlib.contextmanager
def as_user() -> Iterator[None]:
    """Give this process the rights of an ordinary user for a while."""
    os.setgroups([])
    os.setegid(GROUP)
    os.seteuid(USER)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


# The calls. Each takes a Place and gives what must be the same everywhere.


def open_close(at: Place, path: str, flags: int, mode: int) -> None:
    os.close(os.open(at / path, flags | os.O_NONBLOCK, mode))


def open_keep(at: Place, path: str, flags: int) -> None:
    at.open.append(os.open(at / path, flags | os.O_NONBLOCK))


def close_kept(at: Place, index: int) -> None:
    if at.open:
        os.close(at.open.pop(index % len(at.open)))


def kept(at: Place, index: int) -> int:
    if not at.open:
        raise OSError(errno.EBADF, "nothing is open")
    return at.open[index % len(at.open)]


def read_kept(at: Place, index: int, size: int, offset: int) -> bytes:
    return os.pread(kept(at, index), size, offset)


def write_kept(at: Place, index: int, data: bytes, offset: int) -> int:
    return os.pwrite(kept(at, index), data, offset)


def stat_kept(at: Place, index: int) -> tuple[int, ...]:
    return told(os.fstat(kept(at, index)))


def truncate_kept(at: Place, index: int, size: int) -> None:
    os.ftruncate(kept(at, index), size)


def sync_kept(at: Place, index: int) -> None:
    os.fsync(kept(at, index))


def told(st: os.stat_result) -> tuple[int, ...]:
    """What a stat says apart from times and numbers; a directory's size and links are its own business."""
    own = (0, 0) if stat.S_ISDIR(st.st_mode) else (st.st_size, st.st_nlink)
    return st.st_mode, st.st_uid, st.st_gid, st.st_rdev, *own


def lstat(at: Place, path: str) -> tuple[int, ...]:
    return told(os.lstat(at / path))


def access(at: Place, path: str, mode: int) -> bool:
    return os.access(at / path, mode, effective_ids=True)


def read_file(at: Place, path: str) -> bytes:
    fd = os.open(at / path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        return os.read(fd, 1 << 20) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)


def write_file(at: Place, path: str, data: bytes, flags: int) -> int:
    fd = os.open(at / path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | flags, 0o640)
    try:
        return os.write(fd, data) if stat.S_ISREG(os.fstat(fd).st_mode) else 0
    finally:
        os.close(fd)


def write_mapped(at: Place, path: str, data: bytes, offset: int) -> bytes:
    fd = os.open(at / path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_size < offset + len(data) or not data:
            return b""
        with mmap.mmap(fd, 0) as mapped:
            mapped[offset : offset + len(data)] = data
            return bytes(mapped)
    finally:
        os.close(fd)


def copy_file(at: Place, path: str, newpath: str) -> int:
    with (
        open(at / path, "rb", opener=regular_opener) as source,
        open(at / newpath, "wb", opener=regular_opener) as sink,
    ):
        return os.copy_file_range(source.fileno(), sink.fileno(), 1 << 20)


def regular_opener(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o644)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.ENOTBLK, "not regular")


def link_unnamed(at: Place, directory: str, newpath: str, data: bytes) -> None:
    fd = os.open(at / directory, os.O_RDWR | os.O_TMPFILE, 0o604)
    try:
        os.write(fd, data)
        os.link(f"/proc/self/fd/{fd}", at / newpath, src_dir_fd=fd, follow_symlinks=True)
    finally:
        os.close(fd)


def truncate(at: Place, path: str, size: int) -> None:
    os.truncate(at / path, size)


def allocate(at: Place, path: str, offset: int, length: int) -> None:
    fd = os.open(at / path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        os.posix_fallocate(fd, offset, length)
    finally:
        os.close(fd)


def mkdir(at: Place, path: str, mode: int) -> None:
    os.mkdir(at / path, mode)


def mknod(at: Place, path: str, mode: int, rdev: int) -> None:
    os.mknod(at / path, mode, rdev)


def symlink(at: Place, path: str, target: str) -> None:
    os.symlink(target, at / path)


def readlink(at: Place, path: str) -> str:
    return os.readlink(at / path)


def link(at: Place, path: str, newpath: str) -> None:
    os.link(at / path, at / newpath, follow_symlinks=False)


def unlink(at: Place, path: str) -> None:
    os.unlink(at / path)


def rmdir(at: Place, path: str) -> None:
    os.rmdir(at / path)


def rename(at: Place, path: str, newpath: str) -> None:
    os.rename(at / path, at / newpath)


def chmod(at: Place, path: str, mode: int) -> None:
    os.chmod(at / path, mode)


def chown(at: Place, path: str, uid: int, gid: int) -> None:
    os.chown(at / path, uid, gid, follow_symlinks=False)


def utimens(at: Place, path: str, atime_ns: int, mtime_ns: int) -> None:
    os.utime(at / path, ns=(atime_ns, mtime_ns), follow_symlinks=False)


def touch(at: Place, path: str) -> None:
    os.utime(at / path, follow_symlinks=False)


def listdir(at: Place, path: str) -> list[tuple[str, bool]]:
    with os.scandir(at / path) as entries:
        return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)


def setxattr(at: Place, path: str, name: str, value: bytes, flags: int) -> None:
    os.setxattr(at / path, name, value, flags, follow_symlinks=False)


def getxattr(at: Place, path: str, name: str) -> bytes:
    return os.getxattr(at / path, name, follow_symlinks=False)


def listxattr(at: Place, path: str) -> list[str]:
    return sorted(os.listxattr(at / path, follow_symlinks=False))


def removexattr(at: Place, path: str, name: str) -> None:
    os.removexattr(at / path, name, follow_symlinks=False)


class Author:
    """Writes random programs: most paths lead to what is there, which it sees in `model`, the plain directory."""

    def __init__(self, seed: int, model: Path, leave_out: Set[Callable[..., Any]] = frozenset()) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.model = model
        self.repertoire = [row for row in REPERTOIRE if row[0] not in leave_out]

    def path(self) -> str:
        """A path to something, or to a free name, at times through something that is no directory."""
        path = ""
        at = str(self.model)
        for _ in range(self.random.choice((1, 1, 2, 2, 3, 4))):
            names = sorted(os.listdir(at)) if os.path.isdir(at) and not os.path.islink(at) else []
            name = self.random.choice(names) if names and self.random.random() < 0.6 else self.random.choice(NAMES)
            path = f"{path}/{name}" if path else name
            at = f"{at}/{name}"
        return path

    def flags(self) -> int:
        chosen = self.random.sample(FLAGS, self.random.choice((0, 1, 1, 2, 3)))
        return self.random.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR)) | sum(chosen)

    def data(self) -> bytes:
        return self.random.randbytes(self.random.choice((0, 1, 10, 5000)))

    def offset(self) -> int:
        return self.random.choice((0, 0, 3, 4096, 100_000))

    def mode(self) -> int:
        return self.random.choice((0o777, 0o755, 0o644, 0o600, 0o4755, 0o2775, 0o1777, 0o000))

    def owners(self) -> tuple[int, int]:
        """Arguments for chown, never (-1, -1), which FUSE cannot tell from other requests: docs/deviations.md."""
        return self.random.choice(((0, 0), (0, -1), (USER, -1), (-1, GROUP), (USER, GROUP)))

    def device(self) -> tuple[int, int]:
        kinds = ((stat.S_IFIFO, 0), (stat.S_IFSOCK, 0), (stat.S_IFREG, 0), (stat.S_IFBLK, os.makedev(7, 300)))
        return self.random.choice(kinds)

    def time_ns(self) -> int:
        return OLD_NS + self.random.randrange(10**15)

    def xattr(self) -> str:
        return self.random.choice(("user.one", "user.two", "trusted.one"))

    def index(self) -> int:
        return self.random.randrange(16)

    def call(self) -> Call:
        function, *parts = self.random.choice(self.repertoire)
        arguments: list[Any] = []
        for part in parts:
            value = part(self)
            arguments += value if isinstance(value, tuple) else (value,)
        return Call(function, tuple(arguments), self.random.random() < 0.3)


def _one_of(*values: Any) -> Callable[[Author], Any]:
    return lambda author: author.random.choice(values)


def _device(author: Author) -> tuple[int, int]:
    kind, rdev = author.device()
    return kind | author.mode(), rdev


_path, _data, _offset, _mode, _index = Author.path, Author.data, Author.offset, Author.mode, Author.index

#: Function and makers of its arguments; what is repeated is called more often.
REPERTOIRE: Final[tuple[tuple[Callable[..., Any], ...], ...]] = (
    (open_close, _path, Author.flags, _mode),
    (open_keep, _path, _one_of(os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND)),
    (close_kept, _index),
    (read_kept, _index, _one_of(1, 100_000), _offset),
    (write_kept, _index, _data, _offset),
    (stat_kept, _index),
    (truncate_kept, _index, _offset),
    (sync_kept, _index),
    (lstat, _path),
    (access, _path, _one_of(os.R_OK, os.W_OK, os.X_OK)),
    (read_file, _path),
    (write_file, _path, _data, _one_of(0, os.O_CREAT, os.O_TRUNC, os.O_APPEND, os.O_CREAT | os.O_EXCL)),
    (write_mapped, _path, _data, _one_of(0, 5)),
    (copy_file, _path, _path),
    (link_unnamed, _path, _path, _data),
    (truncate, _path, _one_of(*TRUNCATED)),
    (allocate, _path, _offset, _one_of(1, 4096)),
    (mkdir, _path, _mode),
    (mkdir, _path, _mode),
    (mknod, _path, _device),
    (symlink, _path, _one_of("a", "b/c", "nowhere", ".")),
    (readlink, _path),
    (link, _path, _path),
    (unlink, _path),
    (unlink, _path),
    (rmdir, _path),
    (rmdir, _path),
    (rename, _path, _path),
    (rename, _path, _path),
    (chmod, _path, _mode),
    (chown, _path, Author.owners),
    (utimens, _path, Author.time_ns, Author.time_ns),
    (touch, _path),
    (listdir, _path),
    (setxattr, _path, Author.xattr, _one_of(b"", b"1", b"\0" * 300), _one_of(0, os.XATTR_CREATE, os.XATTR_REPLACE)),
    (getxattr, _path, Author.xattr),
    (listxattr, _path),
    (removexattr, _path, Author.xattr),
)


#: Calls that change nothing, which nobody wants to read about.
READING: Final = {access, getxattr, listdir, listxattr, lstat, read_file, read_kept, readlink, stat_kept}


class Trial:
    """One program over fresh layers."""

    def __init__(self, author: Author, ours: Place, kernel: Place, plain: Place) -> None:
        self.author = author
        self.ours, self.plain = ours, plain
        self.kernel: Place | None = kernel
        self.done: list[str] = []
        self.since_ns = time.time_ns() - 10**9

    def run(self) -> None:
        for step in range(PROGRAM_STEPS):
            self.step(self.author.call())
            if step % COMPARE_EVERY == COMPARE_EVERY - 1:
                self.compare()
        self.compare()

    def step(self, call: Call) -> None:
        ours = self.ours.run(call)
        theirs = self.kernel.run(call) if self.kernel else ours
        if ours.startswith("ok") and call.function not in READING:
            self.done.append(repr(call))
        if ours == theirs == "EXDEV":
            return
        wanted = self.plain.run(call)
        if theirs == "EXDEV" and ours == wanted:
            self.kernel, theirs = None, ours  # it has gone its own way from here on
        if call.function is stat_kept and theirs != wanted:
            theirs = wanted  # it counts one link of an unlinked lower file: docs/deviations.md
        if not ours == wanted == theirs:
            self.fail(f"{call}\nours: {ours[:500]}\nplain directory: {wanted[:500]}\nkernel overlayfs: {theirs[:500]}")

    def compare(self) -> None:
        wanted = self.settled(self.plain)
        for place in filter(None, (self.ours, self.kernel)):
            shown = self.settled(place)
            if place is self.ours:
                believe_truncations(shown, wanted)
            else:
                believe_directories(shown, wanted)
            if found := differences(shown, wanted):
                self.fail(f"{place.name} differs from the plain directory:\n" + "\n".join(found))

    def settled(self, place: Place) -> Snapshot:
        """The tree, with times told only of what the program did not change, or set."""
        tree = snapshot(place.root)
        for facts in tree.values():
            mtime_ns = facts["mtime_ns"]
            assert isinstance(mtime_ns, int)
            facts["mtime_ns"] = min(mtime_ns, self.since_ns)
        return tree

    def fail(self, why: str) -> None:
        if not self.ours.root.is_mount():
            why = f"unionfsd is not mounted any more; {why}"
        pytest.fail(f"seed {self.author.seed}: {why}\nbefore that:\n" + "\n".join(self.done), pytrace=False)


def believe_truncations(shown: Snapshot, wanted: Snapshot) -> None:
    """Truncation to the size a file has changes its mtime; with its writeback cache the kernel hears of it when the
    file is no longer open: docs/deviations.md."""
    for path, facts in shown.items():
        if facts.get("size") in TRUNCATED and path in wanted:
            facts["mtime_ns"] = wanted[path]["mtime_ns"]


def believe_directories(shown: Snapshot, wanted: Snapshot) -> None:
    """A rename that fails, as onto a directory that is not empty, changes the mtime of directories in overlayfs."""
    for path, facts in shown.items():
        if facts["type"] == stat.S_IFDIR and path in wanted:
            facts["mtime_ns"] = wanted[path]["mtime_ns"]


def populate(layers: Layers, author: Author) -> None:
    """Two lowers with random content; the names collide with each other and with the program's."""
    bottom = layers.lower
    for lower in (bottom, layers.push()):
        scribe = Place("lower", lower)
        author.model = lower
        for _ in range(60):
            scribe.run(author.call()._replace(user=False))
        scribe.close_all()
        for path in lower.rglob("*") if lower == bottom else ():
            if path.lstat().st_nlink > 1 and not stat.S_ISDIR(path.lstat().st_mode):
                path.unlink()  # the lower on top may hide a name, which is counted all the same


#: What a transport cannot express: docs/deviations.md. glibc allocates by writing zeros where there is no fallocate(2),
#: and writes nothing, which leaves the times alone, where there is data.
LACKING: Final[dict[str, Set[Callable[..., Any]]]] = {"pyfuse3": {allocate, link_unnamed}}


def trial(author: Author, layers: Layers, mounted: MountFactory, overlayfs: MountFactory) -> None:
    """Run one program over `layers`, of which the kernel gets a copy; ours must in the end suit the kernel, too."""
    populate(layers, author)
    ours, kernel = mounted(layers=layers), overlayfs("redirect_dir=on,index=on", layers=layers.copy("kernel"))
    plain = layers.root / "plain"
    run("cp", "-a", kernel.path, plain)
    places = [Place("unionfsd", ours.path), Place("kernel overlayfs", kernel.path), Place("plain directory", plain)]
    author.model = plain
    try:
        Trial(author, *places).run()
    finally:
        for place in places:
            place.close_all()
    written = snapshot(ours.path)
    ours.unmount()
    kernel.unmount()
    with OverlayFS(layers, "redirect_dir=on,index=on") as kernel_over_ours:
        shown = snapshot(kernel_over_ours.path)
        believe_truncations(written, shown)
        found = differences(shown, written)
    assert not found, f"seed {author.seed}: kernel overlayfs over our layers:\n" + "\n".join(found)


def seeds() -> Iterator[int]:
    """Which programs to run: the one that was asked for, random ones as long as the soak, or always the same."""
    if SEED:
        yield int(SEED)
    elif SOAK_SECONDS:
        deadline = time.monotonic() + SOAK_SECONDS
        first = random.SystemRandom().randrange(10**6)
        yield from itertools.takewhile(lambda _: time.monotonic() < deadline, itertools.count(first))
    else:
        yield from range(1, PROGRAMS + 1)


@pytest.mark.timeout(SOAK_SECONDS * 1.5 + 120)  # what was made is removed at the end
def test_random_programs(mode: Mode, disk: Path, mounted: MountFactory, overlayfs: MountFactory) -> None:
    before = os.umask(0o022)
    try:
        for seed in seeds():
            root = disk / str(seed)
            root.mkdir()
            print(f"program {seed}")
            author = Author(seed, root, LACKING.get(mode.transport, frozenset()))
            trial(author, Layers(root), mounted, overlayfs)
    finally:
        os.umask(before)
