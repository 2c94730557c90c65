"""Images made for the tests: layers as tar archives, layouts and archives of every form around them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import stat
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import zstandard

from unionfsd.images import digest as digests
from unionfsd.images import documents, tarwrite
from unionfsd.images.tarread import Member

MTIME: Final = 1_000_000_000


def member(name: bytes | str, kind: int = stat.S_IFREG, *, data: bytes = b"", **more: Any) -> tuple[Member, bytes]:
    """An entry with its data; root's, of a fixed time, unless told."""
    settings: dict[str, Any] = {"mode": 0o755 if kind == stat.S_IFDIR else 0o644, "uid": 0, "gid": 0}
    settings |= {"mtime_ns": MTIME * 10**9, "target": b"", "rdev": (0, 0), "xattrs": {}}
    settings |= more
    name = name.encode() if isinstance(name, str) else name
    return Member(name=name, kind=kind, size=len(data), stored=len(data), **settings), data


def directory(name: bytes | str, **more: Any) -> tuple[Member, bytes]:
    return member(name, stat.S_IFDIR, **more)


def symlink(name: bytes | str, target: str, **more: Any) -> tuple[Member, bytes]:
    return member(name, stat.S_IFLNK, target=target.encode(), **more)


def hard_link(name: bytes | str, target: str, **more: Any) -> tuple[Member, bytes]:
    return member(name, 0, target=target.encode(), **more)


def tar(entries: Iterable[tuple[Member, bytes]], *, end: bool = True) -> bytes:
    """An archive of `entries`, with our own writer."""
    parts = []
    for entry, data in entries:
        parts += [tarwrite.header(entry), data, tarwrite.padding(len(data))]
    return b"".join(parts) + (tarwrite.END if end else b"")


def files(content: Mapping[str, bytes]) -> bytes:
    """An archive of plain files."""
    return tar([member(name, data=data) for name, data in content.items()])


COMPRESSORS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "": lambda data: data,
    "+gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "+zstd": lambda data: zstandard.compress(data),
    "+xz": lambda data: lzma.compress(data, preset=0),
    "+bzip2": lambda data: bz2.compress(data, 1),
}


class Made:
    """An image of `layers`, tars with the lowest first, each stored with `compression`."""

    def __init__(self, layers: Sequence[bytes], compression: str = "+gzip", **config: Any) -> None:
        self.layers = list(layers)
        self.diff_ids = [digests.of(layer) for layer in layers]
        self.blobs = [COMPRESSORS[compression](layer) for layer in layers]
        self.config = json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": {"Env": ["PATH=/bin", "A=b c"], "Cmd": ["/bin/sh"], "WorkingDir": "/w"},
                "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
                "history": [{"created_by": f"step {at}"} for at in range(len(layers))],
                **config,
            }
        ).encode()
        self.manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": documents.OCI_MANIFEST,
                "config": descriptor(documents.OCI_CONFIG, self.config),
                "layers": [descriptor(documents.OCI_LAYER + compression, blob) for blob in self.blobs],
            }
        ).encode()

    @property
    def chain_ids(self) -> list[str]:
        return list(digests.chain_ids(self.diff_ids))

    @property
    def digest(self) -> str:
        return digests.of(self.manifest)

    def oci_files(self, name: str | None = "latest", **more: bytes) -> dict[str, bytes]:
        """The files of an OCI layout with this image in it."""
        entry = descriptor(documents.OCI_MANIFEST, self.manifest)
        entry["platform"] = {"os": "linux", "architecture": "amd64"}
        if name is not None:
            entry["annotations"] = {documents.REF_NAME: name}
        found = {
            "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
            "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(),
        }
        for blob in (self.config, self.manifest, *self.blobs, *more.values()):
            found["blobs/" + digests.of(blob).replace(":", "/")] = blob
        return found

    def oci(self, directory: Path, name: str | None = "latest") -> Path:
        return write(directory, self.oci_files(name))

    def docker_files(self, tag: str = "app:1") -> dict[str, bytes]:
        """The files of ``docker save`` since 1.10."""
        config = digests.of(self.config).partition(":")[2] + ".json"
        names = [f"{at}{'0' * 63}/layer.tar" for at in range(len(self.layers))]
        manifest = [{"Config": config, "RepoTags": [tag], "Layers": names}]
        return {
            **dict(zip(names, self.layers, strict=True)),
            config: self.config,
            "manifest.json": json.dumps(manifest).encode(),
        }

    def old_docker_files(self, tag: str = "app:1") -> dict[str, bytes]:
        """The files of ``docker save`` before 1.10."""
        identities = [hashlib.sha256(str(at).encode()).hexdigest() for at in range(len(self.layers))]
        found: dict[str, bytes] = {}
        for at, (identity, layer) in enumerate(zip(identities, self.layers, strict=True)):
            document: dict[str, Any] = {"id": identity, "created": "2015-01-01T00:00:00Z", "os": "linux"}
            document |= {"architecture": "amd64", "config": {"Env": ["OLD=1"], "Cmd": ["/bin/sh"]}}
            document["container_config"] = {"Cmd": ["/bin/sh", "-c", f"step {at}"]}
            if at:
                document["parent"] = identities[at - 1]
            found[f"{identity}/VERSION"] = b"1.0"
            found[f"{identity}/json"] = json.dumps(document).encode()
            found[f"{identity}/layer.tar"] = layer
        name, _, version = tag.partition(":")
        found["repositories"] = json.dumps({name: {version: identities[-1]}}).encode()
        return found

    def dir_files(self) -> dict[str, bytes]:
        """The files of skopeo's ``dir:``."""
        blobs = (self.config, *self.blobs)
        named = {digests.of(blob).partition(":")[2]: blob for blob in blobs}
        return {"version": b"Directory Transport Version: 1.1\n", "manifest.json": self.manifest, **named}


def descriptor(media_type: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digests.of(blob), "size": len(blob)}


def write(directory: Path, content: Mapping[str, bytes]) -> Path:
    for name, data in content.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


def archive(path: Path, content: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> Path:
    """A tar, by Python's own writer, of `content`; names of it in `links` are symlinks."""
    with tarfile.open(path, "w") as made:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            made.addfile(info)
    return path
