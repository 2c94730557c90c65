"""Which opens are passed through: the kernel's rules (fs/fuse/iomode.c), and never a lower file for writing."""

from __future__ import annotations

import errno
import os
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from unionfsd.fuse import abi, passthrough, wire
from unionfsd.fuse.passthrough import How, Passthrough
from unionfsd.ledger import Ledger
from unionfsd.syscalls import Fd

LOWER, UPPER = 1, 2
"""Numbers of files that stand for a node's lower and upper one; they are never opened."""


class File(Fd):
    """A descriptor that is only a number."""

    def close(self) -> None:
        pass


class Device:
    """Backing ids as the kernel keeps them; `error` is what it says to the next file."""

    def __init__(self) -> None:
        self.files: dict[int, int] = {}
        self.error = 0
        self.asked = 0

    def open(self, fuse_fd: int, fd: int) -> int:
        self.asked += 1
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        self.files[self.asked] = fd
        return self.asked

    def close(self, fuse_fd: int, backing: int) -> None:
        del self.files[backing]


class Union:
    """Nodes that are in the upper, or not yet; a mount without an upper gives its lowers away."""

    def __init__(self, *, writable: bool = True) -> None:
        self.writable = writable
        self.upper: set[int] = set()
        self.ledger = Ledger.new()

    def backing(self, nodeid: int) -> Fd | None:
        if nodeid in self.upper:
            return File(UPPER)
        return None if self.writable else File(LOWER)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(passthrough, "backing_open", device.open)
    monkeypatch.setattr(passthrough, "backing_close", device.close)
    return device


@pytest.fixture
def union() -> Union:
    return Union()


def opens_of(union: Union, *, asked_for: bool = True) -> Passthrough:
    return Passthrough(-1, union, set(), asked_for=asked_for)  # type: ignore[arg-type]


CACHED = How(abi.FOPEN_KEEP_CACHE, 0)


def test_opens_of_a_node_share_one_id_until_the_last_is_released(union: Union, device: Device) -> None:
    union.upper.add(5)
    opens = opens_of(union)
    assert [opens.opened(5, os.O_RDONLY) for _ in range(3)] == [How(abi.FOPEN_PASSTHROUGH, 1)] * 3
    for _ in range(2):
        opens.released(5, os.O_RDONLY)
        assert device.files == {1: UPPER}
    opens.released(5, os.O_RDONLY)
    assert device.files == {}
    assert opens.opened(5, os.O_RDONLY) == How(abi.FOPEN_PASSTHROUGH, 2)


def test_a_lower_file_of_a_writable_mount_is_not_given_away(union: Union, device: Device) -> None:
    assert opens_of(union).opened(5, os.O_RDONLY) == CACHED
    assert device.asked == 0


def test_a_lower_file_of_a_mount_without_upper_is(device: Device) -> None:
    assert opens_of(Union(writable=False)).opened(5, os.O_RDONLY) == How(abi.FOPEN_PASSTHROUGH, 1)
    assert device.files == {1: LOWER}


def test_a_node_copied_up_while_it_is_open_stays_cached_until_it_is_closed(union: Union, device: Device) -> None:
    opens = opens_of(union)
    opens.opened(5, os.O_RDONLY)
    union.upper.add(5)
    assert opens.opened(5, os.O_RDONLY) == CACHED
    opens.released(5, os.O_RDONLY)
    assert opens.opened(5, os.O_RDONLY) == CACHED
    opens.released(5, os.O_RDWR)
    opens.released(5, os.O_RDWR)
    assert opens.opened(5, os.O_RDONLY) == How(abi.FOPEN_PASSTHROUGH, 1)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ELOOP, errno.ENOMEM])
def test_one_refusal_is_enough(union: Union, device: Device, code: int, caplog: pytest.LogCaptureFixture) -> None:
    device.error = code
    union.upper |= {5, 6}
    opens = opens_of(union)
    before = opens.impossible
    assert opens.opened(5, os.O_RDONLY) == opens.opened(6, os.O_RDONLY) == How(0, 0)
    assert device.asked == 1
    assert (before, opens.impossible) == (False, True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_who_did_not_ask_for_it_is_not_warned(union: Union, device: Device, caplog: pytest.LogCaptureFixture) -> None:
    device.error = errno.EPERM
    union.upper.add(5)
    opens_of(union, asked_for=False).opened(5, os.O_RDONLY)
    assert not caplog.records


def test_after_a_late_refusal_opens_are_still_sent_and_no_cache_is_kept(union: Union, device: Device) -> None:
    """Files were written past the kernel's cache already, so what it has may be old."""
    union.upper |= {5, 6}
    opens = opens_of(union)
    opens.opened(5, os.O_RDONLY)
    device.error = errno.ENOMEM
    assert opens.opened(6, os.O_RDONLY) == How(0, 0)
    assert opens.opened(5, os.O_RDONLY) == How(abi.FOPEN_PASSTHROUGH, 1)
    assert not opens.impossible


def test_what_may_be_written_unseen_is_not_to_be_believed(union: Union, device: Device) -> None:
    """The kernel drops the attributes it has at the first open for writing, and keeps none until the last release."""
    union.upper.add(5)
    unsettled: set[int] = set()
    receiver, sender = os.pipe2(os.O_NONBLOCK)
    try:
        opens = Passthrough(sender, union, unsettled, asked_for=True)  # type: ignore[arg-type]
        opens.opened(5, os.O_RDONLY)
        opens.opened(5, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            os.read(receiver, 100)
        assert not unsettled
        opens.opened(5, os.O_RDWR)
        opens.opened(5, os.O_WRONLY)
        assert os.read(receiver, 100) == wire.notification(2, wire.INVAL_INODE_OUT.pack(5, -1, 0))
        opens.released(5, os.O_RDONLY)
        opens.released(5, os.O_RDWR)
        assert unsettled == {5}
        opens.released(5, os.O_WRONLY)
        assert unsettled == set()
    finally:
        os.close(receiver)
        os.close(sender)


NODES = st.integers(1, 3)


class Opening(RuleBasedStateMachine):
    """Opens, releases and copy-ups in any order, held against what the kernel takes."""

    def __init__(self) -> None:
        super().__init__()
        self.device = Device()
        self.union = Union()
        self.opens = opens_of(self.union)
        self.kernel: dict[int, list[How]] = {}
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(passthrough, "backing_open", self.device.open)
        self.patch.setattr(passthrough, "backing_close", self.device.close)

    def teardown(self) -> None:
        self.patch.undo()

    @rule(node=NODES, copy_up=st.booleans())
    def open(self, node: int, copy_up: bool) -> None:
        if copy_up:
            self.union.upper.add(node)
        self.kernel.setdefault(node, []).append(self.opens.opened(node, os.O_RDONLY))

    @precondition(lambda self: any(self.kernel.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from([node for node, opens in self.kernel.items() if opens]))
        self.kernel[node].pop()
        self.opens.released(node, os.O_RDONLY)

    @rule()
    def refuse(self) -> None:
        self.device.error = errno.EPERM

    @invariant()
    def no_open_fails(self) -> None:
        for opens in self.kernel.values():
            assert len({how.backing for how in opens}) <= 1
            assert all(bool(how.backing) == (how.flags == abi.FOPEN_PASSTHROUGH) for how in opens)

    @invariant()
    def only_upper_files_are_registered_once_each(self) -> None:
        assert set(self.device.files.values()) <= {UPPER}
        in_use = Counter(opens[0].backing for opens in self.kernel.values() if opens and opens[0].backing)
        assert in_use.keys() == self.device.files.keys()
        assert in_use.total() == len(self.device.files)


TestOpening = Opening.TestCase
TestOpening.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
