"""The control socket of live mounts, and `unionfsctl`: what it says is so, and what it does happens."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.harness import PROJECT, UNMOUNT, Daemon, DaemonFactory, Layers, Mode, as_user, mounts, run, wait_for
from tests.trees import errno_of, fingerprint
from unionfsd.control.client import Client
from unionfsd.ctl import find

pytestmark = pytest.mark.deviates  # the kernel's overlayfs has no such thing


class Said(NamedTuple):
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


def ctl(*words: str | Path, cwd: Path | None = None) -> Said:
    """Run unionfsctl."""
    command = [sys.executable, "-m", "unionfsd.ctl", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=60, check=False)
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def mount(layers: Layers, daemon: DaemonFactory) -> Daemon:
    """Two lowers and an upper, with something in each."""
    base, top = layers.lower, layers.push()
    (base / "etc").mkdir()
    (base / "etc/hosts").write_text("base")
    (base / "etc/motd").write_text("base")
    (base / "only base").write_text("base")
    (top / "etc").mkdir()
    (top / "etc/hosts").write_text("top")
    return daemon()


def test_status_tells_what_is_there(mount: Daemon, mode: Mode, layers: Layers) -> None:
    status = ctl("status", "--json", mount.path).json
    assert status["mountpoint"] == str(mount.path)
    assert status["pid"] == mount.pid
    assert (status["transport"], status["io"]) == (mode.transport, mode.io)
    assert [layer["path"] for layer in status["layers"]] == [str(layers.upper), *map(str, layers.lowers)]
    assert stat.S_ISSOCK(os.stat(status["socket"]).st_mode)
    assert status["id"] == os.minor(os.stat(mount.path).st_dev)
    text = ctl("status", mount.path).out
    assert all(word in text for word in (str(mount.path), str(mount.pid), mode.transport, str(layers.upper)))


@pytest.mark.mounting
def test_the_mount_is_found_from_any_path(mount: Daemon, layers: Layers) -> None:
    expected = ctl("status", "--json", mount.path).json["socket"]
    (mount / "link").symlink_to("etc")
    outside = layers.root / "outside"
    outside.symlink_to(mount / "etc")
    for path in ("etc", "etc/hosts", "not/there", "link", "link/hosts"):
        assert ctl("status", "--json", mount / path).json["socket"] == expected
    assert ctl("status", "--json", outside / "hosts").json["socket"] == expected
    assert ctl("status", "--json", cwd=mount / "etc").json["socket"] == expected
    bound = layers.root / "bound"
    bound.mkdir()
    run("mount", "--bind", mount / "etc", bound)
    try:
        assert ctl("explain", "--json", bound / "hosts").json["path"] == "/etc/hosts"
    finally:
        run("umount", bound)


def test_what_is_no_mount_of_ours_is_said_so(layers: Layers) -> None:
    for path in (layers.root, layers.mnt, Path("/proc/self"), Path("/nowhere/at/all")):
        said = ctl("status", path)
        assert (said.code, said.out) == (5, "")
        assert "not on a unionfsd mount" in said.err
        assert ("No such file or directory" in said.err) is not path.exists()
    assert ctl("no such verb").code == 2
    assert ctl("status", "--no-such-option").code == 2


def test_explain_names_the_layer_and_what_it_covers(mount: Daemon, mode: Mode, layers: Layers) -> None:
    top, base = layers.lowers
    assert f"from lower 1 {top}\n" in ctl("explain", "./etc/hosts", cwd=mount.path).out
    why = ctl("explain", "--json", mount / "etc/hosts").json
    assert (why["layer"]["path"], why["source"]) == (str(top), str(top / "etc/hosts"))
    assert [(copy["role"], copy["path"]) for copy in why["copies"]] == [
        ("gives", str(top / "etc/hosts")),
        ("covered", str(base / "etc/hosts")),
    ]
    if mode.transport == "channel":
        assert why["ino"]["number"] == os.stat(mount / "etc/hosts").st_ino
    (mount / "etc/hosts").write_text("changed")
    assert f"from upper {layers.upper}\n" in ctl("explain", mount / "etc/hosts").out
    assert str(base) in ctl("explain", mount / "only base").out
    (mount / "etc/hosts").unlink()
    said = ctl("explain", mount / "etc/hosts")
    assert said.code == 1
    assert f"whiteout /etc/hosts in upper {layers.upper}" in said.out
    assert ctl("explain", mount / "never/there").code == 1


def test_diff_has_a_line_for_each_change(mount: Daemon) -> None:
    assert ctl("diff", mount.path) == Said(0, "", "")
    (mount / "etc/hosts").write_text("changed")
    (mount / "etc/motd").unlink()
    (mount / "new").mkdir()
    (mount / "new/file\n").touch()
    os.chmod(mount / "only base", 0o600)
    os.chmod(mount / "only base", 0o644)  # copied up, and the same as before
    assert sorted(ctl("diff", mount.path).out.splitlines()) == [
        "added   /new/",
        "added   /new/file\\n",
        "changed /etc/hosts  (size, mtime)",
        "deleted /etc/motd",
    ]
    found = ctl("diff", "--json", mount / "new").json
    assert [(item["kind"], item["path"]) for item in found["items"]] == [("added", "/new/file\n")]
    assert found["counts"] == {"added": 1}
    assert ctl("diff", mount / "nowhere").code == 1


def test_a_long_diff_is_cut_by_a_pager_without_a_fuss(mount: Daemon) -> None:
    for number in range(1500):
        (mount / f"{number:0200}").touch()
    command = f"{sys.executable} -m unionfsd.ctl diff {mount.path} | head -n 3"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=PROJECT, check=True)
    assert (len(done.stdout.splitlines()), done.stderr) == (3, "")
    assert ctl("status", mount.path).code == 0


def test_the_other_reading_verbs(mount: Daemon, layers: Layers) -> None:
    (mount / "etc/hosts").write_bytes(b"x" * 100_000)
    assert ctl("layers", "--json", mount.path).json["layers"][0]["path"] == str(layers.upper)
    stats = ctl("stats", "--json", mount.path).json
    assert stats["counters"]["copied_bytes"] >= 0
    assert stats["counters"]["requests"] > 0
    assert stats["nodes"] >= 1
    lookups = stats["operations"]["LOOKUP"]
    assert lookups["count"] == sum(lookups["histogram"]) >= 1
    assert 0 < lookups["seconds"] < 60
    assert len(lookups["histogram"]) == len(stats["bounds"]) + 1
    assert stats["fd_misses"] >= 1
    with pytest.raises(OSError):
        os.rmdir(mount / "etc")
    failed = ctl("stats", "--json", mount.path).json["operations"]["RMDIR"]
    assert failed["errors"] == {"ENOTEMPTY": 1}
    total = ctl("du", "--json", "--depth", "1", mount.path).json["total"]
    assert total["apparent"] >= 100_000
    options = ctl("options", "--json", mount.path).json
    assert options["options"]["lowerdir"] == [str(lower) for lower in layers.lowers]
    assert "upperdir" in options["explicit"]
    assert ctl("sync", mount.path) == Said(0, "", "")
    assert ctl("log", "--level", "debug", mount.path) == Said(0, "debug\n", "")
    assert ctl("log", "--level", "info", mount.path).out == "info\n"
    assert "diff" in [method["name"] for method in ctl("discover", mount.path).json["methods"]]
    assert ctl("call", mount.path, "explain", '{"path": "/etc"}').json["exists"]
    assert ctl("call", mount.path, "explain", "[").code == 2
    for verb in ("layers", "stats", "du", "options"):
        assert ctl(verb, mount.path).code == 0


def test_events_say_what_changed_and_who_did(mount: Daemon, mode: Mode) -> None:
    assert ctl("events", mount.path).code == 0  # from here on
    script = """
    cd "$0" && mkdir d && echo text >d/file && echo more >>d/file && mv d/file d/moved && ln d/moved d/link
    ln -s x d/symlink && chmod 600 d/moved && rm d/link && setfattr -n user.a -v b d/moved && echo x >>etc/hosts
    rm d/symlink d/moved && rmdir d
    """
    process = subprocess.Popen(["sh", "-ec", script, str(mount.path)])
    assert process.wait(30) == 0
    found = [json.loads(line) for line in ctl("events", "--json", mount.path).out.splitlines()]
    assert [event["number"] for event in found] == list(range(1, len(found) + 1))
    told = [(event["kind"], event["path"], event["to"]) for event in found]
    for expected in (
        ("mkdir", "/d", None),
        ("create", "/d/file", None),
        ("rename", "/d/file", "/d/moved"),
        ("link", "/d/moved", "/d/link"),
        ("symlink", "/d/symlink", None),
        ("setattr", "/d/moved", None),
        ("unlink", "/d/link", None),
        ("setxattr", "/d/moved", None),
        ("copy-up", "/etc", None),
        ("copy-up", "/etc/hosts", None),
        ("rmdir", "/d", None),
    ):
        assert told.count(expected) == 1, (expected, told)
    assert told.index(("copy-up", "/etc", None)) < told.index(("copy-up", "/etc/hosts", None))
    if mode.io != "passthrough":
        assert ("write", "/etc/hosts", None) in told
    by_shell = [event for event in found if event["kind"] == "create"]
    assert [(event["pid"], event["uid"]) for event in by_shell] == [(process.pid, os.geteuid())]
    if mode.transport == "channel":
        # Pages that the kernel writes back, when the file is closed at the latest, are nobody's.
        by_pages = ("write", "copy-up")
        assert all(event["pid"] for event in found[1:] if event["kind"] not in by_pages)
    assert [event["fields"] for event in found if event["kind"] == "setxattr"] == [["user.a"]]
    lines = ctl("events", "--since", "2", mount / "etc").out.splitlines()
    assert lines
    assert all("/etc" in line for line in lines)


def test_events_are_followed(mount: Daemon) -> None:
    command = [sys.executable, "-m", "unionfsd.ctl", "events", "--follow", "--json", str(mount.path)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as follower:
        assert follower.stdout is not None
        wait_for(lambda: ctl("stats", "--json", mount.path).json["control"]["clients"] == 2, "the follower")
        (mount / "one").touch()
        assert json.loads(follower.stdout.readline())["path"] == "/one"
        os.rename(mount / "one", mount / "two")
        kinds = []
        while "rename" not in kinds:
            kinds.append(json.loads(follower.stdout.readline())["kind"])
        follower.send_signal(signal.SIGINT)
        assert follower.wait(30) == 130


def test_metrics_are_what_prometheus_reads(mount: Daemon) -> None:
    (mount / "etc/hosts").read_text()
    lines = ctl("metrics", mount.path).out.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    (requests,) = (name for name in values if name.startswith("unionfsd_requests_total{"))
    assert f'mountpoint="{mount.path}"' in requests
    assert float(values[requests]) > 0
    kinds = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds))
    parts = ("_bucket", "_sum", "_count")
    families = {name.partition("{")[0] for name in values}
    assert {next((name.removesuffix(part) for part in parts if name.endswith(part)), name) for name in families} == set(
        kinds
    )
    lookups = [(name, float(value)) for name, value in values.items() if 'operation="LOOKUP"' in name]
    buckets = [value for name, value in lookups if "_bucket{" in name]
    assert buckets == sorted(buckets)
    assert buckets[-1] == next(value for name, value in lookups if "_count{" in name) > 0


def test_metrics_are_served(mount: Daemon) -> None:
    command = [sys.executable, "-m", "unionfsd.ctl", "metrics", "--listen", "127.0.0.1:0", str(mount.path)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as exporter:
        assert exporter.stdout is not None
        url = exporter.stdout.readline().split()[-1]
        for _ in range(2):
            with urllib.request.urlopen(url, timeout=30) as answer:
                assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                assert f'unionfsd_nodes{{mountpoint="{mount.path}"'.encode() in answer.read()
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(url.replace("/metrics", "/"), timeout=30)
        exporter.terminate()
        assert exporter.wait(30) == 0
    assert ctl("metrics", "--listen", "nonsense").code == 2


def test_any_language_can_speak_to_it(mount: Daemon) -> None:
    path = ctl("status", "--json", mount.path).json["socket"]
    command = 'printf \'{"jsonrpc":"2.0","id":7,"method":"status"}\\n\' | nc -N -U "$1"'
    answer = json.loads(run("sh", "-c", command, "sh", path))
    assert (answer["id"], answer["result"]["pid"]) == (7, mount.pid)


@pytest.mark.owners
def test_nobody_else_gets_in(mount: Daemon) -> None:
    path = ctl("status", "--json", mount.path).json["socket"]

    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)

    assert as_user(lambda: errno_of(connect)) == "EACCES"


@pytest.mark.privileged
def test_a_group_may_get_in(layers: Layers, daemon: DaemonFactory) -> None:
    mount = daemon("control_group=54399")

    def status() -> Any:
        with Client(find.locate(bytes(mount.path)).socket) as client:
            return client.call("status")["pid"]

    assert as_user(status, groups=[54399]) == mount.pid
    assert as_user(lambda: errno_of(status)) == "EACCES"


def test_the_place_of_the_socket(layers: Layers, daemon: DaemonFactory) -> None:
    """Anywhere: also with a long path, and where the mount itself covers it."""
    deep = layers.root / ("d" * 100) / "socket"
    deep.parent.mkdir()
    for path in (deep, layers.mnt / "socket"):
        mount = daemon(f"control={path}")
        status = ctl("status", "--json", mount.path)
        if path == deep:
            assert status.json["socket"] == str(deep)
            assert ctl("status", "--json", "--socket", deep, "/").json["pid"] == mount.pid
        assert os.stat(mount.path).st_ino
        mount.unmount()
        assert not path.exists()


def test_a_mount_without_a_socket(layers: Layers, daemon: DaemonFactory) -> None:
    mount = daemon("control=off")
    said = ctl("status", mount.path)
    assert said.code == 5
    assert "control=off" in said.err
    states = {row["mountpoint"]: row["state"] for row in ctl("ps", "--json").json}
    assert states[str(mount.path)] == "no socket"


def test_a_socket_that_cannot_be_refuses_the_mount(layers: Layers) -> None:
    command = [sys.executable, "-m", "unionfsd", "-o", f"{layers.options()},control=/nowhere/socket", str(layers.mnt)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == 2
    assert "control=/nowhere/socket" in done.stderr


def test_unmounting(mount: Daemon) -> None:
    path = Path(ctl("status", "--json", mount.path).json["socket"])
    with (mount / "etc/hosts").open():
        said = ctl("unmount", mount.path)
        assert (said.code, "busy" in said.out) == (1, True)
        assert mount.mounted
    assert ctl("unmount", mount.path) == Said(0, "", "")
    wait_for(lambda: not mount.mounted, "still mounted")
    wait_for(lambda: not path.exists(), "the socket stays")


def test_unmounting_lazily(mount: Daemon) -> None:
    with (mount / "etc/hosts").open() as file:
        assert ctl("unmount", "--json", "--lazy", mount.path).json == {"result": "detached"}
        assert not mount.mounted
        assert file.read() == "top"


@pytest.mark.mounting
def test_the_dead_are_found_and_taken_away(mount: Daemon, layers: Layers) -> None:
    status = ctl("status", "--json", mount.path).json
    bound = layers.root / "bound"
    bound.mkdir()
    run("mount", "--bind", mount / "etc", bound)
    alive = {row["mountpoint"]: row for row in ctl("ps", "--json").json}[str(mount.path)]
    assert (alive["state"], alive["status"]["pid"]) == ("serving", mount.pid)
    assert str(mount.path) in ctl("ps").out
    mount.kill()
    said = ctl("status", mount.path)
    assert said.code == 5
    assert "dead" in said.err
    assert {row["mountpoint"]: row["state"] for row in ctl("ps", "--json").json}[str(mount.path)] == "dead"
    assert str(mount.path) in ctl("reap", "--dry-run", mount.path).out
    assert mount.mounted
    taken = [row["path"] for row in ctl("reap", "--json", mount.path).json]
    assert {str(mount.path), str(bound), status["socket"]} <= set(taken)
    assert mount.path not in mounts()
    assert not bound.is_mount()
    assert not os.path.lexists(status["socket"])
    assert str(mount.path) not in ctl("ps").out


@pytest.mark.mounting
def test_a_dead_mount_with_something_over_it_is_left(mount: Daemon) -> None:
    run("mount", "-t", "tmpfs", "tmpfs", mount.path)
    mount.kill()
    assert ctl("reap", mount.path) == Said(0, "", "")
    assert mounts().count(mount.path) == 2
    run(*UNMOUNT, mount.path)
    assert ctl("reap", mount.path).code == 0
    assert mount.path not in mounts()


def test_a_mount_that_hangs_is_told_from_a_dead_one(mount: Daemon) -> None:
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        assert {row["mountpoint"]: row["state"] for row in ctl("ps", "--json").json}[str(mount.path)] == "hung"
    finally:
        os.kill(mount.pid, signal.SIGCONT)
    assert ctl("status", mount.path).code == 0


def test_changes_wait_while_frozen(mount: Daemon, mode: Mode, layers: Layers) -> None:
    (mount / "file").write_text("before")
    if mode.io == "passthrough":
        assert "io=passthrough" in ctl("freeze", mount.path).err
        return
    # A name that the kernel knows is found; one that it does not waits behind a change of the same directory.
    known = (mount / "etc/hosts").open()
    assert ctl("freeze", "--timeout", "90", mount.path).code == 0
    changes = [
        lambda: (mount / "file").write_text("after"),
        lambda: (mount / "new").mkdir(),
        lambda: (mount / "etc/motd").unlink(),
        lambda: os.chmod(mount / "etc/hosts", 0o600),
        lambda: os.rename(mount / "only base", mount / "renamed"),
    ]
    threads = [threading.Thread(target=change) for change in changes]
    for thread in threads:
        thread.start()
    assert (mount / "etc/hosts").read_text() == "top"
    known.close()
    assert ctl("status", "--json", mount.path).json["frozen"]
    time.sleep(0.3)
    assert all(thread.is_alive() for thread in threads)
    assert sorted(os.listdir(layers.upper)) == ["file"]
    assert (layers.upper / "file").read_text() == "before"
    assert ctl("thaw", mount.path).code == 0
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert (mount / "file").read_text() == "after"
    assert sorted(os.listdir(mount.path)) == ["etc", "file", "new", "renamed"]
    assert sorted(os.listdir(mount / "etc")) == ["hosts"]
    assert stat.S_IMODE(os.stat(mount / "etc/hosts").st_mode) == 0o600


@pytest.mark.parametrize("verb", ["freeze", "sync"])
def test_what_open_files_hold_back_is_handed_over_first(verb: str, mount: Daemon, mode: Mode, layers: Layers) -> None:
    if mode.io == "passthrough" and verb == "freeze":
        return
    with (mount / "new").open("wb", buffering=0) as new, (mount / "etc/hosts").open("r+b", buffering=0) as old:
        new.write(bytes(8 << 20))
        old.write(b"TOP")
        assert ctl(verb, mount.path).code == 0
        assert (layers.upper / "new").stat().st_size == 8 << 20
        assert (layers.upper / "etc/hosts").read_bytes() == b"TOP"
        assert ctl("thaw", mount.path).code == 0


def test_the_end_of_a_mount_ends_its_freeze(mount: Daemon, mode: Mode) -> None:
    if mode.io == "passthrough":
        return
    assert ctl("freeze", mount.path).code == 0
    writer = threading.Thread(target=lambda: (mount / "new").mkdir())
    writer.start()
    time.sleep(0.2)
    os.kill(mount.pid, signal.SIGTERM)
    writer.join(30)
    assert not writer.is_alive()
    wait_for(lambda: mount.path not in mounts(), "still mounted")
    assert (mount.layers.upper / "new").is_dir()


def test_lowers_that_changed_are_seen_after_a_refresh(mode: Mode, layers: Layers, daemon: DaemonFactory) -> None:
    lower = layers.lower
    (lower / "d").mkdir()
    (lower / "d/stays").write_text("stays")
    (lower / "d/changes").write_text("before")
    (lower / "d/goes").write_text("goes")
    mount = daemon()
    before = os.stat(mount / "d/stays").st_ino
    assert sorted(os.listdir(mount / "d")) == ["changes", "goes", "stays"]
    assert (mount / "d/changes").read_text() == "before"
    assert errno_of(os.stat, mount / "d/comes") == "ENOENT"
    (lower / "d/goes").unlink()
    (lower / "d/comes").write_text("comes")
    (lower / "d/changes").write_text("after and longer")
    assert errno_of(os.stat, mount / "d/comes") == "ENOENT"
    assert ctl("refresh", mount / "d").code == 0
    assert (mount / "d/comes").read_text() == "comes"
    assert (mount / "d/changes").read_text() == "after and longer"
    assert errno_of(os.stat, mount / "d/goes") == "ENOENT"
    assert sorted(os.listdir(mount / "d")) == ["changes", "comes", "stays"]
    if mode.transport == "channel":
        assert os.stat(mount / "d/stays").st_ino == before
    mount._lowers[lower] = fingerprint(lower)  # what it must be in the end; the change was ours


def test_dropped_caches_let_the_kernel_forget(layers: Layers, daemon: DaemonFactory) -> None:
    for number in range(300):
        (layers.lower / f"f{number}").write_text("x")
    mount = daemon()
    for path in mount.path.iterdir():
        path.read_text()
    dropped = ctl("drop-caches", "--json", mount.path).json
    assert dropped["names"] >= 300
    if dropped["kernel"]:
        wait_for(lambda: ctl("stats", "--json", mount.path).json["nodes"] < 20, "the kernel keeps its nodes")
    assert (mount / "f7").read_text() == "x"


def test_a_mount_works_beside_a_flood(mount: Daemon) -> None:
    path = ctl("status", "--json", mount.path).json["socket"]
    stop = threading.Event()

    def flood() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.setblocking(False)
            while not stop.is_set():
                try:
                    client.send(b'{"jsonrpc":"2.0","method":"diff","id":1}\n[[[[[\n' * 50)
                except BlockingIOError:
                    time.sleep(0.001)
                except OSError:
                    return  # it never read an answer, and was dropped

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        start = time.monotonic()
        for number in range(200):
            (mount / f"f{number}").write_text("x")
        assert time.monotonic() - start < 10
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert ctl("status", mount.path).code == 0


def test_status_is_quick(mount: Daemon) -> None:
    """In processor time, which a busy machine does not change."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert ctl("status", mount.path).code == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(8)) < 0.08


@pytest.mark.privileged
def test_nothing_is_imported_that_a_verb_does_not_need() -> None:
    script = "import sys, unionfsd.ctl.main as m; m.parser(); import unionfsd.ctl.verbs; print(*sys.modules)"
    modules = run(sys.executable, "-c", script).split()
    assert not {"trio", "pyfuse3", "ctypes", "shutil", "subprocess", "dataclasses", "unionfsd.union"} & set(modules)
