"""The kernel channel against the kernel's side of the protocol on a socket: what it answers, and what it survives."""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fakekernel import CONFIG, EVERYTHING, STAT, FakeUnion, Kernel, served
from unionfsd.errors import UserError
from unionfsd.fuse import abi, wire, workers
from unionfsd.fuse.abi import InitFlag, Opcode
from unionfsd.fuse.channel import Channel
from unionfsd.steps import Blocking, Gate, Op

HANDLES = EVERYTHING & ~(InitFlag.NO_OPEN_SUPPORT | InitFlag.NO_OPENDIR_SUPPORT)


@pytest.fixture
def union() -> FakeUnion:
    return FakeUnion()


def read_in(offset: int, size: int) -> bytes:
    return wire.READ_IN.pack(0, offset, size, 0, 0, 0)


def write_in(offset: int, data: bytes, flags: int = 0) -> bytes:
    return wire.WRITE_IN.pack(0, offset, len(data), flags, 0, 0) + data


# --- negotiation -----------------------------------------------------------------------------------------------------


async def test_features_are_asked_for_only_when_offered(union: FakeUnion) -> None:
    for offered in (EVERYTHING, InitFlag(0), InitFlag.ASYNC_READ | InitFlag.POSIX_ACL):
        async with served(union) as kernel:
            reply = await kernel.init(offered)
            low, high = wire.INIT_OUT.unpack(reply.payload)[3], wire.INIT_OUT.unpack(reply.payload)[10]
            assert not (low | high << 32) & ~offered


async def test_truncation_is_never_left_to_open(union: FakeUnion) -> None:
    async with served(union) as kernel:
        flags = wire.INIT_OUT.unpack((await kernel.init()).payload)[3]
        assert not flags & InitFlag.ATOMIC_O_TRUNC


async def test_a_timeout_asked_for_makes_the_kernel_check_its_pages(union: FakeUnion) -> None:
    for given_, expected in (
        (frozenset[str](), InitFlag.EXPLICIT_INVAL_DATA),
        (frozenset(["timeout"]), InitFlag.AUTO_INVAL_DATA),
    ):
        async with served(union, config=CONFIG._replace(explicit=given_)) as kernel:
            flags = wire.INIT_OUT.unpack((await kernel.init()).payload)[3]
            assert flags & (InitFlag.EXPLICIT_INVAL_DATA | InitFlag.AUTO_INVAL_DATA) == expected


async def test_a_newer_major_version_is_asked_to_come_down(union: FakeUnion) -> None:
    async with served(union) as kernel:
        assert wire.INIT_OUT.unpack((await kernel.init(major=8, minor=1)).payload)[0] == 7
        assert (await kernel.init()).error == 0
        assert (await kernel.call(Opcode.GETATTR, wire.GETATTR_IN.pack(0, 0))).error == 0


async def test_a_kernel_too_old_is_refused_with_a_way_out(union: FakeUnion) -> None:
    async def offer() -> None:
        async with served(union) as kernel:
            assert (await kernel.init(minor=30)).error == errno.EPROTO
            await trio.sleep_forever()

    with pytest.raises(ExceptionGroup) as refused:
        await offer()
    cause = refused.value.exceptions[0]
    assert isinstance(cause, UserError)
    assert "pyfuse3" in str(cause)


@pytest.mark.parametrize("opcode", [Opcode.OPEN, Opcode.OPENDIR])
async def test_opens_are_declined_where_the_kernel_can_do_without(union: FakeUnion, opcode: int) -> None:
    body = wire.OPEN_IN.pack(0, 0)
    async with served(union) as kernel:
        await kernel.init()
        assert (await kernel.call(opcode, body)).error == errno.ENOSYS
    async with served(union) as kernel:
        await kernel.init(HANDLES)
        assert (await kernel.call(opcode, body)).error == 0


async def test_closing_is_no_news(union: FakeUnion) -> None:
    async with served(union) as kernel:
        await kernel.init(HANDLES)
        assert (await kernel.call(Opcode.FLUSH, wire.FLUSH_IN.pack(0, 0))).error == errno.ENOSYS


# --- replies ---------------------------------------------------------------------------------------------------------


async def test_a_lookup_is_an_entry_with_nothing_lost(union: FakeUnion) -> None:
    async with served(union) as kernel:
        reply = await kernel.call(Opcode.LOOKUP, b"name\0", nodeid=3)
    entry = wire.ENTRY_OUT.unpack(reply.payload)
    assert entry[:2] == (5, 0)
    assert entry[2] == entry[3] > 10**8
    assert (entry[6], entry[7], entry[16]) == (77, 30, 3)
    assert union.calls == [("lookup", 3, b"name")]


async def test_an_absent_name_is_remembered_by_the_kernel(union: FakeUnion) -> None:
    async with served(union) as kernel:
        reply = await kernel.call(Opcode.LOOKUP, b"absent\0")
    nodeid, _, entry_valid, *_ = wire.ENTRY_OUT.unpack(reply.payload)
    assert reply.error == 0
    assert nodeid == 0
    assert entry_valid > 0


async def test_an_oserror_is_its_errno(union: FakeUnion, monkeypatch: pytest.MonkeyPatch) -> None:
    def rmdir(parent: int, name: bytes) -> None:
        raise OSError(errno.ENOTEMPTY, "not empty")

    monkeypatch.setattr(union, "rmdir", rmdir)
    async with served(union) as kernel:
        assert await kernel.call(Opcode.RMDIR, b"name\0") == (2, errno.ENOTEMPTY, b"")
    assert (union.counters.errors, union.counters.faults) == (1, 0)


@pytest.mark.parametrize("late", [False, True])
async def test_a_defect_is_eio_and_a_traceback_and_nothing_ends(
    union: FakeUnion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, late: bool
) -> None:
    def fsync(nodeid: int, datasync: bool) -> Op[None]:
        if late:
            yield Blocking(lambda: None)
        raise ZeroDivisionError

    monkeypatch.setattr(union, "fsync", fsync)
    async with served(union) as kernel:
        assert (await kernel.call(Opcode.FSYNC, wire.FSYNC_IN.pack(0, 0))).error == errno.EIO
        assert (await kernel.call(Opcode.LOOKUP, b"name\0")).error == 0
    assert union.counters.faults == 1
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("opcode", [Opcode.GETLK, Opcode.BMAP, Opcode.POLL, 7, 63, 64, 4096, 2**32 - 1])
async def test_what_is_not_served_is_enosys(union: FakeUnion, opcode: int) -> None:
    async with served(union) as kernel:
        assert (await kernel.call(opcode, bytes(64))).error == errno.ENOSYS


async def test_forgetting_is_not_answered(union: FakeUnion) -> None:
    async with served(union) as kernel:
        await kernel.send(Opcode.FORGET, wire.FORGET_IN.pack(2), nodeid=5)
        await kernel.send(
            Opcode.BATCH_FORGET, wire.BATCH_FORGET_IN.pack(2) + wire.FORGET_ONE.pack(6, 1) + wire.FORGET_ONE.pack(7, 3)
        )
        await kernel.send(Opcode.INTERRUPT, wire.INTERRUPT_IN.pack(2))
        assert (await kernel.call(Opcode.STATFS)).error == 0
    assert union.calls == [("forget", 5, 2), ("forget", 6, 1), ("forget", 7, 3)]


async def test_what_is_created_without_handles_is_closed_at_once(union: FakeUnion) -> None:
    body = wire.CREATE_IN.pack(2, 0o100644, 0o22, 0) + b"name\0"
    async with served(union) as kernel:
        await kernel.init()
        reply = await kernel.call(Opcode.CREATE, body)
        assert wire.OPEN_OUT.unpack_from(reply.payload, wire.ENTRY_OUT.size) == (0, abi.FOPEN_KEEP_CACHE, 0)
        assert union.calls[-1] == ("release", 9)
        assert (await kernel.call(Opcode.RELEASE, wire.RELEASE_IN.pack(0, 0, 0, 0), nodeid=9)).error == 0
    assert union.calls.count(("release", 9)) == 1


async def test_what_is_created_with_handles_stays_open(union: FakeUnion) -> None:
    body = wire.CREATE_IN.pack(2, 0o100644, 0o22, 0) + b"name\0"
    async with served(union) as kernel:
        await kernel.init(HANDLES)
        reply = await kernel.call(Opcode.CREATE, body)
        fh, _, _ = wire.OPEN_OUT.unpack_from(reply.payload, wire.ENTRY_OUT.size)
        assert ("release", 9) not in union.calls
        await kernel.call(Opcode.RELEASE, wire.RELEASE_IN.pack(fh, 0, 0, 0), nodeid=9)
    assert union.calls[-1] == ("release", 9)


@pytest.mark.parametrize(("size", "expected"), [(0, wire.GETXATTR_OUT.pack(5)), (5, b"value"), (99, b"value")])
async def test_an_extended_attribute_or_its_size(union: FakeUnion, size: int, expected: bytes) -> None:
    async with served(union) as kernel:
        body = wire.GETXATTR_IN.pack(size) + b"user.a\0"
        assert (await kernel.call(Opcode.GETXATTR, body)).payload == expected


async def test_an_extended_attribute_longer_than_the_buffer(union: FakeUnion) -> None:
    async with served(union) as kernel:
        assert (await kernel.call(Opcode.GETXATTR, wire.GETXATTR_IN.pack(4) + b"user.a\0")).error == errno.ERANGE
        assert (await kernel.call(Opcode.LISTXATTR, wire.GETXATTR_IN.pack(14))).payload == b"user.a\0user.b\0"


@pytest.mark.parametrize(
    ("permissions", "ids", "flags", "left"),
    [
        (0o104755, (5, 1), abi.FUSE_WRITE_KILL_SUIDGID, 0o755),
        (0o104755, (0, 1), abi.FUSE_WRITE_KILL_SUIDGID, 0o755),
        (0o102755, (5, STAT.st_gid), abi.FUSE_WRITE_KILL_SUIDGID, 0o755),
        (0o102745, (5, STAT.st_gid), abi.FUSE_WRITE_KILL_SUIDGID, None),
        (0o102745, (5, 1), abi.FUSE_WRITE_KILL_SUIDGID, 0o745),
        (0o102745, (0, 1), abi.FUSE_WRITE_KILL_SUIDGID, None),
        (0o100644, (5, 1), abi.FUSE_WRITE_KILL_SUIDGID, None),
        (0o104755, (5, 1), 0, None),
    ],
)
async def test_a_write_drops_privileges_when_the_kernel_says_so(
    union: FakeUnion,
    monkeypatch: pytest.MonkeyPatch,
    permissions: int,
    ids: tuple[int, int],
    flags: int,
    left: int | None,
) -> None:
    """And the kernel is told that the mode is another, before it hears that the write is done."""
    st = union.getattr(1)
    monkeypatch.setattr(union, "getattr", lambda nodeid: st._replace(st=_with_mode(st.st, permissions)))
    async with served(union) as kernel:
        await kernel.send(Opcode.WRITE, write_in(3, b"data", flags), nodeid=8, uid=ids[0], gid=ids[1])
        if left is not None:
            told = await kernel.receive()
            assert (told.unique, -told.error) == (0, abi.FUSE_NOTIFY_INVAL_INODE)
            assert wire.INVAL_INODE_OUT.unpack(told.payload) == (8, -1, 0)
        reply = await kernel.receive()
    assert wire.WRITE_OUT.unpack(reply.payload) == (4,)
    modes = [call[2].mode for call in union.calls if call[0] == "setattr"]
    assert modes == ([] if left is None else [left])
    assert union.calls[-1] == ("write", 8, b"data", 3)


async def test_a_late_write_waits_for_space_that_comes_back(union: FakeUnion, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was unlinked has its space until the kernel says, after other requests, that it has forgotten it."""

    def write_late(nodeid: int, data: memoryview, offset: int) -> Op[int]:
        yield from ()
        if not any(call[0] == "forget" for call in union.calls):
            raise OSError(errno.ENOSPC, "full")
        return len(data)

    monkeypatch.setattr(union, "write_late", write_late)
    monkeypatch.setattr("unionfsd.fuse.files._FORGET_S", 0.3)  # a busy machine is slower than the kernel
    async with served(union, config=CONFIG._replace(writeback="on")) as kernel:
        await kernel.init()
        written = await kernel.send(Opcode.WRITE, write_in(0, b"late", abi.FUSE_WRITE_CACHE), nodeid=8)
        await kernel.send(Opcode.FORGET, wire.FORGET_IN.pack(1), nodeid=9)
        reply = await kernel.receive()
    assert (reply.unique, reply.error) == (written, 0)
    assert wire.WRITE_OUT.unpack(reply.payload) == (4,)


def _with_mode(st: Any, mode: int) -> Any:
    return type(st)((mode, *st[1:]))


async def test_an_ioctl_goes_with_its_argument_and_comes_with_its_answer(union: FakeUnion) -> None:
    async with served(union) as kernel:
        reply = await kernel.call(Opcode.IOCTL, wire.IOCTL_IN.pack(0, 0, 77, 0, 3, 4) + b"arg", nodeid=8)
        assert (await kernel.call(Opcode.IOCTL, wire.IOCTL_IN.pack(0, 0, 77, 0, 9, 4) + b"arg")).error == errno.EIO
    assert reply.payload == wire.IOCTL_OUT.pack(0, 0, 0, 0) + b"flag"
    assert union.calls == [("ioctl", 8, 77, b"arg")]


async def test_statx_says_when_an_object_was_made(union: FakeUnion) -> None:
    async with served(union) as kernel:
        reply = await kernel.call(Opcode.STATX, wire.STATX_IN.pack(0, 0, 0, 0xFFF))
    found = wire.STATX_OUT.unpack(reply.payload)
    assert (found[3], found[9], found[10], found[17]) == (0xFFF, 0o100644, 77, 70)


# --- listings --------------------------------------------------------------------------------------------------------


def dirents(payload: bytes, head: int) -> Iterator[tuple[bytes, int]]:
    """Names and cookies of a listing whose entries have `head` bytes before their fuse_dirent."""
    while payload:
        _, cookie, length, _ = wire.DIRENT.unpack_from(payload, head)
        start = head + wire.DIRENT.size
        yield payload[start : start + length], cookie
        payload = payload[(start + length + 7) & ~7 :]


@pytest.mark.parametrize("plus", [False, True])
@given(names=st.lists(st.binary(min_size=1, max_size=255), max_size=30, unique=True), size=st.integers(600, 4096))
@settings(max_examples=50, deadline=None)
def test_a_listing_in_parts_is_the_listing(plus: bool, names: list[bytes], size: int) -> None:
    union = FakeUnion()
    union.entries = [(name, 100 + at, 8, at + 1) for at, name in enumerate(names)]
    opcode, head = (Opcode.READDIRPLUS, wire.ENTRY_OUT.size) if plus else (Opcode.READDIR, 0)
    found: list[bytes] = []

    async def run() -> None:
        cookie = 0
        async with served(union) as kernel:
            await kernel.init()
            while part := (await kernel.call(opcode, read_in(cookie, size))).payload:
                assert len(part) <= size
                entries = list(dirents(part, head))
                found.extend(name for name, _ in entries)
                cookie = entries[-1][1]

    trio.run(run)
    assert found == names
    looked_up = [call[2] for call in union.calls if call[0] == "lookup"]
    assert looked_up == [name for name in names if name not in (b".", b"..") and not name.startswith(b"absent")] * plus
    assert union.calls[-1] == ("releasedir", 1)


async def test_what_is_not_worth_looking_up_is_listed_by_name(
    union: FakeUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    union.entries += [(b"a", 7, 8, 3), (b"b", 8, 8, 4)]
    monkeypatch.setattr(union, "eager", lambda nodeid: False)
    async with served(union) as kernel:
        part = (await kernel.call(Opcode.READDIRPLUS, read_in(0, 4096))).payload
    assert [name for name, _ in dirents(part, wire.ENTRY_OUT.size)] == [b".", b"..", b"a", b"b"]
    assert not [call for call in union.calls if call[0] == "lookup"]


# --- operations that wait --------------------------------------------------------------------------------------------


async def test_a_write_that_waits_keeps_its_data_while_others_are_served(
    union: FakeUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    written = []

    def write(nodeid: int, data: memoryview, offset: int) -> Op[int]:
        yield gate
        written.append(bytes(data))
        return len(data)

    async with served(union) as kernel:
        with monkeypatch.context() as patch:
            patch.setattr(union, "write", write)
            waiting = [await kernel.send(Opcode.WRITE, write_in(0, bytes([letter]) * 5000)) for letter in b"abc"]
            for _ in range(10):
                assert (await kernel.call(Opcode.LOOKUP, b"n" * 200 + b"\0")).error == 0
        gate.open()
        replies = [await kernel.receive() for _ in waiting]
    assert sorted(reply.unique for reply in replies) == waiting
    assert sorted(written) == [bytes([letter]) * 5000 for letter in b"abc"]


async def test_reads_that_wait_do_not_share_a_buffer(union: FakeUnion, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    def readinto(nodeid: int, buffer: memoryview, offset: int) -> Op[int]:
        buffer[:] = bytes([offset]) * len(buffer)
        yield gate
        return len(buffer)

    monkeypatch.setattr(union, "readinto", readinto)
    async with served(union) as kernel:
        expected = {await kernel.send(Opcode.READ, read_in(at, 3000)): bytes([at]) * 3000 for at in range(4)}
        await kernel.call(Opcode.STATFS)
        gate.open()
        replies = [await kernel.receive() for _ in expected]
    assert {reply.unique: reply.payload for reply in replies} == expected


async def test_what_waits_is_finished_after_the_kernel_has_gone(
    union: FakeUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    def fsync(nodeid: int, datasync: bool) -> Op[None]:
        yield Blocking(lambda: None)
        ended.append(nodeid)

    monkeypatch.setattr(union, "fsync", fsync)
    async with served(union) as kernel:
        await kernel.send(Opcode.FSYNC, wire.FSYNC_IN.pack(0, 0), nodeid=4)
    assert ended == [4]


async def test_more_steps_than_threads_all_end_and_quiesce_waits_for_them(
    union: FakeUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()
    ended = []

    def fsync(nodeid: int, datasync: bool) -> Op[None]:
        ended.append((yield Blocking(lambda: held.wait() and nodeid)))

    monkeypatch.setattr(union, "fsync", fsync)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(union, near.fileno(), CONFIG, lambda: None)  # type: ignore[arg-type]
    kernel = Kernel(far)
    with near:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.run)
            try:
                count = workers.THREADS + 5
                waiting = [
                    await kernel.send(Opcode.FSYNC, wire.FSYNC_IN.pack(0, 0), nodeid=at + 1) for at in range(count)
                ]
                assert (await kernel.call(Opcode.STATFS)).error == 0
                with trio.move_on_after(0.05) as patience:
                    await channel.quiesce()
                assert patience.cancelled_caught
                assert not ended
                held.set()
                await channel.quiesce()
                assert sorted(ended) == list(range(1, count + 1))
                assert sorted([(await kernel.receive()).unique for _ in waiting]) == waiting
            finally:
                held.set()
                kernel.hang_up()


async def test_a_step_that_fails_is_the_operation_s_to_handle(
    union: FakeUnion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(error: Exception) -> None:
        raise error

    def fsync(nodeid: int, datasync: bool) -> Op[None]:
        if nodeid == 1:
            with pytest.raises(OSError, match="full"):
                yield Blocking(lambda: fail(OSError(errno.ENOSPC, "full")))
            return
        yield Blocking(lambda: fail(OSError(errno.ENOSPC, "full") if nodeid == 2 else ValueError("a defect")))

    monkeypatch.setattr(union, "fsync", fsync)
    async with served(union) as kernel:
        errors = [(await kernel.call(Opcode.FSYNC, wire.FSYNC_IN.pack(0, 0), nodeid=at)).error for at in (1, 2, 3)]
    assert errors == [0, errno.ENOSPC, errno.EIO]
    assert union.counters.faults == 1
    assert "a defect" in caplog.text
    caplog.clear()


@pytest.mark.parametrize("threads", [0, 1])
async def test_without_a_thread_to_be_had_the_caller_hears_of_it_or_waits(
    union: FakeUnion, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    real, left = threading.Thread.start, [threads]

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("unionfsd"):
            if not left[0]:
                raise RuntimeError("can't start new thread")
            left[0] -= 1
        real(thread)

    def fsync(nodeid: int, datasync: bool) -> Op[None]:
        yield Blocking(lambda: None)

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(union, "fsync", fsync)
    async with served(union) as kernel:
        waiting = [await kernel.send(Opcode.FSYNC, wire.FSYNC_IN.pack(0, 0)) for _ in range(3)]
        replies = [await kernel.receive() for _ in waiting]
    assert [reply.error for reply in replies] == [0 if threads else errno.EAGAIN] * 3


def test_work_begins_before_there_is_an_event_loop(union: FakeUnion, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(nodeid: int, datasync: bool) -> Op[None]:
        yield Blocking(lambda: None)

    monkeypatch.setattr(union, "fsync", fsync)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        for unique in (2, 4, 6):
            body = wire.FSYNC_IN.pack(0, 0)
            far.send(wire.IN_HEADER.pack(wire.BODY + len(body), Opcode.FSYNC, unique, 1, 0, 0, 0, 0) + body)
        Channel(union, near.fileno(), CONFIG, lambda: None).begin()  # type: ignore[arg-type]
        assert sorted(wire.OUT_HEADER.unpack(far.recv(4096))[2] for _ in range(3)) == [2, 4, 6]


def test_what_may_follow_a_step_follows_it(union: FakeUnion, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    ended = threading.Event()

    def then() -> None:
        order.append("then")
        ended.set()

    def fsync(nodeid: int, datasync: bool) -> Op[None]:
        yield Blocking(lambda: order.append("step"), then=then)

    monkeypatch.setattr(union, "fsync", fsync)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        body = wire.FSYNC_IN.pack(0, 0)
        far.send(wire.IN_HEADER.pack(wire.BODY + len(body), Opcode.FSYNC, 2, 1, 0, 0, 0, 0) + body)
        channel = Channel(union, near.fileno(), CONFIG, lambda: None)  # type: ignore[arg-type]
        channel.begin()
        assert wire.OUT_HEADER.unpack(far.recv(4096))[2] == 2
        assert ended.wait(10)
        channel.close()
    assert order == ["step", "then"]


def test_the_beginning_ends_when_somebody_else_waits(union: FakeUnion) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = wire.IN_HEADER.pack(wire.BODY, Opcode.STATFS, 2, 1, 0, 0, 0, 0)
    with near, far:
        for _ in range(3):
            far.send(request)
        Channel(union, near.fileno(), CONFIG, lambda: None).begin(lambda: True)  # type: ignore[arg-type]
        assert near.recv(4096) == request, "left for the event loop"


def test_a_quiet_mount_waits_for_somebody_who_needs_the_loop(union: FakeUnion) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    looks: list[float] = []

    def wanted() -> bool:
        looks.append(monotonic())
        return len(looks) == 5

    with near, far:
        channel = Channel(union, near.fileno(), CONFIG, lambda: None)  # type: ignore[arg-type]
        channel.begin(wanted, 30.0)
        assert not channel.gone
        channel.close()
    assert 0.02 < looks[-1] - looks[0] < 10


def test_a_mount_that_nobody_uses_looks_less_and_less_often(union: FakeUnion) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    looks: list[None] = []

    def wanted() -> bool:
        looks.append(None)
        return False

    with near, far:
        channel = Channel(union, near.fileno(), CONFIG, lambda: None)  # type: ignore[arg-type]
        channel.begin(wanted, 0.7)
        channel.close()
    assert 1 < len(looks) < 12, "it would be 35 at the first pace"


def test_a_mount_that_is_gone_needs_no_loop(union: FakeUnion) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near:
        far.send(wire.IN_HEADER.pack(wire.BODY, Opcode.STATFS, 2, 1, 0, 0, 0, 0))
        far.shutdown(socket.SHUT_WR)
        channel = Channel(union, near.fileno(), CONFIG, lambda: None)  # type: ignore[arg-type]
        channel.begin(lambda: False, 30.0)
        assert wire.OUT_HEADER.unpack_from(far.recv(4096))[2] == 2
        assert channel.gone
        channel.close()
        far.close()
    (statfs,) = union.counters.operations.snapshot()
    assert (statfs.kind, sum(statfs.times)) == (Opcode.STATFS, 1)


# --- hostile bytes ---------------------------------------------------------------------------------------------------

BODIES = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda head, *names: head + b"\0".join(names), st.binary(max_size=64), st.binary(max_size=20), st.just(b"")
    ),
)
MESSAGES = st.one_of(
    st.binary(min_size=1, max_size=120),
    st.builds(
        lambda opcode, body, lie: wire.IN_HEADER.pack(wire.BODY + len(body) + lie, opcode, 9, 1, 0, 0, 0, 0) + body,
        st.integers(0, 70).filter(lambda opcode: opcode != Opcode.INIT),
        BODIES,
        st.sampled_from([0, 0, 0, 1, -1, 2**20]),
    ),
)


@given(st.lists(MESSAGES, max_size=20))
@settings(deadline=None)
def test_no_bytes_end_the_channel(messages: list[bytes]) -> None:
    union = FakeUnion()

    async def run() -> None:
        async with served(union) as kernel:
            for message in messages:
                await kernel.send_raw(message)
            unique = await kernel.send(Opcode.LOOKUP, b"still here\0")
            while (await kernel.receive()).unique != unique:
                pass

    logging.disable(logging.WARNING)
    try:
        trio.run(run)
    finally:
        logging.disable(logging.NOTSET)
    assert union.counters.faults == 0
    assert union.calls[-1] == ("lookup", 1, b"still here")
