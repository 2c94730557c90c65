"""The main job on real input: a container root of three layers, mounted by unionfsd and worked in through chroot.

Shows the merged tree with the layers each entry comes from, what landed in the upper, and whether kernel overlayfs over
the same layers shows the identical tree. What the kernel or missing privileges forbid is named and left out. Everything
happens in a mount namespace and a temporary directory of its own; nothing stays mounted and no file is left.

Exit status: 0 when everything that could be tried held, 1 otherwise. UNIONFSD names another program to mount with.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .layers import stage
from .report import LAYER_COLOURS, Findings, heading, paint, run
from .views import differences, show_tree, show_upper, snapshot, union_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .layers import Layer
    from .views import Facts

INSIDE = "UNIONFSD_DEMO_INSIDE"
KEPT_BY_SUDO = ("PATH", "TMPDIR", "NO_COLOR", "UNIONFSD")
# The extent of a user namespace that maps every id (user_namespaces(7)).
ALL_IDS = 2**32 - 1


class Part(NamedTuple):
    title: str
    commands: list[str]


SESSION = [
    Part("Run programs", ["grep PRETTY /etc/os-release", "cat /etc/motd", "app", "ls /opt/app", "find / | wc -l"]),
    Part(
        "Edit",
        [
            "echo '10.0.0.7 db' >>/etc/hosts; cat /etc/hosts",
            """sed -i 's/".*"/"edited in the union"/' /etc/app/app.conf; app""",
            "chmod 600 /etc/profile.d/locale.sh; ls -l /etc/profile.d/locale.sh",
            "cd /var/lib/app; echo changed | dd of=store.db bs=1 seek=4096 conv=notrunc status=none; du -k store.db",
        ],
    ),
    Part(
        "Delete",
        [
            "rm /etc/shells /etc/issue; ls /etc",
            "rm -r /usr/share/licenses; ls /usr/share",
            "cd /var/cache; rm -r fonts; mkdir fonts; echo fresh >fonts/index; ls fonts",
        ],
    ),
    Part(
        "Rename",
        [
            "cd /srv/www; mv index.html home.html; ls",
            "cd /usr/share; mv man manual; find manual",
        ],
    ),
    Part(
        "Create",
        [
            "mkdir -p /srv/data/new; cd /srv/data; echo one >new/file; ln new/file hardlink",
            "cd /srv/data; ln -s ../../etc/hosts symlink; mkfifo fifo; mv new renamed; ls -l",
        ],
    ),
]
AS_USER = Part("Work as a user", ["su app -c 'app; echo note >~/note; ls -ln ~; echo no >/etc/passwd || :'"])


def enter_namespace() -> None:
    """Runs the demo again where it may mount: as root, through sudo, or as root of a user namespace."""
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    unshare = ["unshare", "--mount", "--propagation", "private"]
    ways = [unshare, [*unshare, "--user", "--map-root-user"]]
    if os.geteuid() != 0:
        kept = [f"{key}={os.environ[key]}" for key in KEPT_BY_SUDO if key in os.environ]
        ways[0] = ["sudo", "--", "env", *kept, *unshare]
    for way in ways:
        probe = [*way, "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]
        if shutil.which(way[0]) and subprocess.run(probe, stderr=subprocess.DEVNULL, check=False).returncode == 0:
            os.execvp(way[0], [*way, "env", f"{INSIDE}=1", sys.executable, "-m", "scripts.demo"])
    sys.exit("demo: nothing can be mounted here (run it as root, with sudo, or where user namespaces are allowed)")


def is_full_root() -> bool:
    """Whether this is the machine's own root, who may give files away and use `trusted` attributes."""
    return int(Path("/proc/self/uid_map").read_text().split()[2]) == ALL_IDS


def umount(place: Path) -> None:
    """Unmounts, lazily when something still holds the mount: nothing of ours may stay mounted."""
    if place.is_mount() and run("umount", place).returncode:
        run("umount", "--lazy", place)


def make_workspace(stack: ExitStack, prefix: str, findings: Findings) -> Path:
    """A directory that can hold layers; a tmpfs is put there where the temporary directory cannot."""
    workspace = Path(tempfile.mkdtemp(prefix="unionfsd-demo."))
    workspace.chmod(0o755)
    stack.callback(shutil.rmtree, workspace)
    try:
        os.mknod(workspace / "probe", stat.S_IFCHR, os.makedev(0, 0))
        os.setxattr(workspace, prefix + "opaque", b"y")
        os.removexattr(workspace, prefix + "opaque")
        (workspace / "probe").unlink()
    except OSError as error:
        findings.forbid(f"keep layers in {workspace.parent}; a tmpfs takes its place", error.strerror)
        run("mount", "-t", "tmpfs", "unionfsd-demo", workspace)
        stack.callback(umount, workspace)
    return workspace


def mount_union(stack: ExitStack, lowers: Sequence[Layer], workspace: Path, options: str) -> Path:
    """Mounts the layers under an empty upper; returns the mountpoint."""
    for name in ("upper", "work", "merged"):
        (workspace / name).mkdir()
    merged = workspace / "merged"
    program = shlex.split(os.environ.get("UNIONFSD", "")) or [str(Path(sys.executable).with_name("unionfsd"))]
    lowerdir = ":".join(str(layer.root) for layer in lowers)
    argument = f"lowerdir={lowerdir},upperdir={workspace / 'upper'},workdir={workspace / 'work'}{options}"
    print(f"  $ {Path(program[0]).name} -o {argument.replace(f'{workspace}/', '')} merged")
    if not Path("/dev/fuse").exists():
        run("modprobe", "fuse")
    stack.callback(umount, merged)
    begun = time.monotonic()
    mounted = run(*program, "-o", argument, merged)
    if mounted.returncode or not merged.is_mount():
        sys.exit(f"demo: could not mount: {mounted.stdout.strip()}")
    print(f"  mounted after {(time.monotonic() - begun) * 1000:.0f} ms")
    return merged


def work_inside(merged: Path, findings: Findings) -> None:
    """Lives in the container for a while: every command of the session, with what it printed."""
    parts = list(SESSION)
    if is_full_root():
        parts.append(AS_USER)
    else:
        findings.forbid("work as another user", "this user namespace has one id")
    clean = ["env", "--ignore-environment", "HOME=/root", "TERM=dumb"]
    chroot = [*clean, str(shutil.which("chroot")), str(merged), "/bin/sh", "-l", "-e", "-c"]
    for part in parts:
        heading(f"{part.title}, in a chroot on the mount")
        for command in part.commands:
            print(f"  # {command}")
            done = run(*chroot, command)
            print("".join(f"    {line}\n" for line in done.stdout.splitlines()), end="")
            if done.returncode:
                findings.check(False, f"that ended with status {done.returncode}")


def compare_with_kernel(
    stack: ExitStack, ours: dict[str, Facts], layers: Sequence[Path], options: str, findings: Findings
) -> None:
    """Holds what the mount showed against kernel overlayfs, mounted read-only over `layers` (top first)."""
    workspace = layers[0].parent
    place = workspace / "kernel"
    place.mkdir()
    argument = f"ro,lowerdir={':'.join(map(str, layers))}{options}"
    print(f"  $ mount -t overlay overlay -o {argument.replace(f'{workspace}/', '')} kernel")
    stack.callback(umount, place)
    mounted = run("mount", "-t", "overlay", "overlay", "-o", argument, place)
    if mounted.returncode:
        findings.forbid("compare with kernel overlayfs", mounted.stdout.strip())
        return
    theirs = snapshot(place)
    found = differences(ours, theirs, ("ours", "the kernel's"))
    size = sum(entry.size for entry in theirs.values()) / 2**20
    findings.check(
        not found, f"kernel overlayfs shows the identical tree: {len(theirs)} entries, {size:.1f} MiB", found
    )
    print("       (compared: path, type, mode, owner, device, size, mtime, extended attributes, content)")


def demo(stack: ExitStack, findings: Findings) -> Path:
    """The whole story, up to the clean-up that `stack` does; returns the workspace."""
    prefix, options = ("trusted.overlay.", "") if is_full_root() else ("user.overlay.", ",userxattr")
    workspace = make_workspace(stack, prefix, findings)

    heading(f"Three layers in {workspace}")
    lowers = stage(workspace, prefix, findings)
    before = {layer.name: snapshot(layer.root) for layer in lowers}
    for layer in lowers:
        print(f"  {paint(LAYER_COLOURS[layer.name], f'{layer.name:<7}')} {len(before[layer.name]):>4} entries")

    heading("Mount")
    merged = mount_union(stack, lowers, workspace, options)
    work_inside(merged, findings)
    ours = snapshot(merged)

    places = [("upper", workspace / "upper"), *((layer.name, layer.root) for layer in lowers)]
    expected = union_of(places, prefix)
    heading("The merged tree, and the layers each entry comes from")
    show_tree(expected)
    heading("What landed in the upper")
    show_upper(workspace / "upper", union_of(places[1:], prefix), prefix)

    heading("Is it right?")
    umount(merged)
    odd = sorted((ours.keys() - {""}) ^ expected.keys())
    findings.check(not odd, f"the mount showed the {len(expected)} names that the layers make", odd)
    for layer in lowers:
        changed = differences(before[layer.name], snapshot(layer.root), ("the layer before", "the layer after"))
        findings.check(not changed, f"layer {layer.name} is untouched", changed)
    compare_with_kernel(stack, ours, [place for _, place in places], options, findings)
    return workspace


def main() -> int:
    if INSIDE not in os.environ:
        enter_namespace()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    findings = Findings()
    with ExitStack() as stack:
        workspace = demo(stack, findings)
    left = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(workspace) in line]
    findings.check(not left and not workspace.exists(), f"nothing is left mounted, and {workspace} is gone", left)
    if findings.forbidden:
        heading("Left out, because this machine or your privileges do not allow it")
        print("".join(f"  {step}\n" for step in findings.forbidden), end="")
    return 1 if findings.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader, a pager perhaps, has seen enough; nothing may be flushed to it any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
