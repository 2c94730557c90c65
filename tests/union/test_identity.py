"""An upper that was used with other lowers is refused by name, or made one of them; layers that were moved are not."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.union.client import UMASK, Client
from tests.union.stack import Stack, has_kernel_overlayfs, overlay, scratch_directory
from tests.union.test_index import links_of
from tests.union.trees import directory, regular
from unionfsd import cli
from unionfsd.errors import UserError
from unionfsd.union import Union

ORIGIN = "trusted.overlay.origin"
LOWER = directory({b"d": directory({b"x": regular(b"lower")}), b"f": regular(b"lower file")})
OTHER = directory({b"d": directory({b"y": regular(b"another")}), b"g": regular(b"other")})

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_DAC_READ_SEARCH")


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(UMASK)
    yield
    os.umask(before)


@pytest.fixture
def stack() -> Iterator[Stack]:
    """Two lowers, of which the second is the one in use."""
    with scratch_directory() as path:
        made = Stack(path, [OTHER, LOWER], directory())
        del made.lowers[0]
        yield made


def other(stack: Stack) -> bytes:
    return stack.path + b"/lower0"


def use(stack: Stack, **options: bool) -> None:
    """Mount, copy things up, and unmount."""
    union = stack.union(**options)
    client = Client(union)
    client.chmod((b"d", b"x"), 0o600)
    client.chmod((b"f",), 0o600)
    union.close()


def use_by_the_kernel(stack: Stack) -> None:
    assert stack.upper is not None
    options = b"lowerdir=%s,upperdir=%s,workdir=%s,index=off" % (stack.lowers[0], stack.upper, stack.work)
    with overlay(stack.mountpoint, options):
        os.chmod(stack.mountpoint + b"/d/x", 0o600)


def mounts(stack: Stack, **options: bool) -> Union:
    union = stack.union(**options)
    union.close()
    return union


USERS = [use, pytest.param(use_by_the_kernel, marks=pytest.mark.skipif(not has_kernel_overlayfs(), reason="no kernel"))]


@pytest.mark.parametrize("used", USERS)
def test_other_lowers_are_refused_and_the_message_names_them(stack: Stack, used: Callable[[Stack], None]) -> None:
    used(stack)
    mine, stack.lowers = stack.lowers[0], [other(stack)]
    with pytest.raises(UserError) as caught:
        stack.union()
    assert all(os.fsdecode(path) in str(caught.value) for path in (stack.upper or b"", mine, other(stack)))
    assert "rebase" in str(caught.value)
    stack.lowers = [mine]
    mounts(stack)


@pytest.mark.parametrize("used", USERS)
def test_rebase_accepts_them_for_good(stack: Stack, used: Callable[[Stack], None]) -> None:
    used(stack)
    mine, stack.lowers = stack.lowers[0], [other(stack)]
    union = stack.union(rebase=True)
    found = union.lookup(union.root, b"d")
    union.close()
    assert found.attr.ino == os.stat(other(stack) + b"/d").st_ino
    assert stack.upper is not None
    assert ORIGIN not in os.listxattr(stack.upper + b"/d/x") or used is use
    mounts(stack)
    stack.lowers = [mine]
    with pytest.raises(UserError, match="was used with"):
        stack.union()


def test_an_upper_without_anything_may_have_any_lowers(stack: Stack) -> None:
    mounts(stack)
    stack.lowers = [other(stack)]
    mounts(stack)


def test_a_layer_may_be_added_on_top_and_below(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    use(stack)
    stack.lowers = [other(stack), *stack.lowers]
    mounts(stack)
    stack.lowers.reverse()
    mounts(stack)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def moved(stack: Stack) -> None:
    """Podman's storage, renamed as a whole."""
    for name in (b"lower1", b"upper", b"work"):
        os.rename(stack.path + b"/" + name, stack.path + b"/moved-" + name)
    stack.lowers, stack.upper, stack.work = (
        [stack.path + b"/moved-lower1"],
        stack.path + b"/moved-upper",
        stack.path + b"/moved-work",
    )


def copied_whole(stack: Stack) -> None:
    """The layers and the upper beside the originals, with all attributes."""
    for name in (b"lower1", b"upper", b"work"):
        subprocess.run(["cp", "-a", stack.path + b"/" + name, stack.path + b"/copy-" + name], check=True)
    stack.lowers, stack.upper, stack.work = (
        [stack.path + b"/copy-lower1"],
        stack.path + b"/copy-upper",
        stack.path + b"/copy-work",
    )


def restored_by_tar(stack: Stack) -> None:
    """The lower from an archive, beside what it was made of."""
    os.mkdir(stack.path + b"/restored")
    archive = subprocess.run(["tar", "-C", stack.lowers[0], "-c", "."], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-C", stack.path + b"/restored", "-x"], check=True, input=archive)
    stack.lowers = [stack.path + b"/restored"]


def made_anew(stack: Stack) -> None:
    """The lower removed and made again, with other content."""
    shutil.rmtree(stack.lowers[0])
    shutil.copytree(os.fsdecode(other(stack)), os.fsdecode(stack.lowers[0]))


@pytest.mark.parametrize("change", [moved, copied_whole, restored_by_tar, made_anew])
@pytest.mark.parametrize("used", USERS)
def test_layers_that_were_moved_or_copied_are_mounted(
    stack: Stack, used: Callable[[Stack], None], change: Callable[[Stack], None]
) -> None:
    used(stack)
    change(stack)
    mounts(stack)


def test_an_index_is_taken_along(stack: Stack) -> None:
    """By a copy of the lower: names of one object stay together, which they do not without an index."""
    lower = stack.lowers[0]
    os.link(lower + b"/f", lower + b"/d/again")
    use(stack)
    restored_by_tar(stack)
    shutil.rmtree(lower)
    union = stack.union(rebase=True, index="on")
    assert links_of(union)[b"f"] == (2, (b"d/again", b"f"))
    Client(union).chmod((b"d", b"again"), 0o640)
    union.close()
    union = stack.union(index="on")
    assert stat.S_IMODE(Client(union).stat((b"f",))[0]) == 0o640
    union.close()


def test_check_tells_and_mounts_nothing(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    use(stack)
    assert stack.upper is not None

    def check(lower: bytes, *more: str) -> int:
        options = b"lowerdir=%s,upperdir=%s,workdir=%s" % (lower, stack.upper, stack.work)
        return cli.main(["--check", *more, "-o", os.fsdecode(options)])

    assert check(stack.lowers[0]) == 0
    assert check(stack.lowers[0], os.fsdecode(stack.mountpoint)) == 0
    assert not capsys.readouterr().out
    assert check(other(stack)) == 1
    assert "other-lowers: upper:/" in capsys.readouterr().out
    assert check(stack.path + b"/none") == 3
    union = stack.union()
    assert check(stack.lowers[0]) == 4
    union.close()
