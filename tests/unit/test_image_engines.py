"""The stores of Docker and podman, as they lay them out, found, read and imported from with nothing changed."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any, Final

import pytest

from tests.images import Made, member, tar
from tests.trees import fingerprint
from unionfsd.errors import UserError
from unionfsd.images import digest as digests
from unionfsd.images import engines, importing, sources, tarsplit
from unionfsd.images.store import Image, Store, default_root

NAME: Final = b"b\xff" + b"long" * 30
LAYERS: Final = (
    tar([member("a", data=b"1"), member("empty")]),
    tar([member(NAME, data=b"2" * 5000), member("d/.wh.a")]) + bytes(4096),
)


def split(layer: bytes, diff: Path) -> bytes:
    """Put the files of a tar into `diff`, and give the rest of it as tar-split has it."""
    diff.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    at = 0
    with tarfile.open(fileobj=io.BytesIO(layer), errors="surrogateescape") as archive:
        for entry in archive:
            data = layer[entry.offset_data : entry.offset_data + entry.size]
            lines.append({"type": 2, "payload": base64.b64encode(layer[at : entry.offset_data]).decode()})
            at = entry.offset_data + entry.size
            name = os.fsencode(entry.name)
            named = {"name_raw": base64.b64encode(name).decode()} if b"\xff" in name else {"name": entry.name}
            lines.append({"type": 1, **named, "size": entry.size, "payload": "AAAAAAAAAAA="})
            if data:
                (diff / os.fsdecode(name)).write_bytes(data)
    lines.append({"type": 2, "payload": base64.b64encode(layer[at:]).decode()})
    numbered = ({**line, "position": number} for number, line in enumerate(lines))
    return gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in numbered))


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    made = Made(LAYERS)
    root = tmp_path / "docker"
    base = root / "image" / "overlay2"
    identity = digests.of(made.config)
    content = base / "imagedb" / "content" / "sha256"
    content.mkdir(parents=True)
    (content / identity[7:]).write_bytes(made.config)
    tags = {"app": {"app:1": identity, f"app@{made.digest}": identity}}
    (base / "repositories.json").write_text(json.dumps({"Repositories": tags}))
    for at, chain in enumerate(made.chain_ids):
        layer = base / "layerdb" / "sha256" / chain[7:]
        layer.mkdir(parents=True)
        (layer / "cache-id").write_text(f"cache{at}")
        (layer / "tar-split.json.gz").write_bytes(split(LAYERS[at], root / "overlay2" / f"cache{at}" / "diff"))
    return root


@pytest.fixture
def podman(tmp_path: Path) -> Path:
    """The same in containers/storage, with a manifest over the plain tars."""
    made = Made(LAYERS, compression="")
    root = tmp_path / "podman"
    (root / "overlay-layers").mkdir(parents=True)
    layers = []
    for at, (layer, diff_id) in enumerate(zip(LAYERS, made.diff_ids, strict=True)):
        identity = f"{at}" * 64
        layers.append({"id": identity, "diff-digest": diff_id, **({"parent": "0" * 64} if at else {})})
        split_of = split(layer, root / "overlay" / identity / "diff")
        (root / "overlay-layers" / f"{identity}.tar-split.gz").write_bytes(split_of)
    (root / "overlay-layers" / "layers.json").write_text(json.dumps(layers))
    identity = digests.of(made.config)[7:]
    image = root / "overlay-images" / identity
    image.mkdir(parents=True)
    (image / ("=" + base64.b64encode(f"sha256:{identity}".encode()).decode())).write_bytes(made.config)
    (image / "manifest").write_bytes(made.manifest)
    entry = {"id": identity, "names": ["localhost/app:1"], "layer": "1" * 64}
    (root / "overlay-images" / "images.json").write_text(json.dumps([entry]))
    return root


def bring(store: Store, place: str) -> Image:
    source = sources.open_source(f"containers-storage:{place}", store.stage).source
    return importing.import_image(store, source, source.names)


def test_an_image_of_docker_is_imported(docker: Path, tmp_path: Path) -> None:
    before = fingerprint(docker)
    store = Store(str(tmp_path / "store"))
    image = bring(store, f"{docker}@app:1")
    assert image.names == ("docker.io/library/app:1",)
    assert image.config.raw == Made(LAYERS).config
    top = Path(os.fsdecode(os.fsencode(store.diff_path(image.config.chain_ids[1])) + b"/" + NAME))
    assert top.read_bytes() == b"2" * 5000
    assert fingerprint(docker) == before


@pytest.mark.parametrize("place", ["{}@app:1", "[overlay@{}+/run/containers:a=b]localhost/app:1", "{}@" + "IDENTITY"])
def test_an_image_of_podman_keeps_its_digest(podman: Path, tmp_path: Path, place: str) -> None:
    made = Made(LAYERS, compression="")
    place = place.format(podman).replace("IDENTITY", digests.of(made.config)[7:20])
    assert bring(Store(str(tmp_path / "store")), place).digest == made.digest


def test_storage_conf_says_where(podman: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "storage.conf"
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(conf))
    key = "graphroot" if os.geteuid() == 0 else "rootless_storage_path"
    conf.write_text(f'[storage]\ndriver = "overlay"\n{key} = "{podman}"\n')
    assert engines.find("app:1").names == ("localhost/app:1",)
    (tmp_path / "empty" / "overlay-images").mkdir(parents=True)
    (tmp_path / "empty" / "overlay-layers").mkdir()
    for path in ("overlay-images/images.json", "overlay-layers/layers.json"):
        (tmp_path / "empty" / path).write_text("[]")
    conf.write_text(f'[storage]\n{key} = "{tmp_path}/empty"\n[storage.options]\nadditionalimagestores = ["{podman}"]\n')
    assert engines.find("app:1").names == ("localhost/app:1",)
    conf.write_text("storage = [")
    with pytest.raises(UserError, match=r"storage\.conf"):
        engines.find("app:1")


def test_in_a_namespace_of_a_user_the_stores_are_the_users(
    podman: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root of ``podman unshare``; the machine's own root has others."""
    for name in ("CONTAINERS_STORAGE_CONF", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_root() == "/var/lib/unionfsd"
    monkeypatch.setenv("_CONTAINERS_USERNS_CONFIGURED", "done")
    assert default_root() == str(tmp_path / "data" / "unionfsd-userns")
    monkeypatch.setattr(engines, "_SYSTEM", ())
    assert engines.roots() == [str(tmp_path / "data" / "containers" / "storage")]
    with pytest.raises(UserError, match="there is no store"):
        engines.find("app:1")
    conf = tmp_path / "home" / ".config" / "containers" / "storage.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text(f'[storage]\ngraphroot = "{podman}"\n')
    assert engines.find("app:1").names == ("localhost/app:1",)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert default_root() == str(tmp_path / "data" / "unionfsd")


def test_files_that_changed_are_no_longer_the_layer(podman: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    file = podman / "overlay" / ("0" * 64) / "diff" / "a"
    for content, words in ((b"X", "another digest"), (b"", "shorter"), (None, "No such file")):
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        with pytest.raises(UserError, match=words):
            bring(store, f"{podman}@app:1")
    file.symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="a: "):
        bring(store, f"{podman}@app:1")
    assert store.images() == []


@pytest.mark.parametrize(
    "lines",
    [
        b"noise",
        b'{"type":3}\n',
        b'{"type":2,"payload":"?"}\n',
        b'{"type":1,"name":"a","size":-1}\n',
        b'{"type":1,"name":"../a","size":1}\n',
        b'{"type":1,"name":"","size":1}\n',
        b"[]\n",
    ],
)
def test_what_is_no_tar_split_is_refused(tmp_path: Path, lines: bytes) -> None:
    (tmp_path / "split").write_bytes(lines)
    with pytest.raises(UserError, match="split"):
        tarsplit.stream(str(tmp_path / "split"), str(tmp_path)).read(1)


def test_an_image_of_docker_is_found(docker: Path) -> None:
    before = fingerprint(docker)
    image = engines.find(f"{docker}@app:1")
    assert image.names == ("docker.io/library/app:1",)
    assert image.diffs == tuple(f"{docker}/overlay2/cache{at}/diff" for at in range(2))
    assert engines.find(f"{docker}@{image.identity[:12]}") == image
    assert fingerprint(docker) == before


def test_what_is_not_there_is_said(docker: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such image"):
        engines.find(f"{docker}@other")
    shutil.rmtree(docker / "overlay2" / "cache1" / "diff")
    with pytest.raises(UserError, match="cache1"):
        engines.find(f"{docker}@app:1")
    (docker / "image" / "overlay2" / "layerdb" / "sha256").joinpath(
        Made(LAYERS).chain_ids[0][7:], "cache-id"
    ).write_text("../../etc")
    with pytest.raises(UserError, match="no layer"):
        engines.find(f"{docker}@app:1")
    with pytest.raises(UserError, match="neither"):
        engines.find(f"{docker / 'image'}@app:1")
