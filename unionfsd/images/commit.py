"""A container's upper as one more layer: a new image over the same lowers, or the tar of the layer alone."""

from __future__ import annotations

import datetime
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence

from unionfsd.errors import UserError
from unionfsd.images import archives, documents, pack
from unionfsd.images import digest as digests
from unionfsd.images.below import Below
from unionfsd.images.compress import Readable, Source, pieces
from unionfsd.images.containers import Container
from unionfsd.images.documents import Config, Descriptor, Manifest
from unionfsd.images.store import Image, Store
from unionfsd.syscalls import Fd
from unionfsd.typed import Any, Final, Literal, NamedTuple

Compression = Literal["gzip", "zstd", "none"]
COMPRESSIONS: Final[tuple[Compression, ...]] = ("gzip", "zstd", "none")
_SUFFIX: Final[Mapping[str, str]] = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}
#: What of a configuration can be changed when an image is made, as ``KEY=VALUE``.
CHANGES: Final = ("Env", "Cmd", "Entrypoint", "WorkingDir", "User", "Label")


class Packed(NamedTuple):
    """The tar of a layer in a file without a name."""

    fd: Fd
    diff_id: str
    size: int


def compressed(found: Iterator[bytes], how: Compression) -> Iterator[bytes]:
    """The bytes of `found`, compressed, the same for the same bytes."""
    if how == "none":
        yield from found
        return
    if how == "gzip":
        packer: Any = zlib.compressobj(6, wbits=31)
    else:
        import zstandard

        packer = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
    for piece in found:
        if made := packer.compress(piece):
            yield made
    yield packer.flush()


def below(store: Store, chains: Sequence[str]) -> Below:
    """The stack of layers, given the lowest first."""
    return Below([store.open_diff(chain) for chain in reversed(chains)])


def pack_upper(store: Store, container: Container, newest: int | None = None) -> Packed:
    """The upper of a container as a tar, as it is on disk (`ctl.settled`); UserError for what no layer can say."""
    upper = Fd(os.open(container.upper, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
    return spooled(store, pack.upper(upper, below(store, container.layers), newest=newest))


def spooled(store: Store, found: Iterator[bytes]) -> Packed:
    """A tar in a file without a name, with its DiffID."""
    counted = Source(found)
    fd = archives.spooled(iter(lambda: counted.read(1 << 20), b""), store.stage)
    return Packed(fd, counted.digest, counted.count)


class Committed:
    """The image that `container` would be: its layers, one more, and a changed configuration. A `Source`."""

    def __init__(
        self,
        store: Store,
        container: Container,
        *,
        changes: Sequence[str] = (),
        author: str = "",
        message: str = "",
        compression: Compression = "gzip",
        timestamp: int | None = None,
    ) -> None:
        self.names: tuple[str, ...] = ()
        self._store = store
        base = store.image(container.image)
        packed = pack_upper(store, container, None if timestamp is None else timestamp * 10**9)
        self._blob, descriptor = self._compressed(packed, compression)
        now = datetime.datetime.fromtimestamp(timestamp, datetime.UTC) if timestamp is not None else _now()
        step = {"created": now.strftime("%Y-%m-%dT%H:%M:%SZ"), "created_by": f"commit of {container.name}"}
        step |= {"author": author} if author else {}
        step |= {"comment": message} if message else {}
        self.config = _changed(base.config, packed.diff_id, step, changes)
        self.manifest = _manifest(base.manifest, self.config, descriptor)

    def _compressed(self, packed: Packed, compression: Compression) -> tuple[Fd, Descriptor]:
        counted = Source(compressed(pieces(archives.stream(packed.fd)), compression))
        fd = archives.spooled(iter(lambda: counted.read(1 << 20), b""), self._store.stage)
        return fd, Descriptor(documents.OCI_LAYER + _SUFFIX[compression], counted.digest, counted.count, {})

    def blob(self, descriptor: Descriptor, start: int = 0) -> Readable:
        if descriptor == self.manifest.layers[-1]:
            return archives.Slice(self._blob, start, descriptor.size - start)
        fd = self._store.open_blob(descriptor.digest)
        return archives.Slice(fd, start, descriptor.size - start)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _changed(base: Config, diff_id: str, step: Mapping[str, str], changes: Sequence[str]) -> Config:
    document = dict(base.document)
    document["created"] = step["created"]
    document["rootfs"] = {"type": "layers", "diff_ids": [*base.diff_ids, diff_id]}
    document["history"] = [*(document.get("history") or []), dict(step)]
    process = dict(base.process)
    for change in changes:
        _change(process, change)
    document["config"] = process
    return documents.config(documents.dump(document))


def _change(process: dict[str, Any], change: str) -> None:
    """Apply one ``KEY=VALUE``; lists are JSON lists, and one ``Env`` or ``Label`` is added to the others."""
    key, equals, value = change.partition("=")
    if key not in CHANGES or not equals:
        raise UserError(f"--change {change}: not a change", hint=f"KEY=VALUE with a key of {', '.join(CHANGES)}")
    if key == "Env":
        name = value.partition("=")[0]
        kept = [word for word in process.get("Env") or [] if str(word).partition("=")[0] != name]
        process["Env"] = [*kept, value]
    elif key == "Label":
        name, _, text = value.partition("=")
        process["Labels"] = {**(process.get("Labels") or {}), name: text}
    elif key in ("Cmd", "Entrypoint"):
        words = documents.load(b'{"words":' + value.encode() + b"}", f"--change {key}")["words"]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"--change {change}: not a list of words", hint='for example Cmd=["sh","-c","true"]')
        process[key] = words
    else:
        process[key] = value


def _manifest(base: Manifest, config: Config, layer: Descriptor) -> Manifest:
    """The manifest over the layers of `base` and one more, in OCI's form."""
    layers = [_as_oci(each).to_json() for each in (*base.layers, layer)]
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": documents.OCI_MANIFEST,
        "config": Descriptor(documents.OCI_CONFIG, config.digest, len(config.raw), {}).to_json(),
        "layers": layers,
    }
    return documents.manifest(documents.dump(document))


def _as_oci(layer: Descriptor) -> Descriptor:
    if layer.media_type == documents.DOCKER_LAYER:
        return layer._replace(media_type=documents.OCI_LAYER + "+gzip")
    return layer


def layer_tar(store: Store, image: Image, number: int) -> Packed:
    """The tar of a layer of an image, the lowest is 0: as it came where it was kept, else made again of its files."""
    if not 0 <= number < len(image.config.diff_ids):
        raise UserError(f"--layer {number}: the image has layers 0 to {len(image.config.diff_ids) - 1}")
    descriptor, chains = image.manifest.layers[number], image.config.chain_ids
    if store.has_blob(descriptor.digest):
        with store.open_blob(descriptor.digest) as fd:
            packed = spooled(store, pieces(archives.Slice(fd, 0, descriptor.size)))
        wanted = image.config.diff_ids[number]
        if digests.split(wanted)[0] == "sha256" and packed.diff_id != wanted:
            raise UserError(f"{descriptor.digest}: damaged in the store")
        return packed
    return spooled(store, pack.upper(store.open_diff(chains[number]), below(store, chains[:number])))
