"""Images with what others make of them: built by buildah, mounted as podman does, loaded by podman and skopeo."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests import harness
from tests.harness import PROJECT, run, wait_for
from tests.images import Made, member, tar
from tests.system import private
from tests.system.built import SOURCES, Built, view
from tests.system.built import image as image
from tests.trees import fingerprint
from unionfsd.images import runtime
from unionfsd.images.store import Store

CONTAINERFILE: Final = """\
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN mkdir -p /etc /tmp /data/sub && echo 'root:x:0:0:root:/root:/bin/sh' >/etc/passwd && echo one >/data/one \
  && echo two >/data/two && echo deep >/data/sub/deep && chmod 1777 /tmp \
  && echo 'me:x:7:8:me:/home:/bin/sh' >>/etc/passwd
RUN rm /data/two && echo more >>/data/one && ln /data/one /data/linked
RUN rm -r /data/sub && mkdir /data/sub && echo new >/data/sub/new
RUN mv /data/sub /data/moved && chmod 700 /data/moved && chown 5:6 /data/moved/new && ln -s moved /data/link
RUN mkfifo /data/fifo && touch -d '2001-02-03 04:05:06' /data/old
ENV WORD="two words" PATH=/bin
WORKDIR /data
CMD ["sh", "-c", "pwd; echo $WORD"]
"""


def _busybox(context: Path) -> None:
    shutil.copy("/bin/busybox", context / "busybox")


@pytest.fixture(scope="module")
def built() -> Iterator[Built]:
    root = Path(tempfile.mkdtemp(prefix="unionfsd-", dir=harness.DISK))
    try:
        yield Built(root, CONTAINERFILE, _busybox)
    finally:
        harness.remove(root)


@pytest.mark.parametrize("source", SOURCES)
def test_our_root_is_podmans_root(built: Built, image: Any, disk: Path, source: str) -> None:
    where = built.root / source
    image("import", f"{source}:{where}", "--name", "app:1")
    point = disk / "point"
    point.mkdir()
    image("mount", "app:1", point)
    try:
        ours = view(point)
    finally:
        image("umount", point)
    with built.mounted() as theirs:
        assert ours == view(theirs)
    assert image("verify") == ""


def test_podmans_store_is_mounted_in_place_and_imported_from(built: Built, image: Any, disk: Path) -> None:
    storage = built.root / "storage"
    before = fingerprint(storage / "overlay-images")
    point = disk / "point"
    point.mkdir()
    image("mount", f"containers-storage:{storage}@localhost/built", point)
    try:
        ours = view(point)
    finally:
        image("umount", point)
    with built.mounted() as theirs:
        assert ours == view(theirs)
    policy = disk / "policy.toml"
    policy.write_text('default = "reject"\n')
    assert "rejected" in image("mount", f"containers-storage:{storage}@built", point, "--policy", policy, code=1)
    brought = image("import", f"containers-storage:{storage}@localhost/built", "--quiet").strip()
    image("mount", brought, point)
    try:
        assert view(point) == ours
    finally:
        image("umount", point)
    assert brought == "sha256:" + hashlib.sha256(built.manifest()).hexdigest()
    assert fingerprint(storage / "overlay-images") == before


def test_a_store_with_a_mount_program_is_read(built: Built, image: Any, disk: Path) -> None:
    """There podman keeps whiteouts as the archives have them."""
    with tempfile.TemporaryDirectory(dir="/tmp") as runroot:
        options = [f"--root={disk}/fuse", f"--runroot={runroot}", "--storage-driver=overlay"]
        options += ["--storage-opt=overlay.mount_program=/usr/bin/fuse-overlayfs"]
        run("podman", *options, "load", "--quiet", "--input", built.root / "docker-archive", seconds=100)
    assert list((disk / "fuse" / "overlay").rglob(".wh.*"))
    point = disk / "point"
    point.mkdir()
    place = f"containers-storage:{disk}/fuse@localhost/app:1"
    with built.mounted() as theirs:
        expected = view(theirs)
    for name in (place, image("import", place, "--quiet").strip()):
        image("mount", name, point)
        try:
            assert view(point) == expected
        finally:
            image("umount", point)


def test_a_changed_byte_is_told_and_never_read(built: Built, image: Any, disk: Path) -> None:
    image("import", built.root / "oci", "--name", "app")
    image("create", "app", "--name", "work")
    log = disk / "log"
    where = Path(image("start", "work", "--verify", "-o", f"log={log}").strip())
    try:
        with built.mounted() as theirs:
            assert view(where) == view(theirs)
        (changed,) = (disk / "store" / "layers").glob("*/diff/data/moved/new")
        st = changed.stat()
        changed.write_bytes(b"NEW\n")
        os.utime(changed, ns=(st.st_atime_ns, st.st_mtime_ns))
        assert (where / "data" / "moved" / "new").read_bytes() == b"new\n"  # as the kernel has it since
        Path("/proc/sys/vm/drop_caches").write_text("3")
        for meet in (Path.read_bytes, lambda path: os.truncate(path, 2)):
            with pytest.raises(OSError, match="Input/output error"):
                meet(where / "data" / "moved" / "new")
        assert (where / "data" / "linked").read_text() == "one\nmore\n"
        events = run(sys.executable, "-m", "unionfsd.ctl", "events", where, "--json").splitlines()
        (told,) = (event for event in map(json.loads, events) if event["kind"] == "corrupt")
        assert (told["path"], told["fields"]) == ("/data/moved/new", ["data"])
        stats = json.loads(run(sys.executable, "-m", "unionfsd.ctl", "stats", where, "--json"))
        assert stats["counters"]["corrupt"] >= 1
    finally:
        image("umount", "work")
    assert "not what the layer must hold: data" in log.read_text()
    assert "data/moved/new" in image("verify", code=1) + log.read_text()
    assert list((disk / "store" / "containers" / "work" / "upper").rglob("new")) == []


def test_a_mounted_container_is_committed_with_what_the_kernel_still_has(built: Built, image: Any, disk: Path) -> None:
    image("import", built.root / "oci", "--name", "app")
    image("create", "app", "--name", "work")
    where = Path(image("start", "work").strip())
    big = os.urandom(3 << 20)
    try:
        with (where / "data" / "big").open("wb") as late, (where / "data" / "one").open("a") as one:
            for at in range(0, len(big), 1000):
                late.write(big[at : at + 1000])
            late.flush()
            one.write("late\n")
            one.flush()
            assert image("diff", "work").splitlines() == ["A /data/big", "C /data/one"]
            image("commit", "work", "made:1")
            tar = disk / "layer.tar"
            image("export-layer", "work", tar)
        assert (where / "data" / "linked").read_text() == "one\nmore\n"
        (where / "data" / "after").write_text("thawed")
    finally:
        image("umount", "work")
    with tarfile.open(tar) as archive:
        found = archive.extractfile("data/big")
        assert found is not None
        assert found.read() == big
    point = disk / "point"
    point.mkdir()
    image("mount", "made:1", point)
    try:
        assert (point / "data" / "big").read_bytes() == big
        assert (point / "data" / "one").read_text() == "one\nmore\nlate\n"
        assert (point / "data" / "linked").read_text() == "one\nmore\n"
        assert not (point / "data" / "after").exists()
    finally:
        image("umount", point)
    image("start", "work", "-o", "control=off")
    assert "nobody can be asked" in image("commit", "work", "made:2", code=4)
    image("umount", "work")


def test_what_is_mounted_is_not_collected(built: Built, image: Any, disk: Path) -> None:
    digest = image("import", built.root / "docker-archive", "--quiet").strip()
    (disk / "point").mkdir()
    image("mount", "localhost/app:1", disk / "point")
    image("rm", digest)
    assert "mounted and stay" in image("gc")
    assert (disk / "point" / "data" / "one").read_text() == "one\nmore\n"
    image("umount", disk / "point")
    wait_for(lambda: "mounted" not in image("gc"), "layers stay in use after the unmount")
    assert list(Store(str(disk / "store")).all_layers()) == []


@pytest.mark.parametrize("runner", ["chroot", "crun"])
def test_a_command_runs_in_a_root(built: Built, image: Any, runner: str) -> None:
    image("import", built.root / "oci-archive", "--name", "app")
    assert image("run", "--runner", runner, "app") == "/data\ntwo words\n"
    script = "id -u; id -g; pwd; echo $A; echo x >/tmp/x && cat /tmp/x /data/linked"
    options = ["--user", "me", "--workdir", "/etc", "--env", "A=b"]
    said = image("run", "--runner", runner, *options, "app", "--", "sh", "-c", script)
    assert said == "7\n8\n/etc\nb\nx\none\nmore\n"
    image("run", "--runner", runner, "app", "--", "sh", "-c", "exit 3", code=3)
    assert image("containers") == ""


def bare(disk: Path, image: Any, **config: Any) -> None:
    """An image with nothing in it but busybox, which is no shell there."""
    layer = tar(
        [member("busybox", mode=0o755, data=Path("/bin/busybox").read_bytes()), member("text", data=b"no program")]
    )
    image("import", Made([layer], config=config).oci(disk / "bare"), "--name", "bare")


def test_a_command_needs_nothing_of_the_root(disk: Path, image: Any) -> None:
    bare(
        *(disk, image),
        Cmd=["/busybox", "sh", "-c", "pwd; echo $0 $LD_PRELOAD; kill -PIPE $$; echo alive"],
        Env=["LD_PRELOAD=/of/the/root.so", "PATH=/"],
        WorkingDir="/not/there yet",
    )
    image("run", "bare", code=141)
    assert (
        image("run", "bare", "--", "busybox", "sh", "-c", "pwd; echo $LD_PRELOAD")
        == "/not/there yet\n/of/the/root.so\n"
    )
    assert "nothing: No such file" in image("run", "bare", "--", "nothing", code=127)
    assert "/text: Permission denied" in image("run", "bare", "--", "/text", code=126)


def test_an_interrupt_is_for_the_command(disk: Path, image: Any) -> None:
    bare(disk, image, Cmd=["/busybox", "sh", "-c", "echo up; /busybox sleep 100"], Env=["PATH=/"])
    words = [sys.executable, "-m", "unionfsd.ctl", "image", "run", "--root", str(disk / "store"), "bare"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=PROJECT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 130
    assert image("containers") == ""


def test_a_root_is_furnished_in_a_user_namespace(disk: Path) -> None:
    """There a new /proc cannot be mounted as long as the processes are the machine's."""
    (disk / "root").mkdir()
    namespaces = ("unshare", "--user", "--map-root-user", "--mount")
    words = ("cat", disk / "root" / "proc" / "self" / "status")
    assert "Seccomp" in run(*namespaces, "sh", "-c", runtime._FURNISH, "chroot", disk / "root", *words)
    assert os.listdir(disk / "root" / "proc") == []


def test_stage_rootfs_takes_an_image(built: Built, image: Any, disk: Path) -> None:
    image("import", built.root / "oci", "--name", "app")
    private.install(disk / "unionfsd")
    control = disk / "unionfsctl"
    control.write_text(f'#!/bin/sh\nPYTHONPATH={PROJECT} exec {sys.executable} -m unionfsd.ctl "$@"\n')
    control.chmod(0o755)
    script = f'"{PROJECT}/scripts/stage-rootfs" -i app -r "$store" -- sh -c "cat /data/linked; echo new >/data/one"'
    done = private.shell(script, UNIONFSD=disk / "unionfsd", UNIONFSCTL=control, store=disk / "store")
    assert (done.returncode, done.stdout) == (0, "one\nmore\n"), done.stderr
    assert image("verify") == ""


CHANGE: Final = """
echo x >/data/x; rm /data/moved/new /data/link; mv /data/moved /data/again; mkdir -p /a/b; echo y >/a/b/c
chmod 600 /data/old; echo added >>/data/one; ln /data/x /data/y; rm -r /etc; mkdir /etc; echo z >/etc/z
"""


def test_what_is_committed_others_load_and_run(built: Built, image: Any, disk: Path) -> None:
    image("import", built.root / "oci", "--name", "app")
    image("run", "--name", "work", "app", "--", "sh", "-ec", CHANGE)
    change = ["--change", 'Cmd=["cat","/data/one"]', "--change", "Env=WORD=new", "--timestamp", "1000000000"]
    digest = image("commit", "work", "made:1", *change, "--quiet").strip()
    assert image("commit", "work", "again:1", *change, "--quiet").strip() == digest
    changes = set(image("diff", "app", "made:1").splitlines())
    expected = {"A /data/x", "A /a", "A /a/b/c", "D /data/link", "D /data/moved", "A /data/again", "C /data/one"}
    assert expected | {"C /data/old", "D /etc/passwd", "A /etc/z"} <= changes, "\n".join(sorted(changes))
    assert not any("busybox" in line for line in changes)
    tar = disk / "layer.tar"
    diff_id = image("export-layer", "work", tar, "--timestamp", "1000000000").strip()
    assert json.loads(image("inspect", "made:1", "--json"))["layers"][-1]["diff_id"] == diff_id
    names = subprocess.run(["tar", "tf", tar], capture_output=True, text=True, check=True).stdout.split()
    assert {"data/.wh.moved", "data/.wh.link", "etc/.wh.passwd", "etc/z"} <= set(names)
    assert "etc/.wh..wh..opq" not in names
    point = disk / "point"
    point.mkdir()
    image("mount", "made:1", point)
    ours = view(point)
    image("umount", point)
    for to in (f"docker-archive:{disk}/a.tar:localhost/made:1", f"oci:{disk}/oci:1", f"oci-archive:{disk}/o.tar:1"):
        image("export", "made:1", to)
        inspected = json.loads(run("skopeo", "inspect", "--config", to))
        assert inspected["rootfs"]["diff_ids"][-1] == diff_id
    built.podman("load", "--quiet", f"--input={disk}/a.tar")
    with built.mounted("localhost/made:1") as theirs:
        assert view(theirs) == ours
    assert built.run("localhost/made:1") == "one\nmore\nadded\n"
    unpacked = disk / "bundle"
    run("umoci", "unpack", "--image", f"{disk}/oci:1", unpacked, seconds=100)
    umocis = view(unpacked / "rootfs")
    assert {path: facts.get("content") for path, facts in umocis.items()} == {
        path: facts.get("content") for path, facts in ours.items()
    }


def test_skopeo_reads_the_store_itself(built: Built, image: Any, disk: Path) -> None:
    image("import", built.root / "dir", "--name", "app:1")
    run("skopeo", "copy", "--quiet", f"oci:{disk}/store:localhost/app:1", f"dir:{disk}/copied")
    assert (disk / "copied" / "manifest.json").read_bytes() == (built.root / "dir" / "manifest.json").read_bytes()


def test_an_ordinary_user_imports_and_verifies(built: Built, disk: Path) -> None:
    disk.chmod(0o777)
    shutil.copy(built.root / "docker-archive", disk / "a.tar")
    (disk / "a.tar").chmod(0o644)
    # As root first: an ordinary user may not read the interpreter's modules here, so they must be there already.
    script = (
        "import os, sys; from unionfsd.ctl.main import main\n"
        "def both(where):\n"
        "    archive, root = sys.argv[1], sys.argv[2] + where\n"
        "    brought = main(['image', 'import', archive, '--quiet', '--root', root])\n"
        "    return brought or main(['image', 'verify', '--root', root])\n"
        "assert both('roots') == 0\n"
        "os.setgid(54322); os.setuid(54321); raise SystemExit(both('mine'))"
    )
    command = [sys.executable, "-c", script, f"{disk}/a.tar", f"{disk}/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (layer,) = Path(f"{disk}/mine/layers").glob("*/diff/data/moved/new")
    assert os.getxattr(layer, "user.containers.override_stat") == b"5:6:644:file"
