"""podman and buildah with unionfsd as their mount program: images built, run, changed, committed and taken apart."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import harness
from tests.harness import GROUP, USER, wait_for
from tests.system.containers import Store
from unionfsd import __version__

# Each line but the first makes a layer. No network: everything is one static busybox.
CONTAINERFILE = """\
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN mkdir -p /etc /tmp /data/sub && echo one >/data/one && echo two >/data/two && echo deep >/data/sub/deep
RUN rm /data/two && echo more >>/data/one && ln /data/one /data/linked
RUN rm -r /data/sub && mkdir /data/sub && echo new >/data/sub/new
RUN mv /data/sub /data/moved && chmod 700 /data/moved && chown 5:6 /data/moved/new && ln -s moved /data/link
RUN mkfifo /data/fifo && touch -d '2001-02-03 04:05:06' /data/old
CMD ["sh"]
"""

# Path, type and mode, owner, size or nothing, and target: what `LIST` prints of `/data` in the image.
DATA = """\
/data directory 755 0:0
/data/fifo fifo 644 0:0
/data/link symbolic link 777 0:0
/data/linked regular file 644 0:0
/data/moved directory 700 0:0
/data/moved/new regular file 644 5:6
/data/old regular file 644 0:0
/data/one regular file 644 0:0
"""
DATA_FILES = "new\none\nmore\none\nmore\n"
LIST = "find /data | sort | xargs stat -c '%n %F %a %u:%g' | sed 's/regular empty file/regular file/'"
READ = "cat /data/link/new /data/one /data/linked"

CHANGE = """
echo x >/data/x
rm /data/moved/new /data/link
mv /data/moved /data/again
mkdir -p /a/b && echo y >/a/b/c
chmod 600 /data/old
echo added >>/data/one
"""
CHANGES = {
    *("A /a", "A /a/b", "A /a/b/c", "C /data", "A /data/again", "C /data/old", "C /data/one", "A /data/x"),
    *("C /data/linked", "D /data/link", "D /data/moved"),  # another name of /data/one
}
CHANGED = """\
/data directory 755 0:0
/data/again directory 700 0:0
/data/fifo fifo 644 0:0
/data/linked regular file 644 0:0
/data/old regular file 600 0:0
/data/one regular file 644 0:0
/data/x regular file 644 0:0
"""
# podman itself makes these, to mount over.
PODMANS = ("/dev", "/etc", "/proc", "/run", "/sys")


@pytest.fixture(scope="module", params=["root", "rootless"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """A store with `image` built in it, of root and of an ordinary user."""
    with store_on_disk(rootless=request.param == "rootless") as store:
        context(store.share, CONTAINERFILE)
        store.build(store.share, "--layers", "--tag=image")
        yield store


@pytest.fixture
def empty_store() -> Iterator[Store]:
    with store_on_disk() as store:
        yield store


@contextlib.contextmanager
def store_on_disk(*, rootless: bool = False) -> Iterator[Store]:
    root = Path(tempfile.mkdtemp(prefix="unionfsd-", dir=harness.DISK))
    root.chmod(0o755)
    try:
        with Store(root, rootless=rootless) as store:
            yield store
        assert store.complaints() == []
    finally:
        harness.remove(root)


def context(directory: Path, text: str) -> None:
    """Files to build an image from."""
    (directory / "Containerfile").write_text(text)
    shutil.copy("/bin/busybox", directory / "busybox")


def changes(text: str) -> set[str]:
    """The lines of `podman diff` but for those about directories that podman makes to mount over."""
    return {line for line in text.splitlines() if not line[2:].startswith(PODMANS)}


@pytest.fixture
def changed(store: Store) -> Iterator[str]:
    """A container of `image`, stopped, in which `CHANGE` was run."""
    store.podman("run", "--name=changed", "image", "sh", "-ec", CHANGE)
    yield "changed"
    store.podman("rm", "changed")


def test_info_names_the_program(store: Store) -> None:
    info = json.loads(store.podman("info", "--format=json"))["store"]
    assert info["graphOptions"]["overlay.mount_program"]["Version"] == f"unionfsd {__version__}"
    assert info["graphStatus"]["Supports d_type"] == "true"


def test_the_root_of_a_container_is_our_union(store: Store) -> None:
    assert store.podman("run", "--rm", "image", "sed", "-n", "s/.* - //p;q", "/proc/self/mountinfo").startswith(
        "fuse.unionfsd unionfsd rw"
    )


def test_layers_add_up(store: Store) -> None:
    assert store.podman("run", "--rm", "image", "sh", "-c", LIST) == DATA
    assert store.podman("run", "--rm", "image", "sh", "-c", READ) == DATA_FILES


def test_diff_tells_what_a_container_changed(store: Store, changed: str) -> None:
    assert changes(store.podman("diff", changed)) == CHANGES


def test_export_holds_what_the_container_shows(store: Store, changed: str) -> None:
    store.podman("export", f"--output={store.share}/export.tar", changed)
    with tarfile.open(store.share / "export.tar") as archive:
        found = {member.name: member for member in archive}
        assert {name for name in found if name.startswith("data")} == {
            line.split()[0][1:] for line in CHANGED.splitlines()
        }
        one = archive.extractfile("data/one")
        assert one is not None
        assert one.read() == b"one\nmore\nadded\n"
    assert found["data/old"].mode & 0o7777 == 0o600
    assert found["data/old"].mtime == 981173106
    assert found["data/fifo"].isfifo()


def test_commit_save_and_load_keep_the_changes(store: Store, changed: str) -> None:
    store.podman("commit", "--quiet", changed, "committed")
    assert changes(store.podman("diff", "committed")) == CHANGES
    assert store.podman("run", "--rm", "committed", "sh", "-c", LIST) == CHANGED
    store.podman("save", "--quiet", f"--output={store.share}/image.tar", "committed")
    store.podman("rmi", "committed")
    store.podman("load", "--quiet", f"--input={store.share}/image.tar")
    assert store.podman("run", "--rm", "committed", "sh", "-c", LIST) == CHANGED
    store.podman("rmi", "committed")


def mapped_run(store: Store, *flags: str) -> str:
    """What a container with a user namespace of its own says of itself; no copy of the image may be made for it."""
    links = store.root / "store" / "overlay" / "l"
    before = len(list(links.iterdir()))
    script = f"id -u; {LIST}; mkdir /tmp/d; echo mine >/tmp/d/mine; stat -c %u:%g /tmp/d/mine; cat /data/one"
    said = store.podman("run", "--name=mapped", *flags, "image", "sh", "-c", script)
    assert len(list(links.iterdir())) == before + 1, "layers besides the container's own"
    store.podman("rm", "mapped")
    return said


def test_mapped_ids_take_no_copy_of_the_image(store: Store) -> None:
    """The library asks for a mapping instead of changing the owners of a whole copy."""
    said = mapped_run(store, "--uidmap=0:1000:60000", "--gidmap=0:1000:60000")
    assert said == f"0\n{DATA}0:0\none\nmore\n"


@pytest.mark.parametrize("store", ["rootless"], indirect=True)
def test_an_ordinary_user_keeps_the_id(store: Store) -> None:
    store.podman("run", "--name=writable", "image", "chmod", "1777", "/tmp")
    store.podman("commit", "--quiet", "writable", "image")
    store.podman("rm", "writable")
    seen = DATA.replace("/data/moved/new regular file 644 5:6\n", "")  # in a directory of root's
    assert mapped_run(store, "--userns=keep-id") == f"{USER}\n{seen}{USER}:{GROUP}\none\nmore\n"


def test_a_volume_with_an_overlay_keeps_its_source(store: Store) -> None:
    source = store.share / "volume"
    source.mkdir(exist_ok=True)
    source.chmod(0o777)
    (source / "kept").write_text("kept\n")
    script = "cat /v/kept; rm /v/kept; echo new >/v/new; ls /v; grep -c ' /v fuse.unionfsd' /proc/mounts"
    assert store.podman("run", "--rm", f"--volume={source}:/v:O", "image", "sh", "-c", script) == "kept\nnew\n1\n"
    assert [path.name for path in source.iterdir()] == ["kept"]


def test_a_read_only_container(store: Store) -> None:
    script = "touch /data/new 2>&1; cat /data/one"
    said = store.podman("run", "--rm", "--read-only", "image", "sh", "-c", script)
    assert said == "touch: /data/new: Read-only file system\none\nmore\n"


def test_a_running_container_is_worked_in_from_outside(store: Store) -> None:
    store.podman("run", "--detach", "--name=running", "image", "sleep", "1000")
    (store.share / "file").write_text("from outside\n")
    store.podman("cp", store.share / "file", "running:/data/copied")
    store.podman("exec", "running", "sh", "-c", "mv /data/copied /data/moved/in")
    archive = store.finish(store.start("podman", "cp", "running:/data/moved", "-"))
    with tarfile.open(fileobj=io.BytesIO(archive.encode())) as tar:
        assert set(tar.getnames()) == {"moved", "moved/in", "moved/new"}
    store.podman("rm", "--force", "--time=0", "running")


def test_buildah_builds_a_layer_at_a_time(store: Store) -> None:
    def buildah(*arguments: str | Path) -> str:
        return store.finish(store.start("buildah", *arguments))

    buildah("from", "--name=working", "localhost/image")
    buildah("run", "working", "--", "sh", "-ec", CHANGE)
    buildah("copy", "working", store.share / "busybox", "/data/busybox")
    buildah("config", "--env=WORD=said", "working")
    buildah("commit", "--quiet", "--rm", "working", "by-buildah")
    assert store.podman("run", "--rm", "by-buildah", "sh", "-c", f"rm /data/busybox; {LIST}; echo $WORD") == (
        CHANGED + "said\n"
    )
    store.podman("rmi", "by-buildah")


@pytest.mark.timeout(300)
def test_fifty_containers_at_once(store: Store) -> None:
    script = "echo $NUMBER >/data/one; sleep 2; cat /data/one; rm -r /data; ls /data 2>&1 || true"
    started = [
        store.start("podman", "run", "--rm", f"--env=NUMBER={number}", "image", "sh", "-c", script)
        for number in range(50)
    ]
    said = [store.finish(process, 250) for process in started]
    assert said == [f"{number}\nls: /data: No such file or directory\n" for number in range(50)]


def test_nothing_is_left_when_nothing_runs(store: Store) -> None:
    store.podman("run", "--rm", "image", "true")
    try:
        wait_for(lambda: not store.mounts() and not store.daemons(), "mounts or daemons are left")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{store.leftovers()}") from None


def layer(files: dict[str, bytes]) -> bytes:
    """A layer as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def archive_of(layers: list[bytes]) -> bytes:
    """An image as `docker save` writes it, to be run as `hundred`."""
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in layers]},
    }
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": "config.json", "RepoTags": ["localhost/hundred:latest"], "Layers": names}]
    return layer(
        {
            "config.json": json.dumps(config).encode(),
            "manifest.json": json.dumps(manifest).encode(),
            **dict(zip(names, layers, strict=True)),
        }
    )


def test_a_hundred_layers_with_whiteouts_of_their_own(empty_store: Store) -> None:
    """podman unpacks `.wh.` files as they are for a mount program, so they are ours to understand."""
    first = {"bin/busybox": Path("/bin/busybox").read_bytes(), "d/gone": b"", "d/kept": b"0\n", "o/hidden": b""}
    layers = [layer(first)]
    layers += [layer({f"d/{number}": b"", "d/top": f"{number}\n".encode()}) for number in range(1, 98)]
    layers += [layer({"d/.wh.gone": b"", "o/.wh..wh..opq": b"", "o/seen": b""}), layer({"d/.wh.50": b""})]
    (empty_store.share / "image.tar").write_bytes(archive_of(layers))
    empty_store.podman("load", "--quiet", f"--input={empty_store.share}/image.tar")
    script = "cd d; cat kept top; ls . ../o"
    said = empty_store.podman("run", "--rm", "hundred", "/bin/busybox", "sh", "-c", script).splitlines()
    names = sorted(str(number) for number in range(1, 98) if number != 50)
    assert said == ["0", "97", ".:", *names, "kept", "top", "", "../o:", "seen"]


def test_prune_leaves_an_empty_store(empty_store: Store) -> None:
    context(empty_store.share, CONTAINERFILE)
    empty_store.build(empty_store.share, "--layers", "--tag=image")
    empty_store.podman("run", "--name=stopped", "image", "true")
    empty_store.podman("system", "prune", "--all", "--force")
    left = {path.name for path in (empty_store.root / "store" / "overlay").iterdir()}
    assert left <= {"l", ".has-mount-program"}
    assert not any((empty_store.root / "store" / "overlay" / "l").iterdir())
