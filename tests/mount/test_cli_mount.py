"""The command line as people, podman, mount(8) and service managers use it: coming up, staying, going away."""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.harness import DETACH, PROJECT, ROOTLESS, UNMOUNT, Layers, Mode, Watchdog, children, mounts, run, wait_for
from unionfsd import errors, syscalls

FUSE_SUPER_MAGIC = "65735546"

Done = subprocess.CompletedProcess[str]


class Cli:
    """The command line over `layers` in one mode; whatever it starts is gone after the test."""

    def __init__(self, layers: Layers, mode: Mode) -> None:
        self.layers = layers
        self.mnt = layers.mnt
        self.options = ",".join([layers.options(), *mode.options])
        self.read_only = ",".join([layers.options(upper=False), *mode.options])
        self.environment = os.environ | {"PYTHONPATH": str(PROJECT)}

    def argv(self, *arguments: str | Path, program: Sequence[str] = ("-m", "unionfsd")) -> list[str]:
        return [sys.executable, *program, *map(str, arguments)]

    def __call__(self, *arguments: str | Path, cwd: Path | None = None, fds: Sequence[int] = (), **env: str) -> Done:
        """Run it with its output in pipes: this returns when the last copy of them is closed."""
        return self.complete(self.argv(*arguments), cwd=cwd, fds=fds, env=env)

    def complete(
        self,
        argv: Sequence[str],
        *,
        cwd: Path | None = None,
        fds: Sequence[int] = (),
        env: dict[str, str] | None = None,
    ) -> Done:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=cwd or "/",
            env=self.environment | (env or {}),
            pass_fds=fds,
            timeout=40,
            check=False,
        )

    def mount(self, *options: str) -> int:
        """Mount in the background; the daemon's pid."""
        done = self("-o", ",".join([self.options, *options]), self.mnt)
        assert (done.returncode, done.stdout, done.stderr) == (errors.OK, "", "")
        assert self.mounted
        return self.pid()

    @property
    def mounted(self) -> bool:
        return self.mnt in mounts()

    def mounts(self) -> list[Path]:
        """What is mounted in the test's directory; others come and go elsewhere meanwhile."""
        return [path for path in mounts() if path.is_relative_to(self.layers.root)]

    def pids(self) -> list[int]:
        """Every process that was started with a path of this test in its arguments, but for the watchdog's."""
        here = os.fsencode(self.layers.root)
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (process / "cmdline").read_bytes()
                if here in line and b"unionfsd" in line and not line.startswith(b"sh\0"):
                    found.append(int(process.name))
        return found

    def pid(self) -> int:
        """The process that the others, if any, are children of."""
        pids = self.pids()
        (pid,) = (pid for pid in pids if not any(pid in children(other) for other in pids))
        return pid

    def wait_until_ended(self) -> None:
        wait_for(lambda: not self.pids(), "the daemon is still there")


@pytest.fixture
def cli(layers: Layers, mode: Mode) -> Iterator[Cli]:
    (layers.lower / "file").write_text("lower\n")
    cli = Cli(layers, mode)
    watchdog = Watchdog(90, shlex.join([*DETACH, str(layers.mnt)]))
    try:
        yield cli
    finally:
        while cli.mounted:
            run(*DETACH, cli.mnt)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not cli.pids(), "ended", seconds=5)
        for pid in cli.pids():
            os.kill(pid, signal.SIGKILL)
        assert watchdog.call_off(), "the mount hung"


def status(pid: int, field: str) -> str:
    """A field of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (value,) = (line.partition(":")[2].strip() for line in lines if line.startswith(field + ":"))
    return value


# Coming up.


def test_the_command_returns_when_the_mount_answers(cli: Cli) -> None:
    cli.mount()
    assert (cli.mnt / "file").read_text() == "lower\n"
    assert run("stat", "--file-system", "--format=%t", cli.mnt).strip() == FUSE_SUPER_MAGIC
    (cli.mnt / "new").write_text("new\n")
    assert (cli.layers.upper / "new").read_text() == "new\n"


def test_the_daemon_holds_nothing_of_its_caller(cli: Cli) -> None:
    reader, writer = os.pipe()
    done = cli("-o", cli.options, cli.mnt, fds=[writer], cwd=cli.layers.root)
    assert done.returncode == errors.OK
    os.close(writer)
    assert os.read(reader, 1) == b"", "the daemon kept a descriptor that it inherited"
    os.close(reader)
    pid = cli.pid()
    assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)] == ["/dev/null"] * 3
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) == pid
    assert status(pid, "Umask") == "0000"
    soft, hard = Path(f"/proc/{pid}/limits").read_text().partition("Max open files")[2].split()[:2]
    assert soft == hard


def test_podman_s_way(cli: Cli) -> None:
    """Links to layers relative to the current directory, an empty option at the end, a label, a private mount."""
    (cli.layers.root / "l").mkdir()
    (cli.layers.root / "l" / "ABC").symlink_to(cli.layers.lower)
    (cli.layers.root / "l" / "DEF").symlink_to(cli.layers.push())
    label = 'context="system_u:object_r:container_file_t:s0:c1,c2"'
    options = f"lowerdir=l/DEF:l/ABC,upperdir=upper,workdir=work,private,volatile,{label},"
    done = cli("-o", options, "mnt", cwd=cli.layers.root)
    assert (done.returncode, done.stdout, done.stderr) == (errors.OK, "", "")
    assert (cli.mnt / "file").read_text() == "lower\n"
    run("fusermount3", "-u", cli.mnt)
    cli.wait_until_ended()


def test_the_same_layers_mounted_read_only_again_and_again(cli: Cli) -> None:
    for _ in range(3):
        assert cli("-o", cli.read_only, cli.mnt).returncode == errors.OK
        assert (cli.mnt / "file").read_text() == "lower\n"
        with pytest.raises(OSError, match="Read-only"):
            (cli.mnt / "new").touch()
        run(*UNMOUNT, cli.mnt)


def test_mount_flags_and_names_reach_the_mount_table(cli: Cli) -> None:
    options = f"{cli.options},nodev,nosuid,noexec,noatime,nodiratime,sync,fsname=a\\,b c,subtype=x"
    assert cli("SPEC", cli.mnt, "-o", options).returncode == errors.OK
    line = run("findmnt", "--noheadings", "--output=FSTYPE,SOURCE,VFS-OPTIONS,FS-OPTIONS", "--raw", cli.mnt)
    fstype, source, vfs, fs = line.split()
    assert (fstype, source) == ("fuse.x", "a,b\\x20c")
    for_root = () if ROOTLESS == "user" else ("nodiratime", "allow_other")  # what fusermount3 does not know, or let one
    assert {"nodev", "nosuid", "noexec", "noatime", *for_root} <= {*vfs.split(","), "allow_other"}
    assert {"sync", "default_permissions", *for_root} <= {*fs.split(","), "nodiratime"}


def test_the_source_is_what_was_given(cli: Cli) -> None:
    assert cli("SPEC", cli.mnt, "-o", cli.options).returncode == errors.OK
    assert run("findmnt", "--noheadings", "--output=FSTYPE,SOURCE", "--raw", cli.mnt).split() == [
        "fuse.unionfsd",
        "SPEC",
    ]


def test_an_unknown_option_warns_and_mounts(cli: Cli) -> None:
    done = cli("-o", f"{cli.options},frobnicate=1", cli.mnt)
    assert (done.returncode, done.stderr) == (errors.OK, "unionfsd: warning: unknown option ignored: frobnicate=1\n")


def test_the_log_goes_to_a_file_when_asked(cli: Cli) -> None:
    done = cli("-o", f"{cli.options},log=log,frobnicate", cli.mnt, cwd=cli.layers.root)
    assert (done.returncode, done.stderr) == (errors.OK, "")
    run(*UNMOUNT, cli.mnt)
    cli.wait_until_ended()
    log = (cli.layers.root / "log").read_text()
    assert "WARNING unionfsd.daemon: unknown option ignored: frobnicate" in log
    assert f"INFO unionfsd.daemon: mounted on {cli.mnt}" in log


def test_the_service_manager_hears_when_the_mount_is_there(cli: Cli) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(cli.layers.root / "notify"))
        sock.settimeout(20)
        assert cli("-o", cli.options, cli.mnt, NOTIFY_SOCKET=str(cli.layers.root / "notify")).returncode == errors.OK
        assert sock.recv(1000).decode() == f"READY=1\nMAINPID={cli.pid()}"
        os.kill(cli.pid(), signal.SIGTERM)
        while (said := sock.recv(1000)).startswith(b"STATUS="):
            pass
        assert said == b"STOPPING=1"
    cli.wait_until_ended()


# Other people's ways to mount.


def program(cli: Cli, name: str) -> Path:
    """An executable of that name, as an installation has it."""
    path = cli.layers.root / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport sys\nfrom unionfsd.cli import main\nsys.exit(main())\n")
    path.chmod(0o755)
    return path


def test_mount_fuse3(cli: Cli) -> None:
    path = f"{program(cli, 'unionfsd').parent}:{os.environ['PATH']}"
    argv = ["mount.fuse3", "SPEC", str(cli.mnt), "-o", f"rw,_netdev,nofail,{cli.options}", "-t", "fuse.unionfsd"]
    done = cli.complete(argv, env={"PATH": path})
    assert (done.returncode, done.stderr) == (errors.OK, "")
    assert (cli.mnt / "file").read_text() == "lower\n"
    (cli.mnt / "file").write_text("changed\n")
    assert (cli.layers.upper / "file").read_text() == "changed\n"


def test_a_helper_of_mount_8(cli: Cli) -> None:
    helper = str(program(cli, "mount.fuse.unionfsd"))
    arguments = ["SPEC", str(cli.mnt), "-n", "-v", "-o", f"rw,{cli.options},x-systemd.automount", "-t", "fuse.name"]
    done = cli.complete([helper, *arguments])
    assert (done.returncode, done.stderr) == (errors.OK, "")
    assert run("findmnt", "--noheadings", "--output=FSTYPE,SOURCE", "--raw", cli.mnt).split() == ["fuse.name", "SPEC"]


@pytest.mark.mounting
def test_a_mount_that_the_caller_made(cli: Cli) -> None:
    fd = os.open("/dev/fuse", os.O_RDWR)
    data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
    syscalls.mount("theirs", str(cli.mnt), "fuse", 0, data)
    done = cli("-o", cli.options, f"/dev/fd/{fd}", fds=[fd])
    os.close(fd)
    assert (done.returncode, done.stderr) == (errors.OK, "")
    assert (cli.mnt / "file").read_text() == "lower\n"
    run(*UNMOUNT, cli.mnt)
    cli.wait_until_ended()


class Ordinary:
    """An ordinary user in a mount namespace where /dev/fuse is open to everybody, as distributions have it."""

    # fusermount3 wants a user that has a name.
    USER = pwd.getpwnam("nobody")
    BECOME = f"setpriv --reuid {USER.pw_uid} --regid {USER.pw_gid} --clear-groups"

    def __init__(self, cli: Cli) -> None:
        self.cli = cli
        self.device = cli.layers.root / "fuse"
        os.mknod(self.device, stat.S_IFCHR, os.makedev(10, 229))
        self.device.chmod(0o666)
        for directory in (cli.mnt, cli.layers.upper, cli.layers.work):
            os.chown(directory, self.USER.pw_uid, self.USER.pw_gid)

    def __call__(self, script: str) -> Done:
        """Run a shell script as root in that namespace."""
        script = f"set -e\nmount --bind {self.device} /dev/fuse\n{textwrap.dedent(script)}"
        return self.cli.complete(["unshare", "--mount", "sh", "-c", script])


@pytest.mark.privileged
def test_an_ordinary_user(cli: Cli) -> None:
    run_as_root = Ordinary(cli)
    me = Ordinary.BECOME
    done = run_as_root(f"""
        {me} {shlex.join(cli.argv("-o", cli.options + ",noatime", cli.mnt))}
        {me} cat {cli.mnt}/file
        {me} sh -c 'echo mine > {cli.mnt}/new'
        if cat {cli.mnt}/file 2>&1; then exit 1; fi
        findmnt --noheadings --output VFS-OPTIONS {cli.mnt}
        {me} fusermount3 -u {cli.mnt}
    """)
    assert (done.returncode, done.stderr) == (0, "")
    content, denied, options = done.stdout.splitlines()
    assert content == "lower"
    assert "Permission denied" in denied, "root is somebody else, too"
    assert {"nosuid", "nodev", "noatime"} <= set(options.split(","))
    new = cli.layers.upper / "new"
    assert (new.read_text(), new.stat().st_uid) == ("mine\n", Ordinary.USER.pw_uid)
    cli.wait_until_ended()


@pytest.mark.privileged
def test_fusermount_s_refusal_is_passed_on(cli: Cli) -> None:
    run_as_root = Ordinary(cli)
    (cli.layers.root / "fuse.conf").touch()
    done = run_as_root(f"""
        mount --bind {cli.layers.root}/fuse.conf /etc/fuse.conf
        {Ordinary.BECOME} {shlex.join(cli.argv("-o", cli.options + ",allow_other", cli.mnt))}
    """)
    assert done.returncode == errors.MOUNT
    assert done.stderr.startswith(f"unionfsd: cannot mount on {cli.mnt}: fusermount3: option allow_other only allowed")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.privileged
def test_a_signal_unmounts_an_ordinary_user_s_mount(busy: bool, cli: Cli) -> None:
    run_as_root = Ordinary(cli)
    me = Ordinary.BECOME
    # Not mountpoint(1): it asks the mount, and root may not.
    mounted = f"grep --quiet ' {cli.mnt} ' /proc/self/mountinfo"
    done = run_as_root(f"""
        {me} {shlex.join(cli.argv("-f", "-o", cli.options, cli.mnt))} 2>/dev/null &
        daemon=$!
        until {mounted}; do kill -0 $daemon; sleep 0.05; done
        {f"{me} sh -c 'exec sleep 1 <{cli.mnt}/file' &" if busy else ""}
        {me} cat {cli.mnt}/file
        sleep 0.3
        kill -TERM $daemon
        wait $daemon
        echo "ended with $?"
        if {mounted}; then echo still mounted; fi
    """)
    assert done.stdout.splitlines() == ["lower", "ended with 0"]


# Going away.


@pytest.mark.parametrize("command", [pytest.param("umount", marks=pytest.mark.mounting), "fusermount3 -u"])
def test_unmounting_ends_the_daemon_and_frees_the_mountpoint(command: str, cli: Cli) -> None:
    cli.mount()
    run(*command.split(), cli.mnt)
    cli.mnt.rename(cli.layers.root / "renamed")
    (cli.layers.root / "renamed").rmdir()
    cli.wait_until_ended()


def test_the_mountpoint_is_not_held(cli: Cli) -> None:
    cli.mount()
    run(*UNMOUNT, cli.mnt)  # EBUSY if the daemon were in it
    assert not cli.mounted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_unmounts(number: signal.Signals, cli: Cli) -> None:
    pid = cli.mount()
    (cli.mnt / "new").write_text("new\n")
    os.kill(pid, number)
    cli.wait_until_ended()
    assert not cli.mounted
    assert (cli.layers.upper / "new").read_text() == "new\n"


def test_who_is_inside_is_served_until_they_leave(cli: Cli) -> None:
    pid = cli.mount(f"log={cli.layers.root}/log")
    with (cli.mnt / "new").open("w+") as file:
        file.write("before\n")
        file.flush()
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not cli.mounted, "detached")
        file.write("after\n")
        file.flush()
        os.fsync(file.fileno())
        assert cli.pid() == pid
    cli.wait_until_ended()
    assert (cli.layers.upper / "new").read_text() == "before\nafter\n"
    assert "busy: detached" in (cli.layers.root / "log").read_text()


def test_a_second_signal_ends_it_at_once(cli: Cli) -> None:
    pid = cli.mount()
    fd = os.open(cli.mnt, os.O_RDONLY)
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not cli.mounted, "detached")
    os.kill(pid, signal.SIGTERM)
    cli.wait_until_ended()
    with pytest.raises(OSError, match="not connected"):
        os.fchmod(fd, 0o700)
    os.close(fd)


def test_a_signal_finds_a_mount_whose_parent_was_renamed(cli: Cli) -> None:
    parent = cli.layers.root / "parent"
    (parent / "mnt").mkdir(parents=True)
    assert cli("-o", cli.options, parent / "mnt").returncode == errors.OK
    moved = parent.rename(cli.layers.root / "moved")
    assert moved / "mnt" in mounts()
    os.kill(cli.pid(), signal.SIGTERM)
    cli.wait_until_ended()
    assert moved / "mnt" not in mounts()


@pytest.mark.mounting
def test_a_signal_leaves_alone_what_was_mounted_over_it(cli: Cli) -> None:
    pid = cli.mount()
    run("mount", "-t", "tmpfs", "over", cli.mnt)
    os.kill(pid, signal.SIGTERM)
    cli.wait_until_ended()
    assert run("findmnt", "--noheadings", "--output=SOURCE", cli.mnt).split()[-1] == "over"
    run(*UNMOUNT, cli.mnt)


@pytest.mark.mounting
def test_with_mounts_inside_it_goes_as_one(cli: Cli) -> None:
    (cli.layers.lower / "proc").mkdir()
    pid = cli.mount()
    run("mount", "-t", "tmpfs", "inside", cli.mnt / "proc")
    os.kill(pid, signal.SIGTERM)
    cli.wait_until_ended()
    assert not [path for path in mounts() if path.is_relative_to(cli.mnt)]


# In the foreground.


@contextlib.contextmanager
def foreground(cli: Cli, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    argv = cli.argv(*arguments, "-o", cli.options, cli.mnt)
    with subprocess.Popen(argv, stderr=subprocess.PIPE, env=cli.environment, text=True) as process:
        wait_for(lambda: cli.mounted or process.poll() is not None, "mounted")
        assert (cli.mnt / "file").read_text() == "lower\n"
        yield process
    assert not cli.mounted


@pytest.mark.parametrize("flag", ["-f", "-d"])
@pytest.mark.parametrize("end", [lambda cli, process: run(*UNMOUNT, cli.mnt), lambda cli, process: process.terminate()])
def test_in_the_foreground(flag: str, end: Callable[[Cli, subprocess.Popen[str]], None], cli: Cli) -> None:
    with foreground(cli, flag) as process:
        assert os.getsid(process.pid) == os.getsid(0)
        end(cli, process)
        assert process.wait(20) == errors.OK
        assert process.stderr is not None
        assert f"unionfsd: info: mounted on {cli.mnt}\n" in process.stderr.read()


# Failing.


def refused(cli: Cli, code: int, *arguments: str | Path) -> str:
    """The one line of a command that fails with `code`, after which nothing is mounted."""
    before = cli.mounts()
    done = cli(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("unionfsd: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert cli.mounts() == before
    assert not cli.pids()
    return done.stderr.strip()


def test_a_missing_layer(cli: Cli) -> None:
    for where in ([], ["-f"]):
        said = refused(cli, errors.LAYER, *where, "-o", f"lowerdir={cli.layers.root}/gone", cli.mnt)
        assert f"{cli.layers.root}/gone" in said


def test_an_upper_in_use(cli: Cli) -> None:
    cli.mount()
    (cli.layers.root / "mnt2").mkdir()
    done = cli("-o", cli.options, cli.layers.root / "mnt2")
    assert done.returncode == errors.BUSY
    assert cli.layers.root / "mnt2" not in mounts()
    assert (cli.mnt / "file").read_text() == "lower\n"


def test_a_mountpoint_that_is_none(cli: Cli) -> None:
    assert "No such file" in refused(cli, errors.MOUNT, "-o", cli.options, cli.layers.root / "gone")
    assert "not a directory" in refused(cli, errors.MOUNT, "-o", cli.options, cli.layers.lower / "file")


def test_a_dead_mount_is_named_as_such(cli: Cli) -> None:
    pid = cli.mount()
    for each in (pid, *children(pid)):  # the keeper first, or it would start another
        os.kill(each, signal.SIGKILL)
    cli.wait_until_ended()
    said = refused(cli, errors.MOUNT, "-o", cli.options, cli.mnt)
    assert "not connected (unmount it first" in said


def test_what_the_kernel_refuses(cli: Cli) -> None:
    for where in ([], ["-f"]):
        said = refused(cli, errors.MOUNT, *where, "-o", f"{cli.options},subtype={'x' * 5000}", cli.mnt)
        assert said.startswith(f"unionfsd: cannot mount on {cli.mnt}: ")


def scripted(cli: Cli, preparation: str, *arguments: str) -> list[str]:
    """A command that mounts by an interpreter which first runs `preparation`."""
    script = f"{textwrap.dedent(preparation)}\nimport sys\nfrom unionfsd.cli import main\nsys.exit(main(sys.argv[1:]))"
    return cli.argv("-o", cli.options, cli.mnt, *arguments, program=("-c", script))


def before_serving(cli: Cli, action: str, *arguments: str) -> list[str]:
    """A command that mounts and then, when it comes to import the transport, does `action`."""
    preparation = f"""
        import os, sys, time
        class Moment:
            def find_spec(self, name, path=None, target=None):
                if name in ("unionfsd.fuse.channel", "unionfsd.fuse.libfuse"):
                    {action}
        sys.meta_path.insert(0, Moment())
    """
    return scripted(cli, preparation, *arguments)


def test_a_daemon_that_dies_on_the_way_up_leaves_no_mount(cli: Cli) -> None:
    done = cli.complete(before_serving(cli, "os.kill(os.getpid(), 9)"))
    assert done.returncode == errors.INTERNAL
    assert done.stderr == "unionfsd: the daemon was killed by SIGKILL before the mount was up\n"
    assert not cli.mounted


def test_a_defect_on_the_way_up_leaves_no_mount(cli: Cli) -> None:
    done = cli.complete(before_serving(cli, "raise RuntimeError('grief')"))
    assert done.returncode == errors.INTERNAL
    assert done.stderr.splitlines()[-1] == "unionfsd: internal error: RuntimeError: grief"
    assert not cli.mounted
    assert not cli.pids()


@pytest.mark.parametrize("where", ["foreground", "background"])
def test_an_interruption_on_the_way_up_leaves_no_mount(where: str, cli: Cli) -> None:
    argv = before_serving(cli, "time.sleep(1)", *(["-f"] if where == "foreground" else []))
    with subprocess.Popen(argv, env=cli.environment) as process:
        wait_for(lambda: cli.mounted, "mounted")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == (errors.OK if where == "foreground" else 130)
    assert not cli.mounted
    assert not cli.pids()


@pytest.mark.parametrize("changed", [True, False])
def test_an_upper_that_cannot_be_synced_is_told_at_the_end(changed: bool, cli: Cli) -> None:
    """One that nothing was changed in need not be."""
    preparation = """
        import errno, os
        from unionfsd import syscalls
        def fail(fd):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        syscalls.syncfs = fail
    """
    assert cli.complete(scripted(cli, preparation, "-o", f"log={cli.layers.root}/log")).returncode == errors.OK
    if changed:
        Path(cli.mnt, "new").touch()
    run(*UNMOUNT, cli.mnt)
    cli.wait_until_ended()
    log = (cli.layers.root / "log").read_text()
    assert ("CRITICAL unionfsd.daemon: the upper could not be synced: Input/output error (" in log) == changed


def test_nohup_outlives_the_terminal(cli: Cli) -> None:
    argv = ["nohup", *cli.argv("-f", "-o", cli.options, cli.mnt)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=cli.environment) as process:
        wait_for(lambda: cli.mounted, "mounted")
        os.stat(cli.mnt / "file")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == errors.OK
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert "SIGTERM" in said
    assert "SIGHUP" not in said


def test_the_mount_is_there_soon(cli: Cli) -> None:
    """A bound for busy test machines; docs/performance.md has the figures of idle ones."""

    def once() -> float:
        begin = time.monotonic()
        assert cli("-o", cli.read_only, cli.mnt).returncode == errors.OK
        os.stat(cli.mnt)
        took = time.monotonic() - begin
        run(*UNMOUNT, cli.mnt)
        return took

    assert min(once() for _ in range(5)) < 0.5
