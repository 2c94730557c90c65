"""From a signature to the bytes that a union shows: every link that somebody changed is refused (docs/images.md)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.images import Made, directory, member, tar
from tests.union.client import Client
from unionfsd.errors import UserError
from unionfsd.images import admission, checked, collect, containers, importing, layering, policy, sources, trust
from unionfsd.images import digest as digests
from unionfsd.images.store import Store
from unionfsd.options import parse
from unionfsd.syscalls import Fd
from unionfsd.union import Union

NAME: Final = "example.com/app:1"
LAYERS: Final = (
    tar([directory("bin"), member("bin/sh", mode=0o755, data=b"shell"), member("etc/passwd", data=b"root")]),
    tar([member("etc/.wh.passwd"), member("etc/hosts", data=b"localhost")]),
)


class Kept(NamedTuple):
    """A store with a signed image, and the rules under which it may be mounted."""

    store: Store
    made: Made
    rules: policy.Policy

    def layer(self, number: int) -> Path:
        return Path(self.store.diff_path(self.made.chain_ids[number])).parent

    def union(self) -> Union:
        """What ``mount --verify`` makes; the image may be one of a container."""
        image = self.store.image(NAME)
        admission.check(self.store, image, self.rules)
        for container in containers.every(self.store):
            containers.same_layers(container, image.config.chain_ids)
        lowers = containers.lower_paths(self.store, image.config.chain_ids)
        texts = [f"lowerdir={':'.join(map(containers.escaped, lowers))}", checked.option(self.store, image)]
        return Union.mount(parse(texts).config(b"/nowhere", root=os.geteuid() == 0))


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    store = Store(str(tmp_path / "st,o:re"))
    made = Made(LAYERS)
    source = sources.open_source(str(made.oci(tmp_path / "oci")), store.stage, sources.here()).source
    image = importing.import_image(store, source, (NAME,))
    key = ec.generate_private_key(ec.SECP256R1())
    pem, encoding = serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM
    (tmp_path / "key").write_bytes(key.private_bytes(encoding, pem, serialization.NoEncryption()))
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "pub").write_bytes(key.public_key().public_bytes(encoding, info))
    trust.keep(store, image.digest, [trust.sign(str(tmp_path / "key"), NAME, image.digest)])
    rule = policy.Rule("example.com/*", "signed", (str(tmp_path / "pub"),))
    containers.create(store, image, "work")
    return Kept(store, made, policy.Policy((rule,), "reject", "policy"))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change a document as its JSON."""
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def signature(kept: Kept) -> Path:
    (found,) = (Path(kept.store.root) / "signatures").iterdir()
    return found


def swap_layers(kept: Kept) -> None:
    one, other = kept.layer(0), kept.layer(1)
    one.rename(one.parent / "x")
    other.rename(one)
    (one.parent / "x").rename(other)


def swap_manifests(kept: Kept) -> None:
    edit(kept.layer(0) / "layer.json", lambda facts: facts.pop("index"))
    (kept.layer(0) / "tree.zst").write_bytes((kept.layer(1) / "tree.zst").read_bytes())


#: Link: who changes what, and what is said.
LINKS: Final[dict[str, tuple[Callable[[Kept], object], str]]] = {
    "signature": (
        lambda kept: edit(signature(kept), lambda all: all["signatures"][0].update(signature="AAAA")),
        "not by a key that counts",
    ),
    "payload": (
        lambda kept: edit(signature(kept), lambda all: all["signatures"][0].update(payload="AAAA")),
        "not by a key that counts",
    ),
    "no signature": (lambda kept: signature(kept).unlink(), "no signature"),
    "manifest": (
        lambda kept: Path(kept.store.blob_path(kept.made.digest)).write_bytes(kept.made.manifest + b" "),
        "damaged in the store",
    ),
    "another manifest for the name": (
        lambda kept: edit(Path(kept.store.root) / "index.json", lambda index: index["manifests"].clear()),
        "no such image",
    ),
    "configuration": (
        lambda kept: Path(kept.store.blob_path(digests.of(kept.made.config))).write_bytes(kept.made.config + b" "),
        "damaged in the store",
    ),
    "DiffID": (
        lambda kept: edit(kept.layer(0) / "layer.json", lambda facts: facts.update(diff_id=digests.of(b""))),
        "not that of the image",
    ),
    "a layer in another's place": (swap_layers, "not that of the image"),
    "no layer": (lambda kept: shutil.rmtree(kept.layer(0)), "not that of the image"),
    "index of the tree": (
        lambda kept: (kept.layer(0) / "tree.index").write_bytes((kept.layer(1) / "tree.index").read_bytes()),
        "it has been changed",
    ),
    "its digest": (
        lambda kept: edit(kept.layer(0) / "layer.json", lambda facts: facts.update(index=digests.of(b""))),
        "it has been changed",
    ),
    "no index, and the manifest of the tree": (
        swap_manifests,
        "the manifest of its tree is damaged",
    ),
    "a container's layers": (
        lambda kept: edit(
            Path(kept.store.root) / "containers" / "work" / "container.json", lambda facts: facts["layers"].pop()
        ),
        "its layers are not those of its image",
    ),
    "root of a layer": (lambda kept: (kept.layer(1) / "diff").chmod(0o777), "Input/output error"),
}


@pytest.mark.parametrize("link", LINKS)
def test_a_link_that_was_changed_is_refused(kept: Kept, link: str) -> None:
    change, words = LINKS[link]
    change(kept)
    with pytest.raises(UserError, match=words):
        kept.union()


def test_the_chain_holds_to_the_last_byte(kept: Kept) -> None:
    union = kept.union()
    client = Client(union)
    assert client.read((b"bin", b"sh"), 9, 0) == b"shell"
    assert sorted(name for name, _ in client.listdir((b"etc",))) == [b"hosts"]
    hosts = kept.layer(1) / "diff" / "etc" / "hosts"
    st = hosts.stat()
    hosts.write_bytes(b"LOCALHOST")
    os.utime(hosts, ns=(st.st_atime_ns, st.st_mtime_ns))
    with pytest.raises(OSError, match="Input/output error"):
        client.read((b"etc", b"hosts"), 9, 0)
    union.close()
    assert [damage.path for damage in collect.verify(kept.store, kept.store.image(NAME))] == ["etc/hosts"]


def test_verification_finds_a_changed_index(kept: Kept) -> None:
    with (kept.layer(0) / "tree.index").open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    (damage,) = collect.verify(kept.store, kept.store.image(NAME))
    assert "index" in damage.what


def test_a_layer_from_before_there_were_indices_gets_one(kept: Kept) -> None:
    before = (kept.layer(0) / "tree.index").read_bytes()
    edit(kept.layer(0) / "layer.json", lambda facts: facts.pop("index"))
    (kept.layer(0) / "tree.index").unlink()
    kept.union().close()
    assert (kept.layer(0) / "tree.index").read_bytes() == before
    assert os.listdir(Path(kept.store.root) / "stage") == []


def forged(kept: Kept) -> None:
    """A layer that was changed with all that the store says of it."""
    hosts, facts = kept.layer(1) / "diff" / "etc" / "hosts", kept.layer(1) / "layer.json"
    hosts.write_bytes(b"forged")
    hosts.chmod(0o4755)
    for name in ("tree.zst", "tree.index"):
        (kept.layer(1) / name).unlink()
    with Fd(os.open(kept.layer(1), os.O_PATH)) as layer, Fd(os.open(kept.layer(1) / "diff", os.O_PATH)) as diff:
        written = layering.write_manifest(layer, diff, None)
    edit(facts, lambda found: found.update(tree=written.tree_digest, index=written.index_digest))


def test_a_forged_layer_is_not_what_its_blob_makes(kept: Kept) -> None:
    image = kept.store.image(NAME)
    assert list(collect.verify(kept.store, image, unpack=True)) == []
    forged(kept)
    assert list(collect.verify(kept.store, image)) == []
    (damage,) = collect.verify(kept.store, image, unpack=True)
    assert (damage.where, damage.path) == (kept.made.chain_ids[1], "etc/hosts")
    assert {"mode", "sha256", "size"} <= set(damage.what.partition(": ")[2].split(", "))
    assert os.listdir(Path(kept.store.root) / "stage") == []
    Path(kept.store.blob_path(digests.of(kept.made.blobs[1]))).unlink()
    assert "blob" in next(collect.verify(kept.store, image, unpack=True)).what
