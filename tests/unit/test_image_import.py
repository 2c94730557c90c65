"""Imports from every kind of place, and what a store keeps: whole, shared, and nothing of what is wrong."""

from __future__ import annotations

import concurrent.futures
import gc
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests import images
from tests.images import Made, directory, member, tar
from unionfsd import syscalls
from unionfsd.errors import UserError
from unionfsd.images import collect, documents, importing, sources
from unionfsd.images import digest as digests
from unionfsd.images.compress import BrokenOffError, Readable
from unionfsd.images.documents import Descriptor
from unionfsd.images.store import Image, Store
from unionfsd.images.tarread import Limits

BASE: Final = tar([directory("bin"), member("bin/sh", mode=0o755, data=b"shell"), member("etc/passwd", data=b"root")])
TOP: Final = tar([member("etc/.wh.passwd"), member("etc/hosts", data=b"localhost")])
AMD64: Final = {"os": "linux", "architecture": "amd64"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def bring(store: Store, place: str | Path, *names: str, **more: Any) -> Image:
    source = sources.open_source(str(place), store.stage, more.pop("platform", AMD64)).source
    return importing.import_image(store, source, importing.names_for(source, list(names)), **more)


def left(store: Store) -> list[str]:
    """What stands in the stage of a store."""
    return sorted(os.listdir(Path(store.root) / "stage"))


def layer_names(store: Store) -> set[str]:
    return set(os.listdir(Path(store.root) / "layers"))


def check(store: Store, image: Image, made: Made) -> None:
    assert list(image.config.chain_ids) == made.chain_ids
    lower, upper = (Path(store.diff_path(chain)) for chain in made.chain_ids)
    assert (lower / "bin" / "sh").read_bytes() == b"shell"
    assert sorted(os.listdir(upper / "etc")) == ["hosts", "passwd"]
    assert (upper / "etc" / "passwd").lstat().st_rdev == 0
    for chain in made.chain_ids:
        assert Path(store.link_path(chain)).resolve() == Path(store.diff_path(chain))
        assert len(os.path.basename(store.link_path(chain))) == 26
    assert (upper.parent / "lower").read_text() == "l/" + os.path.basename(store.link_path(made.chain_ids[0]))
    assert left(store) == []
    assert list(collect.verify(store, image)) == []


@pytest.mark.parametrize("compression", images.COMPRESSORS)
def test_an_oci_layout(store: Store, tmp_path: Path, compression: str) -> None:
    made = Made([BASE, TOP], compression)
    image = bring(store, f"oci:{made.oci(tmp_path / 'oci')}:latest", "app:1")
    check(store, image, made)
    assert image.digest == made.digest
    assert image.names == ("localhost/app:1",)
    assert store.image("app:1").digest == store.image(made.digest[7:19]).digest == made.digest


FORMS: dict[str, Callable[[Made, Path], str]] = {
    "oci-archive": lambda made, path: f"oci-archive:{images.archive(path / 'a.tar', made.oci_files())}",
    "docker-archive": lambda made, path: f"docker-archive:{images.archive(path / 'a.tar', made.docker_files())}",
    "dir": lambda made, path: f"dir:{images.write(path / 'dir', made.dir_files())}",
    "guessed-oci": lambda made, path: str(made.oci(path / "oci")),
    "guessed-dir": lambda made, path: str(images.write(path / "dir", made.dir_files())),
    "guessed-oci-archive": lambda made, path: str(images.archive(path / "a.tar", made.oci_files())),
    "guessed-docker-archive": lambda made, path: str(images.archive(path / "a.tar", made.docker_files())),
    "docker-25": lambda made, path: str(images.archive(path / "a.tar", {**made.docker_files(), **made.oci_files()})),
}


def packed(how: str) -> Callable[[Made, Path], str]:
    return lambda made, path: str(compressed(images.archive(path / "a.tar", made.docker_files()), how))


FORMS |= {f"compressed{how}": packed(how) for how in images.COMPRESSORS}


def compressed(path: Path, how: str) -> Path:
    packed = path.with_suffix(".packed")
    packed.write_bytes(images.COMPRESSORS[how](path.read_bytes()))
    return packed


@pytest.mark.parametrize("form", FORMS)
def test_every_form(store: Store, tmp_path: Path, form: str) -> None:
    made = Made([BASE, TOP])
    image = bring(store, FORMS[form](made, tmp_path), "app")
    check(store, image, made)
    assert image.config.digest == digests.of(made.config)


def test_a_docker_archive_has_its_names(store: Store, tmp_path: Path) -> None:
    made = Made([BASE, TOP])
    two = [*json.loads(made.docker_files()["manifest.json"])] * 2
    two[1] = {**two[1], "RepoTags": ["other:2"]}
    content = {**made.docker_files(), "manifest.json": json.dumps(two).encode()}
    path = images.archive(tmp_path / "a.tar", content)
    with pytest.raises(UserError, match="2 images"):
        bring(store, f"docker-archive:{path}")
    assert bring(store, f"docker-archive:{path}:other:2").names == ("docker.io/library/other:2",)


def test_a_number_means_one_of_an_archive(store: Store, tmp_path: Path) -> None:
    one, two = Made([BASE, TOP]), Made([BASE])
    manifests = [json.loads(made.docker_files()["manifest.json"])[0] for made in (one, two)]
    content = {**two.docker_files(), **one.docker_files(), "manifest.json": json.dumps(manifests).encode()}
    path = images.archive(tmp_path / "a.tar", content)
    for number, made in enumerate((one, two)):
        assert bring(store, f"docker-archive:{path}:@{number}").config.digest == digests.of(made.config)
    with pytest.raises(UserError, match=r"no image of that name.*app:1"):
        bring(store, f"docker-archive:{path}:@2")


def docker_25(*made: tuple[Made, list[str]]) -> dict[str, bytes]:
    """The files of ``docker save`` since 25: a layout that names each tag, and a list as before."""
    content: dict[str, bytes] = {}
    entries, manifests = [], []
    for image, tags in made:
        content |= image.oci_files(None)
        blobs = ["blobs/" + digests.of(blob).replace(":", "/") for blob in (image.config, *image.blobs)]
        manifests.append({"Config": blobs[0], "RepoTags": tags or None, "Layers": blobs[1:]})
        for tag in tags or [""]:
            names = {
                "io.containerd.image.name": f"docker.io/library/{tag}",
                documents.REF_NAME: str(tag).partition(":")[2],
            }
            entries.append(
                {**images.descriptor(documents.OCI_MANIFEST, image.manifest), **({"annotations": names} if tag else {})}
            )
    index = {"schemaVersion": 2, "manifests": entries}
    return {**content, "index.json": json.dumps(index).encode(), "manifest.json": json.dumps(manifests).encode()}


def test_an_archive_of_docker_25_with_several_images_and_names(store: Store, tmp_path: Path) -> None:
    one, two, three = Made([BASE, TOP]), Made([BASE]), Made([TOP])
    path = images.archive(
        tmp_path / "a.tar", docker_25((one, ["app:1", "app:latest"]), (two, ["other:1"]), (three, []))
    )
    with pytest.raises(UserError, match="3 images"):
        bring(store, f"docker-archive:{path}")
    image = bring(store, f"docker-archive:{path}:app:1")
    assert (image.digest, image.names) == (one.digest, ("docker.io/library/app:1", "docker.io/library/app:latest"))
    assert bring(store, f"docker-archive:{path}:other:1").digest == two.digest
    with pytest.raises(UserError, match="no image of that name"):
        bring(store, f"docker-archive:{path}:other:2")
    again = images.archive(tmp_path / "b.tar", docker_25((one, ["app:1", "app:latest"])))
    assert bring(store, again).names == image.names
    plain = docker_25((one, ["app:1"]), (two, ["other:1"]))
    index = json.loads(plain["index.json"])
    for entry in index["manifests"]:
        del entry["annotations"]
    unnamed = images.archive(tmp_path / "c.tar", {**plain, "index.json": json.dumps(index).encode()})
    assert bring(store, f"docker-archive:{unnamed}:other:1").digest == two.digest


ARTIFACT: Final = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": documents.OCI_MANIFEST,
        "artifactType": "application/example",
        "config": images.descriptor(documents.OCI_EMPTY, b"{}"),
        "layers": [images.descriptor(documents.OCI_EMPTY, b"{}")],
    }
).encode()


@pytest.mark.parametrize(
    "beside",
    [
        {"artifactType": "application/example"},
        {"annotations": {"vnd.docker.reference.type": "attestation-manifest"}, "platform": {"os": "unknown"}},
        {"annotations": {documents.REF_NAME: "sha256-" + "a" * 64 + ".att"}},
        {"annotations": {documents.REF_NAME: "sha256-" + "a" * 64}},
    ],
    ids=str,
)
def test_what_is_about_an_image_is_not_taken_for_one(store: Store, tmp_path: Path, beside: dict[str, Any]) -> None:
    made = Made([BASE, TOP])
    content = made.oci_files(None, artifact=ARTIFACT, empty=b"{}")
    image = images.descriptor(documents.OCI_MANIFEST, made.manifest)
    entries = [{**images.descriptor(documents.OCI_MANIFEST, ARTIFACT), **beside}, image]
    content["index.json"] = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    check(store, bring(store, images.write(tmp_path / "oci", content)), made)


def test_an_artifact_is_called_one(store: Store, tmp_path: Path) -> None:
    content = Made([BASE]).oci_files(None, artifact=ARTIFACT, empty=b"{}")
    entry = images.descriptor(documents.OCI_MANIFEST, ARTIFACT)
    content["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    with pytest.raises(UserError, match="artifact: application/example"):
        bring(store, images.write(tmp_path / "oci", content))


def test_nothing_is_no_root(store: Store, tmp_path: Path) -> None:
    (tmp_path / "root.tar").touch()
    with pytest.raises(UserError, match="nothing is in it"):
        bring(store, f"tar:{tmp_path / 'root.tar'}")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="neither a file nor a directory"):
        bring(store, tmp_path / "fifo")


def test_a_docker_archive_whose_layers_are_links(store: Store, tmp_path: Path) -> None:
    made = Made([BASE, TOP])
    content = made.docker_files()
    name = next(name for name in content if name.endswith("layer.tar"))
    content["shared/layer.tar"] = content.pop(name)
    path = images.archive(tmp_path / "a.tar", content, {name: "../shared/layer.tar"})
    check(store, bring(store, path), made)


def test_a_docker_archive_from_before_there_were_manifests(store: Store, tmp_path: Path) -> None:
    made = Made([BASE, TOP])
    image = bring(store, images.archive(tmp_path / "a.tar", made.old_docker_files()))
    check(store, image, made)
    assert image.names == ("docker.io/library/app:1",)
    assert image.config.process["Env"] == ["OLD=1"]
    assert [step.created_by for step in image.config.history] == ["/bin/sh -c step 0", "/bin/sh -c step 1"]


def test_a_plain_root(store: Store, tmp_path: Path) -> None:
    (tmp_path / "root.tar").write_bytes(BASE)
    image = bring(store, tmp_path / "root.tar", "root")
    assert image.config.diff_ids == (digests.of(BASE),)
    with tarfile.open(tmp_path / "root.tar") as archive:
        archive.extractall(tmp_path / "root", filter="tar")
    one = bring(store, tmp_path / "root", "directory")
    assert bring(store, f"root:{tmp_path / 'root'}", "again").digest == one.digest
    assert (Path(store.diff_path(one.config.chain_ids[0])) / "etc" / "passwd").read_bytes() == b"root"


def test_an_index_for_several_machines(store: Store, tmp_path: Path) -> None:
    made, other = Made([BASE, TOP]), Made([BASE], architecture="arm64")
    entries = []
    for image, architecture in ((other, "arm64"), (made, "amd64")):
        entry = images.descriptor(documents.OCI_MANIFEST, image.manifest)
        entries.append({**entry, "platform": {"os": "linux", "architecture": architecture}})
    index = json.dumps({"schemaVersion": 2, "mediaType": documents.OCI_INDEX, "manifests": entries}).encode()
    content = {**other.oci_files(), **made.oci_files(index=index)}
    top = {**images.descriptor(documents.OCI_INDEX, index), "annotations": {documents.REF_NAME: "v1"}}
    content["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [top]}).encode()
    path = images.write(tmp_path / "oci", content)
    check(store, bring(store, f"oci:{path}:v1"), made)
    arm = bring(store, f"oci:{path}:v1", platform={"os": "linux", "architecture": "arm64"})
    assert arm.digest == other.digest
    assert sources.platform_of("linux/aarch64") == {"os": "linux", "architecture": "arm64"}
    with pytest.raises(UserError, match="linux/arm64"):
        bring(store, f"oci:{path}:v1", platform={"os": "linux", "architecture": "s390x"})


def test_layers_are_shared_by_images(store: Store, tmp_path: Path) -> None:
    first = bring(store, Made([BASE]).oci(tmp_path / "a"), "a")
    chain = first.config.chain_ids[0]
    inode = os.stat(store.diff_path(chain)).st_ino
    second = bring(store, Made([BASE, TOP]).oci(tmp_path / "b"), "b")
    assert second.config.chain_ids[0] == chain
    assert os.stat(store.diff_path(chain)).st_ino == inode
    assert len(layer_names(store)) == 2
    collect.remove(store, "a")
    assert collect.collect(store).layers == ()
    collect.remove(store, "b")
    assert set(collect.collect(store).layers) == set(second.config.chain_ids)
    assert layer_names(store) == set()
    assert os.listdir(Path(store.root) / "l") == []
    assert list(store.all_blobs()) == []


def test_names_move(store: Store, tmp_path: Path) -> None:
    one = bring(store, Made([BASE]).oci(tmp_path / "a"), "app")
    two = bring(store, Made([TOP]).oci(tmp_path / "b"), "app", "more:2")
    assert store.image("app").digest == two.digest
    assert [found.names for found in store.images()] == [("localhost/app:latest", "localhost/more:2")] or [
        found.digest for found in store.images()
    ] == [two.digest]
    assert collect.remove(store, "app") == (["localhost/app:latest"], False)
    assert store.image("more:2").digest == two.digest
    with pytest.raises(UserError, match="no such image"):
        store.image(one.digest)


def damage(name: str) -> Callable[[Made], dict[str, bytes]]:
    """The files of a layout in which one thing is wrong."""

    def change(made: Made) -> dict[str, bytes]:
        content = made.oci_files()
        blob = "blobs/" + digests.of(made.blobs[1]).replace(":", "/")
        if name == "another layer":
            content[blob] = images.COMPRESSORS["+gzip"](BASE)
        elif name == "a changed byte":
            content[blob] = content[blob][:-1] + bytes([content[blob][-1] ^ 1])
        elif name == "too short":
            content[blob] = content[blob][:-9]
        elif name == "too long":
            content[blob] += b"\0" * 600
        elif name == "no layer":
            del content[blob]
        else:
            target = digests.of(made.config if name == "another configuration" else made.manifest)
            content["blobs/" + target.replace(":", "/")] += b" "
        return content

    return change


@pytest.mark.parametrize(
    "name",
    [
        *("another layer", "a changed byte", "too short", "too long"),
        *("no layer", "another configuration", "another manifest"),
    ],
)
def test_what_is_not_what_it_says_is_refused(store: Store, tmp_path: Path, name: str) -> None:
    made = Made([BASE, TOP])
    path = images.write(tmp_path / "oci", damage(name)(made))
    with pytest.raises(UserError):
        bring(store, path, "app")
    assert store.images() == []
    assert left(store) == []
    assert layer_names(store) <= {made.chain_ids[0][7:]}
    check(store, bring(store, made.oci(tmp_path / "right"), "app"), made)


def test_a_diff_id_that_is_wrong_is_refused(store: Store, tmp_path: Path) -> None:
    made = Made([BASE, TOP])
    lying = Made([BASE, TOP], rootfs={"type": "layers", "diff_ids": [made.diff_ids[0], digests.of(b"other")]})
    with pytest.raises(UserError, match=rf"{digests.of(made.blobs[1])}: unpacks to"):
        bring(store, lying.oci(tmp_path / "oci"))
    assert left(store) == []


def test_a_blob_that_goes_on_without_giving_anything_stops_early(store: Store, tmp_path: Path) -> None:
    """Empty members of gzip, say; it is refused by what it says of its size, before anything is read."""
    empty = images.COMPRESSORS["+gzip"](b"")
    path = changed(Made([BASE]), lambda blob: blob + empty * 3000, tmp_path / "oci")
    with pytest.raises(UserError, match=r"too many for a layer.*max-layer"):
        bring(store, path, limits=Limits(size=20_000))
    assert left(store) == []


def changed(made: Made, change: Callable[[bytes], bytes], path: Path) -> Path:
    """A layout whose last layer's blob is changed, and known by its digest as it is."""
    made.blobs[-1] = change(made.blobs[-1])
    document = json.loads(made.manifest)
    document["layers"][-1] |= {"digest": digests.of(made.blobs[-1]), "size": len(made.blobs[-1])}
    made.manifest = json.dumps(document).encode()
    return made.oci(path)


SKIPPABLE: Final = b"\x50\x2a\x4d\x18\4\0\0\0abcd"


@pytest.mark.parametrize(
    ("compression", "change"),
    [
        *((how, lambda blob: blob[:-3]) for how in ("+gzip", "+zstd", "+xz", "+bzip2")),
        *((how, lambda blob: blob + b"more") for how in ("+gzip", "+zstd", "+xz", "+bzip2")),
        *(
            (how, lambda blob: blob[: len(blob) // 2] + b"\0" * 9 + blob[len(blob) // 2 + 9 :])
            for how in ("+xz", "+bzip2")
        ),
        ("+zstd", lambda blob: blob + SKIPPABLE[:-1]),
    ],
)
def test_a_damaged_stream_is_refused(
    store: Store, tmp_path: Path, compression: str, change: Callable[[bytes], bytes]
) -> None:
    made = Made([BASE, TOP], compression)
    path = changed(made, change, tmp_path / "oci")
    with pytest.raises(UserError, match=digests.of(made.blobs[1])):
        bring(store, path)
    assert left(store) == []


@pytest.mark.parametrize(
    ("compression", "change"),
    [
        *((how, lambda blob, how=how: blob + images.COMPRESSORS[how](b"")) for how in images.COMPRESSORS),
        ("+zstd", lambda blob: SKIPPABLE + blob + SKIPPABLE),  # what pzstd writes, and zstd:chunked
        ("+xz", lambda blob: blob + b"\0" * 8),
    ],
)
def test_streams_in_several_parts(
    store: Store, tmp_path: Path, compression: str, change: Callable[[bytes], bytes]
) -> None:
    made = Made([BASE, TOP], compression)
    check(store, bring(store, changed(made, change, tmp_path / "oci")), made)


@pytest.mark.parametrize("compression", [how for how in images.COMPRESSORS if how])
def test_a_bomb_stops_early(store: Store, tmp_path: Path, compression: str) -> None:
    made = Made([tar([member("zeros", data=bytes(64 << 20))])], compression)
    began = time.monotonic()
    with pytest.raises(UserError, match="max-layer"):
        bring(store, made.oci(tmp_path / "oci"), limits=Limits(size=1 << 20))
    assert time.monotonic() - began < 5
    assert left(store) == []


@pytest.mark.parametrize(
    "change",
    [
        {"layers": None},
        {"config": {"digest": "sha256:00", "size": 1, "mediaType": "x"}},
        {"manifests": []},
        {"mediaType": documents.OCI_INDEX},
        {"schemaVersion": 1},
        {"layers": [{"digest": "sha256:" + "0" * 64, "size": -1, "mediaType": "x"}]},
        {"layers": [{"digest": "../../etc/passwd", "size": 1, "mediaType": "x"}]},
    ],
    ids=str,
)
def test_a_manifest_that_means_nothing_is_refused(change: dict[str, Any]) -> None:
    document = {**json.loads(Made([BASE]).manifest), **change}
    with pytest.raises(UserError):
        documents.manifest(json.dumps(document).encode())


def test_a_member_that_stands_twice_is_refused() -> None:
    with pytest.raises(UserError, match="twice"):
        documents.load(b'{"a": 1, "a": 2}', "document")


class Breaking:
    """A source whose layers break off after `good` bytes, and which remembers from where it was read."""

    def __init__(self, source: sources.Source, good: int) -> None:
        self.manifest, self.config, self.names = source.manifest, source.config, source.names
        self._source = source
        self._good = good
        self.starts: list[int] = []

    def blob(self, descriptor: Descriptor, start: int = 0) -> Readable:
        self.starts.append(start)
        stream = self._source.blob(descriptor, start)
        good = self._good

        class Broken:
            left = good

            def read(self, size: int, /) -> bytes:
                if self.left <= 0:
                    raise BrokenOffError("the line is dead")
                data = stream.read(min(size, self.left))
                self.left -= len(data)
                return data

        return Broken()


def test_what_broke_off_is_gone_on_with(store: Store, tmp_path: Path) -> None:
    made = Made([tar([member("big", data=os.urandom(1 << 20))])], "")
    source = sources.open_source(str(made.oci(tmp_path / "oci")), store.stage, AMD64).source
    broken = Breaking(source, 700_000)
    with pytest.raises(UserError, match="dead"):
        importing.import_image(store, broken, ("a",))
    assert layer_names(store) == set()
    again = Breaking(source, 1 << 30)
    importing.import_image(store, again, ("a",))
    assert 0 < again.starts[0] <= 700_000
    assert left(store) == []


def test_layers_can_be_unpacked_again_when_their_blobs_are_there(store: Store, tmp_path: Path) -> None:
    made = Made([BASE, TOP])
    path = made.oci(tmp_path / "oci")
    bring(store, path, "app", keep_blobs=False)
    assert not store.has_blob(digests.of(made.blobs[0]))
    image = bring(store, path, "app")
    assert store.has_blob(digests.of(made.blobs[0]))
    check(store, image, made)


def test_verification_names_what_changed(store: Store, tmp_path: Path) -> None:
    made = Made([BASE, TOP])
    image = bring(store, made.oci(tmp_path / "oci"), "app")
    file = Path(store.diff_path(made.chain_ids[0])) / "bin" / "sh"
    before = file.stat()
    file.write_bytes(b"SHELL")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    blob = Path(store.blob_path(digests.of(made.blobs[1])))
    blob.write_bytes(blob.read_bytes()[:-1])
    found = list(collect.verify(store, image))
    assert [(damage.where, damage.path) for damage in found] == [
        (digests.of(made.blobs[1]), ""),
        (made.chain_ids[0], "bin/sh"),
    ]
    assert found[1].what == "sha256"
    tree = Path(store.diff_path(made.chain_ids[1])).parent / "tree.zst"
    tree.write_bytes(images.COMPRESSORS["+zstd"](b""))
    assert made.chain_ids[1] in [damage.where for damage in collect.verify(store, image)]


_IMPORT: Final = """
import sys
from unionfsd.images import importing, sources
from unionfsd.images.store import Store
store = Store(sys.argv[1])
source = sources.open_source(sys.argv[2], store.stage, {"os": "linux", "architecture": "amd64"}).source
print("begins", flush=True)
importing.import_image(store, source, (sys.argv[3],))
"""


def importer(store: Store, path: Path, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _IMPORT, store.root, str(path), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_a_killed_import_leaves_nothing_that_counts(store: Store, tmp_path: Path) -> None:
    big = tar([member(f"f{at}", data=os.urandom(4000)) for at in range(4000)])
    made = Made([BASE, big], "")
    path = made.oci(tmp_path / "oci")
    for delay in (0.02, 0.1, 0.25):
        process = importer(store, path, "killed")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for chain in layer_names(store):
            assert list(collect.verify_layer(store, f"sha256:{chain}")) == []
    image = bring(store, path, "app")
    assert list(collect.verify(store, image)) == []
    assert left(store) == []


class CrashError(BaseException):
    """The machine stopped: from here on nothing changes any more."""


def test_a_crash_at_any_call_leaves_a_store_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made([BASE, TOP])
    path = made.oci(tmp_path / "oci")
    lock = threading.Lock()
    limit = count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            nonlocal count
            with lock:
                count += 1
                if count > limit:
                    raise CrashError
            return function(*given, **more)

        return call

    for name in syscalls.MUTATING:
        monkeypatch.setattr(syscalls, name, counted(getattr(syscalls, name)))
    crashes = 0
    while True:
        root, count = str(tmp_path / f"store{limit}"), 0
        try:
            image = bring(Store(root), path, "app")
            break
        except CrashError:
            crashes += 1
        gc.collect()  # what the dead process held
        point, limit = limit, 1 << 40
        store = Store(root)
        for found in store.images():
            assert found.digest == made.digest
            assert list(collect.verify(store, found)) == []
        for chain in layer_names(store):
            assert list(collect.verify_layer(store, f"sha256:{chain}")) == []
        if point % 2 == 0:
            check(store, bring(store, path, "app"), made)
        limit = point + 3
    assert image.digest == made.digest
    assert crashes > 20


def test_two_processes_at_once(store: Store, tmp_path: Path) -> None:
    shared = tar([member(f"f{at}", data=os.urandom(100)) for at in range(500)])
    made = [Made([BASE, shared, TOP]), Made([BASE, shared, BASE])]
    paths = [image.oci(tmp_path / str(at)) for at, image in enumerate(made)]
    running = [importer(store, paths[at % 2], f"localhost/app:{at}") for at in range(4)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        codes = list(pool.map(lambda process: (process.communicate(), process.returncode)[1], running))
    assert codes == [0] * 4
    assert len(layer_names(store)) == 4
    assert left(store) == []
    assert {image.digest: len(image.names) for image in store.images()} == {image.digest: 2 for image in made}
    assert [damage for image in store.images() for damage in collect.verify(store, image)] == []


def test_nothing_is_collected_while_an_import_runs(store: Store) -> None:
    with store.lock(shared=True), pytest.raises(UserError, match="in use"):
        collect.collect(store)
