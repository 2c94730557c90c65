"""The mount table, from its text and as the system has it."""

from __future__ import annotations

import os

from unionfsd import mountinfo

TABLE = rb"""21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 21 0:53 / /mnt rw,nosuid - fuse.unionfsd src rw,user_id=1000,group_id=0
31 30 0:54 /sub/dir /mnt/a\040b\134c rw master:3 propagate_from:1 - fuse.unionfsd a\011b rw
32 30 0:55 / /mnt rw - tmpfs tmpfs rw
"""


def test_lines_are_read() -> None:
    root, ours, bound, over = mountinfo.read(TABLE)
    assert (root.device, root.path, root.fstype) == ((8, 1), b"/", b"ext4")
    assert ours == (
        30,
        21,
        (0, 53),
        b"/",
        b"/mnt",
        b"fuse.unionfsd",
        b"src",
        b"rw,user_id=1000,group_id=0",
        b"rw,nosuid",
    )
    assert (bound.root, bound.path) == (b"/sub/dir", b"/mnt/a b\\c")
    assert over.mount_id == 32


def test_a_path_within_a_mount_is_counted_from_the_root_of_its_file_system() -> None:
    root, ours, bound, _ = mountinfo.read(TABLE)
    assert mountinfo.within(ours, b"/mnt") == b"/"
    assert mountinfo.within(ours, b"/mnt/x/y") == b"/x/y"
    assert mountinfo.within(bound, b"/mnt/a b\\c") == b"/sub/dir"
    assert mountinfo.within(bound, b"/mnt/a b\\c/z") == b"/sub/dir/z"
    assert mountinfo.within(root, b"/etc/hosts") == b"/etc/hosts"


def test_the_mount_of_a_path_is_the_nearest_and_the_topmost() -> None:
    assert mountinfo.at(b"/mnt/x", TABLE) == list(mountinfo.read(TABLE))[3]
    found = mountinfo.at(b"/mnt/a b\\c/d", TABLE)
    assert found is not None
    assert found.mount_id == 31
    found = mountinfo.at(b"/mntx", TABLE)
    assert found is not None
    assert found.mount_id == 21


def test_the_table_of_the_system() -> None:
    line = mountinfo.at(b"/proc/self")
    assert line is not None
    assert line.fstype == b"proc"
    assert os.makedev(*line.device) == os.stat("/proc").st_dev
