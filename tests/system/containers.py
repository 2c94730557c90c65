"""podman and buildah over unionfsd, each store in namespaces of its own.

Rules this file obeys:

- Nothing outside the store's directory is changed: what podman must find elsewhere (`/dev/fuse` open to everybody, a
  user with subordinate ids) is bound over the original in a private mount namespace.
- Daemons, monitors and containers live in a private pid namespace. When its first process is killed all of them are
  gone, and with the last of them every mount.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import site
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

from tests.harness import GROUP, PROJECT, USER, wait_for
from tests.system import private

# What a test machine may lack: networks, a cgroup hierarchy to write in, the right to raise limits.
_CONTAINERS_CONF: Final = """\
[containers]
cgroups = "disabled"
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
netns = "none"

[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
tmp_dir = "{root}/tmp"
"""

_STORAGE_CONF: Final = """\
[storage]
driver = "overlay"
graphroot = "{root}/store"
rootless_storage_path = "{root}/store"
runroot = "{root}/state"

[storage.options.overlay]
mount_program = "{program}"
mountopt = "{options}"
"""

_PROGRAM: Final = """\
#!/bin/sh
exec env {environment} {python} -m unionfsd "$@"
"""

# Run by the first process of the namespaces.
_INIT: Final = """\
cd {root}
{preparation}
touch ready
exec sleep infinity
"""

# A user that the system does not have, with subordinate ids; fuse for everybody; a Python that everybody may read.
_ROOTLESS: Final = """\
mkdir etc python project site
{{ cat /etc/passwd; echo 'tester:x:{uid}:{gid}::{root}/home:/bin/sh'; }} >etc/passwd
{{ cat /etc/group; echo 'tester:x:{gid}:'; }} >etc/group
echo 'tester:200000:65536' | tee etc/subuid >etc/subgid
for name in passwd group subuid subgid; do
    mount --bind etc/$name /etc/$name
done
mknod -m 666 fuse c 10 229
mount --bind fuse /dev/fuse
mount --bind {python} python
mount --bind {project} project
mount --bind {site} site
"""


class Store:
    """An image store in `root` whose overlay driver mounts by unionfsd, for as long as `with` lasts.

    It is root's or, `rootless`, an ordinary user's. `options` are mount options for every mount. With `program`, that
    is the mount program in place of unionfsd.
    """

    def __init__(self, root: Path, *options: str, rootless: bool = False, program: Path | None = None) -> None:
        self.root = root
        self._program = program
        self.log = root / "log"
        self.share = root / "share"
        self._options = ",".join([*([] if program else [f"log={self.log}"]), *options])
        self._rootless = rootless
        self._outer: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        for name in ("home", "run", "tmp", "share"):
            (self.root / name).mkdir(mode=0o700)
        self._configure()
        if self._rootless:
            for path in (self.root, *self.root.iterdir()):
                os.chown(path, USER, GROUP)
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._outer is not None
        self._outer.kill()
        self._outer.wait(20)
        wait_for(lambda: not self.daemons(), "daemons outlived their namespaces")

    def _configure(self) -> None:
        program = self.root / "mount-program"
        paths = {
            "root": self.root,
            "program": self._program or program,
            "options": self._options,
        }
        (self.root / "containers.conf").write_text(_CONTAINERS_CONF.format(**paths))
        (self.root / "storage.conf").write_text(_STORAGE_CONF.format(**paths))
        python, environment = sys.executable, {"PYTHONPATH": str(PROJECT)}
        if self._rootless:
            python = f"{self.root}/python/bin/{Path(sys.executable).resolve().name}"
            environment = {
                "LD_LIBRARY_PATH": f"{self.root}/python/lib",
                "PYTHONPATH": f"{self.root}/project:{self.root}/site",
            }
        words = [shlex.join([f"{name}={value}" for name, value in environment.items()]), shlex.quote(python)]
        program.write_text(_PROGRAM.format(environment=words[0], python=words[1]))
        program.chmod(0o755)

    def _start(self) -> None:
        quoted = {
            "root": shlex.quote(str(self.root)),
            "python": shlex.quote(sys.base_prefix),
            "project": shlex.quote(str(PROJECT)),
            "site": shlex.quote(site.getsitepackages()[0]),
        }
        preparation = _ROOTLESS.format(uid=USER, gid=GROUP, **quoted) if self._rootless else ""
        script = private.PROLOGUE + _INIT.format(root=quoted["root"], preparation=preparation)
        self._outer = subprocess.Popen([*private.UNSHARE, "sh", "-c", script], stdin=subprocess.DEVNULL)
        outer = self._outer
        wait_for(lambda: (self.root / "ready").exists() or outer.poll() is not None, "namespaces")
        assert outer.poll() is None, "the namespaces could not be made"

    @property
    def _init(self) -> int:
        assert self._outer is not None
        pid = self._outer.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def podman(self, *arguments: str | Path) -> str:
        """Standard output of a podman command that must succeed."""
        return self.finish(self.start("podman", *arguments))

    def build(self, context: Path, *arguments: str) -> str:
        """`podman build` with the isolation that works everywhere; prints what `arguments` make it print."""
        return self.podman("build", "--isolation=chroot", "--network=host", *arguments, context)

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        """A command in the namespaces, running."""
        nsenter = ["nsenter", f"--target={self._init}", "--mount", "--pid", "--"]
        user = ["setpriv", f"--reuid={USER}", f"--regid={GROUP}", "--clear-groups", "--"] if self._rootless else []
        return subprocess.Popen(
            [*nsenter, *user, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env=os.environ | self._environment,
        )

    @property
    def _environment(self) -> Mapping[str, str]:
        return {
            "BUILDAH_ISOLATION": "chroot",
            "CONTAINERS_CONF": f"{self.root}/containers.conf",
            "CONTAINERS_STORAGE_CONF": f"{self.root}/storage.conf",
            "HOME": f"{self.root}/home",
            "XDG_RUNTIME_DIR": f"{self.root}/run",
        }

    def finish(self, process: subprocess.Popen[str], seconds: float = 100) -> str:
        """Wait for a command of `start`; its standard output. It must have succeeded."""
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            process.kill()
        assert process.returncode == 0, f"{process.args!r}: exit {process.returncode}:\n{out}{err}"
        return out

    def daemons(self) -> list[int]:
        """The pids, outside, of the unionfsd processes of this store that are alive."""
        here = os.fsencode(self.root)
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"unionfsd" in words and any(here in word for word in words):
                found.append(int(process.name))
        return found

    def leftovers(self) -> str:
        """What is left of unions, and which processes have their mounts: for who wonders why."""
        lines = [f"mounted: {path}" for path in self.mounts()]
        for pid in self.daemons():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            lines.append(f"{pid}: {words}")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f" {self.root}/store/overlay/" in (process / "mountinfo").read_text():
                    lines.append(f"{process.name} has mounts: {(process / 'cmdline').read_bytes()!r}")
        return "\n".join(lines)

    def mounts(self) -> list[str]:
        """The unions that are mounted in the store."""
        lines = Path(f"/proc/{self._init}/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines if " - fuse.unionfsd " in line]

    def complaints(self) -> list[str]:
        """What the daemons logged that is more than information."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return [line for line in lines if not re.match(r"\S+ \S+ (INFO|DEBUG) ", line)]
