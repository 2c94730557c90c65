"""What a new object inherits from a default ACL, held against what the kernel gives it on a real file system."""

from __future__ import annotations

import errno
import os
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import harness, trees
from tests.trees import Tag
from unionfsd import acl

permissions = st.integers(0, 7)
_ids: st.SearchStrategy[list[int]] = st.lists(st.sampled_from([0, 1, 1000, 54321]), max_size=3, unique=True).map(sorted)


@st.composite
def default_acls(draw: st.DrawFn) -> bytes:
    """A valid default ACL, as the kernel orders its entries."""
    users = [(Tag.USER, draw(permissions), uid) for uid in draw(_ids)]
    groups = [(Tag.GROUP, draw(permissions), gid) for gid in draw(_ids)]
    needed = bool(users or groups)
    mask = [(Tag.MASK, draw(permissions))] if needed or draw(st.booleans()) else []
    return trees.acl(
        (Tag.USER_OBJ, draw(permissions)),
        *users,
        (Tag.GROUP_OBJ, draw(permissions)),
        *groups,
        *mask,
        (Tag.OTHER, draw(permissions)),
    )


def _file(path: Path, mode: int) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))


def _fifo(path: Path, mode: int) -> None:
    os.mknod(path, stat.S_IFIFO | mode)


#: How the kernel makes an object, and the bits of the mode that it lets through.
MAKERS: dict[str, tuple[Callable[[Path, int], None], int]] = {
    "file": (_file, 0o7777),
    "directory": (os.mkdir, 0o1777),
    "fifo": (_fifo, 0o7777),
}


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A directory on a file system with ACLs; the umask is one that would show if the kernel applied it."""
    with tempfile.TemporaryDirectory(dir=harness.DISK, prefix="unionfsd-") as path:
        before = os.umask(0o077)
        yield Path(path)
        os.umask(before)


@pytest.mark.parametrize("kind", MAKERS)
@given(default=default_acls(), mode=st.integers(0, 0o7777))
@settings(deadline=None)
def test_the_kernel_inherits_the_same(kind: str, scratch: Path, default: bytes, mode: int) -> None:
    make, accepted = MAKERS[kind]
    mode &= accepted
    with tempfile.TemporaryDirectory(dir=scratch) as parent:
        os.setxattr(parent, trees.DEFAULT, default)
        made = Path(parent, "made")
        make(made, mode)
        assert acl.inherit(default, mode) == acl.Inherited(stat.S_IMODE(made.stat().st_mode), _access_acl(made))


def _access_acl(path: Path) -> bytes | None:
    return os.getxattr(path, trees.ACCESS) if trees.ACCESS in os.listxattr(path) else None


@given(default_acls(), st.integers(0, 0o7777))
def test_inheriting_takes_away_and_never_gives(default: bytes, mode: int) -> None:
    inherited = acl.inherit(default, mode)
    assert inherited.mode & ~mode == 0
    assert inherited.mode & ~0o777 == mode & ~0o777


_MINIMAL = trees.acl((Tag.USER_OBJ, 7), (Tag.GROUP_OBJ, 5), (Tag.OTHER, 0))


def test_an_acl_that_the_mode_can_say_is_not_kept() -> None:
    assert acl.inherit(_MINIMAL, 0o666) == acl.Inherited(0o640, None)


@pytest.mark.parametrize(
    "value",
    [b"", b"\2", _MINIMAL[:-1], _MINIMAL + b"\0", struct.pack("<I", 1) + _MINIMAL[4:], struct.pack(">I", 2)],
    ids=["empty", "half a head", "cut", "too long", "version 1", "big-endian"],
)
def test_a_damaged_acl_is_an_error(value: bytes) -> None:
    with pytest.raises(OSError) as caught:
        acl.inherit(value, 0o666)
    assert caught.value.errno == errno.EIO


@given(st.one_of(st.binary(max_size=64), st.binary(max_size=64).map(lambda body: b"\2\0\0\0" + body)))
def test_any_bytes_are_an_acl_or_eio(value: bytes) -> None:
    try:
        inherited = acl.inherit(value, 0o666)
    except OSError as exc:
        number = exc.errno
    else:
        number = errno.EIO
        assert inherited.access is None or len(inherited.access) == len(value)
    assert number == errno.EIO
