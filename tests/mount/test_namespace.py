"""Names made, linked, moved and removed, over what is new, in a lower, deleted, or merged."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.harness import Layers, Mount, MountFactory, run
from tests.trees import errno_of, is_whiteout
from unionfsd import syscalls

#: Where an object of the union is before an operation.
PLACES = ("lower", "upper", "both")


def rename(old: Path, new: Path, flags: int = 0) -> None:
    """renameat2(2)."""
    there = os.open(old.parent, os.O_PATH), os.open(new.parent, os.O_PATH)
    try:
        syscalls.renameat2(there[0], os.fsencode(old.name), there[1], os.fsencode(new.name), flags)
    finally:
        for fd in there:
            os.close(fd)


def put(layers: Layers, name: str, place: str) -> None:
    """A file saying its name, in lower, in upper, or in both; `whiteout` is a deleted lower file."""
    if place in ("lower", "both", "whiteout"):
        (layers.lower / name).parent.mkdir(parents=True, exist_ok=True)
        (layers.lower / name).write_text(f"lower {name}")
    if place in ("upper", "both", "whiteout"):
        (layers.upper / name).parent.mkdir(parents=True, exist_ok=True)
    if place == "whiteout":
        os.mknod(layers.upper / name, stat.S_IFCHR, 0)
    elif place != "lower":
        (layers.upper / name).write_text(f"upper {name}")


# Directories.


def test_a_directory_made_over_a_deleted_one_is_empty(layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "d/sub").mkdir(parents=True)
    (layers.lower / "d/f").touch()
    mount = mounted()
    run("rm", "-r", mount / "d")
    (mount / "d").mkdir()
    for _ in range(2):
        assert os.listdir(mount / "d") == []
        assert errno_of(os.stat, mount / "d/f") == "ENOENT"
        mount.remount()
    (mount / "d/f").write_bytes(b"new")
    assert os.listdir(mount / "d") == ["f"]


def test_a_directory_made_over_a_deleted_file_merges_nothing(layers: Layers, mounted: MountFactory) -> None:
    """Bottom: directory `x` with content. Above it: file `x`, deleted through the mount."""
    (layers.lower / "x").mkdir()
    (layers.lower / "x/f").touch()
    (layers.push() / "x").touch()
    mount = mounted()
    (mount / "x").unlink()
    (mount / "x").mkdir()
    for _ in range(2):
        assert os.listdir(mount / "x") == []
        mount.remount()


@pytest.mark.parametrize("place", PLACES)
def test_only_an_empty_directory_is_removed(place: str, layers: Layers, mounted: MountFactory) -> None:
    put(layers, "d/f", place)
    mount = mounted()
    assert errno_of(os.rmdir, mount / "d") == "ENOTEMPTY"
    (mount / "d/f").unlink()
    (mount / "d/g").mkdir()
    assert errno_of(os.rmdir, mount / "d") == "ENOTEMPTY"
    (mount / "d/g").rmdir()
    (mount / "d").rmdir()
    for _ in range(2):
        assert os.listdir(mount.path) == []
        assert errno_of(os.stat, mount / "d") == "ENOENT"
        mount.remount()
    assert os.listdir(layers.upper) == ([] if place == "upper" else ["d"])


def test_a_directory_emptied_in_an_earlier_mount_is_removed(layers: Layers, mounted: MountFactory) -> None:
    put(layers, "d/f", "whiteout")
    mount = mounted()
    (mount / "d").rmdir()
    assert is_whiteout(layers.upper / "d")


@pytest.mark.parametrize("name", ["d", "d/e"])
def test_mkdir_and_rmdir_move_the_times_of_the_parent(name: str, layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "d").mkdir()
    mount = mounted()
    parent = (mount / name).parent
    for step in ("new", "whole"):
        os.utime(parent, ns=(1, 1))
        (mount / name / step).mkdir() if name == "d" else (parent / step).mkdir()
    assert os.stat(mount / "d").st_mtime_ns > 1
    os.utime(mount / "d", ns=(1, 1))
    os.rmdir(mount / "d/whole")
    assert os.stat(mount / "d").st_mtime_ns > 1


def test_link_counts_of_files_are_true(layers: Layers, mounted: MountFactory) -> None:
    mount = mounted()
    (mount / "a").touch()
    for count, name in enumerate("bcd", start=2):
        os.link(mount / "a", mount / name)
        assert os.stat(mount / "a").st_nlink == os.stat(mount / name).st_nlink == count
    for count, name in ((3, "a"), (2, "c"), (1, "b")):
        (mount / name).unlink()
        assert os.stat(mount / "d").st_nlink == count


# Links.


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("target", ["absent", "whiteout"])
def test_a_hard_link_is_the_same_file(target: str, place: str, layers: Layers, mounted: MountFactory) -> None:
    put(layers, "x", place)
    if target == "whiteout":
        put(layers, "y", "whiteout")
    mount = mounted()
    content = (mount / "x").read_text()
    os.link(mount / "x", mount / "y")
    first, second = os.stat(mount / "x"), os.stat(mount / "y")
    assert first.st_ino == second.st_ino
    assert first.st_nlink == second.st_nlink == 2
    assert (mount / "y").read_text() == content
    with (mount / "x").open("a") as file:
        file.write(" and more")
    assert (mount / "y").read_text() == f"{content} and more"
    mount.remount()
    assert os.stat(mount / "x").st_ino == os.stat(mount / "y").st_ino
    (mount / "x").unlink()
    assert (mount / "y").read_text() == f"{content} and more"
    assert os.stat(mount / "y").st_nlink == 1


def test_links_that_cannot_be(layers: Layers, mounted: MountFactory) -> None:
    for name in ("a", "b"):
        put(layers, name, "lower")
    (layers.lower / "d").mkdir()
    mount = mounted()
    assert errno_of(os.link, mount / "a", mount / "b") == "EEXIST"
    assert errno_of(os.link, mount / "a", mount / "d") == "EEXIST"
    assert errno_of(os.link, mount / "d", mount / "e") == "EPERM"
    assert errno_of(os.link, mount / "absent", mount / "e") == "ENOENT"
    assert errno_of(os.link, mount / "a", mount / "absent/e") == "ENOENT"
    assert errno_of(os.link, mount / "a", mount / "b/e") == "ENOTDIR"
    assert errno_of(os.link, mount / "a", layers.root / "outside") == "EXDEV"
    assert os.listdir(layers.upper) == []


def test_a_symlink_itself_can_be_linked(layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "s").symlink_to("target")
    mount = mounted()
    os.link(mount / "s", mount / "t", follow_symlinks=False)
    assert os.readlink(mount / "t") == "target"
    assert os.lstat(mount / "s").st_ino == os.lstat(mount / "t").st_ino


def test_symlinks_are_followed_within_the_mount(layers: Layers, mounted: MountFactory) -> None:
    put(layers, "d/f", "lower")
    (layers.lower / "s").symlink_to("d")
    mount = mounted()
    (mount / "t").symlink_to("s/f")
    assert (mount / "t").read_text() == "lower d/f"
    (mount / "t").write_text("through two links")
    assert (mount / "d/f").read_text() == "through two links"
    (mount / "loop").symlink_to("loop")
    assert errno_of(os.stat, mount / "loop") == "ELOOP"


def test_the_longest_symlink_target(layers: Layers, mounted: MountFactory) -> None:
    target = "t" * 4095
    (layers.lower / "lower").symlink_to(target)
    mount = mounted()
    (mount / "upper").symlink_to(target)
    assert os.readlink(mount / "lower") == os.readlink(mount / "upper") == target
    assert errno_of(os.symlink, target + "t", mount / "too-long") == "ENAMETOOLONG"


# Renaming.


@pytest.mark.parametrize("to", ["absent", "whiteout", *PLACES])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("where", ["", "d/", "new/"])
def test_a_renamed_file_is_there_and_no_longer_here(
    where: str, place: str, to: str, layers: Layers, mounted: MountFactory
) -> None:
    """Within a directory, into a merged one, into a new one; onto nothing, a deleted name, or another file."""
    (layers.lower / "d").mkdir()
    put(layers, "x", place)
    if to != "absent" and where != "new/":
        put(layers, f"{where}y", to)
    mount = mounted()
    (mount / "new").mkdir()
    content, ino = (mount / "x").read_text(), os.stat(mount / "x").st_ino
    os.rename(mount / "x", mount / f"{where}y")
    assert os.stat(mount / f"{where}y").st_ino == ino
    for _ in range(2):
        assert errno_of(os.stat, mount / "x") == "ENOENT"
        assert "x" not in os.listdir(mount.path)
        assert (mount / f"{where}y").read_text() == content
        assert os.stat(mount / f"{where}y").st_nlink == 1
        mount.remount()


@pytest.mark.parametrize("place", PLACES)
def test_noreplace_spares_what_is_there(place: str, layers: Layers, mounted: MountFactory) -> None:
    put(layers, "x", place)
    put(layers, "y", place)
    put(layers, "gone", "whiteout")
    mount = mounted()
    content = (mount / "x").read_text(), (mount / "y").read_text()
    assert errno_of(rename, mount / "x", mount / "y", syscalls.RENAME_NOREPLACE) == "EEXIST"
    assert ((mount / "x").read_text(), (mount / "y").read_text()) == content
    rename(mount / "x", mount / "gone", syscalls.RENAME_NOREPLACE)
    rename(mount / "y", mount / "absent", syscalls.RENAME_NOREPLACE)
    for _ in range(2):
        assert ((mount / "gone").read_text(), (mount / "absent").read_text()) == content
        assert sorted(os.listdir(mount.path)) == ["absent", "gone"]
        mount.remount()


@pytest.mark.parametrize("second", PLACES)
@pytest.mark.parametrize("first", PLACES)
def test_exchange_swaps_two_files(first: str, second: str, layers: Layers, mounted: MountFactory) -> None:
    put(layers, "x", first)
    put(layers, "d/y", second)
    mount = mounted()
    content = (mount / "x").read_text(), (mount / "d/y").read_text()
    inos = os.stat(mount / "x").st_ino, os.stat(mount / "d/y").st_ino
    rename(mount / "x", mount / "d/y", syscalls.RENAME_EXCHANGE)
    assert (os.stat(mount / "d/y").st_ino, os.stat(mount / "x").st_ino) == inos
    for _ in range(2):
        assert ((mount / "d/y").read_text(), (mount / "x").read_text()) == content
        mount.remount()


def test_exchange_of_unlike_objects(layers: Layers, mounted: MountFactory) -> None:
    put(layers, "f", "lower")
    mount = mounted()
    (mount / "new").mkdir()
    (mount / "new/inside").touch()
    rename(mount / "f", mount / "new", syscalls.RENAME_EXCHANGE)
    for _ in range(2):
        assert (mount / "new").read_text() == "lower f"
        assert os.listdir(mount / "f") == ["inside"]
        mount.remount()
    assert errno_of(rename, mount / "f", mount / "absent", syscalls.RENAME_EXCHANGE) == "ENOENT"


def test_without_redirects_a_directory_with_a_lower_is_not_renamed(layers: Layers, mounted: MountFactory) -> None:
    """EXDEV, as overlayfs says; mv(1) then copies and removes."""
    put(layers, "d/f", "lower")
    put(layers, "m/f", "both")
    mount = mounted("redirect_dir=off")
    (mount / "new").mkdir()
    for name in ("d", "m"):
        assert errno_of(os.rename, mount / name, mount / "moved") == "EXDEV"
        assert errno_of(os.rename, mount / name, mount / "new") == "EXDEV"
        assert errno_of(rename, mount / name, mount / "new", syscalls.RENAME_EXCHANGE) == "EXDEV"
        assert errno_of(rename, mount / "new", mount / name, syscalls.RENAME_EXCHANGE) == "EXDEV"
        run("mv", mount / name, mount / f"{name}-moved")
    for _ in range(2):
        assert sorted(os.listdir(mount.path)) == ["d-moved", "m-moved", "new"]
        assert (mount / "d-moved/f").read_text() == "lower d/f"
        assert (mount / "m-moved/f").read_text() == "upper m/f"
        mount.remount()


REDIRECTS = "redirect_dir=on"


@pytest.mark.parametrize("to", ["y", "other/y", "new/y"])
@pytest.mark.parametrize("over", ["absent", "whiteout", "empty"])
@pytest.mark.parametrize("place", PLACES)
def test_a_directory_with_a_lower_is_renamed_with_all_in_it(
    place: str, over: str, to: str, layers: Layers, mounted: MountFactory
) -> None:
    """Within its parent, into a merged directory and into a new one; its contents come from the lower all the same."""
    put(layers, "x/deep/f", "lower")
    put(layers, "x/g", place)
    (layers.lower / "other").mkdir()
    (layers.upper / "other").mkdir()
    if over != "absent" and to != "new/y":
        (layers.lower / to).mkdir()
        (layers.lower / to / "hidden").touch()
        if over == "whiteout":
            os.mknod(layers.upper / to, stat.S_IFCHR, 0)
        else:
            (layers.upper / to).mkdir()
            os.mknod(layers.upper / to / "hidden", stat.S_IFCHR, 0)
    mount = mounted(REDIRECTS)
    (mount / "new").mkdir()
    content, ino = (mount / "x/g").read_text(), os.stat(mount / "x/deep/f").st_ino
    os.rename(mount / "x", mount / to)
    assert os.stat(mount / to / "deep/f").st_ino == ino
    for _ in range(2):
        assert errno_of(os.stat, mount / "x") == "ENOENT"
        assert "x" not in os.listdir(mount.path)
        assert sorted(os.listdir(mount / to)) == ["deep", "g"]
        assert (mount / to / "deep/f").read_text() == "lower x/deep/f"
        assert (mount / to / "g").read_text() == content
        mount.remount()
    (mount / to / "deep/f").write_text("changed")
    (mount / "x").mkdir()
    for _ in range(2):
        assert os.listdir(mount / "x") == []
        assert (mount / to / "deep/f").read_text() == "changed"
        mount.remount()


def test_merged_directories_are_exchanged(layers: Layers, mounted: MountFactory) -> None:
    for name in ("d/f", "other/e/g"):
        put(layers, name, "lower")
    mount = mounted(REDIRECTS)
    (mount / "new").mkdir()
    (mount / "new/h").touch()
    rename(mount / "d", mount / "other/e", syscalls.RENAME_EXCHANGE)
    rename(mount / "d", mount / "new", syscalls.RENAME_EXCHANGE)
    for _ in range(2):
        assert os.listdir(mount / "d") == ["h"]
        assert (mount / "new/g").read_text() == "lower other/e/g"
        assert (mount / "other/e/f").read_text() == "lower d/f"
        mount.remount()


def test_a_directory_is_renamed_again_and_again(layers: Layers, mounted: MountFactory) -> None:
    """Above and below other renamed ones, and back to where it was; each place it left is free for a new one."""
    put(layers, "a/b/c/f", "lower")
    (layers.lower / "other").mkdir()
    mount = mounted(REDIRECTS)
    for old, new in (
        ("a/b", "a/x"),
        ("a", "z"),
        ("z/x/c", "other/c"),
        ("z", "other/c/z"),
        ("other", "a"),
        ("a/c/z", "z"),
    ):
        os.rename(mount / old, mount / new)
        (mount / old).mkdir(parents=True)
        assert os.listdir(mount / old) == []
        mount.remount()
        assert os.listdir(mount / old) == []
        (mount / old).rmdir()
    assert (mount / "a/c/f").read_text() == "lower a/b/c/f"
    assert os.listdir(mount / "z/x") == []
    os.rename(mount / "a/c", mount / "z/x/c")
    run("rm", "-r", mount / "a")
    os.rename(mount / "z/x", mount / "z/b")
    os.rename(mount / "z", mount / "a")
    for _ in range(2):
        assert (mount / "a/b/c/f").read_text() == "lower a/b/c/f"
        mount.remount()


@pytest.mark.parametrize("to", ["absent", "whiteout", "empty-lower", "empty-upper", "emptied"])
def test_a_new_directory_is_renamed_with_all_in_it(to: str, layers: Layers, mounted: MountFactory) -> None:
    if to == "whiteout":
        (layers.lower / "y").mkdir()
        (layers.lower / "y/hidden").touch()
        os.mknod(layers.upper / "y", stat.S_IFCHR, 0)
    elif to == "empty-lower":
        (layers.lower / "y").mkdir()
    elif to == "emptied":
        put(layers, "y/hidden", "whiteout")
    mount = mounted()
    if to == "empty-upper":
        (mount / "y").mkdir()
    (mount / "x/deep/er").mkdir(parents=True)
    (mount / "x/deep/f").write_bytes(b"data")
    os.rename(mount / "x", mount / "y")
    for _ in range(2):
        assert os.listdir(mount.path) == ["y"]
        assert sorted(os.listdir(mount / "y")) == ["deep"]
        assert sorted(os.listdir(mount / "y/deep")) == ["er", "f"]
        assert (mount / "y/deep/f").read_bytes() == b"data"
        mount.remount()


def test_a_new_directory_under_a_merged_one_merges_nothing(layers: Layers, mounted: MountFactory) -> None:
    """The names below its new place in the lower stay hidden: the directory arrives opaque."""
    (layers.lower / "m/y").mkdir(parents=True)
    (layers.lower / "m/y/hidden").touch()
    mount = mounted()
    run("rm", "-r", mount / "m/y")
    (mount / "x").mkdir()
    (mount / "x/f").touch()
    os.rename(mount / "x", mount / "m/y")
    for _ in range(2):
        assert os.listdir(mount / "m/y") == ["f"]
        mount.remount()


def test_renames_that_cannot_be(layers: Layers, mounted: MountFactory) -> None:
    put(layers, "f", "lower")
    put(layers, "full/f", "lower")
    mount = mounted()
    (mount / "d/sub").mkdir(parents=True)
    assert errno_of(os.rename, mount / "d", mount / "full") == "ENOTEMPTY"
    assert errno_of(os.rename, mount / "d", mount / "f") == "ENOTDIR"
    assert errno_of(os.rename, mount / "f", mount / "d") == "EISDIR"
    assert errno_of(os.rename, mount / "d", mount / "d/sub/x") == "EINVAL"
    assert errno_of(os.rename, mount / "d/sub", mount / "d") == "ENOTEMPTY"
    assert errno_of(os.rename, mount / "absent", mount / "f") == "ENOENT"
    assert errno_of(os.rename, mount / "f", mount / "absent/f") == "ENOENT"
    assert errno_of(os.rename, mount / "f", layers.root / "f") == "EXDEV"
    assert (mount / "f").read_text() == "lower f"
    assert os.listdir(layers.upper) == ["d"]


@pytest.mark.parametrize("place", PLACES)
def test_renaming_to_itself_changes_nothing(place: str, layers: Layers, mounted: MountFactory) -> None:
    put(layers, "x", place)
    mount = mounted()
    content = (mount / "x").read_text()
    os.rename(mount / "x", mount / "x")
    os.link(mount / "x", mount / "y")
    os.rename(mount / "x", mount / "y")  # two names of one file: rename(2) leaves both
    assert sorted(os.listdir(mount.path)) == ["x", "y"]
    assert (mount / "x").read_text() == (mount / "y").read_text() == content


def test_open_files_follow_their_renames(layers: Layers, mounted: MountFactory) -> None:
    put(layers, "x", "lower")
    mount = mounted()
    with (mount / "x").open("r+") as file:
        os.rename(mount / "x", mount / "y")
        file.write("UPPER")
    assert (mount / "y").read_text() == "UPPER x"


def test_what_a_rename_replaced_stays_open(layers: Layers, mounted: MountFactory) -> None:
    put(layers, "x", "lower")
    put(layers, "y", "lower")
    mount = mounted()
    with (mount / "y").open() as file:
        os.rename(mount / "x", mount / "y")
        assert file.read() == "lower y"


def test_many_renames_in_a_row(layers: Layers, mounted: MountFactory) -> None:
    put(layers, "d/x", "lower")
    mount = mounted()
    (mount / "e").mkdir()
    here = mount / "d/x"
    for number in range(50):
        there = mount / f"{'de'[number % 2]}/{number % 3}"
        os.rename(here, there)
        here = there
    assert [p.name for name in "de" for p in (mount / name).iterdir()] == [here.name]
    assert here.read_text() == "lower d/x"


def test_a_read_only_union_changes_nothing(layers: Layers, mounted: MountFactory) -> None:
    put(layers, "d/f", "lower")
    layers.push()
    mount: Mount = mounted(upper=False)
    path = mount / "d/f"
    attempts = [
        errno_of(path.write_text, "x"),
        errno_of(path.unlink),
        errno_of(os.chmod, path, 0o600),
        errno_of(os.utime, path),
        errno_of(os.rename, path, mount / "d/g"),
        errno_of(os.link, path, mount / "d/g"),
        errno_of((mount / "new").mkdir),
        errno_of((mount / "new").touch),
        errno_of(os.setxattr, path, "user.a", b"1"),
        errno_of(os.truncate, path, 0),
    ]
    assert set(attempts) == {"EROFS"}
    assert path.read_text() == "lower d/f"
    assert os.listdir(layers.upper) == []
