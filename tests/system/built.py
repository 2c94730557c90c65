"""Images made by buildah, in a store of containers/storage; and what all tests of images on the command line share."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests import harness
from tests.harness import run
from tests.trees import describe, walk

SOURCES: Final = ("docker-archive", "oci", "oci-archive", "dir")


#: Runs a command where hybrid cgroups do not look like unified ones, which crun takes them for.
UNIFIED: Final = (
    *("unshare", "--mount", "--propagation=slave", "sh", "-c"),
    *('! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified; exec "$@"', "sh"),
)


class Built:
    """An image built by buildah in a store of containers/storage with native overlay, and written in several forms.

    `fill` puts what `containerfile` needs into a directory.
    """

    def __init__(
        self, root: Path, containerfile: str, fill: Callable[[Path], None], forms: tuple[str, ...] = SOURCES
    ) -> None:
        self.root = root
        self._options = [f"--root={root}/storage", f"--runroot={root}/run", "--storage-driver=overlay"]
        context = root / "context"
        context.mkdir()
        (context / "Containerfile").write_text(containerfile)
        fill(context)
        options = ["--layers", "--isolation=chroot", "--network=host", "--tag=built", "--format=oci"]
        run("buildah", *self._options, "build", *options, context, seconds=100)
        for transport in forms:
            path = root / transport
            tag = ":tag" if transport.startswith("oci") else ":localhost/app:1" if transport == "docker-archive" else ""
            self.podman("push", "--quiet", "localhost/built", f"{transport}:{path}{tag}")

    def podman(self, *arguments: str | Path) -> str:
        words = [*self._options, "--cgroup-manager=cgroupfs", "--events-backend=file", *arguments]
        return run(*(UNIFIED if arguments[0] == "run" else ()), "podman", *words, seconds=100)

    def run(self, name: str, *command: str) -> str:
        """What a container of podman's prints, made of an image of its store."""
        options = ["--network=host", "--cgroups=disabled", "--rm", "--security-opt=seccomp=unconfined"]
        options += ["--runtime=crun", "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096"]
        return self.podman("run", *options, name, *command)

    def manifest(self) -> bytes:
        """The manifest that the store has of the image."""
        source = f"containers-storage:[overlay@{self.root}/storage+{self.root}/run]localhost/built"
        return run("skopeo", "inspect", "--raw", source).encode()

    @contextlib.contextmanager
    def mounted(self, name: str = "localhost/built") -> Iterator[Path]:
        """Where podman mounts an image of its store."""
        where = self.podman("image", "mount", name).strip().splitlines()[-1]
        try:
            yield Path(where)
        finally:
            self.podman("image", "unmount", name)


@pytest.fixture
def image(disk: Path) -> Iterator[Any]:
    """``unionfsctl image`` over a store of its own; the words it printed."""
    root = disk / "store"

    def image(*words: str | Path, code: int = 0) -> str:
        verb, *rest = map(str, words)
        command = [sys.executable, "-m", "unionfsd.ctl", "image", verb, "--root", str(root), *rest]
        if "crun" in rest:
            command = [*UNIFIED, *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == code, f"{words}: exit {done.returncode}: {done.stderr}"
        return done.stdout if code == 0 else done.stderr

    yield image
    for path in harness.mounts():
        assert disk not in path.parents, f"{path} is still mounted"


def view(root: Path) -> dict[bytes, dict[str, object]]:
    """Everything a user can tell of a tree but the times of its root, by path."""
    found = {path[len(os.fsencode(root)) :]: describe(path) for path in walk(root)}
    del found[b""]  # podman makes the root of a layer that does not describe it 0555, whatever is below
    for path, facts in found.items():
        if facts["type"] == stat.S_IFDIR:
            del facts["mtime_ns"]  # podman makes directories over that a layer only implies
        full = os.fsencode(root) + path
        if facts["type"] == stat.S_IFREG:
            facts["content"] = Path(os.fsdecode(full)).read_bytes()
    return found
