"""Layers: lowers that nothing can change, locks, and the unions that are refused before anything is written."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import harness
from tests.harness import Layers
from tests.union import trees
from tests.union.stack import overlay
from tests.union.trees import OLD, Obj
from unionfsd import errors, syscalls
from unionfsd import format as fmt
from unionfsd.errors import UserError
from unionfsd.fdcache import FdCache
from unionfsd.layers import Layer, LayerStack, LowerDir, read_marks
from unionfsd.opening import open_stack
from unionfsd.options import MountConfig


def config(layers: Layers, *, upper: bool = True, **changes: Any) -> MountConfig:
    """The configuration that names `layers`; `changes` are other fields, paths as Path."""
    fields: dict[str, Any] = {
        "lowerdirs": tuple(os.fsencode(path) for path in layers.lowers),
        "mountpoint": os.fsencode(layers.mnt),
    }
    if upper:
        fields |= {"upperdir": os.fsencode(layers.upper), "workdir": os.fsencode(layers.work)}
    fields |= {name: os.fsencode(value) if isinstance(value, Path) else value for name, value in changes.items()}
    return MountConfig(**fields)


def naming(field: str, value: object) -> dict[str, Any]:
    """Changes for `config`, of a field that is not known beforehand."""
    return {field: value}


@contextlib.contextmanager
def opened(wanted: MountConfig) -> Iterator[LayerStack]:
    stack = open_stack(wanted)
    try:
        yield stack
    finally:
        stack.close()


def refuse(wanted: MountConfig, code: int, *words: str) -> None:
    """The stack is refused with that exit code, in one line with these words, and no descriptor stays."""
    gc.collect()  # what other tests left open must not be closed just now
    before = len(os.listdir("/proc/self/fd"))
    try:
        open_stack(wanted)
    except UserError as exc:
        line, got, hint = str(exc), exc.code, exc.hint
    else:
        pytest.fail("it was not refused")
    assert got == code
    assert hint
    assert [word for word in words if word not in line] == []
    assert "\n" not in line
    assert len(os.listdir("/proc/self/fd")) == before


def errno_of(call: Callable[..., object], *args: Any) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*args)
    return caught.value.errno


@pytest.fixture
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounts cannot be cloned, as without CAP_SYS_ADMIN."""

    def clone_mount(path: bytes, attributes: int) -> syscalls.Fd:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(syscalls, "clone_mount", clone_mount)


# Lowers.


CHANGES: dict[str, Callable[[int, int], object]] = {
    "create": lambda root, _: syscalls.create_at(root, b"new", 0o600),
    "tmpfile": lambda root, _: syscalls.tmpfile_at(root, 0o600),
    "mkdir": lambda root, _: syscalls.mkdir_at(root, b"new", 0o700),
    "mknod": lambda root, _: syscalls.mknod_at(root, b"new", stat.S_IFIFO, 0),
    "symlink": lambda root, _: syscalls.symlink_at(b"x", root, b"new"),
    "link": lambda root, _: syscalls.link_at(root, b"file", root, b"new"),
    "unlink": lambda root, _: syscalls.unlink_at(root, b"file"),
    "rmdir": lambda root, _: syscalls.rmdir_at(root, b"sub"),
    "rename": lambda root, _: syscalls.renameat2(root, b"file", root, b"new"),
    "chown": lambda _, file: syscalls.chown(file, 1, 1),
    "chmod": lambda _, file: syscalls.chmod(file, 0o600),
    "utimens": lambda _, file: syscalls.utimens(file, 1, 1),
    "setxattr": lambda _, file: syscalls.setxattr(file, b"user.new", b""),
    "removexattr": lambda _, file: syscalls.removexattr(file, b"user.tag"),
    "open for writing": lambda _, file: syscalls.reopen(file, os.O_RDWR),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_kernel_refuses_every_change_of_a_lower(change: str, layers: Layers) -> None:
    (layers.lower / "file").write_text("content")
    (layers.lower / "sub").mkdir()
    os.setxattr(layers.lower / "file", "user.tag", b"")
    with opened(config(layers)) as stack:
        root = stack.lowers[0].root.fd
        with syscalls.open_object(root, b"file") as file, pytest.raises(OSError) as caught:
            CHANGES[change](root, file.fd)
    assert caught.value.errno == errno.EROFS


def test_the_data_of_a_lower_is_not_opened_for_writing(layers: Layers) -> None:
    (layers.lower / "file").write_text("content")
    with opened(config(layers)) as stack, pytest.raises(OSError) as caught:
        stack.lowers[0].open_data(stack.lowers[0].root.fd, b"file", write=True)
    assert caught.value.errno == errno.EROFS


@pytest.mark.parametrize("privileged", [True, False])
def test_reading_a_lower_moves_no_access_times(
    privileged: bool, layers: Layers, request: pytest.FixtureRequest
) -> None:
    if not privileged:
        request.getfixturevalue("unprivileged")
    directory, file = layers.lower / "sub", layers.lower / "sub/file"
    directory.mkdir()
    file.write_text("content")
    for path in (file, directory):
        os.utime(path, ns=(OLD, OLD + 1))  # read long before it was written: also relatime would move it
    with opened(config(layers, upper=False)) as stack:
        layer = stack.lowers[0]
        with syscalls.open_dir(layer.root.fd, b"sub") as sub:
            assert [name for name, _ in layer.scan(sub.fd)] == [b"file"]
            with layer.open_data(sub.fd, b"file") as fd:
                assert os.pread(fd.fd, 100, 0) == b"content"
    assert [path.stat().st_atime_ns for path in (file, directory)] == [OLD, OLD]
    file.read_text(), list(directory.iterdir())
    assert OLD not in [path.stat().st_atime_ns for path in (file, directory)], "this disk moves no access times anyway"


def test_a_lower_may_be_named_by_a_symlink(layers: Layers) -> None:
    (layers.lower / "file").touch()
    (layers.root / "link").symlink_to(layers.lower)
    with opened(config(layers, upper=False, lowerdirs=(os.fsencode(layers.root / "link"),))) as stack:
        assert os.listdir(f"/proc/self/fd/{stack.lowers[0].root.fd}") == ["file"]


@pytest.mark.parametrize("kind", ["directory", "fifo", "chardev"])
def test_data_is_a_regular_file_or_an_error(kind: str, layers: Layers) -> None:
    path = layers.lower / "node"
    made = {"directory": (stat.S_IFDIR, 0), "fifo": (stat.S_IFIFO, 0), "chardev": (stat.S_IFCHR, os.makedev(1, 3))}
    mode, rdev = made[kind]
    path.mkdir() if mode == stat.S_IFDIR else os.mknod(path, mode | 0o600, rdev)
    with opened(config(layers)) as stack, pytest.raises(OSError) as caught:
        stack.lowers[0].open_data(stack.lowers[0].root.fd, b"node")
    # A device cannot even be opened: the clone of its mount is nodev where the mount is, else EIO is ours.
    assert caught.value.errno in (errno.EIO, errno.EACCES)


# Directories of lowers.


@pytest.fixture
def chain(layers: Layers) -> Iterator[LowerDir]:
    """The lower directory a/b/c."""
    (layers.lower / "a/b/c").mkdir(parents=True)
    with opened(config(layers, upper=False)) as stack:
        yield stack.lowers[0].root_dir.child(b"a").child(b"b").child(b"c")


def test_a_chain_of_names_is_opened_step_by_step(chain: LowerDir, layers: Layers) -> None:
    fds = FdCache(FdCache.MINIMUM)
    st = os.fstat(chain.open(fds))
    assert os.path.samestat(st, os.stat(layers.lower / "a/b/c"))
    assert len(fds) == 3
    assert chain.components() == (b"a", b"b", b"c")
    number = chain.open(fds)
    assert number == chain.open(fds)
    assert len(fds) == 3


def test_a_chain_is_opened_again_after_eviction(chain: LowerDir, layers: Layers) -> None:
    fds = FdCache(FdCache.MINIMUM)
    chain.open(fds)
    fds.close()
    assert chain.fd is None
    assert os.path.samestat(os.fstat(chain.open(fds)), os.stat(layers.lower / "a/b/c"))


def test_a_chain_longer_than_the_cache_is_opened(layers: Layers) -> None:
    depth = 3 * FdCache.MINIMUM
    bottom = layers.lower.joinpath(*["d"] * depth)
    bottom.mkdir(parents=True)
    with opened(config(layers, upper=False)) as stack:
        at = stack.lowers[0].root_dir
        for _ in range(depth):
            at = at.child(b"d")
        fds = FdCache(FdCache.MINIMUM)
        assert os.path.samestat(os.fstat(at.open(fds)), os.stat(bottom))
        assert len(fds) <= FdCache.MINIMUM


def test_a_chain_follows_no_symlink(chain: LowerDir, layers: Layers) -> None:
    (layers.lower / "a/b/c").rmdir()
    (layers.lower / "a/b/c").symlink_to("/")
    with pytest.raises(OSError) as caught:
        chain.open(FdCache(FdCache.MINIMUM))
    assert caught.value.errno in (errno.ENOTDIR, errno.ELOOP)


@pytest.mark.parametrize(
    ("obj", "marks"),
    [
        (trees.directory(), fmt.Marks(False, False)),
        (trees.directory(opaque="trusted"), fmt.Marks(True, False)),
        (trees.directory(opaque="user"), fmt.Marks(True, False)),
        (trees.directory(opaque="fuseoverlayfs"), fmt.Marks(True, False)),
        (trees.directory(opaque="wh"), fmt.Marks(True, False)),
        (trees.directory({b"w": trees.Whiteout("xattr")}), fmt.Marks(False, True)),
        (trees.directory({b"w": trees.Whiteout("xattr")}, opaque="wh"), fmt.Marks(True, True)),
        (Obj(stat.S_IFDIR, xattrs=((b"trusted.overlay.opaque", b""), (b"user.tag", b"y"))), fmt.Marks(False, False)),
    ],
)
def test_marks_of_every_form_are_read(obj: Obj, marks: fmt.Marks, disk: Path) -> None:
    trees.build(os.fsencode(disk / "dir"), obj)
    with syscalls.Fd(os.open(disk / "dir", os.O_PATH)) as fd:
        assert read_marks(fd.fd) == marks


# Inode numbers.


def test_numbers_tell_file_systems_apart(layers: Layers) -> None:
    other = layers.push()
    harness.run("mount", "-t", "tmpfs", "none", other)
    with opened(config(layers)) as stack:
        assert stack.upper is not None
        roots = [os.fstat(layer.root.fd) for layer in (stack.upper, *stack.lowers)]
        numbers = [stack.ino(st) for st in roots]
        assert len(set(numbers)) == 3
        assert numbers[0] == roots[0].st_ino  # the upper keeps its own,
        assert numbers[2] == roots[2].st_ino  # and so does the lower on the same disk;
        assert numbers[1] & ((1 << 56) - 1) == roots[1].st_ino
        assert stack.entry_inos(stack.lowers[0])(roots[1].st_ino) == numbers[1]


def test_a_number_too_long_is_folded(layers: Layers) -> None:
    with opened(config(layers)) as stack:
        layer: Layer = stack.lowers[0]
        long = stack.entry_inos(layer)(0xABCD << 48 | 5)
        assert 0 < long < 1 << 56
        assert long != stack.entry_inos(layer)(5)


# Refused.


def test_a_missing_layer(layers: Layers) -> None:
    gone = layers.root / "gone\nhere"
    for field in ("upperdir", "workdir"):
        refuse(config(layers, **naming(field, gone)), errors.LAYER, field, "No such file", "\\n")
    refuse(
        config(layers, lowerdirs=(os.fsencode(layers.lower), os.fsencode(gone))),
        errors.LAYER,
        "lowerdir",
        "No such file",
    )


def test_a_layer_that_is_no_directory(layers: Layers) -> None:
    file = layers.root / "file"
    file.touch()
    for field in ("upperdir", "workdir"):
        refuse(config(layers, **naming(field, file)), errors.LAYER, field, "not a directory")
    refuse(config(layers, lowerdirs=(os.fsencode(file),)), errors.LAYER, "lowerdir", "not a directory")


def test_no_lower_at_all(layers: Layers) -> None:
    refuse(config(layers, lowerdirs=()), errors.USAGE, "lowerdir")


def test_an_upper_without_a_workdir(layers: Layers) -> None:
    refuse(config(layers, workdir=None), errors.USAGE, "workdir")


@pytest.mark.parametrize("alias", ["itself", "symlink", "bind mount"])
@pytest.mark.parametrize("field", ["upperdir", "workdir", "lowerdirs"])
def test_one_directory_as_two_layers(alias: str, field: str, layers: Layers) -> None:
    path = layers.lower
    if alias == "symlink":
        path = layers.root / "alias"
        path.symlink_to(layers.lower)
    elif alias == "bind mount":
        path = layers.root / "alias"
        path.mkdir()
        harness.run("mount", "--bind", layers.lower, path)
    lowers = (os.fsencode(layers.lower), os.fsencode(path))
    refuse(
        config(layers, **naming(field, lowers if field == "lowerdirs" else path)),
        errors.LAYER,
        "is the same directory as",
        "overlap",
    )


@pytest.mark.parametrize("outer", ["upper", "work", "lower"])
@pytest.mark.parametrize("inner", ["upperdir", "workdir", "lowerdirs"])
def test_a_layer_inside_another(outer: str, inner: str, layers: Layers) -> None:
    deep = getattr(layers, outer) / "some/where"
    deep.mkdir(parents=True)
    if inner.startswith(outer):
        return  # it would replace the one it lies in
    lowers = (os.fsencode(layers.lower), os.fsencode(deep))
    refuse(
        config(layers, **naming(inner, lowers if inner == "lowerdirs" else deep)), errors.LAYER, "is inside", "overlap"
    )


def test_layers_next_to_each_other_with_names_alike(layers: Layers) -> None:
    """A path that begins with another's characters lies not inside of it."""
    near = layers.root / f"{layers.lower.name}.2"
    near.mkdir()
    with opened(config(layers, lowerdirs=(os.fsencode(layers.lower), os.fsencode(near)))) as stack:
        assert len(stack.lowers) == 2


@pytest.mark.parametrize("field", ["upper", "work"])
def test_a_mountpoint_inside_upper_or_work(field: str, layers: Layers) -> None:
    inside = getattr(layers, field) / "mnt"
    inside.mkdir()
    refuse(config(layers, mountpoint=inside), errors.LAYER, "mountpoint", f"inside {field}dir")


def test_a_mountpoint_inside_a_lower(layers: Layers, request: pytest.FixtureRequest) -> None:
    """Harmless where the lower is a private copy of its mount, which the new mount does not show in."""
    inside = layers.lower / "mnt"
    inside.mkdir()
    with opened(config(layers, mountpoint=inside)):
        pass
    request.getfixturevalue("unprivileged")
    refuse(config(layers, mountpoint=inside), errors.LAYER, "mountpoint", "inside lowerdir")


def test_upper_and_work_on_different_file_systems(layers: Layers) -> None:
    harness.run("mount", "-t", "tmpfs", "none", layers.work)
    refuse(config(layers), errors.LAYER, "different file systems")


def test_a_read_only_upper(layers: Layers) -> None:
    for path in (layers.upper, layers.work):
        harness.run("mount", "--bind", path, path)
        harness.run("mount", "-o", "remount,bind,ro", path)
    refuse(config(layers), errors.LAYER, "read-only")


# In use.


@pytest.mark.parametrize("shared", ["upper", "work", "both"])
def test_upper_and_work_belong_to_one_mount(shared: str, layers: Layers, disk: Path) -> None:
    (disk / "other").mkdir()
    other = Layers(disk / "other")
    changes: dict[str, Any] = {
        "upper": {"workdir": other.work},
        "work": {"upperdir": other.upper},
        "both": {},
    }[shared]
    with opened(config(layers)):
        refuse(config(layers, **changes), errors.BUSY, "in use")
    with opened(config(layers, **changes)):
        pass


def test_lowers_are_shared_by_many(layers: Layers, disk: Path) -> None:
    (disk / "other").mkdir()
    other = Layers(disk / "other", lowers=layers.lowers)
    with opened(config(layers)), opened(config(other)), opened(config(layers, upper=False)):
        pass


@pytest.mark.parametrize("name", ["plain", "b c", "back\\slash", "\udcff", "tab\tbed"], ids=ascii)
def test_an_upper_of_the_kernel_is_in_use(name: str, layers: Layers) -> None:
    """The mount table writes its path with escapes."""
    upper = layers.root / name
    upper.mkdir()
    lower, escaped = layers.lower, str(upper).replace("\\", "\\\\")
    options = os.fsencode(f"lowerdir={lower},upperdir={escaped},workdir={layers.work}")
    with overlay(os.fsencode(layers.mnt), options):
        refuse(config(layers, upperdir=upper), errors.BUSY, "kernel overlayfs")
    with opened(config(layers, upperdir=upper)):
        pass


def test_where_locks_do_not_work_a_warning_is_all(
    layers: Layers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with opened(config(layers)):
        pass
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_closing_leaves_no_descriptor(layers: Layers) -> None:
    gc.collect()  # what other tests left open must not be closed just now
    before = len(os.listdir("/proc/self/fd"))
    with opened(config(layers)):
        assert len(os.listdir("/proc/self/fd")) > before
    assert len(os.listdir("/proc/self/fd")) == before
