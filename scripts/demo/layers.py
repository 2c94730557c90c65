"""The three layers of the demo: directories, filled the way image builds leave them."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from typing import TYPE_CHECKING

from .report import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .report import Findings

# When each layer was built: a copy-up must keep times to the nanosecond.
BUILT = {
    "base": 1_767_225_600_123_456_789,
    "config": 1_770_000_000_987_654_321,
    "app": 1_772_345_678_000_000_001,
}

OS_RELEASE = 'NAME="Demo Linux"\nID=demo\nVERSION_ID=1\nPRETTY_NAME="Demo Linux 1 (three layers)"\n'
PASSWD = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n"
GROUP = "root:x:0:\ndaemon:x:1:\nshadow:x:42:\nnogroup:x:65534:\n"
PROFILE = """\
export PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin
umask 022
for script in /etc/profile.d/*.sh; do [ -r "$script" ] && . "$script"; done
"""
APP = """\
#!/bin/sh
. /etc/app/app.conf
echo "app $(cat /opt/app/VERSION), $(id -un) on $(cat /etc/hostname): $GREETING"
"""
BASE_FILES = {
    "etc/passwd": PASSWD,
    "etc/group": GROUP,
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/hostname": "localhost\n",
    "etc/profile": PROFILE,
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/fstab": "# made by the installer\n",
    "etc/issue": "Demo Linux 1\n",
    "etc/motd": "Welcome.\n",
    "etc/shells": "/bin/sh\n/bin/ash\n",
    "usr/lib/os-release": OS_RELEASE,
    "usr/share/doc/README": "Nobody reads this in a container.\n",
    "usr/share/licenses/busybox/COPYING": "GPL-2.0-only\n",
    "usr/share/man/man1/sh.1": ".TH SH 1\n",
    "srv/www/index.html": "<h1>It works</h1>\n",
    "srv/www/old.html": "<h1>It worked</h1>\n",
    "var/cache/fonts/stale": "rendered long ago\n",
    "opt/app/VERSION": "1.4\n",
    "opt/app/plugins/legacy.sh": "echo legacy\n",
}


class Layer:
    """A directory of the workspace that becomes a lower layer. Paths are relative to its root."""

    def __init__(self, workspace: Path, name: str, prefix: str, findings: Findings) -> None:
        self.name = name
        self.root = workspace / name
        self.prefix = prefix
        self.findings = findings
        self.root.mkdir()

    def directory(self, path: str, mode: int = 0o755) -> None:
        (self.root / path).mkdir(parents=True, exist_ok=True)
        (self.root / path).chmod(mode)

    def file(self, path: str, text: str, mode: int = 0o644) -> None:
        self.directory(os.path.dirname(path))
        (self.root / path).write_text(text)
        (self.root / path).chmod(mode)

    def symlink(self, path: str, target: str) -> None:
        self.directory(os.path.dirname(path))
        (self.root / path).symlink_to(target)

    def whiteout(self, path: str) -> None:
        """Hides `path` of the layers below, in the kernel's form."""
        self.directory(os.path.dirname(path))
        os.mknod(self.root / path, stat.S_IFCHR, os.makedev(0, 0))

    def opaque(self, path: str) -> None:
        """Hides what the layers below have in the directory `path`."""
        self.directory(path)
        self.try_to("make a directory opaque", lambda: os.setxattr(self.root / path, self.prefix + "opaque", b"y"))

    def owner(self, path: str, uid: int, gid: int) -> None:
        self.try_to("give a file to another user", lambda: os.chown(self.root / path, uid, gid))

    def xattr(self, path: str, name: str, value: bytes) -> None:
        self.try_to("set an extended attribute", lambda: os.setxattr(self.root / path, name, value))

    def device(self, path: str, major: int, minor: int) -> None:
        node = self.root / path
        self.try_to("make a device node", lambda: os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(major, minor)))

    def try_to(self, step: str, call: Callable[[], object]) -> None:
        """Calls; where the kernel refuses, that is a finding and not an error."""
        try:
            call()
        except OSError as error:
            # EINVAL: an id that this user namespace does not map.
            if error.errno not in (errno.EPERM, errno.EINVAL, errno.ENOTSUP):
                raise
            self.findings.forbid(f"{step} in layer {self.name}", error.strerror)

    def seal(self) -> None:
        """Gives every entry the build time of the layer."""
        for folder, directories, files in os.walk(self.root, topdown=False):
            for name in [*directories, *files, "."]:
                os.utime(os.path.join(folder, name), ns=(BUILT[self.name],) * 2, follow_symlinks=False)


def stage_base(base: Layer, busybox: str) -> None:
    """A root with a static busybox and its applets, a proper /etc, and an old release of the application."""
    for path in ("bin", "sbin", "usr/bin", "usr/sbin", "dev", "proc", "sys", "run", "var/log", "home"):
        base.directory(path)
    base.directory("root", 0o700)
    base.directory("tmp", 0o1777)
    shutil.copy(busybox, base.root / "bin/busybox")
    applets = run("chroot", base.root, "/bin/busybox", "--install", "-s")
    if applets.returncode:
        sys.exit(f"demo: {busybox} does not run in a root of its own; is it static? {applets.stdout.strip()}")
    # For initial RAM disks only.
    (base.root / "linuxrc").unlink(missing_ok=True)
    for path, text in BASE_FILES.items():
        base.file(path, text)
    base.file("opt/app/bin/app", "#!/bin/sh\necho 'app 1.4, the old one'\n", 0o755)
    base.symlink("etc/os-release", "../usr/lib/os-release")
    base.file("etc/shadow", "root:*:20000:0:99999:7:::\n", 0o640)
    base.owner("etc/shadow", 0, 42)
    base.xattr("etc/hosts", "user.comment", b"from the base layer")
    base.device("dev/null", 1, 3)


def stage_config(config: Layer) -> None:
    """What a site puts on top of a base image: names, users, settings."""
    config.file("etc/hostname", "web-1\n")
    config.file("etc/passwd", PASSWD + "app:x:1000:1000:the application:/home/app:/bin/sh\n")
    config.file("etc/group", GROUP + "app:x:1000:\n")
    config.file("etc/profile.d/locale.sh", "export LANG=C.UTF-8\n")
    config.file("etc/app/app.conf", 'GREETING="hello from the config layer"\n')
    config.directory("home/app", 0o750)
    config.owner("home/app", 1000, 1000)


def stage_app(app: Layer) -> None:
    """A new release that replaces the old one entirely (an opaque directory) and removes what it does not want."""
    app.opaque("opt/app")
    app.file("opt/app/VERSION", "2.0\n")
    app.file("opt/app/bin/app", APP, 0o755)
    app.symlink("usr/bin/app", "/opt/app/bin/app")
    app.file("etc/motd", "This container runs app 2.0.\n")
    app.whiteout("usr/share/doc")
    app.whiteout("etc/fstab")
    app.whiteout("srv/www/old.html")
    # A sparse file, with data in its middle: a copy-up keeps the holes.
    app.file("var/lib/app/store.db", "first page\n")
    with (app.root / "var/lib/app/store.db").open("r+b") as store:
        store.seek(4 << 20)
        store.write(os.urandom(64 << 10))
        store.truncate(8 << 20)
    app.owner("var/lib/app/store.db", 1000, 1000)


def stage(workspace: Path, prefix: str, findings: Findings) -> list[Layer]:
    """Builds the lower layers; returns them top first."""
    busybox = shutil.which("busybox")
    if busybox is None:
        sys.exit("demo: no busybox on this machine (install busybox-static)")
    base, config, app = (Layer(workspace, name, prefix, findings) for name in ("base", "config", "app"))
    stage_base(base, busybox)
    stage_config(config)
    stage_app(app)
    for layer in (base, config, app):
        layer.seal()
    return [app, config, base]
