"""With nfs_export=on, a nodeid means one object for good: after FORGET, a remount, copy-up and rename; else ESTALE."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from tests.union.client import UMASK, Client, Path
from tests.union.stack import Stack, scratch_directory
from tests.union.trees import directory, regular
from unionfsd import steps, syscalls
from unionfsd.errors import UserError
from unionfsd.options import MountConfig
from unionfsd.union import Union

LOWER = directory(
    {
        b"d": directory({b"x": regular(b"lower"), b"sub": directory({b"deep": regular(b"deep")})}),
        b"f": regular(b"file"),
    }
)
D, X, DEEP, F = (b"d",), (b"d", b"x"), (b"d", b"sub", b"deep"), (b"f",)


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(UMASK)
    yield
    os.umask(before)


@pytest.fixture
def stack() -> Iterator[Stack]:
    with scratch_directory() as path:
        yield Stack(path, [LOWER], directory())


def mount(stack: Stack) -> Union:
    return stack.union(nfs_export="on")


def handle(union: Union, path: Path) -> tuple[int, int]:
    """nodeid and generation, as name_to_handle_at(2) keeps them; then the kernel forgets everything."""
    at, generation, passed = union.root, 0, []
    for name in path:
        at, generation, _ = union.lookup(at, name)
        passed.append(at)
    for nodeid in passed:
        union.forget(nodeid, 1)
    assert union.known() == 1
    return at, generation


def read(union: Union, wanted: tuple[int, int]) -> bytes:
    """What open_by_handle_at(2) leads to: the data of a file, the names in a directory; forgotten in the end."""
    found = union.reach(wanted[0], b".")
    assert found.nodeid == wanted[0]
    if found.generation != wanted[1]:
        union.forget(found.nodeid, 1)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    try:
        if found.attr.st.st_mode & 0o170000 == 0o040000:
            return b" ".join(sorted(name for name, *_ in union.listdir(found.nodeid, 0)))
        return bytes(steps.run(union.read(found.nodeid, 100, 0)))
    finally:
        union.forget(found.nodeid, 1)
        assert union.known() == 1


def stale(union: Union, wanted: tuple[int, int]) -> bool:
    try:
        read(union, wanted)
    except OSError as exc:
        return exc.errno == errno.ESTALE
    return False


def test_handles_are_good_after_forget_and_a_remount(stack: Stack) -> None:
    union = mount(stack)
    client = Client(union)
    client.mkdir((b"d", b"new"), 0o755)
    client.create((b"d", b"new", b"file"), 0o644)
    client.forget_all()
    paths = (D, X, DEEP, F, (b"d", b"new"), (b"d", b"new", b"file"))
    handles = {path: handle(union, path) for path in paths}
    assert len(set(handles.values())) == len(paths)
    for _ in range(2):
        assert read(union, handles[DEEP]) == b"deep"
        assert read(union, handles[D]) == b". .. new sub x"
        assert read(union, handles[(b"d", b"new", b"file")]) == b""
        union.close()
        union = mount(stack)
    assert {path: handle(union, path) for path in paths} == handles
    union.close()


def test_they_follow_copy_up_and_rename(stack: Stack) -> None:
    union = mount(stack)
    file, deep, sub = handle(union, X), handle(union, DEEP), handle(union, (b"d", b"sub"))
    client = Client(union)
    client.append(X, b"!")
    client.rename(X, (b"moved",), 0)
    client.rename((b"d", b"sub"), (b"elsewhere",), 0)
    client.forget_all()
    for _ in range(2):
        assert read(union, file) == b"lower!"
        assert read(union, deep) == b"deep"
        assert read(union, sub) == b". .. deep"
        found = union.reach(sub[0], b"..")
        assert found.nodeid == union.root
        assert found.generation == 0
        union.close()
        union = mount(stack)
    union.close()


def test_what_is_gone_or_replaced_is_stale(stack: Stack) -> None:
    union = mount(stack)
    gone, replaced, below = handle(union, X), handle(union, F), handle(union, DEEP)
    client = Client(union)
    client.unlink(X)
    client.create(X, 0o644)
    client.create((b"other",), 0o644)
    client.rename((b"other",), F, 0)
    client.rename((b"d", b"sub"), (b"s",), 0)
    client.unlink((b"s", b"deep"))
    client.forget_all()
    for _ in range(2):
        assert stale(union, gone)
        assert stale(union, replaced)
        assert stale(union, below)
        assert stale(union, (987654321, 0))
        union.close()
        union = mount(stack)
    union.close()


def test_a_number_used_again_is_another_object(stack: Stack) -> None:
    """File systems give the inode number of a removed file to the next one; the generation tells them apart."""
    union = mount(stack)
    client = Client(union)
    client.create((b"one",), 0o644)
    client.forget_all()
    first = handle(union, (b"one",))
    client = Client(union)
    client.unlink((b"one",))
    client.forget_all()
    for number in range(20):
        client.create((b"%d" % number,), 0o644)
    client.forget_all()
    assert stale(union, first)
    union.close()


def test_all_names_of_a_lower_file_are_one_object(stack: Stack) -> None:
    lower = stack.lowers[0]
    os.link(lower + b"/f", lower + b"/d/g")
    union = mount(stack)
    assert handle(union, F) == handle(union, (b"d", b"g"))
    client = Client(union)
    client.append((b"d", b"g"), b"!")
    client.forget_all()
    union.close()
    union = mount(stack)
    assert handle(union, F) == handle(union, (b"d", b"g"))
    assert read(union, handle(union, F)) == b"file!"
    union.close()


def test_a_torn_record_is_the_last_one(stack: Stack) -> None:
    union = mount(stack)
    first, last = handle(union, X), handle(union, F)
    union.close()
    with open(stack.work + b"/exports", "r+b") as file:
        file.truncate(os.fstat(file.fileno()).st_size - 1)
    union = mount(stack)
    assert read(union, first) == b"lower"
    assert stale(union, last)
    assert handle(union, F) == last
    assert read(union, last) == b"file"
    union.close()


def test_records_that_are_true_no_more_are_dropped(stack: Stack) -> None:
    union = mount(stack)
    kept = handle(union, X)
    client = Client(union)
    for number in range(1000):
        client.rename((b"f",) if not number else (b"f%0200d" % number,), (b"f%0200d" % (number + 1),), 0)
    client.forget_all()
    union.close()
    before = os.path.getsize(stack.work + b"/exports")
    union = mount(stack)
    assert os.path.getsize(stack.work + b"/exports") < before / 10
    assert read(union, kept) == b"lower"
    union.close()
    assert sorted(os.listdir(stack.work)) == [b"exports", b"work"]


def test_a_read_only_union_keeps_them_in_a_work_directory(stack: Stack) -> None:
    stack.upper = None
    with pytest.raises(UserError, match="workdir"):
        mount(stack)
    work = stack.work

    def lowers_only() -> Union:
        return Union.mount(
            MountConfig(lowerdirs=tuple(stack.lowers), workdir=work, mountpoint=stack.mountpoint, nfs_export="on")
        )

    union = lowers_only()
    kept = handle(union, DEEP)
    with pytest.raises(UserError, match="in use"):
        lowers_only()
    union.close()
    union = lowers_only()
    assert read(union, kept) == b"deep"
    union.close()


def test_a_full_disk_hinders_nobody(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    union = mount(stack)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syscalls, "pwrite", no_space)
        kept = handle(union, DEEP)
        assert read(union, kept) == b"deep"
    assert "stale after a remount" in caplog.text
    union.close()
    union = mount(stack)
    assert stale(union, kept)
    assert handle(union, DEEP) == kept
    union.close()


def no_space(*args: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
