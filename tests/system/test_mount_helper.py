"""mount(8) with `fuse.unionfsd`: from a command line and from an fstab, through /sbin/mount.fuse.unionfsd.

The helper is put in its place in a private mount namespace only, by the kernel's overlayfs.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Layers, Watchdog
from tests.system import private


class Namespace:
    """Runs shell scripts, each in a mount namespace in which the helper is installed."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.options = layers.options()
        self._sbin = layers.root / "sbin"
        self._sbin.mkdir()
        private.install(self._sbin / "mount.fuse.unionfsd")

    def __call__(self, script: str) -> str:
        """What `script`, which must succeed, prints. `$options` and `$mnt` are the layers' as in `Layers`."""
        install = 'set -e; mount -t overlay overlay -o lowerdir="$sbin":/usr/sbin /usr/sbin\n'
        done = private.shell(install + script, sbin=self._sbin, options=self.options, mnt=self.layers.mnt)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def fstab(self, options: str) -> Path:
        """An fstab with one line."""
        path = self.layers.root / "fstab"
        path.write_text(f"layers {self.layers.mnt} fuse.unionfsd {options} 0 0\n")
        return path


@pytest.fixture
def namespace(layers: Layers) -> Iterator[Namespace]:
    (layers.lower / "file").write_text("lower\n")
    # Mounts end with their namespace, which a hanging one keeps alive.
    watchdog = Watchdog(100, f"umount --force --lazy {shlex.quote(str(layers.mnt))} 2>/dev/null")
    yield Namespace(layers)
    assert watchdog.call_off()


SHOW = 'findmnt --noheadings --output SOURCE,FSTYPE "$mnt" | tr -s " "; cat "$mnt/file"\n'


def test_a_mount_by_type(namespace: Namespace) -> None:
    said = namespace(
        'mount -t fuse.unionfsd layers "$mnt" -o "$options"\n' + SHOW + 'echo new >"$mnt/new"; umount "$mnt"'
    )
    assert said == "layers fuse.unionfsd\nlower\n"
    assert (namespace.layers.upper / "new").read_text() == "new\n"


@pytest.mark.parametrize("flags", ["-n", "-s", "-v", "-r", "-w", "-o nosuid,nodev"])
def test_flags_of_mount(flags: str, namespace: Namespace) -> None:
    said = namespace(f'mount {flags} -t fuse.unionfsd layers "$mnt" -o "$options" >/dev/null\n' + SHOW)
    assert said == "layers fuse.unionfsd\nlower\n"


def test_flags_reach_the_mount(namespace: Namespace) -> None:
    said = namespace('mount -r -t fuse.unionfsd layers "$mnt" -o "$options,noexec"\nfindmnt -nro OPTIONS "$mnt"')
    assert {"ro", "noexec", "allow_other"} <= set(said.strip().split(","))


def test_a_dry_run_mounts_nothing(namespace: Namespace) -> None:
    assert namespace('mount -f -t fuse.unionfsd layers "$mnt" -o "$options"\nfindmnt "$mnt" || echo none') == "none\n"


def test_an_fstab(namespace: Namespace) -> None:
    later = "nofail,_netdev,user,x-systemd.requires-mounts-for=/,x-systemd.automount,comment=ours"
    fstab = namespace.fstab(f"{namespace.options},{later}")
    assert namespace(f'mount --fstab {fstab} "$mnt"\n' + SHOW) == "layers fuse.unionfsd\nlower\n"
    assert namespace(f"mount --fstab {fstab} --all\n" + SHOW) == "layers fuse.unionfsd\nlower\n"


def test_an_fstab_with_paths_that_need_escapes(namespace: Namespace) -> None:
    lower = namespace.layers.root / "a b:c,d"
    lower.mkdir()
    (lower / "file").write_text("strange\n")
    written = str(lower).replace(":", "\\:").replace(",", "\\,").replace(" ", "\\040")
    fstab = namespace.fstab(f"lowerdir={written},nofail")
    assert namespace(f'mount --fstab {fstab} "$mnt"\n' + SHOW) == "layers fuse.unionfsd\nstrange\n"


def test_noauto_is_left_alone(namespace: Namespace) -> None:
    fstab = namespace.fstab(f"{namespace.options},noauto")
    assert namespace(f'mount --fstab {fstab} --all\nfindmnt "$mnt" || echo none') == "none\n"


def test_a_failure_is_told_and_the_code_passed_on(namespace: Namespace) -> None:
    said = namespace('mount -t fuse.unionfsd layers "$mnt" -o lowerdir=/nonexistent 2>&1 || echo "code $?"')
    assert said == "unionfsd: lowerdir /nonexistent: No such file or directory (name an existing directory)\ncode 3\n"


def test_flags_change_by_remounting(namespace: Namespace) -> None:
    said = namespace(
        'mount -t fuse.unionfsd layers "$mnt" -o "$options,nodev"\n'
        'mount -o remount,ro "$mnt"; touch "$mnt/new" 2>&1 || findmnt -nro OPTIONS "$mnt"\n'
        'mount -o remount,rw,noexec "$mnt"; touch "$mnt/new"; findmnt -nro OPTIONS "$mnt"; ls "$mnt"'
    )
    refusal, read_only, writable, *names = said.splitlines()
    assert "Read-only file system" in refusal
    assert {"ro", "nodev"} <= set(read_only.split(","))
    assert {"rw", "nodev", "noexec"} <= set(writable.split(","))
    assert names == ["file", "new"]


@pytest.mark.parametrize("upper", [True, False])
def test_what_was_made_read_only_stays_so(upper: bool, namespace: Namespace) -> None:
    options = f"{namespace.layers.options(upper=upper)},ro"
    said = namespace(
        f'mount -t fuse.unionfsd layers "$mnt" -o "{options}"\nmount -o remount,rw "$mnt" 2>&1 || echo "code $?"'
    )
    assert said.endswith(" Read-only file system (unmount it, and mount it with an upperdir and without ro)\ncode 5\n")
