"""Whiteouts and opaque directories: read in every form and layer, hidden, written in the form asked for."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import Layers, MountFactory, run
from tests.trees import errno_of, is_whiteout

#: Written by kernel overlayfs: it reads them as we do.
KERNEL_WHITEOUTS = ("chardev", "xattr")
WHITEOUTS = (*KERNEL_WHITEOUTS, "xattr-user", "wh")
OPAQUES = {
    "trusted": ("trusted.overlay.opaque", b"y"),
    "user": ("user.overlay.opaque", b"y"),
    "fuseoverlayfs": ("user.fuseoverlayfs.opaque", b"y"),
    "wh": None,
}


def whiteout(path: Path, form: str) -> None:
    """Put a whiteout of that form where `path` is to be hidden."""
    if form == "chardev":
        os.mknod(path, stat.S_IFCHR, 0)
    elif form == "wh":
        path.with_name(f".wh.{path.name}").touch()
    else:
        namespace = "user" if form == "xattr-user" else "trusted"
        path.touch()
        os.setxattr(path, f"{namespace}.overlay.whiteout", b"")
        os.setxattr(path.parent, f"{namespace}.overlay.opaque", b"x")


def opaque(path: Path, form: str) -> None:
    """Mark a directory opaque in that form."""
    mark = OPAQUES[form]
    if mark is None:
        (path / ".wh..wh..opq").touch()
    else:
        os.setxattr(path, *mark)


def marked(layers: Layers, where: str, mark: Callable[[Path], None]) -> None:
    """Three lowers: `d` in all, `d/gone` and `d/kept` at the bottom, and what `mark` does to `d` of a layer above."""
    (layers.lower / "d/gone").mkdir(parents=True)
    (layers.lower / "d/gone/deep").touch()
    (layers.lower / "d/kept").touch()
    middle, top = layers.push(), layers.push()
    directory = {"middle": middle, "top": top, "upper": layers.upper}[where] / "d"
    for layer in (middle, top, layers.upper):
        (layer / "d").mkdir()
    (directory / "own").touch()
    mark(directory)


@pytest.mark.deviates
@pytest.mark.parametrize("where", ["middle", "top", "upper"])
@pytest.mark.parametrize("form", WHITEOUTS)
@pytest.mark.privileged
def test_a_whiteout_of_any_form_hides_what_is_below(
    form: str, where: str, layers: Layers, mounted: MountFactory
) -> None:
    marked(layers, where, lambda directory: whiteout(directory / "gone", form))
    mount = mounted()
    for _ in range(2):
        assert sorted(os.listdir(mount / "d")) == ["kept", "own"]
        assert errno_of(os.lstat, mount / "d/gone") == "ENOENT"
        assert errno_of(os.lstat, mount / "d/gone/deep") == "ENOENT"
        assert errno_of(os.lstat, mount / "d/.wh.gone") == "ENOENT"
        mount.remount()
    (mount / "d/gone").mkdir()
    assert os.listdir(mount / "d/gone") == []
    mount.remount()
    assert os.listdir(mount / "d/gone") == []
    (mount / "d/gone").rmdir()
    assert sorted(os.listdir(mount / "d")) == ["kept", "own"]


@pytest.mark.deviates
@pytest.mark.parametrize("where", ["middle", "top", "upper"])
@pytest.mark.parametrize("form", OPAQUES)
@pytest.mark.privileged
def test_an_opaque_directory_of_any_form_hides_what_is_below(
    form: str, where: str, layers: Layers, mounted: MountFactory
) -> None:
    marked(layers, where, lambda directory: opaque(directory, form))
    mount = mounted()
    for _ in range(2):
        assert os.listdir(mount / "d") == ["own"]
        for name in ("gone", "kept", "gone/deep", ".wh..wh..opq"):
            assert errno_of(os.lstat, mount / "d" / name) == "ENOENT"
        mount.remount()
    (mount / "d/kept").touch()
    (mount / "d/own").unlink()
    assert os.listdir(mount / "d") == ["kept"]
    run("rm", "-r", mount / "d")
    assert os.listdir(mount.path) == []


@pytest.mark.deviates
def test_wh_files_hide_nothing_of_their_own_layer(layers: Layers, mounted: MountFactory) -> None:
    """As in OCI image layers: a whiteout and the name itself in one layer, and the name stays."""
    (layers.lower / "d").mkdir()
    (layers.lower / "d/x").write_text("below")
    top = layers.push()
    (top / "d").mkdir()
    (top / "d/x").write_text("same layer")
    (top / "d/.wh.x").touch()
    mount = mounted()
    assert (mount / "d/x").read_text() == "same layer"
    assert os.listdir(mount / "d") == ["x"]


def test_a_whiteout_of_nothing_is_hidden_too(layers: Layers, mounted: MountFactory) -> None:
    whiteout(layers.lower / "stray", "chardev")
    whiteout(layers.upper / "other", "chardev")
    mount = mounted()
    assert os.listdir(mount.path) == []
    (mount / "stray").touch()
    (mount / "other").touch()
    assert sorted(os.listdir(mount.path)) == ["other", "stray"]


@pytest.mark.deviates
@pytest.mark.parametrize("form", ["chardev", "xattr", "wh"])
@pytest.mark.privileged
def test_whiteouts_are_written_in_the_form_asked_for(form: str, layers: Layers, mounted: MountFactory) -> None:
    """For a file and a directory deleted, a file renamed away, and a directory made anew over a deleted one."""
    for name in ("file", "moved"):
        (layers.lower / name).write_text(name)
    for name in ("directory", "renewed"):
        (layers.lower / name).mkdir()
        (layers.lower / name / "inside").touch()
    mount = mounted(f"whiteout={form}")
    (mount / "file").unlink()
    os.rename(mount / "moved", mount / "new")
    for name in ("directory", "renewed"):
        run("rm", "-r", mount / name)
    (mount / "renewed").mkdir()
    for _ in range(2):
        assert sorted(os.listdir(mount.path)) == ["new", "renewed"]
        assert os.listdir(mount / "renewed") == []
        mount.remount()
    for name in ("file", "directory", "moved"):
        assert _form(layers.upper / name) == form


def _form(path: Path) -> str:
    if path.with_name(f".wh.{path.name}").exists():
        return "both" if os.path.lexists(path) else "wh"
    return "chardev" if is_whiteout(path) else _xattr_form(path)


def _xattr_form(path: Path) -> str:
    os.getxattr(path, "trusted.overlay.whiteout")
    return "xattr" if path.stat().st_size == 0 else "damaged"


def test_a_user_cannot_make_a_whiteout(layers: Layers, mounted: MountFactory) -> None:
    """A character device 0:0 would be one: making it is refused, and nothing is hidden by trying."""
    (layers.lower / "x").touch()
    mount = mounted()
    assert errno_of(os.mknod, mount / "new", stat.S_IFCHR, 0) == "EPERM"
    assert os.listdir(mount.path) == ["x"]
    assert os.listdir(layers.upper) == []


@pytest.mark.deviates
@pytest.mark.parametrize("name", [".wh.x", ".wh..wh..opq", ".wh."])
def test_wh_names_cannot_be_used(name: str, layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "x").touch()
    (layers.lower / "d").mkdir()
    mount = mounted()
    attempts = {
        errno_of((mount / name).touch),
        errno_of((mount / name).mkdir),
        errno_of((mount / name).symlink_to, "t"),
        errno_of(os.mkfifo, mount / name),
        errno_of(os.link, mount / "x", mount / name),
        errno_of(os.rename, mount / "x", mount / name),
    }
    assert "ok" not in attempts
    assert len(attempts) == 1
    assert sorted(os.listdir(mount.path)) == ["d", "x"]
    assert [p for p in layers.upper.iterdir() if p.name.startswith(".wh.")] == []


@pytest.mark.privileged
def test_marks_are_hidden_from_users(layers: Layers, mounted: MountFactory) -> None:
    """Whatever the union keeps in xattrs of copied-up, opaque and merged objects."""
    (layers.lower / "d").mkdir()
    (layers.lower / "d/f").touch()
    (layers.lower / "gone").mkdir()
    mount = mounted()
    os.setxattr(mount / "d/f", "user.mine", b"1")
    (mount / "gone").rmdir()
    (mount / "gone").mkdir()
    assert os.listxattr(mount / "d/f") == ["user.mine"]
    for name in ("d", "gone", "."):
        assert os.listxattr(mount / name) == []
    for mark in ("opaque", "origin", "impure", "whiteout"):
        for name in ("d", "d/f", "gone", "."):
            assert errno_of(os.getxattr, mount / name, f"trusted.overlay.{mark}") == "ENODATA"
    assert os.getxattr(layers.upper / "gone", "trusted.overlay.opaque") == b"y"


@pytest.mark.privileged
def test_a_user_cannot_forge_marks(layers: Layers, mounted: MountFactory) -> None:
    """What a user of the mount sets under the union's own names is kept apart: shown back, and without effect."""
    (layers.lower / "d").mkdir()
    (layers.lower / "d/f").touch()
    mount = mounted()
    os.setxattr(mount / "d", "trusted.overlay.opaque", b"y")
    assert os.getxattr(mount / "d", "trusted.overlay.opaque") == b"y"
    assert "trusted.overlay.opaque" in os.listxattr(mount / "d")
    for _ in range(2):
        assert os.listdir(mount / "d") == ["f"]
        mount.remount()
    os.removexattr(mount / "d", "trusted.overlay.opaque")
    assert os.listxattr(mount / "d") == []
