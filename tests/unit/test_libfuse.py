"""The pyfuse3 transport's own rules: the guard around every handler, and values translated both ways."""

from __future__ import annotations

import errno
import logging
import os
import stat
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest

from unionfsd.events import Events
from unionfsd.fuse import libfuse
from unionfsd.fuse.abi import Opcode
from unionfsd.metrics import Counters
from unionfsd.steps import Blocking, Op
from unionfsd.union import Attr, Found, SetAttr

EXTRA = {"st_blksize": 4096, "st_blocks": 24, "st_rdev": 77, "st_atime_ns": 10**9, "st_mtime_ns": -5, "st_ctime_ns": 3}


def stat_of(mode: int) -> os.stat_result:
    return os.stat_result((mode, 11, 22, 3, 1000, 1001, 12345, 1, 2, 3), EXTRA)


ST = stat_of(stat.S_IFREG | 0o4755)
CONTEXT = SimpleNamespace(uid=5, gid=6, pid=7, umask=0o027)


class FakeUnion:
    """Answers every call with what `answers` has for its name: a value, or an exception to raise."""

    root = 1
    exports = False

    def __init__(self, **answers: Any) -> None:
        self.counters = Counters()
        self.events = Events()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append((name, args))
            answer = self._answers.get(name)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return call


def operation(answer: Any) -> Op[Any]:
    """An operation that goes to a thread once."""
    result = yield Blocking(lambda: answer)
    return result


def operations(union: FakeUnion, timeout: float = 30.0) -> Any:
    fake: Any = union
    return libfuse._Operations(fake, timeout, lambda: None)


def found(nodeid: int) -> Found:
    return Found(nodeid, 9, Attr(ST, 777, 3))


async def test_an_oserror_is_told_as_its_errno() -> None:
    union = FakeUnion(getattr=OSError(errno.ESTALE, "stale"))
    with pytest.raises(pyfuse3.FUSEError) as told:
        await operations(union).getattr(5, CONTEXT)
    assert told.value.errno == errno.ESTALE
    done = union.counters.statistics()
    assert (done.requests, done.errors, done.faults) == (1, 1, 0)
    (operation,) = union.counters.operations.snapshot()
    assert (operation.kind, sum(operation.times), operation.errors) == (Opcode.GETATTR, 1, {errno.ESTALE: 1})


@pytest.mark.parametrize("call", ["getattr", "setxattr"])
async def test_a_defect_is_eio_logged_and_counted(call: str, caplog: pytest.LogCaptureFixture) -> None:
    union = FakeUnion(**{call: ZeroDivisionError("a defect")})
    arguments = {"getattr": (5, CONTEXT), "setxattr": (5, b"user.a", b"1", CONTEXT)}[call]
    with pytest.raises(pyfuse3.FUSEError) as told:
        await getattr(operations(union), call)(*arguments)
    assert told.value.errno == errno.EIO
    assert union.counters.faults == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "a defect" in caplog.text


async def test_forget_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    union = FakeUnion(forget=ZeroDivisionError("a defect"))
    await operations(union).forget([(2, 1), (3, 1)])
    assert union.counters.faults == 1
    assert "a defect" in caplog.text


async def test_an_operation_is_driven_to_its_end() -> None:
    union = FakeUnion(write=operation(5))
    assert await operations(union).write(3, 100, b"hello") == 5
    assert union.calls == [("write", (3, b"hello", 100))]


async def test_an_absent_name_is_remembered_for_the_timeout() -> None:
    union = FakeUnion(lookup=FileNotFoundError(errno.ENOENT, "absent"))
    entry = await operations(union, timeout=12.5).lookup(1, b"name", CONTEXT)
    assert (entry.st_ino, entry.entry_timeout) == (0, 12.5)


async def test_every_attribute_arrives() -> None:
    entry = await operations(FakeUnion(lookup=found(42)), timeout=12.5).lookup(1, b"name", CONTEXT)
    assert (entry.st_ino, entry.generation, entry.st_nlink) == (42, 9, 3)
    assert (entry.entry_timeout, entry.attr_timeout) == (12.5, 12.5)
    for field in ("st_mode", "st_uid", "st_gid", "st_size", *EXTRA):
        assert getattr(entry, field) == getattr(ST, field)


async def test_the_caller_arrives() -> None:
    union = FakeUnion(mkdir=found(3))
    await operations(union).mkdir(1, b"d", stat.S_IFDIR | 0o777, CONTEXT)
    assert union.calls == [("mkdir", (1, b"d", stat.S_IFDIR | 0o777, (5, 6, 7, 0o027)))]


@pytest.mark.parametrize("field", ["mode", "uid", "gid", "size", "atime", "mtime"])
def test_only_what_was_asked_for_is_changed(field: str) -> None:
    attr = pyfuse3.EntryAttributes()
    attr.st_mode, attr.st_uid, attr.st_gid, attr.st_size = pyfuse3.ModeT(stat.S_IFREG | 0o2640), 4, 5, 6
    attr.st_atime_ns, attr.st_mtime_ns = -1, 10**18 + 1
    names = ("mode", "uid", "gid", "size", "atime", "mtime", "ctime")
    fields: Any = SimpleNamespace(**{f"update_{name}": name == field for name in names})
    expected = {
        "mode": SetAttr(mode=0o2640),
        "uid": SetAttr(uid=4),
        "gid": SetAttr(gid=5),
        "size": SetAttr(size=6),
        "atime": SetAttr(atime_ns=-1),
        "mtime": SetAttr(mtime_ns=10**18 + 1),
    }
    assert libfuse._wanted(attr, fields) == expected[field]


async def test_flush_is_ended_by_enosys() -> None:
    with pytest.raises(pyfuse3.FUSEError) as told:
        await operations(FakeUnion()).flush(3)
    assert told.value.errno == errno.ENOSYS


@pytest.mark.parametrize(
    ("uid", "permissions", "mine", "left"),
    [
        (0, 0o6755, False, None),
        (5, 0o6755, False, 0o755),
        (5, 0o6755, True, 0o755),
        (5, 0o6745, False, 0o745),
        (5, 0o6745, True, 0o2745),
        (5, 0o755, False, None),
        (5, 0o2745, True, None),
    ],
)
async def test_truncating_open_takes_privileges_off(uid: int, permissions: int, mine: bool, left: int | None) -> None:
    """setgid of a file that its group may not execute is a lock mark of old, which the group may keep."""
    st = stat_of(stat.S_IFREG | permissions)
    union = FakeUnion(getattr=Attr(st, 777, 1), setattr=operation(Attr(st, 777, 1)), open=operation(None))
    context = SimpleNamespace(uid=uid, gid=st.st_gid + (not mine), pid=0, umask=0)
    handle = await operations(union).open(3, os.O_WRONLY | os.O_TRUNC, context)
    assert handle.fh == 3
    changes = [args[1] for name, args in union.calls if name == "setattr"]
    assert changes == [SetAttr(size=0, mode=left)]
    assert union.calls[-1] == ("open", (3, os.O_WRONLY))
