"""Mounting and unmounting: mount(2) with privileges, the fusermount3 handshake without, or a mount made by others.

Rules this file obeys:

- Once mounted, nothing here looks at the mountpoint itself: until the transport serves, and in the thread that serves,
  a stat of it would wait for ourselves. Where the mount is, is read from /proc/self/mountinfo.
- A mount is known by its mount id and device, not by its path: only ours is ever unmounted, also after its parent was
  renamed and when somebody has mounted something over it.
- Nothing holds the mountpoint open.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import select
import stat
from collections.abc import Iterator
from time import monotonic, sleep

from unionfsd import errors, mountinfo, syscalls
from unionfsd.errors import UserError
from unionfsd.logger import get_logger
from unionfsd.options import MountConfig, mountflags
from unionfsd.syscalls import MNT_DETACH, MNT_FORCE, UMOUNT_NOFOLLOW, Fd
from unionfsd.typed import Final, NamedTuple

log = get_logger(__name__)

_DEVICE: Final = "/dev/fuse"
_DEVICE_NUMBER: Final = os.makedev(10, 229)
_FUSERMOUNT: Final = "fusermount3"
_UNMOUNT_HINT: Final = "unmount it first: fusermount3 -u, or umount -l"

#: Seconds between two attempts to unmount what is in use.
_AGAIN: Final = 0.02

# What fusermount3 knows of mount flags; it adds nosuid and nodev itself.
_FUSERMOUNT_FLAGS: Final = (
    ("nosuid", mountflags.MS_NOSUID),
    ("nodev", mountflags.MS_NODEV),
    ("noexec", mountflags.MS_NOEXEC),
    ("sync", mountflags.MS_SYNCHRONOUS),
    ("noatime", mountflags.MS_NOATIME),
    ("dirsync", mountflags.MS_DIRSYNC),
)


class Unmounted(enum.Enum):
    """What came of an unmount."""

    GONE = enum.auto()
    """The mount is no more."""
    DETACHED = enum.auto()
    """It was busy: nobody can enter any more, and it is gone when its last user leaves."""
    BUSY = enum.auto()
    """It is in use, and as it was."""
    KEPT = enum.auto()
    """It could not be unmounted."""


class Place(NamedTuple):
    """A line of /proc/self/mountinfo (proc_pid_mountinfo(5))."""

    mount_id: int
    parent_id: int
    device: str
    """``MAJOR:MINOR``, as in /sys/class/bdi."""
    path: bytes
    fstype: bytes


class Mount:
    """A FUSE mount of ours: its kernel connection, and where it is.

    `fuse_fd` is owned. `place` is as of the time of mounting; None when somebody else mounted or has unmounted already.
    """

    __slots__ = ("_fd", "place")

    def __init__(self, fd: Fd, place: Place | None) -> None:
        self._fd = fd
        self.place = place

    @property
    def fuse_fd(self) -> int:
        return self._fd.fileno()

    @property
    def number(self) -> int | None:
        """The minor of its device number, which is its name in /sys/fs/fuse/connections; None when that is not known.

        Of a mount that somebody else made, Linux 6.18 and later tell (proc_pid_fdinfo(5)).
        """
        if self.place is not None:
            return int(self.place.device.partition(":")[2])
        with open(f"/proc/self/fdinfo/{self.fuse_fd}") as info:
            told = [line.split()[1] for line in info if line.startswith("fuse_connection:")]
        return int(told[0]) if told else None

    def unmount(self, *, lazy: bool = True, patience: float = 0.0) -> Unmounted:
        """Unmount, a busy mount only if `lazy`, and only when it has been busy for `patience` seconds.

        May block until dirty pages are written, so not for the serving thread.
        """
        end = monotonic() + patience
        while (outcome := self._unmount(lazy=False)) is Unmounted.BUSY and monotonic() < end:
            sleep(_AGAIN)
        return self._unmount(lazy=True) if lazy and outcome is Unmounted.BUSY else outcome

    def _unmount(self, *, lazy: bool) -> Unmounted:
        if self.place is None:
            return Unmounted.KEPT
        now = list(mounts())
        place = _find(now, self.place)
        if place is None:
            return Unmounted.GONE
        if any(other.parent_id == place.mount_id and other.path == place.path for other in now):
            log.error("not unmounted: something is mounted over %s", os.fsdecode(place.path))
            return Unmounted.KEPT
        return _unmount(place.path, lazy=lazy)

    def close(self) -> None:
        """Hang up. Who still uses the mount gets ENOTCONN from here on."""
        self._fd.close()

    def end(self) -> None:
        """Hang up, and take the mount away if it is there still.

        Then it is dead. A living one in its place is another daemon's, whatever its numbers: the kernel uses mount ids
        and device numbers again as soon as they are free.
        """
        self.close()
        if self.place is not None and _is_dead(self.place.path):
            self.unmount()


def has_ended(fuse_fd: int) -> bool:
    """Whether a connection has: its mount is gone, or somebody aborted it."""
    poll = select.poll()
    poll.register(fuse_fd, 0)
    return bool(poll.poll(0))


def _is_dead(path: bytes) -> bool:
    """Whether nobody answers for the mount at `path`; statfs(2) is never answered from a cache."""
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def check_mountpoint(path: bytes) -> None:
    """Raise UserError unless `path` is a directory, or a /dev/fuse that somebody mounted for us."""
    if adoptable(path) is not None:
        return
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        hint = _UNMOUNT_HINT if error.errno == errno.ENOTCONN else None
        raise _refused(path, errors.reason(error), hint) from None
    if not stat.S_ISDIR(mode):
        raise _refused(path, "not a directory")


def mount(config: MountConfig) -> Mount:
    """Mount what `config` describes; requests wait in the kernel until somebody serves. Raises UserError."""
    check_mountpoint(config.mountpoint)
    adopted = adoptable(config.mountpoint)
    if adopted is not None:
        os.set_inheritable(adopted, False)
        return Mount(Fd(adopted), None)
    # Resolved before mounting: afterwards it would ask the file system that nobody serves yet.
    path = os.path.realpath(config.mountpoint)
    fd = _mount_directly(config, path) or _mount_by_fusermount(config, path)
    on_top = [place for place in mounts() if place.path == path]
    return Mount(fd, on_top[-1] if on_top else None)


def adopt(fuse_fd: int, mount_id: int | None) -> Mount:
    """A mount that this process, or one before it, made."""
    place = next((place for place in mounts() if place.mount_id == mount_id), None)
    return Mount(Fd(fuse_fd), place)


def take_away(mount_id: int) -> None:
    """Take away a mount of ours whose connection nobody holds any more, unless something is mounted over it."""
    now = list(mounts())
    place = next((place for place in now if place.mount_id == mount_id), None)
    if place is None or any(other.parent_id == mount_id and other.path == place.path for other in now):
        return
    with contextlib.suppress(OSError):  # somebody was faster
        # By force: should somebody hold the connection after all, its file system is not asked to sync.
        syscalls.umount2(place.path, MNT_FORCE | MNT_DETACH | UMOUNT_NOFOLLOW)


def clear_dead(path: bytes) -> None:
    """Take away a FUSE mount at `path` whose server is gone, if there is one."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            _unmount(os.path.realpath(path), lazy=True)


def mounts() -> Iterator[Place]:
    """The mounts of this mount namespace in the order of mounting; of several at one path the last is on top."""
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields, _, tail = line.partition(b" - ")
            mount_id, parent_id, device, _, path = fields.split(b" ", 5)[:5]
            fstype = tail.split(b" ", 1)[0]
            yield Place(int(mount_id), int(parent_id), device.decode(), mountinfo.plain(path), fstype)


def _find(now: list[Place], ours: Place) -> Place | None:
    return next((p for p in now if p.mount_id == ours.mount_id and p.device == ours.device), None)


def adoptable(path: bytes) -> int | None:
    """The N of ``/dev/fd/N`` (mount.fuse3's drop_privileges); UserError when it is no open /dev/fuse."""
    number = path.removeprefix(b"/dev/fd/")
    if number == path or not number.isdigit() or len(number) > 9:
        return None
    fd = int(number)
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise _refused(path, errors.reason(error)) from None
    if fd < 3 or not stat.S_ISCHR(status.st_mode) or status.st_rdev != _DEVICE_NUMBER:
        raise _refused(path, f"not an open {_DEVICE}")
    return fd


def _refused(path: bytes, why: str, hint: str | None = None) -> UserError:
    return UserError(f"cannot mount on {os.fsdecode(path)}: {why}", hint=hint, code=errors.MOUNT)


# With privileges.


def _mount_directly(config: MountConfig, path: bytes) -> Fd | None:
    """The connection of a new mount; None when mount(2), or /dev/fuse, is not for us."""
    try:
        fd = Fd(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return None
    except OSError as error:
        why = f"cannot open {_DEVICE}: {errors.reason(error)}"
        raise _refused(path, why, "the kernel's fuse module is missing: modprobe fuse") from None
    # MS_POSIXACL makes the kernel leave the umask to us (fs/fuse/inode.c), also over pyfuse3, which cannot ask for it.
    flags = config.mount_flags | mountflags.MS_POSIXACL | (mountflags.MS_RDONLY if config.read_only else 0)
    data = mount_data(fd.fileno(), config, selinux=os.path.exists("/sys/fs/selinux/enforce"))
    try:
        syscalls.mount(config.fsname, os.fsdecode(path), f"fuse.{config.subtype}", flags, data)
    except PermissionError:
        fd.close()
        return None
    except OSError as error:
        fd.close()
        raise _refused(path, errors.reason(error)) from None
    return fd


def mount_data(fuse_fd: int, config: MountConfig, *, selinux: bool) -> str:
    """The data of mount(2) (Documentation/filesystems/fuse.rst); a kernel without SELinux refuses labels."""
    options = [
        f"fd={fuse_fd}",
        f"rootmode={stat.S_IFDIR:o}",
        f"user_id={os.geteuid()}",
        f"group_id={os.getegid()}",
        *_common(config),
    ]
    return ",".join(options + list(config.security) if selinux else options)


def _common(config: MountConfig) -> list[str]:
    return ["default_permissions", "allow_other"] if config.allow_other else ["default_permissions"]


# Without privileges.


def _mount_by_fusermount(config: MountConfig, path: bytes) -> Fd:
    """Have the set-uid fusermount3 mount; it passes the connection back over a socket (libfuse's fusermount.c)."""
    import socket  # late: only ordinary users come here

    ours, theirs = socket.socketpair()
    with ours, theirs:
        environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
        arguments = [b"-o", os.fsencode(fusermount_options(config)), b"--", path]
        failure = _fusermount(arguments, environment, theirs.fileno())
        if failure is not None:
            raise _refused(path, failure)
        _, fds, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_DONTWAIT)
    os.set_inheritable(fds[0], False)
    return Fd(fds[0])


def fusermount_options(config: MountConfig) -> str:
    """What follows fusermount3's `-o`; flags that it does not know are left out with a warning."""
    known = 0
    options = [f"fsname={_escape(config.fsname)}", f"subtype={_escape(config.subtype)}", *_common(config)]
    if config.read_only:
        options.append("ro")
    for name, bit in _FUSERMOUNT_FLAGS:
        known |= bit
        if config.mount_flags & bit:
            options.append(name)
    if config.mount_flags & ~known & ~mountflags.MS_RELATIME:  # relatime is the kernel's default
        log.warning("strictatime and nodiratime ignored: %s does not know them", _FUSERMOUNT)
    return ",".join(options)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace(",", "\\,")


def _fusermount(arguments: list[bytes], environment: dict[str, str] | None = None, *fds: int) -> str | None:
    """Run fusermount3; None, or why it failed."""
    import subprocess  # late: only ordinary users come here

    try:
        done = subprocess.run(
            [os.fsencode(_FUSERMOUNT), *arguments],
            env=environment,
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
    except OSError as error:
        return f"needs privileges, and {_FUSERMOUNT} cannot be run: {errors.reason(error)}"
    if done.returncode == 0:
        return None
    words = done.stderr.decode(errors="backslashreplace").strip()
    return words.splitlines()[-1] if words else f"{_FUSERMOUNT} ended with code {done.returncode}"


# Unmounting.


def _unmount(path: bytes, *, lazy: bool) -> Unmounted:
    try:
        return _unmount_directly(path, lazy=lazy)
    except PermissionError:
        return _unmount_by_fusermount(path, lazy=lazy)
    except OSError as error:
        log.error("not unmounted: %s: %s", os.fsdecode(path), errors.reason(error))
        return Unmounted.KEPT


def _unmount_directly(path: bytes, *, lazy: bool) -> Unmounted:
    try:
        syscalls.umount2(path, UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.EINVAL:  # somebody was faster
            return Unmounted.GONE
        if error.errno != errno.EBUSY:
            raise
        if not lazy:
            return Unmounted.BUSY
        syscalls.umount2(path, UMOUNT_NOFOLLOW | MNT_DETACH)
        return Unmounted.DETACHED
    return Unmounted.GONE


def _unmount_by_fusermount(path: bytes, *, lazy: bool) -> Unmounted:
    if _fusermount([b"-u", b"--", path]) is None:
        return Unmounted.GONE
    if not lazy:
        return Unmounted.BUSY  # the likeliest reason; the lazy attempt says which it is
    failure = _fusermount([b"-u", b"-z", b"--", path])
    if failure is None:
        return Unmounted.DETACHED
    log.error("not unmounted: %s: %s", os.fsdecode(path), failure)
    return Unmounted.KEPT
