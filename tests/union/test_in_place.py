"""What is made whole in one call, and what is not: which calls change the upper, and what is there then."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator

import pytest

from tests.union.client import Client, Path
from tests.union.seam import Seam
from tests.union.stack import Stack, stacked
from tests.union.trees import Whiteout, directory, regular
from unionfsd.union import Caller

NEW: Path = (b"d", b"new")
HIDDEN: Path = (b"d", b"hidden")

#: How a name is made, and the one call that makes it where nothing has to be set.
MAKERS: dict[str, Callable[[Client, Path], None]] = {
    "create_at": lambda client, path: client.create(path, 0o640),
    "mkdir_at": lambda client, path: client.mkdir(path, 0o750),
    "symlink_at": lambda client, path: client.symlink(b"target", path),
}


@pytest.fixture(autouse=True)
def _no_umask() -> Iterator[None]:
    before = os.umask(0)  # as the daemon has it
    yield
    os.umask(before)


def changes(stack: Stack, make: Callable[[Client], None], *, uid: int = 0) -> list[str]:
    """The calls that change the upper while `make` is at work; its directory ``d`` is there already."""
    union = stack.union()
    try:
        caller = Caller(uid, os.getegid() if uid == 0 else uid, os.getpid(), 0o022)
        client = Client(union, caller=caller)
        with Seam() as seam:
            make(client)
        client.forget_all()
        return seam.calls
    finally:
        union.close()


@pytest.mark.parametrize("call", MAKERS)
def test_one_call(call: str) -> None:
    with stacked([directory({b"d": directory({})})], directory({b"d": directory({})})) as stack:
        assert changes(stack, lambda client: MAKERS[call](client, NEW)) == [call]
        st = os.lstat(b"/".join((stack.upper or b"", *NEW)))
    assert (st.st_uid, st.st_gid) == (os.geteuid(), os.getegid())
    if call != "symlink_at":
        assert stat.S_IMODE(st.st_mode) == (0o640 if call == "create_at" else 0o750)


@pytest.mark.parametrize("call", MAKERS)
def test_over_a_whiteout_it_is_staged(call: str) -> None:
    lower = directory({b"d": directory({b"hidden": regular(b"old")})})
    with stacked([lower], directory({b"d": directory({b"hidden": Whiteout()})})) as stack:
        calls = changes(stack, lambda client: MAKERS[call](client, HIDDEN))
        assert "renameat2" in calls
        there = os.lstat(b"/".join((stack.upper or b"", *HIDDEN)))
    assert not stat.S_ISCHR(there.st_mode)


@pytest.mark.parametrize("call", MAKERS)
def test_for_another_user_it_is_staged_and_never_seen_as_ours(call: str) -> None:
    with stacked([directory({b"d": directory({})})], directory({b"d": directory({})})) as stack:
        calls = changes(stack, lambda client: MAKERS[call](client, NEW), uid=1234)
        assert "chown" in calls
        assert calls.index("chown") < max(i for i, c in enumerate(calls) if c in ("link_fd", "renameat2"))
        assert os.lstat(b"/".join((stack.upper or b"", *NEW))).st_uid == 1234


def test_where_something_is_inherited_it_is_staged() -> None:
    with stacked([directory({b"d": directory({})})], directory({b"d": directory({})})) as stack:
        d = (stack.upper or b"") + b"/d"
        os.chown(d, -1, 4321)
        os.chmod(d, 0o2755)
        calls = changes(stack, lambda client: client.create(NEW, 0o640))
        assert calls != ["create_at"]
        assert os.lstat(d + b"/new").st_gid == 4321
