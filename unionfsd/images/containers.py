"""Containers: an image with a writable layer of its own, mounted by the daemon and taken down again.

``ROOT/containers/NAME/`` has ``upper``, ``work``, ``merged`` and ``container.json``. What is mounted holds its layers
by descriptors that the daemon keeps until it ends (`HOLD`), so that no collection takes them, whoever kills whom.
As Docker has it, renaming directories of a lower is off (``redirect_dir``), and so is keeping hard links of a lower
together (``index``): an upper is a layer that can be committed, and then shows what the container showed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from unionfsd import mountinfo, syscalls
from unionfsd.errors import BUSY, MOUNT, UserError, reason
from unionfsd.images import beneath, documents
from unionfsd.images import digest as digests
from unionfsd.images.store import NOT_FOUND, Image, Store
from unionfsd.syscalls import Fd
from unionfsd.typed import Final, NamedTuple

#: Names the descriptors that the daemon is to keep open until it ends.
HOLD: Final = "UNIONFSD_HOLD_FDS"
_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,99}")
_FACTS: Final = b"container.json"
#: Seconds for a daemon to end after its mount.
_PATIENCE: Final = 5.0


class Container(NamedTuple):
    """A container: its image by digest and by the name it was made from, its layers, the lowest first."""

    name: str
    image: str
    image_name: str
    layers: tuple[str, ...]
    directory: str

    @property
    def upper(self) -> str:
        return os.path.join(self.directory, "upper")

    @property
    def merged(self) -> str:
        return os.path.join(self.directory, "merged")

    @property
    def mounted(self) -> bool:
        """Whether it is mounted in this mount namespace, on its own mountpoint."""
        return is_mountpoint(self.merged)


def create(store: Store, image: Image, name: str | None = None) -> Container:
    """Make a container of an image; UserError for a name that is taken or cannot be."""
    name = name or secrets.token_hex(6)
    if _NAME.fullmatch(name) is None:
        raise UserError(f"{name!r}: cannot be the name of a container", hint="letters, digits, and _ . - between them")
    with store.lock(shared=True), store.make(b"container-" + name.encode()) as stage:
        beneath.remove(stage.fd.fd, b"made")
        syscalls.mkdir_at(stage.fd.fd, b"made", 0o711)
        with syscalls.open_dir(stage.fd.fd, b"made") as made, store.open_diff(image.config.chain_ids[-1]) as top:
            for directory in (b"upper", b"work", b"merged"):
                syscalls.mkdir_at(made.fd, directory, 0o755)
            with syscalls.open_dir(made.fd, b"upper") as upper:
                _like(upper, os.stat(top.fd))
            facts = {
                "image": image.digest,
                "image_name": image.names[0] if image.names else image.digest,
                "layers": list(image.config.chain_ids),
            }
            beneath.write_file(made.fd, _FACTS, documents.dump(facts))
        try:
            syscalls.renameat2(stage.fd.fd, b"made", store.containers.fd, name.encode(), syscalls.RENAME_NOREPLACE)
        except FileExistsError:
            raise UserError(f"{name}: there is a container of this name", code=BUSY) from None
        beneath.sync_directory(store.containers.fd)
    return find(store, name)


def _like(fd: Fd, st: os.stat_result) -> None:
    """Give the root of an upper what the root below has."""
    if os.geteuid() == 0:
        syscalls.chown(fd.fd, st.st_uid, st.st_gid)
    syscalls.chmod(fd.fd, stat.S_IMODE(st.st_mode))


def find(store: Store, name: str) -> Container:
    """The container `name`; UserError when there is none."""
    if _NAME.fullmatch(name) is None or syscalls.stat_or_none(store.containers.fd, name.encode()) is None:
        raise UserError(f"{name}: no such container", hint="unionfsctl image containers", code=NOT_FOUND)
    directory = os.path.join(store.root, "containers", name)
    try:
        with syscalls.open_dir(store.containers.fd, name.encode()) as fd:
            facts = documents.load(beneath.read_file(fd.fd, _FACTS, 1 << 20), f"{name}: container.json")
        image, image_name, layers = digests.checked(facts["image"]), str(facts["image_name"]), facts["layers"]
        return Container(name, image, image_name, tuple(map(digests.checked, layers)), directory)
    except (KeyError, TypeError, OSError):
        raise UserError(f"{name}: container.json is damaged", hint=f"{directory} is its directory", code=1) from None


def same_layers(container: Container, chains: Sequence[str]) -> None:
    """UserError unless a container has the layers of its image."""
    if container.layers != tuple(chains):
        raise UserError(
            f"{container.name}: its layers are not those of its image", hint="container.json was changed: make another"
        )


def every(store: Store) -> Iterator[Container]:
    """All containers."""
    for name in beneath.names(store.containers.fd):
        yield find(store, os.fsdecode(name))


def remove(store: Store, container: Container) -> None:
    """Remove a container with all that was written in it; UserError while it is mounted, here or elsewhere."""
    if in_use(store, container):
        raise UserError(f"{container.name}: mounted", hint="unmount it first", code=BUSY)
    with store.make(b"gone-container-" + container.name.encode()) as stage:
        beneath.remove(stage.fd.fd, b"made")
        syscalls.renameat2(store.containers.fd, container.name.encode(), stage.fd.fd, b"made")


def in_use(store: Store, container: Container) -> bool:
    """Whether a container is mounted, here or elsewhere; waits for a daemon that has just lost its mount."""
    with syscalls.open_dir(store.containers.fd, container.name.encode()) as made:
        return container.mounted or _locked(made, _PATIENCE)


def _locked(made: Fd, patience: float) -> bool:
    """Whether a daemon has the upper, in whatever mount namespace: it holds a lock until soon after its mount."""
    deadline = time.monotonic() + patience
    with Fd(os.open(b"upper", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=made.fd)) as upper:
        while True:
            try:
                fcntl.flock(upper.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return True
                time.sleep(0.02)
            else:
                return False


# Mounting.


def mount(store: Store, container: Container, options: Sequence[str] = (), mountpoint: str | None = None) -> str:
    """Mount a container, on its own mountpoint unless told; returns where. UserError with the daemon's words."""
    where = mountpoint or container.merged
    work = os.path.join(container.directory, "work")
    mine = [f"upperdir={escaped(container.upper)}", f"workdir={escaped(work)}", "redirect_dir=off", "index=off"]
    with holding(store, container.layers) as held:
        _mount(lower_paths(store, container.layers), [*mine, *options], where, held)
    return where


def mount_image(store: Store, image: Image, mountpoint: str, options: Sequence[str] = ()) -> None:
    """Mount an image read-only; UserError with the daemon's words."""
    with holding(store, image.config.chain_ids) as held:
        _mount(lower_paths(store, image.config.chain_ids), ["ro", *options], mountpoint, held)


def mount_directories(diffs: Sequence[str], mountpoint: str, options: Sequence[str] = ()) -> None:
    """Mount layers that are elsewhere, the lowest first, read-only; UserError with the daemon's words."""
    _mount(list(reversed(diffs)), ["ro", *options], mountpoint, [])


def lower_paths(store: Store, chains: Sequence[str]) -> list[str]:
    """The directories of layers given the lowest first, as a mount wants them: the top one first."""
    return [store.link_path(chain) for chain in reversed(chains)]


@contextlib.contextmanager
def holding(store: Store, chains: Sequence[str]) -> Iterator[list[int]]:
    """Descriptors, to be inherited, that keep layers from being collected."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(store.hold_layer(chain)).fd for chain in dict.fromkeys(chains)]
        for fd in held:
            os.set_inheritable(fd, True)
        yield held


def hold_variable(held: Sequence[int]) -> dict[str, str]:
    """What tells a daemon to keep them."""
    return {HOLD: ",".join(map(str, held))}


def _mount(lowers: Sequence[str], options: list[str], mountpoint: str, held: Sequence[int]) -> None:
    text = ",".join([f"lowerdir={':'.join(map(escaped, lowers))}", *options])
    done = subprocess.run(
        [sys.executable, "-m", "unionfsd", "-o", text, mountpoint],
        pass_fds=held,
        env={**os.environ, **hold_variable(held)},
        stderr=subprocess.PIPE,
        check=False,
    )
    words = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        raise UserError(words.removeprefix("unionfsd: "), code=done.returncode if done.returncode > 0 else MOUNT)
    if words:
        print(words, file=sys.stderr)


def escaped(path: str) -> str:
    """A path as a mount option has it."""
    return re.sub(r"([\\,:])", r"\\\1", path)


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount what is mounted on `mountpoint`; UserError when nothing is, or it is in use."""
    path = os.path.realpath(os.path.dirname(mountpoint) or ".")
    path = os.path.join(path, os.path.basename(mountpoint))
    lines = [line for line in mountinfo.read() if line.path == os.fsencode(path)]
    if not lines:
        raise UserError(f"{mountpoint}: nothing is mounted there", code=MOUNT)
    if not lines[-1].fstype.startswith(b"fuse."):
        raise UserError(f"{mountpoint}: not a mount of unionfsd", hint="umount takes others away", code=MOUNT)
    try:
        flags = syscalls.UMOUNT_NOFOLLOW | (syscalls.MNT_DETACH if lazy else 0)
        syscalls.umount2(path, flags)
    except PermissionError:
        words = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", path]
        done = subprocess.run(words, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            raise UserError(done.stderr.decode(errors="replace").strip(), code=MOUNT) from None
    except OSError as error:
        raise UserError(f"{mountpoint}: {reason(error)}", code=BUSY) from None


def is_mountpoint(path: str) -> bool:
    """Whether something is mounted on `path`, which is absolute; the mount itself is not asked."""
    return any(line.path == os.fsencode(path) for line in mountinfo.read())
