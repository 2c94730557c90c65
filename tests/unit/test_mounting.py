"""What is said to the kernel and to fusermount3, and which mountpoints are refused; nothing is mounted here."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from unionfsd.errors import MOUNT, UserError
from unionfsd.fuse import mounting
from unionfsd.options import MountConfig, mountflags

CONFIG = MountConfig(lowerdirs=(b"/low",), mountpoint=b"/mnt", upperdir=b"/up", workdir=b"/work")


def refusal(path: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        mounting.check_mountpoint(os.fsencode(path))
    assert caught.value.code == MOUNT
    return str(caught.value)


def test_a_directory_and_a_symlink_to_one_will_do(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    mounting.check_mountpoint(os.fsencode(tmp_path))
    mounting.check_mountpoint(os.fsencode(tmp_path / "link"))


def test_other_mountpoints_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    missing = tmp_path / "missing"
    assert refusal(missing) == f"cannot mount on {missing}: No such file or directory"
    assert refusal(tmp_path / "file") == f"cannot mount on {tmp_path / 'file'}: not a directory"


def test_a_descriptor_is_adopted_only_when_it_is_the_fuse_device() -> None:
    fd = os.open("/dev/fuse", os.O_RDWR)
    os.set_inheritable(fd, True)
    mount = mounting.mount(CONFIG._replace(mountpoint=b"/dev/fd/%d" % fd))
    assert mount.fuse_fd == fd
    assert not os.get_inheritable(fd)
    assert mount.unmount() is mounting.Unmounted.KEPT
    mount.close()
    assert refusal(f"/dev/fd/{fd}") == f"cannot mount on /dev/fd/{fd}: Bad file descriptor"


def test_another_descriptor_is_refused() -> None:
    with open("/dev/null", "rb") as file:
        assert "not an open /dev/fuse" in refusal(f"/dev/fd/{file.fileno()}")


def test_the_kernel_is_told_who_mounts_and_who_may_enter() -> None:
    data = mounting.mount_data(9, CONFIG, selinux=False)
    assert data == f"fd=9,rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},default_permissions"
    data = mounting.mount_data(9, CONFIG._replace(allow_other=True), selinux=False)
    assert data.endswith(",default_permissions,allow_other")


def test_labels_reach_only_a_kernel_that_has_them() -> None:
    labelled = CONFIG._replace(security=('context="a:b,c"',))
    assert mounting.mount_data(9, labelled, selinux=True).endswith(',default_permissions,context="a:b,c"')
    assert "context" not in mounting.mount_data(9, labelled, selinux=False)


def test_fusermount_gets_what_it_knows() -> None:
    flags = mountflags.MS_NOSUID | mountflags.MS_NOEXEC | mountflags.MS_NOATIME | mountflags.MS_RELATIME
    config = CONFIG._replace(fsname="a,b\\c", ro=True, mount_flags=flags)
    assert mounting.fusermount_options(config) == (
        "fsname=a\\,b\\\\c,subtype=unionfsd,default_permissions,ro,nosuid,noexec,noatime"
    )


def test_what_fusermount_does_not_know_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = CONFIG._replace(mount_flags=mountflags.MS_STRICTATIME)
    assert mounting.fusermount_options(config) == "fsname=unionfsd,subtype=unionfsd,default_permissions"
    assert "strictatime" in caplog.text


def test_the_mount_table_is_read() -> None:
    places = list(mounting.mounts())
    *_, proc = (place for place in places if place.path == b"/proc" and place.fstype == b"proc")
    status = os.stat("/proc")
    assert stat.S_ISDIR(status.st_mode)
    assert proc.device == f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    assert proc.parent_id in {place.mount_id for place in places}
