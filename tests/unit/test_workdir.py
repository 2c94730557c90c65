"""The work directory: found out on real file systems, swept, and left by everything whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import harness
from tests.harness import Layers, MountFactory
from tests.trees import fingerprint
from unionfsd import errors, intent, syscalls
from unionfsd import format as fmt
from unionfsd.abilities import Abilities, WhiteoutForm
from unionfsd.errors import UserError
from unionfsd.opening import open_stack
from unionfsd.options import MountConfig
from unionfsd.removal import remove_tree
from unionfsd.workdir import Staged, Workdir, open_workdir

EVERYTHING = Abilities(fmt.TRUSTED, "chardev", tmpfile=True, noreplace=True, exchange=True, rename_whiteout=True)


class Open:
    """An open work directory and the upper it belongs to, by path and by descriptor."""

    def __init__(self, work: Workdir, layers: Layers, upper: int) -> None:
        self.work = work
        self.inside = layers.work / "work"
        self.path = layers.upper
        self.upper = upper

    @property
    def litter(self) -> list[str]:
        return sorted(os.listdir(self.inside))


@contextlib.contextmanager
def opened(layers: Layers, **options: Any) -> Iterator[Open]:
    config = MountConfig(
        lowerdirs=tuple(os.fsencode(path) for path in layers.lowers),
        upperdir=os.fsencode(layers.upper),
        workdir=os.fsencode(layers.work),
        mountpoint=os.fsencode(layers.mnt),
        **options,
    )
    stack = open_stack(config)
    try:
        assert stack.upper is not None
        work = open_workdir(stack, config)
        yield Open(work, layers, stack.upper.root.fd)
        work.close()
    finally:
        stack.close()


def refuse(layers: Layers, *words: str, **options: Any) -> None:
    with pytest.raises(UserError) as caught, opened(layers, **options):
        pass
    assert caught.value.code == errors.LAYER
    assert caught.value.hint
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.fixture
def work(layers: Layers) -> Iterator[Open]:
    with opened(layers) as work:
        yield work


# What the upper can do.


def test_a_disk_can_do_everything(work: Open) -> None:
    assert work.work.abilities == EVERYTHING
    assert work.litter == []


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("tmpfs", EVERYTHING), ("ramfs", EVERYTHING._replace(namespace=None, rename_whiteout=False))],
)
def test_memory_file_systems_are_tried(
    kind: str, expected: Abilities, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (disk / "memory").mkdir()
    harness.run("mount", "-t", kind, "none", disk / "memory")
    with opened(Layers(disk, upper_root=disk / "memory")) as work:
        assert work.work.abilities == expected
        assert work.litter == []
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (2 * (expected.namespace is None))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"userxattr": True}, EVERYTHING._replace(namespace=fmt.USER)),
        ({"whiteout": "chardev"}, EVERYTHING),
        ({"whiteout": "xattr"}, EVERYTHING._replace(whiteout="xattr", rename_whiteout=False)),
        ({"whiteout": "wh"}, EVERYTHING._replace(whiteout="wh", rename_whiteout=False)),
    ],
)
def test_options_decide_where_there_is_a_choice(options: dict[str, Any], expected: Abilities, layers: Layers) -> None:
    with opened(layers, **options) as work:
        assert work.work.abilities == expected
        assert work.litter == []


def without(monkeypatch: pytest.MonkeyPatch, name: str, number: int, is_refused: Callable[..., bool]) -> None:
    """Make the calls of `syscalls.name` whose arguments `is_refused` says so fail with `number`."""
    real = getattr(syscalls, name)

    def call(*args: Any) -> Any:
        if is_refused(*args):
            raise OSError(number, os.strerror(number))
        return real(*args)

    monkeypatch.setattr(syscalls, name, call)


LACKS: dict[str, tuple[str, int, Callable[..., bool], dict[str, Any]]] = {
    "trusted xattrs": (
        "setxattr",
        errno.EPERM,
        lambda fd, name, *_: name.startswith(b"trusted."),
        {"namespace": fmt.USER},
    ),
    "xattrs": ("setxattr", errno.EOPNOTSUPP, lambda *_: True, {"namespace": None}),
    "device nodes": ("mknod_at", errno.EPERM, lambda *_: True, {"whiteout": "xattr", "rename_whiteout": False}),
    "O_TMPFILE": ("tmpfile_at", errno.EOPNOTSUPP, lambda *_: True, {"tmpfile": False}),
    "links of O_TMPFILE": ("link_fd", errno.ENOENT, lambda *_: True, {"tmpfile": False}),
    "rename flags": (
        "renameat2",
        errno.EINVAL,
        lambda *args: args[4:] not in ((), (0,)),
        {"noreplace": False, "exchange": False, "rename_whiteout": False},
    ),
    "RENAME_WHITEOUT": ("renameat2", errno.EINVAL, lambda *args: args[4:] == (4,), {"rename_whiteout": False}),
}


@pytest.mark.parametrize("what", LACKS)
def test_what_an_upper_lacks_is_noticed(what: str, layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    name, number, is_refused, changes = LACKS[what]
    without(monkeypatch, name, number, is_refused)
    with opened(layers) as work:
        assert work.work.abilities == EVERYTHING._replace(**changes)
        assert work.litter == []


def test_without_devices_and_xattrs_there_are_wh_files(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    for what in ("xattrs", "device nodes"):
        name, number, is_refused, _ = LACKS[what]
        without(monkeypatch, name, number, is_refused)
    with opened(layers) as work:
        assert work.work.abilities.whiteout == "wh"
    refuse(layers, "xattr", whiteout="xattr")
    refuse(layers, "chardev", whiteout="chardev")


@pytest.mark.parametrize("name", ["create_at", "mknod_at", "setxattr", "renameat2"])
def test_a_full_disk_is_no_lack_of_ability(name: str, layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, name, errno.ENOSPC, lambda *_: True)
    refuse(layers, "No space left")


# The sweep.


def test_what_a_crash_left_is_swept(layers: Layers) -> None:
    inside = layers.work / "work"
    deep = inside.joinpath("#1", *["deep"] * 50)
    deep.mkdir(parents=True)
    (deep / "file").touch()
    (inside / "#2").symlink_to(layers.lower)
    (layers.lower / "kept").touch()
    os.mknod(inside / "#3", stat.S_IFCHR | 0o600, 0)
    os.mkfifo(inside / "#4")
    (inside / "#5").mkdir(mode=0)
    (inside / "anything").touch()
    with opened(layers) as work:
        assert work.litter == []
    assert (layers.lower / "kept").exists()


def test_an_ordinary_user_sweeps_what_is_closed_to_them(layers: Layers) -> None:
    """A staged directory gets its mode before it is published; the kernel's own work directory has mode 0."""
    inside = layers.work / "work"
    (inside / "#1/deep").mkdir(parents=True)
    for path in (layers.upper, layers.work, inside, inside / "#1", inside / "#1/deep"):
        os.chown(path, harness.USER, harness.GROUP)
    for path in (inside / "#1/deep", inside / "#1", inside):
        path.chmod(0)

    def sweep() -> list[str]:
        with opened(layers) as work:
            return work.litter

    assert harness.as_user(sweep) == []


def test_the_index_is_left_alone(layers: Layers) -> None:
    (layers.work / "index").mkdir()
    (layers.work / "index/00fb1d").touch()
    with opened(layers):
        pass
    assert os.listdir(layers.work / "index") == ["00fb1d"]


def test_a_directory_with_something_else_in_it_is_not_ours(layers: Layers) -> None:
    (layers.work / "work").mkdir()
    (layers.work / "work/#1").touch()
    (layers.work / "precious\n").touch()
    refuse(layers, "precious\\n", "not a union's")
    assert (layers.work / "precious\n").exists()
    assert (layers.work / "work/#1").exists()


def test_what_the_kernel_left_is_ours_and_the_other_way_round(layers: Layers, overlayfs: MountFactory) -> None:
    (layers.lower / "file").write_text("content")
    for _ in range(2):
        with overlayfs() as mount:
            (mount / "file").chmod(0o600)
            (mount / "new").touch()
            (mount / "new").unlink()
        with opened(layers) as work:
            assert work.litter == []
            work.work.stage_dir(0o700)


@pytest.mark.parametrize("field", ["upper", "work"])
def test_upper_and_work_under_two_mounts(field: str, layers: Layers) -> None:
    """Nothing could be renamed from one to the other, though they are on one file system."""
    path = getattr(layers, field)
    harness.run("mount", "--bind", path, path)
    refuse(layers, "another mount")


# Volatile.


def test_a_volatile_upper_is_refused_from_then_on(layers: Layers, overlayfs: MountFactory) -> None:
    (layers.work / "work").mkdir()
    with opened(layers, volatile=True) as work:
        assert work.litter == ["incompat"]
        assert os.listdir(work.inside / "incompat") == ["volatile"]
    (layers.work / "work/#1").touch()
    refuse(layers, "volatile", "work/incompat")
    refuse(layers, "volatile", volatile=True)
    assert (layers.work / "work/#1").exists()
    with pytest.raises(AssertionError, match="exit 32"), overlayfs():
        pass


def test_a_volatile_upper_can_be_accepted(layers: Layers) -> None:
    """By removing the marker, of which the kernel leaves the directory around it (ovl.rst, "Volatile mount")."""
    with opened(layers, volatile=True):
        pass
    (layers.work / "work/incompat/volatile").rmdir()
    with opened(layers) as work:
        assert work.litter == []


def test_a_volatile_upper_can_be_accepted_by_an_option(layers: Layers) -> None:
    with opened(layers, volatile=True):
        pass
    with opened(layers, accept_volatile=True) as work:
        assert work.litter == []
    with opened(layers):
        pass
    for _ in range(2):
        with opened(layers, volatile=True, accept_volatile=True) as work:
            assert os.listdir(work.inside / "incompat") == ["volatile"]


def test_what_a_later_version_needs_is_refused(layers: Layers) -> None:
    (layers.work / "work/incompat/casefold").mkdir(parents=True)
    refuse(layers, "casefold")
    refuse(layers, "casefold", accept_volatile=True)


# Staging.

STAGING: dict[str, tuple[Callable[[Workdir], Staged], int]] = {
    "file": (lambda work: work.stage_file(0o640), stat.S_IFREG),
    "directory": (lambda work: work.stage_dir(0o750), stat.S_IFDIR),
    "symlink": (lambda work: work.stage_symlink(b"to"), stat.S_IFLNK),
    "fifo": (lambda work: work.stage_node(stat.S_IFIFO | 0o600, 0), stat.S_IFIFO),
}


@pytest.fixture(params=["O_TMPFILE", "named", "no rename flags"])
def either(request: pytest.FixtureRequest, layers: Layers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Work directories that stage in each way there is."""
    lacks = {"O_TMPFILE": [], "named": ["O_TMPFILE"], "no rename flags": ["O_TMPFILE", "rename flags"]}[request.param]
    for what in lacks:
        name, number, is_refused, _ = LACKS[what]
        without(monkeypatch, name, number, is_refused)
    with opened(layers) as work:
        yield work


@pytest.mark.parametrize("kind", STAGING)
def test_what_is_published_appears_whole(kind: str, either: Open) -> None:
    stage, type_ = STAGING[kind]
    staged = stage(either.work)
    assert list(either.path.iterdir()) == []
    staged.publish(either.upper, b"new")
    found = os.lstat(either.path / "new")
    assert stat.S_IFMT(found.st_mode) == type_
    assert os.path.samestat(found, os.fstat(staged.fd.fd))
    assert either.litter == []


@pytest.mark.parametrize("kind", STAGING)
@pytest.mark.parametrize("taken", ["file", "directory", "whiteout", "symlink"])
def test_publishing_replaces_nothing(kind: str, taken: str, either: Open) -> None:
    path = either.path / "new"
    if taken == "whiteout":
        os.mknod(path, stat.S_IFCHR, 0)
    elif taken == "symlink":
        path.symlink_to("nowhere")
    else:
        path.mkdir() if taken == "directory" else path.touch()
    before = os.lstat(path)
    staged = STAGING[kind][0](either.work)
    with pytest.raises(FileExistsError):
        staged.publish(either.upper, b"new")
    assert os.path.samestat(before, os.lstat(path))
    staged.abandon()
    assert either.litter == []


@pytest.mark.parametrize("kind", STAGING)
def test_publishing_over_a_whiteout(kind: str, either: Open) -> None:
    os.mknod(either.path / "new", stat.S_IFCHR, 0)
    stage, type_ = STAGING[kind]
    staged = stage(either.work)
    if type_ == stat.S_IFDIR and not either.work.abilities.exchange:
        with pytest.raises(OSError) as caught:
            staged.publish_over(either.upper, b"new")
        assert caught.value.errno == errno.EXDEV
        staged.abandon()
    else:
        staged.publish_over(either.upper, b"new")
        assert stat.S_IFMT(os.lstat(either.path / "new").st_mode) == type_
    assert either.litter == []


@pytest.mark.parametrize("kind", STAGING)
def test_what_is_abandoned_is_gone(kind: str, either: Open) -> None:
    staged = STAGING[kind][0](either.work)
    staged.abandon()
    staged.abandon()
    assert either.litter == []
    assert list(either.path.iterdir()) == []


def test_staged_names_are_never_used_twice(work: Open) -> None:
    names = [work.work.stage_dir(0o700).name for _ in range(20)]
    assert len(set(names)) == 20
    assert all(name is not None and name.startswith(b"#") for name in names)


# Whiteouts.


@pytest.fixture(params=["chardev", "xattr"])
def whiteouts(request: pytest.FixtureRequest, layers: Layers) -> Iterator[Open]:
    with opened(layers, whiteout=request.param) as work:
        yield work


def is_whiteout(path: Path) -> bool:
    found = os.lstat(path)
    if stat.S_ISCHR(found.st_mode):
        return found.st_rdev == 0
    return found.st_size == 0 and os.getxattr(path, "trusted.overlay.whiteout") == b"y"


def test_whiteouts_share_one_inode(whiteouts: Open) -> None:
    for name in (b"a", b"b", b"c"):
        whiteouts.work.place_whiteout(whiteouts.upper, name)
    found = [os.lstat(whiteouts.path / name) for name in "abc"]
    assert all(is_whiteout(whiteouts.path / name) for name in "abc")
    assert len({st.st_ino for st in found}) == 1
    assert found[0].st_nlink == 4
    whiteouts.work.close()
    assert os.lstat(whiteouts.path / "a").st_nlink == 3
    assert whiteouts.litter == []


@pytest.mark.parametrize("number", [errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP])
@pytest.mark.parametrize("refusals", [1, 100])
def test_whiteouts_where_no_more_links_can_be_made(
    number: int, refusals: int, whiteouts: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    whiteouts.work.place_whiteout(whiteouts.upper, b"a")
    left = iter(range(refusals))
    without(monkeypatch, "link_at", number, lambda *_: next(left, None) is not None)
    whiteouts.work.place_whiteout(whiteouts.upper, b"b")
    assert is_whiteout(whiteouts.path / "b")
    assert not os.path.samefile(whiteouts.path / "a", whiteouts.path / "b")
    assert len(whiteouts.litter) <= 1  # a new one to share


def test_a_whiteout_takes_no_name_that_something_has(whiteouts: Open) -> None:
    (whiteouts.path / "a").touch()
    with pytest.raises(FileExistsError):
        whiteouts.work.place_whiteout(whiteouts.upper, b"a")
    assert not stat.S_ISCHR(os.lstat(whiteouts.path / "a").st_mode)


@pytest.mark.parametrize("directory", [True, False])
def test_replacing_by_a_whiteout(directory: bool, whiteouts: Open) -> None:
    path = whiteouts.path / "a"
    if directory:
        path.mkdir()
        (path / "inside").touch()
    else:
        path.write_text("content")
    whiteouts.work.replace_by_whiteout(whiteouts.upper, b"a", directory=directory)
    assert is_whiteout(path)
    assert len(whiteouts.litter) == 1  # the one that whiteouts are links of


def test_opaque_in_the_form_that_the_upper_can_keep(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(layers) as work:
        work.work.mark_opaque(work.upper)
    assert os.getxattr(layers.upper, "trusted.overlay.opaque") == b"y"
    os.removexattr(layers.upper, "trusted.overlay.opaque")
    name, number, is_refused, _ = LACKS["xattrs"]
    without(monkeypatch, name, number, is_refused)
    with opened(layers) as work:
        work.work.mark_opaque(work.upper)
        with pytest.raises(OSError) as caught:
            work.work.mark(work.upper, fmt.IMPURE, b"y")
        assert caught.value.errno == errno.EOPNOTSUPP
    assert os.listdir(layers.upper) == [".wh..wh..opq"]
    assert os.listxattr(layers.upper) == []


# The intent record.


def under_way(work: Open) -> Path:
    """An object that was exchanged to d/old and is to become a whiteout there, as its record says; then a crash."""
    path = work.path / "d/old"
    path.parent.mkdir()
    path.write_text("what was renamed over")
    intent.record(work.work, (b"d", b"old"), path.stat().st_ino)
    assert work.litter == ["#intent"]
    return path


@pytest.mark.parametrize("form", ["chardev", "xattr"])
def test_what_a_crash_interrupted_is_completed(form: WhiteoutForm, layers: Layers) -> None:
    with opened(layers, whiteout=form) as work:
        path = under_way(work)
    with opened(layers, whiteout=form) as work:
        intent.recover(work.work, work.upper)
        assert is_whiteout(path)
        work.work.close()
        assert work.litter == []


def test_a_directory_is_completed_too(layers: Layers) -> None:
    with opened(layers) as work:
        path = under_way(work)
        path.unlink()
        path.mkdir()
        intent.record(work.work, (b"d", b"old"), path.stat().st_ino)
    with opened(layers) as work:
        intent.recover(work.work, work.upper)
        assert is_whiteout(path)


@pytest.mark.parametrize("form", ["chardev", "xattr"])
@pytest.mark.parametrize("moved", [True, False])
def test_a_name_that_is_to_be_gone(moved: bool, form: WhiteoutForm, layers: Layers) -> None:
    """The record of a rename that leaves nothing under the old name until the whiteout comes there."""
    with opened(layers, whiteout=form) as work:
        path = work.path / "old"
        path.write_text("content")
        intent.record(work.work, (b"old",), 0)
        if moved:
            path.rename(work.path / "new")
    with opened(layers, whiteout=form) as work:
        intent.recover(work.work, work.upper)
        assert sorted(os.listdir(work.path)) == (["new", "old"] if moved else ["old"])
        assert is_whiteout(path) if moved else path.read_text() == "content"
        work.work.close()
        assert work.litter == []


@pytest.mark.parametrize("then", ["complete", "never begun", "gone", "torn", "nonsense"])
def test_where_there_is_nothing_to_complete(then: str, layers: Layers) -> None:
    with opened(layers) as work:
        path = under_way(work)
    record = layers.work / "work/#intent"
    if then == "complete":
        path.rename(layers.root / "kept")  # or the whiteout might get its inode number
        os.mknod(path, stat.S_IFCHR, 0)
    elif then == "never begun":
        path.rename(path.with_name("new"))
        path.write_text("what is renamed")
    elif then == "gone":
        path.unlink()
        path.parent.rmdir()
    else:
        record.write_bytes(record.read_bytes()[:-2] if then == "torn" else b"\0" * 100)
    before = fingerprint(layers.upper)
    with opened(layers) as work:
        intent.recover(work.work, work.upper)
        assert fingerprint(layers.upper) == before
        assert work.litter == []


def test_a_record_is_written_over_and_retired(work: Open) -> None:
    under_way(work)
    intent.record(work.work, (b"e",), 5)
    assert (work.inside / "#intent").read_bytes() == b"unionfsd rename 1\0" + b"5\0e\0"
    intent.retire(work.work)
    assert work.litter == []


@pytest.mark.parametrize("name", ["pwrite", "fsync"])
def test_a_record_that_cannot_be_kept_leaves_nothing(name: str, work: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        without(patch, name, errno.ENOSPC, lambda *_: True)
        with pytest.raises(OSError) as caught:
            intent.record(work.work, (b"e",), 5)
    assert caught.value.errno == errno.ENOSPC
    assert work.litter == []


# Cleaning.


def test_what_cannot_be_removed_is_counted(
    work: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    staged = work.work.stage_dir(0o700)
    name = staged.name
    assert name is not None
    with monkeypatch.context() as patch:
        without(patch, "rmdir_at", errno.EIO, lambda *_: True)
        staged.abandon()
    assert work.work.litter == 1
    assert [os.fsencode(entry) for entry in work.litter] == [name]
    assert "stays until the next mount" in caplog.text
    work.work.discard(name)
    work.work.discard(name)  # nothing is there any more, and nothing is wrong with that
    assert work.work.litter == 1
    assert work.litter == []


def test_removing_a_tree_follows_nothing(disk: Path) -> None:
    (disk / "outside/kept").mkdir(parents=True)
    (disk / "tree/inside").mkdir(parents=True)
    (disk / "tree/inside/link").symlink_to(disk / "outside")
    fd = os.open(disk, os.O_PATH)
    try:
        remove_tree(fd, b"tree")
        with pytest.raises(FileNotFoundError):
            remove_tree(fd, b"tree")
    finally:
        os.close(fd)
    assert sorted(os.listdir(disk)) == ["outside"]
    assert (disk / "outside/kept").is_dir()
