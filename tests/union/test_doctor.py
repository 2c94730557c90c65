"""The doctor: it finds what was planted and nothing else, changes nothing, and converts without anybody seeing it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.union.client import UMASK, Client, union_snapshot
from tests.union.seam import Seam, StoppedError, Stopping
from tests.union.stack import Stack, has_kernel_overlayfs, scratch_directory
from tests.union.trees import Obj, Tree, Whiteout, diff, directory, regular, snapshot, timeless
from unionfsd import convert as converting
from unionfsd.ctl.main import main
from unionfsd.doctor import examine
from unionfsd.opening import open_idle

LOWER = directory(
    {
        b"a": regular(b"a"),
        b"b": regular(b"b"),
        b"d": directory({b"x": regular(b"x"), b"y": regular(b"y"), b"sub": directory({b"deep": regular(b"deep")})}),
        b"e": directory({b"z": regular(b"z")}),
    }
)


@pytest.fixture
def scratch() -> Iterator[bytes]:
    before = os.umask(UMASK)
    with scratch_directory() as path:
        yield path
    os.umask(before)


def stack_of(scratch: bytes, upper: Obj) -> Stack:
    return Stack(scratch, [LOWER], upper)


def findings(stack: Stack, *, lowers: bool = True) -> list[tuple[str, bytes]]:
    """Code and path of everything that is found."""
    assert stack.upper is not None
    idle = open_idle(stack.upper, tuple(stack.lowers) if lowers else (), stack.work)
    try:
        return [(found.code, found.path) for found in examine(idle)]
    finally:
        idle.close()


def marked(path: str, name: str, value: bytes) -> Callable[[bytes], None]:
    return lambda root: os.setxattr(os.path.join(root, os.fsencode(path)), name, value)


def in_work(path: str) -> Callable[[bytes], None]:
    return lambda root: os.makedirs(os.path.join(os.path.dirname(root), b"work", os.fsencode(path)))


def whiteout_without_mark(root: bytes) -> None:
    os.close(os.open(root + b"/d/x", os.O_CREAT))
    os.setxattr(root + b"/d/x", "trusted.overlay.whiteout", b"y")


PLAIN = directory({b"d": directory({b"new": regular(b"new")}), b"file": regular(b"file")})

PLANTED: dict[str, tuple[Callable[[bytes], None], list[tuple[str, bytes]]]] = {
    "nothing": (lambda root: None, []),
    "redirect out of the layer": (marked("d", "trusted.overlay.redirect", b"../e"), [("bad-redirect", b"/d")]),
    "redirect to nothing": (marked("d", "trusted.overlay.redirect", b"/none"), [("dangling-redirect", b"/d")]),
    "redirect": (marked("d", "trusted.overlay.redirect", b"/e"), []),
    "whiteout of nothing": (
        lambda root: os.mknod(root + b"/d/none", stat.S_IFCHR, 0),
        [("needless-whiteout", b"/d/none")],
    ),
    "whiteout": (lambda root: os.mknod(root + b"/d/x", stat.S_IFCHR, 0), []),
    "unmarked whiteout": (whiteout_without_mark, [("unmarked-whiteout", b"/d/x")]),
    "origin": (marked("file", "trusted.overlay.origin", b"\0\xfb?"), [("bad-origin", b"/file")]),
    "metacopy": (marked("file", "trusted.overlay.metacopy", b""), [("metacopy-without-data", b"/file")]),
    "opaque for fuse-overlayfs": (
        lambda root: os.close(os.open(root + b"/d/.wh..wh..opq", os.O_CREAT)),
        [("foreign-opaque", b"/d")],
    ),
    "aufs": (lambda root: os.mkdir(root + b"/.wh..wh.plnk"), [("aufs-leftover", b"/.wh..wh.plnk")]),
    "owners": (
        marked("file", "user.containers.override_stat", b"0:0:644"),
        [("unused-owners", b"/")],
    ),
    "staged": (in_work("work/#1"), [("leftover", b"/work/#1")]),
    "volatile": (in_work("work/incompat/volatile"), [("incompat", b"/work/incompat/volatile")]),
    "foreign work": (in_work("home"), [("foreign-work", b"/home")]),
    "index": (in_work("index/none"), [("bad-index", b"/index/none")]),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_was_planted_is_found(what: str, scratch: bytes) -> None:
    stack = stack_of(scratch, PLAIN)
    assert stack.upper is not None
    plant, expected = PLANTED[what]
    plant(stack.upper)
    before = [snapshot(layer) for layer in stack.layers]
    assert findings(stack) == expected
    assert [snapshot(layer) for layer in stack.layers] == before


def test_what_a_mount_leaves_is_healthy(scratch: bytes) -> None:
    stack = stack_of(scratch, directory({}))
    union = stack.union()
    client = Client(union)
    client.unlink((b"a",))
    client.mkdir((b"a",), 0o755)
    client.rename((b"d", b"sub"), (b"a", b"moved"), 0)
    client.rename((b"e",), (b"f",), 0)
    client.append((b"b",), b"more")
    client.unlink((b"d", b"x"))
    client.link((b"b",), (b"d", b"b"))
    union.close()
    assert findings(stack) == []


def test_an_origin_that_is_gone_is_a_note(scratch: bytes) -> None:
    stack = stack_of(scratch, directory({}))
    union = stack.union()
    Client(union).append((b"b",), b"more")
    union.close()
    os.unlink(stack.lowers[0] + b"/b")
    assert findings(stack) == [("dead-origin", b"/b")]


def test_a_deep_upper_ends_no_walk(scratch: bytes) -> None:
    stack = stack_of(scratch, directory({}))
    assert stack.upper is not None
    here = os.open(".", os.O_PATH)
    try:
        os.chdir(stack.upper)
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        os.setxattr(".", "trusted.overlay.redirect", b"/a/../b")
    finally:
        os.fchdir(here)
        os.close(here)
    assert [code for code, _ in findings(stack, lowers=False)] == ["bad-redirect"]
    subprocess.run(["rm", "-r", stack.upper], check=True)  # rmtree recurses


# Converting.

FORMS = directory(
    {
        b"a": Whiteout("chardev"),
        b"b": Whiteout("wh"),
        b"d": directory({b"x": Whiteout("xattr"), b"y": Whiteout("chardev"), b"sub": directory({}, opaque="wh")}),
        b"e": directory({b"own": regular(b"own")}, opaque="fuseoverlayfs"),
    }
)


def convert(stack: Stack, form: converting.Form, *, apply: bool = True) -> Sequence[converting.Step]:
    assert stack.upper is not None
    idle = open_idle(stack.upper, (), None)
    try:
        return list(converting.convert(idle, form, apply=apply))
    finally:
        idle.close()


def view(stack: Stack) -> Tree:
    union = stack.union()
    try:
        return timeless(union_snapshot(union))
    finally:
        union.close()


def codes(stack: Stack) -> set[str]:
    return {code for code, _ in findings(stack)}


@pytest.mark.parametrize("form", converting.FORMS)
def test_every_form_shows_the_same(form: converting.Form, scratch: bytes) -> None:
    stack = stack_of(scratch, FORMS)
    before = view(stack)
    times = os.stat(stack.upper or b"").st_mtime_ns
    planned = convert(stack, form, apply=False)
    assert view(stack) == before
    assert convert(stack, form) == planned
    assert view(stack) == before
    assert os.stat(stack.upper or b"").st_mtime_ns == times
    assert convert(stack, form) == []
    assert "mixed-whiteouts" not in codes(stack)
    if form == "kernel":
        assert codes(stack) == set()
        if has_kernel_overlayfs():
            assert diff(timeless(stack.kernel_tree()), before) == []
    for other in converting.FORMS:
        convert(stack, other)
        assert view(stack) == before


@pytest.mark.parametrize("form", converting.FORMS)
def test_a_crash_while_converting_changes_nothing_that_can_be_seen(form: converting.Form, scratch: bytes) -> None:
    def fresh(number: int) -> Stack:
        os.mkdir(scratch + b"/%d" % number)
        return stack_of(scratch + b"/%d" % number, FORMS)

    whole = fresh(0)
    before = view(whole)
    with Seam() as seam:
        convert(whole, form)
    assert len(seam.calls) > 5
    for index in range(len(seam.calls)):
        stack = fresh(index + 1)
        with Stopping(index), pytest.raises(StoppedError):
            convert(stack, form)
        assert diff(view(stack), before) == [], f"before call {index} of {seam.calls}"
        convert(stack, form)
        assert view(stack) == before


def test_what_has_no_place_in_a_form_stays(scratch: bytes) -> None:
    stack = stack_of(scratch, PLAIN)
    assert stack.upper is not None
    os.setxattr(stack.upper + b"/d", "trusted.overlay.redirect", b"/e")
    (step,) = convert(stack, "fuse-overlayfs")
    assert step.path == b"/d"
    assert step.error is not None
    assert os.getxattr(stack.upper + b"/d", "trusted.overlay.redirect") == b"/e"


# The verb.


def test_the_verb(scratch: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    stack = stack_of(scratch, FORMS)
    assert stack.upper is not None
    upper, lower, work = map(os.fsdecode, (stack.upper, stack.lowers[0], stack.work))
    assert main(["doctor", upper, lower, f"--work={work}"]) == 0
    assert "mixed-whiteouts: upper:/: deletions are recorded as chardev and wh and xattr" in capsys.readouterr().out
    os.setxattr(stack.upper + b"/d", "trusted.overlay.redirect", b"..")
    assert main(["doctor", upper, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [row["path"] for row in found if row["severity"] == "problem"] == ["/d"]
    os.removexattr(stack.upper + b"/d", "trusted.overlay.redirect")
    assert main(["doctor", upper, "--convert-to=kernel"]) == 0
    assert "to do: /b: wh whiteout to a device node" in capsys.readouterr().out.replace("/.wh.b", "/b")
    assert main(["doctor", upper, "--convert-to=kernel", "--apply", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["applied"]
    assert main(["doctor", upper, "--apply"]) == 2
    assert main(["doctor", upper + "/none"]) == 3


def test_an_upper_in_use_is_left_alone(scratch: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    stack = stack_of(scratch, PLAIN)
    union = stack.union()
    try:
        assert main(["doctor", os.fsdecode(stack.upper or b"")]) == 4
    finally:
        union.close()
    assert "in use by another mount" in capsys.readouterr().err
