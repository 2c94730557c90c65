"""The UUID of an upper is the kernel's: whoever gave it, the other one keeps it."""

from __future__ import annotations

import os
import struct

import pytest

from tests.union.client import Client
from tests.union.stack import Stack, has_kernel_overlayfs, overlay, stacked
from tests.union.trees import directory, regular

UUID = "trusted.overlay.uuid"


def uuid_of(stack: Stack) -> bytes | None:
    assert stack.upper is not None
    return os.getxattr(stack.upper, UUID) if UUID in os.listxattr(stack.upper) else None


def mounted(stack: Stack, uuid: str) -> bytes | None:
    """The UUID after a mount of ours in which a file was copied up."""
    union = stack.union(uuid=uuid)
    Client(union).chmod((b"f",), 0o600)
    union.close()
    return uuid_of(stack)


@pytest.mark.parametrize(("uuid", "gives"), [("null", False), ("off", False), ("auto", True), ("on", True)])
def test_an_upper_gets_one_that_stays(uuid: str, gives: bool) -> None:
    with stacked([directory({b"f": regular()})], directory({})) as stack:
        first = mounted(stack, uuid)
        assert (first is not None and len(first) == 16) is gives
        assert mounted(stack, "on" if gives else "null") == first


def test_auto_gives_none_to_an_upper_in_which_something_was_copied_up() -> None:
    with stacked([directory({b"f": regular()})], directory({})) as stack:
        assert mounted(stack, "null") is None
        assert mounted(stack, "auto") is None
        assert mounted(stack, "on") is not None


@pytest.mark.skipif(not has_kernel_overlayfs(), reason="needs the kernel's overlayfs")
def test_the_kernel_takes_it_for_its_own() -> None:
    with stacked([directory({b"f": regular()})], directory({})) as stack:
        ours = mounted(stack, "on")
        assert ours is not None
        assert stack.upper is not None
        options = b"lowerdir=%s,upperdir=%s,workdir=%s,uuid=on" % (stack.lowers[0], stack.upper, stack.work)
        with overlay(stack.mountpoint, options):
            low, high = struct.unpack("<QQ", ours)
            assert os.statvfs(stack.mountpoint).f_fsid == low ^ high
        assert uuid_of(stack) == ours
