"""System calls: what is never followed, what owns a descriptor, and that every change goes through the seam."""

from __future__ import annotations

import ast
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import harness
from unionfsd import syscalls
from unionfsd.syscalls import Fd

PACKAGE = Path(syscalls.__file__).parent

#: Functions of `os` that change a file system, by whatever name.
#: What a module does to memory of its own, which only looks like a file.
#: What is in no layer: memory that processes share, and a socket.
OF_ITS_OWN = {
    "ledger.py": ["os.ftruncate"],
    "keeper.py": ["os.ftruncate"],
    "sparing.py": ["os.chmod", "os.rename", "os.unlink", "os.pwrite", "os.unlink"],
}
CHANGING = {
    *("rename", "renames", "replace", "link", "symlink", "mkdir", "makedirs", "mknod", "mkfifo", "unlink", "remove"),
    *(
        "rmdir",
        "removedirs",
        "truncate",
        "ftruncate",
        "chmod",
        "fchmod",
        "lchmod",
        "chown",
        "fchown",
        "lchown",
        "utime",
    ),
    *("setxattr", "removexattr", "pwrite", "pwritev", "posix_fallocate", "copy_file_range", "sendfile", "splice"),
    *("fsync", "fdatasync", "sync"),
}


@pytest.fixture
def directory(disk: Path) -> Fd:
    """An O_PATH descriptor of `disk`, as the core has them."""
    return Fd(os.open(disk, os.O_PATH | os.O_DIRECTORY))


def errno_of(call: Callable[[], object]) -> int:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno is not None
    return caught.value.errno


# The seam.


@pytest.mark.parametrize("name", syscalls.MUTATING)
def test_the_seam_names_functions(name: str) -> None:
    assert callable(getattr(syscalls, name))


@pytest.mark.parametrize("name", sorted(path.name for path in PACKAGE.glob("*.py") if path.name != "syscalls.py"))
def test_nothing_goes_around_the_seam(name: str) -> None:
    """The core changes no file system by itself, and no module keeps a function of the seam under another name."""
    found = []
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("syscalls"):
            found += [alias.name for alias in node.names if alias.name in syscalls.MUTATING]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            found += [f"os.{node.attr}"] if node.attr in CHANGING else []
    assert found == OF_ITS_OWN.get(name, [])


# Names.


@given(st.binary(max_size=10))
def test_a_component_is_one_step_down(name: bytes) -> None:
    if name in (b"", b".", b"..") or set(name) & set(b"/\0"):
        assert errno_of(lambda: syscalls.component(name)) == (errno.EINVAL if name else errno.ENOENT)
    else:
        assert syscalls.component(name) == name


BY_NAME: dict[str, Callable[[int, bytes], object]] = {
    "open_dir": syscalls.open_dir,
    "open_object": syscalls.open_object,
    "open_data": lambda fd, name: syscalls.open_data(fd, name, os.O_RDONLY),
    "create_at": lambda fd, name: syscalls.create_at(fd, name, 0o600),
    "mkdir_at": lambda fd, name: syscalls.mkdir_at(fd, name, 0o700),
    "mknod_at": lambda fd, name: syscalls.mknod_at(fd, name, stat.S_IFIFO, 0),
    "symlink_at": lambda fd, name: syscalls.symlink_at(b"x", fd, name),
    "link_at, old": lambda fd, name: syscalls.link_at(fd, name, fd, b"new"),
    "link_at, new": lambda fd, name: syscalls.link_at(fd, b"file", fd, name),
    "link_fd": lambda fd, name: syscalls.link_fd(fd, fd, name),
    "unlink_at": syscalls.unlink_at,
    "rmdir_at": syscalls.rmdir_at,
    "renameat2, old": lambda fd, name: syscalls.renameat2(fd, name, fd, b"new"),
    "renameat2, new": lambda fd, name: syscalls.renameat2(fd, b"file", fd, name),
}


@pytest.mark.parametrize("call", BY_NAME)
@pytest.mark.parametrize("name", [b"..", b".", b"sub/file", b"../file", b"/etc", b"a\0b"], ids=repr)
def test_every_call_by_name_takes_one_component(call: str, name: bytes, directory: Fd, disk: Path) -> None:
    (disk / "sub").mkdir()
    (disk / "sub/file").touch()
    (disk / "file").touch()
    assert errno_of(lambda: BY_NAME[call](directory.fd, name)) == errno.EINVAL


# Descriptors.


def test_an_fd_is_closed_once() -> None:
    fd = Fd(os.open("/", os.O_PATH))
    number = fd.fileno()
    with fd:
        assert number == fd.fd >= 0
    assert fd.fd == -1
    other = os.open("/", os.O_PATH)
    assert other == number  # somebody else has the number now, and
    fd.close()
    os.fstat(other)  # keeps it
    os.close(other)


def test_an_fd_is_closed_when_nobody_holds_it() -> None:
    fd = Fd(os.open("/", os.O_PATH))
    number = fd.fd
    del fd
    assert errno_of(lambda: os.fstat(number)) == errno.EBADF


def test_descriptors_are_not_inherited(directory: Fd, disk: Path) -> None:
    (disk / "file").touch()
    (disk / "sub").mkdir()
    made = [
        syscalls.open_dir(directory.fd, b"sub"),
        syscalls.open_object(directory.fd, b"file"),
        syscalls.open_data(directory.fd, b"file", os.O_RDWR),
        syscalls.create_at(directory.fd, b"new", 0o600),
        syscalls.tmpfile_at(directory.fd, 0o600),
        syscalls.reopen(directory.fd, os.O_RDONLY),
        syscalls.clone_mount(os.fsencode(disk), 0),
    ]
    assert [os.get_inheritable(fd.fd) for fd in made] == [False] * len(made)


# Nothing is followed.


def test_directories_are_not_opened_through_symlinks(directory: Fd, disk: Path) -> None:
    (disk / "sub").mkdir()
    (disk / "file").touch()
    (disk / "link").symlink_to("sub")
    assert stat.S_ISDIR(os.fstat(syscalls.open_dir(directory.fd, b"sub").fd).st_mode)
    assert errno_of(lambda: syscalls.open_dir(directory.fd, b"link")) in (errno.ENOTDIR, errno.ELOOP)
    assert errno_of(lambda: syscalls.open_dir(directory.fd, b"file")) == errno.ENOTDIR


def test_data_is_not_opened_through_symlinks(directory: Fd, disk: Path) -> None:
    (disk / "file").touch()
    (disk / "link").symlink_to("file")
    assert errno_of(lambda: syscalls.open_data(directory.fd, b"link", os.O_RDONLY)) == errno.ELOOP
    assert errno_of(lambda: syscalls.create_at(directory.fd, b"link", 0o600)) == errno.EEXIST


@pytest.mark.timeout(10)
def test_opening_data_never_waits(directory: Fd, disk: Path) -> None:
    os.mkfifo(disk / "fifo")
    syscalls.open_data(directory.fd, b"fifo", os.O_RDONLY).close()


def test_a_symlink_is_an_object_like_any_other(directory: Fd, disk: Path) -> None:
    (disk / "link").symlink_to("no/where")
    with syscalls.open_object(directory.fd, b"link") as fd:
        assert syscalls.readlink(fd.fd) == b"no/where"
        syscalls.setxattr(fd.fd, b"trusted.tag", b"value")
        assert syscalls.getxattr(fd.fd, b"trusted.tag") == b"value"
        assert b"trusted.tag" in syscalls.listxattr(fd.fd)
        syscalls.removexattr(fd.fd, b"trusted.tag")
        assert b"trusted.tag" not in syscalls.listxattr(fd.fd)
        syscalls.chown(fd.fd, 12, 34)
        syscalls.utimens(fd.fd, 1, 2)
        assert errno_of(lambda: syscalls.chmod(fd.fd, 0o600)) == errno.EOPNOTSUPP
        syscalls.link_fd(fd.fd, directory.fd, b"second")
    st = os.lstat(disk / "second")
    assert (st.st_uid, st.st_gid, st.st_atime_ns, st.st_mtime_ns, st.st_nlink) == (12, 34, 1, 2, 2)


# Times.


#: What ext4 can keep, but for its very first second.
_times = st.integers(-(2**31 - 1) * 10**9, 2**33 * 10**9)


@given(_times, _times)
def test_times_are_exact(atime_ns: int, mtime_ns: int) -> None:
    with Fd(os.open(harness.DISK, os.O_TMPFILE | os.O_RDWR)) as fd:
        syscalls.utimens(fd.fd, atime_ns, mtime_ns)
        st = os.fstat(fd.fd)
        assert (st.st_atime_ns, st.st_mtime_ns) == (atime_ns, mtime_ns)


def test_times_can_be_left_and_set_to_now() -> None:
    with Fd(os.open(harness.DISK, os.O_TMPFILE | os.O_RDWR)) as fd:
        syscalls.utimens(fd.fd, 7, 9)
        syscalls.utimens(fd.fd, syscalls.UTIME_OMIT, 11)
        assert (os.fstat(fd.fd).st_atime_ns, os.fstat(fd.fd).st_mtime_ns) == (7, 11)
        syscalls.utimens(fd.fd, syscalls.UTIME_NOW, syscalls.UTIME_OMIT)
        st = os.fstat(fd.fd)
        assert (st.st_atime_ns, st.st_mtime_ns) == (st.st_ctime_ns, 11)


# Changes of names.


def test_renames_by_their_flags(directory: Fd, disk: Path) -> None:
    (disk / "a").write_text("a")
    (disk / "b").write_text("b")
    with pytest.raises(FileExistsError) as caught:
        syscalls.renameat2(directory.fd, b"a", directory.fd, b"b", syscalls.RENAME_NOREPLACE)
    assert caught.value.filename == "b"
    syscalls.renameat2(directory.fd, b"a", directory.fd, b"b", syscalls.RENAME_EXCHANGE)
    assert ((disk / "a").read_text(), (disk / "b").read_text()) == ("b", "a")
    syscalls.renameat2(directory.fd, b"a", directory.fd, b"b", syscalls.RENAME_WHITEOUT)
    left = os.lstat(disk / "a")
    assert (stat.S_IFMT(left.st_mode), left.st_rdev) == (stat.S_IFCHR, 0)
    assert (disk / "b").read_text() == "b"


def test_a_file_gets_its_name_late(directory: Fd, disk: Path) -> None:
    with syscalls.tmpfile_at(directory.fd, 0o640) as fd:
        assert syscalls.pwrite(fd.fd, b"late", 1) == 4
        assert list(disk.iterdir()) == []
        syscalls.link_fd(fd.fd, directory.fd, b"file")
        assert errno_of(lambda: syscalls.link_fd(fd.fd, directory.fd, b"file")) == errno.EEXIST
    assert (disk / "file").read_bytes() == b"\0late"


# Data.


def test_holes_are_punched(disk: Path) -> None:
    path = disk / "file"
    path.write_bytes(b"x" * (1 << 20))
    with Fd(os.open(path, os.O_RDWR)) as fd:
        syscalls.fallocate(fd.fd, 3, 4096, 8192)  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        assert os.lseek(fd.fd, 0, os.SEEK_HOLE) == 4096
        assert os.lseek(fd.fd, 4096, os.SEEK_DATA) == 12288
        assert errno_of(lambda: syscalls.fallocate(fd.fd, 0, -1, 1)) == errno.EINVAL


def test_ranges_are_copied(disk: Path) -> None:
    (disk / "source").write_bytes(b"0123456789")
    (disk / "target").write_bytes(b"")
    with Fd(os.open(disk / "source", os.O_RDONLY)) as source, Fd(os.open(disk / "target", os.O_RDWR)) as target:
        assert syscalls.copy_range(source.fd, target.fd, 4, 3, 2) == 4
        assert syscalls.copy_range(source.fd, target.fd, 4, 10, 0) == 0
    assert (disk / "target").read_bytes() == b"\0\0003456"


# Handles and mounts.


def test_a_file_handle_names_an_object(directory: Fd, disk: Path) -> None:
    (disk / "sub").mkdir()
    (disk / "file").touch()
    os.link(disk / "file", disk / "sub/link")
    sub = syscalls.open_dir(directory.fd, b"sub")
    handle = syscalls.file_handle(directory.fd, b"file")
    assert handle == syscalls.file_handle(sub.fd, b"link")
    assert handle != syscalls.file_handle(directory.fd, b"sub")
    assert syscalls.file_handle(sub.fd, b"") == syscalls.file_handle(directory.fd, b"sub")


def test_a_cloned_mount_is_read_only_and_alone(disk: Path) -> None:
    (disk / "on").mkdir()
    (disk / "on/beneath").touch()
    harness.run("mount", "-t", "tmpfs", "none", disk / "on")
    with syscalls.clone_mount(os.fsencode(disk), syscalls.MOUNT_ATTR_RDONLY) as root:
        assert os.listdir(f"/proc/self/fd/{root.fd}/on") == ["beneath"]
        assert errno_of(lambda: syscalls.mkdir_at(root.fd, b"new", 0o700)) == errno.EROFS
    with syscalls.clone_mount(os.fsencode(disk), 0) as root:
        syscalls.mkdir_at(root.fd, b"new", 0o700)
    assert (disk / "new").is_dir()
    assert not [mount for mount in harness.mounts() if mount != disk / "on" and mount.is_relative_to(disk)]


def test_what_cannot_be_unmounted_is_named(disk: Path) -> None:
    with pytest.raises(OSError) as caught:
        syscalls.umount2(str(disk), syscalls.UMOUNT_NOFOLLOW)
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(disk))
    with pytest.raises(OSError) as caught:
        syscalls.mount("none", str(disk), "no-such-fs", 0, "")
    assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, str(disk))
