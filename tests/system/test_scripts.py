"""The shell scripts for container roots: what they mount is right, and whatever happens all of it goes away again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.harness import DISK, PROJECT, Layers, Watchdog, run, wait_for
from tests.system import private

SCRIPTS = PROJECT / "scripts"
APPLETS = ("sh", "ls", "cat", "id", "mount", "touch", "sleep", "mkdir", "rm")

# All mounts but those of other tests.
_MOUNTS = f"""\
mounts() {{
    findmnt -nlo TARGET | awk -v here="$dir/" 'index($0, here) == 1 || index($0, "{DISK}/unionfsd-") != 1'
}}
"""

Done = subprocess.CompletedProcess[str]
Shell = Callable[..., Done]


@pytest.fixture
def rooted(layers: Layers) -> Layers:
    """Layers that make a root: programs in the lowest one, a file in the top one."""
    base = layers.lower
    (base / "bin").mkdir()
    shutil.copy("/bin/busybox", base / "bin" / "busybox")
    for name in APPLETS:
        (base / "bin" / name).symlink_to("busybox")
    (layers.push() / "hello").write_text("hello\n")
    return layers


@pytest.fixture
def shell(rooted: Layers) -> Iterator[Shell]:
    """Runs a script in which `$root` is a place to mount on, `$top` and `$base` are layers, `$upper` is an upper.

    It prints at its end, after a line of dashes, which mounts there are that were not there at its beginning.
    """
    private.install(rooted.root / "unionfsd")
    (rooted.root / "stage").mkdir()
    watchdog = Watchdog(100, "true")

    def shell(script: str) -> Done:
        return private.shell(
            f'{_MOUNTS}\nmounts >"$dir/before"\n{script}\n'
            'echo ----; mounts | diff "$dir/before" - | sed -n "s/^[<>] //p"',
            dir=rooted.root,
            root=rooted.mnt,
            top=rooted.lowers[0],
            base=rooted.lowers[1],
            upper=rooted.root / "kept",
            UNIONFSD=rooted.root / "unionfsd",
            PATH=f"{SCRIPTS}:{os.environ['PATH']}",
            TMPDIR=rooted.root / "stage",
        )

    yield shell
    assert watchdog.call_off()


def split(done: Done) -> tuple[list[str], list[str]]:
    """(lines that were printed, mounts that are new or gone)."""
    said, _, changed = done.stdout.partition("----\n")
    return said.splitlines(), changed.splitlines()


@pytest.mark.parametrize(
    "path",
    ["scripts/setup", "scripts/install", "scripts/launcher", "scripts/closed-to-others", "scripts/*-rootfs", ".ci/run"],
)
def test_shellcheck_finds_nothing(path: str) -> None:
    run("shellcheck", *PROJECT.glob(path))


@pytest.mark.parametrize("name", ["mount-rootfs", "umount-rootfs", "stage-rootfs"])
def test_usage(name: str) -> None:
    told = run(SCRIPTS / name, "-h")
    assert f"  {name} [-" in told
    assert "#" not in told
    wrong = subprocess.run([SCRIPTS / name], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", told)


# mount-rootfs and umount-rootfs.


def test_a_root_is_furnished(shell: Shell, rooted: Layers) -> None:
    done = shell(
        'mount-rootfs -u "$upper" "$root" "$top" "$base"\n'
        "chroot \"$root\" sh -c 'cat hello; ls -d /proc/1 /dev/null /dev/pts/ptmx /sys/kernel; touch written'\n"
        'cmp /etc/resolv.conf "$root/etc/resolv.conf" && echo same'
    )
    said, changed = split(done)
    assert said == ["hello", "/dev/null", "/dev/pts/ptmx", "/proc/1", "/sys/kernel", "same"], done.stderr
    mnt = str(rooted.mnt)
    assert {mnt, f"{mnt}/proc", f"{mnt}/sys", f"{mnt}/dev", f"{mnt}/etc/resolv.conf"} <= set(changed)
    assert sorted(os.listdir(rooted.root / "kept")) == ["dev", "etc", "proc", "sys", "written"]


def test_all_of_it_is_taken_down_and_nothing_of_the_host(shell: Shell) -> None:
    done = shell(
        'mount-rootfs -u "$upper" "$root" "$top" "$base"\n'
        'mkdir "$root/more"; mount -t tmpfs more "$root/more"\n'
        'umount-rootfs "$root"; echo $?'
    )
    assert split(done) == (["0"], []), done.stderr


def test_a_bare_root_is_the_union_alone(shell: Shell, rooted: Layers) -> None:
    assert split(shell('mount-rootfs -b "$root" "$top" "$base"')) == ([], [str(rooted.mnt)])


def test_more_options(shell: Shell) -> None:
    said, _ = split(shell('mount-rootfs -b -o ro,noexec "$root" "$top" "$base"; findmnt -no SOURCE,OPTIONS "$root"'))
    assert said[0].startswith("rootfs ")
    assert ",noexec," in said[0]


def test_strange_paths(shell: Shell, rooted: Layers) -> None:
    done = shell(
        'cp -r "$top" "$dir/a b:c,d\\\\e"; mkdir "$dir/m n"\n'
        'mount-rootfs -b -u "$dir/u,p p" "$dir/m n" "$dir/a b:c,d\\\\e" "$base"\n'
        'cat "$dir/m n/hello"; touch "$dir/m n/new"\n'
        'umount-rootfs "$dir/m n"'
    )
    assert split(done) == (["hello"], []), done.stderr
    assert (rooted.root / "u,p p" / "new").exists()


def test_a_symlink_in_a_layer_leads_nowhere(shell: Shell, rooted: Layers) -> None:
    (rooted.lowers[0] / "dev").symlink_to("/etc")
    done = shell('mount-rootfs -u "$upper" "$root" "$top" "$base"; echo $?')
    assert split(done) == (["1"], [])
    assert "not mounted: /dev of the layers is a symlink" in done.stderr


def test_a_read_only_root_needs_the_places(shell: Shell, rooted: Layers) -> None:
    done = shell('mount-rootfs "$root" "$top" "$base"; echo $?')
    assert split(done) == (["1"], [])
    assert "not mounted: the layers have no directory /proc" in done.stderr
    for name in ("proc", "sys", "dev", "etc"):
        (rooted.lowers[0] / name).mkdir()
    done = shell('mount-rootfs "$root" "$top" "$base"; echo $?; umount-rootfs "$root"')
    assert split(done) == (["0"], []), done.stderr


def test_what_unionfsd_refuses(shell: Shell) -> None:
    done = shell('mount-rootfs "$root" "$top" /nonexistent; echo $?')
    assert split(done) == (["3"], [])
    assert "/nonexistent: No such file or directory" in done.stderr


def test_a_root_in_use_stays_whole(shell: Shell, rooted: Layers) -> None:
    done = shell(
        'mount-rootfs -u "$upper" "$root" "$top" "$base"\n'
        '(cd "$root/proc"; exec sleep 100) & user=$!; sleep 0.2\n'
        'umount-rootfs "$root"; echo $?; findmnt -nlo TARGET | grep -c "^$root"\n'
        'umount-rootfs -l "$root"; echo $?; kill $user'
    )
    (code, whole, lazily), changed = split(done)
    assert (code, lazily, changed) == ("32", "0", [])
    assert int(whole) >= 5
    assert "is in use by" in done.stderr
    assert "(sleep)" in done.stderr


def test_a_root_whose_daemon_was_killed_is_taken_down(shell: Shell) -> None:
    done = shell(
        'mount-rootfs -u "$upper" "$root" "$top" "$base"\n'
        'kill -9 $(grep -l "^Name:.*unionfsd\\|^Name:.*python" /proc/[0-9]*/status | cut -d/ -f3); sleep 0.5\n'
        'ls "$root" 2>/dev/null; echo $?; umount-rootfs -l "$root"; echo $?'
    )
    assert split(done) == (["2", "0"], []), done.stderr


def test_there_must_be_something_to_take_down(shell: Shell) -> None:
    done = shell('umount-rootfs "$root"; echo $?')
    assert split(done) == (["1"], [])
    assert "nothing is mounted on" in done.stderr


# stage-rootfs.


@pytest.mark.parametrize("runner", ["chroot", "bwrap", "crun"])
def test_a_command_in_a_root_for_as_long_as_it_runs(runner: str, shell: Shell, rooted: Layers) -> None:
    done = shell(f'stage-rootfs -x {runner} "$top" "$base" -- sh -c \'cat /hello; id -u; touch /new; exit 7\'\necho $?')
    assert split(done) == (["hello", "0", "7"], []), done.stderr
    assert os.listdir(rooted.root / "stage") == []


@pytest.mark.parametrize("runner", ["chroot", "bwrap", "crun"])
def test_words_reach_the_command_as_they_are(runner: str, shell: Shell) -> None:
    done = shell(
        f"stage-rootfs -x {runner} \"$top\" \"$base\" -- sh -c 'printf \"[%s]\" \"$@\"' - 'a  b' '' '\"' '$x' --; echo"
    )
    assert split(done) == (['[a  b][]["][$x][--]'], []), done.stderr


def test_what_is_written_can_be_kept(shell: Shell, rooted: Layers) -> None:
    done = shell('stage-rootfs -u "$upper" "$top" "$base" -- sh -c "echo kept >/hello"')
    assert split(done) == ([], []), done.stderr
    assert (rooted.root / "kept" / "hello").read_text() == "kept\n"
    assert os.listdir(rooted.root / "stage") == []


def test_without_a_command_the_root_stays_until_it_is_taken_down(shell: Shell, rooted: Layers) -> None:
    done = shell(
        'root=$(stage-rootfs "$top" "$base"); cat "$root/hello"; findmnt -no FSTYPE "$root"; touch "$root/new"\n'
        'umount-rootfs "$root"'
    )
    assert split(done) == (["hello", "fuse.unionfsd"], []), done.stderr
    assert os.listdir(rooted.root / "stage") == []


def test_what_the_command_left_running_keeps_no_mount(shell: Shell, rooted: Layers) -> None:
    done = shell('stage-rootfs "$top" "$base" -- sh -c \'cd /proc; sleep 100 >/dev/null 2>&1 &\'; echo $?')
    assert split(done) == (["0"], []), done.stderr
    assert os.listdir(rooted.root / "stage") == []


@pytest.mark.parametrize("number", ["INT", "TERM", "HUP"])
def test_an_interruption_takes_everything_down(number: str, shell: Shell, rooted: Layers) -> None:
    done = shell(
        'set -- "$top" "$base" -- sh -c "echo up >/up; exec sleep 100"\n'
        'env --default-signal setsid stage-rootfs "$@" & session=$!\n'
        'until [ -e "$dir"/stage/*/upper/up ]; do sleep 0.1; done\n'
        f"kill -{number} -$session; wait $session; echo $?"
    )
    assert split(done) == ([str(128 + getattr(signal, f"SIG{number}"))], []), done.stderr
    assert os.listdir(rooted.root / "stage") == []


def test_a_root_that_cannot_be_mounted_leaves_nothing(shell: Shell, rooted: Layers) -> None:
    done = shell('stage-rootfs "$top" /nonexistent -- sh; echo $?')
    assert split(done) == (["3"], [])
    assert os.listdir(rooted.root / "stage") == []


def test_wrong_words(shell: Shell) -> None:
    done = shell(
        'stage-rootfs -x ship "$top" -- sh; echo $?; stage-rootfs -x crun "$top"; echo $?; stage-rootfs --; echo $?'
    )
    assert split(done) == (["2", "2", "2"], [])


def test_no_daemon_outlives_its_root(rooted: Layers, shell: Shell) -> None:
    done = shell(
        'stage-rootfs "$top" "$base" -- sh -c "touch /new"\n'
        "for i in 1 2 3 4 5 6 7 8 9 10; do pgrep -x unionfsd >/dev/null || break; sleep 0.5; done; echo $i"
    )
    (rounds,), changed = split(done)
    assert int(rounds) < 10
    assert changed == []
    wait_for(lambda: os.listdir(rooted.root / "stage") == [], "stage is left")
