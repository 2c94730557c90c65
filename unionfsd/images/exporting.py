"""Writing images of the store where other tools read them: OCI layouts, and archives as ``docker save`` makes them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator

from unionfsd import syscalls
from unionfsd.errors import UserError, reason
from unionfsd.images import archives, beneath, documents, tarwrite, trust
from unionfsd.images import digest as digests
from unionfsd.images.compress import Verified, pieces
from unionfsd.images.documents import Descriptor
from unionfsd.images.events import Events
from unionfsd.images.reference import Place
from unionfsd.images.store import Image, Store
from unionfsd.images.tarread import Member
from unionfsd.syscalls import Fd
from unionfsd.typed import Any, Final

_LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'
_VERSION: Final = b"Directory Transport Version: 1.1\n"
_MAX_INDEX: Final = 64 << 20


def export(store: Store, image: Image, place: Place, events: Events) -> None:
    """Write an image to `place`; UserError when a layer is not there as it came, or the place cannot be written."""
    require_blobs(store, image)
    try:
        _WRITERS[place.transport](store, image, place, events)
    except KeyError:
        raise UserError(f"{place}: cannot be written", hint=f"one of {', '.join(_WRITERS)}") from None
    except OSError as error:
        raise UserError(f"{place}: {reason(error)}") from None


def require_blobs(store: Store, image: Image) -> None:
    """UserError unless every layer of an image is there as it came."""
    missing = [layer.digest for layer in image.manifest.layers if not store.has_blob(layer.digest)]
    if missing:
        hint = "import the image without --discard-blobs"
        raise UserError(f"{missing[0]}: the layer was not kept as it came", hint=hint)


def blobs(image: Image) -> list[Descriptor]:
    """Everything an image consists of, the manifest last: each before what refers to it."""
    layers = {layer.digest: layer for layer in image.manifest.layers}
    return [*layers.values(), image.manifest.config, image.manifest.descriptor]


def _verified(store: Store, blob: Descriptor, events: Events) -> Iterator[bytes]:
    with store.open_blob(blob.digest) as fd:
        size = os.fstat(fd.fd).st_size
        stream = Verified(
            archives.Slice(fd, 0, size), blob.digest, blob.size, lambda count: events.advance(blob.digest, count)
        )
        while data := stream.read(1 << 20):
            yield data


# Directories.


def _oci(store: Store, image: Image, place: Place, events: Events) -> None:
    os.makedirs(place.where, exist_ok=True)
    signatures = _signatures(store, image)
    with _open(place.where) as root:
        for name in (b"blobs", b"blobs/sha256", b"blobs/sha512"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=root.fd)
        for blob in blobs(image):
            algorithm, digits = digests.split(blob.digest)
            with _open(os.path.join(place.where, "blobs", algorithm)) as directory:
                _copy(store, blob, directory, digits, events)
        if signatures is not None:
            with _open(os.path.join(place.where, "blobs", "sha256")) as directory:
                for data in signatures[1]:
                    beneath.replace_file(directory.fd, digests.split(digests.of(data))[1].encode(), data)
        entries = []
        if syscalls.stat_or_none(root.fd, b"index.json") is not None:
            entries = list(documents.index(beneath.read_file(root.fd, b"index.json", _MAX_INDEX)))
        if signatures is not None:
            entries = [entry for entry in entries if entry.annotations != signatures[0].annotations]
            entries.append(signatures[0])
        beneath.replace_file(root.fd, b"index.json", _index(image, place.which, entries))
        beneath.replace_file(root.fd, b"oci-layout", _LAYOUT)


def _signatures(store: Store, image: Image) -> tuple[Descriptor, list[bytes]] | None:
    """(the entry of an index, the blobs) of the signatures of an image, as cosign keeps them in a layout."""
    mine = [each for each in trust.kept(store, image.digest) if each.signed_index is None]
    if not mine:
        return None
    manifest, found = trust.manifest(mine)
    entry = manifest.descriptor._replace(annotations={documents.REF_NAME: trust.tag(image.digest)})
    return entry, [*found.values(), manifest.raw]


def _index(image: Image, name: str | None, others: list[Descriptor]) -> bytes:
    annotations = {documents.REF_NAME: name} if name else {}
    entry = image.manifest.descriptor._replace(annotations=annotations, platform=image.config.platform)
    kept = [
        other
        for other in others
        if (other.annotations.get(documents.REF_NAME) != name if name else other.digest != image.digest)
    ]
    manifests = [each.to_json() for each in (*kept, entry)]
    return documents.dump({"schemaVersion": 2, "mediaType": documents.OCI_INDEX, "manifests": manifests})


def _dir(store: Store, image: Image, place: Place, events: Events) -> None:
    os.makedirs(place.where, exist_ok=True)
    with _open(place.where) as root:
        for blob in blobs(image)[:-1]:
            _copy(store, blob, root, digests.split(blob.digest)[1], events)
        beneath.replace_file(root.fd, b"version", _VERSION)
        beneath.replace_file(root.fd, b"manifest.json", image.manifest.raw)


def _open(path: str) -> Fd:
    return Fd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def _copy(store: Store, blob: Descriptor, directory: Fd, name: str, events: Events) -> None:
    st = syscalls.stat_or_none(directory.fd, name.encode())
    if st is not None and stat.S_ISREG(st.st_mode) and st.st_size == blob.size:
        return
    events.begin(blob.digest, "write", blob.size)
    staged = b"." + name.encode() + b".new"
    beneath.remove(directory.fd, staged)
    with syscalls.create_at(directory.fd, staged, 0o644) as fd:
        _write(fd, 0, _verified(store, blob, events))
        syscalls.fsync(fd.fd)
    syscalls.renameat2(directory.fd, staged, directory.fd, name.encode())
    events.end(blob.digest)


# Archives.


class _ArchiveWriter:
    """A tar in a file that gets its name when it is whole."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._directory = _open(os.path.dirname(self._path))
        self._staged = b"." + os.path.basename(self._path).encode() + b".new"
        beneath.remove(self._directory.fd, self._staged)
        self._fd = syscalls.create_at(self._directory.fd, self._staged, 0o644)
        self._at = 0

    def add(self, name: str, data: Iterator[bytes]) -> None:
        """Add a file; its header is written when its size is known."""
        began = self._at
        self._at += len(tarwrite.header(_file(name, 0)))
        size = _write(self._fd, self._at, data)
        header = tarwrite.header(_file(name, size))
        if began + len(header) != self._at:
            raise UserError(f"{name}: {size} bytes are too many for a member of an archive")
        syscalls.pwrite(self._fd.fd, header, began)
        self._at += size
        self._at += _write(self._fd, self._at, iter([tarwrite.padding(size)]))

    def write(self, data: Iterator[bytes]) -> None:
        """Write what is an archive already, and finish."""
        _write(self._fd, 0, data)
        self._publish()

    def finish(self) -> None:
        _write(self._fd, self._at, iter([tarwrite.END]))
        self._publish()

    def _publish(self) -> None:
        syscalls.fsync(self._fd.fd)
        name = os.path.basename(self._path).encode()
        syscalls.renameat2(self._directory.fd, self._staged, self._directory.fd, name)


def _file(name: str, size: int) -> Member:
    return Member(name.encode(), stat.S_IFREG, 0o644, 0, 0, size, 0, b"", (0, 0), {}, size)


def _write(fd: Fd, start: int, data: Iterator[bytes]) -> int:
    """Write pieces from `start` on; returns the bytes written."""
    at = start
    for piece in data:
        view = memoryview(piece)
        while view:
            count = syscalls.pwrite(fd.fd, view, at)
            at, view = at + count, view[count:]
    return at - start


def write_file(path: str, content: Fd) -> None:
    """Write all of `content` to the file `path`, which is whole or not there; ``-`` is standard output."""
    size = os.fstat(content.fd).st_size
    stream = archives.Slice(content, 0, size)
    data = iter(lambda: stream.read(1 << 20), b"")
    if path == "-":
        for piece in data:
            view = memoryview(piece)
            while view:
                view = view[os.write(1, view) :]
        return
    try:
        writer = _ArchiveWriter(path)
        writer.write(data)
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from None


def _oci_archive(store: Store, image: Image, place: Place, events: Events) -> None:
    writer = _ArchiveWriter(place.where)
    writer.add("oci-layout", iter([_LAYOUT]))
    writer.add("index.json", iter([_index(image, place.which, [])]))
    for blob in blobs(image):
        events.begin(blob.digest, "write", blob.size)
        writer.add("blobs/" + blob.digest.replace(":", "/"), _verified(store, blob, events))
        events.end(blob.digest)
    writer.finish()


def _docker_archive(store: Store, image: Image, place: Place, events: Events) -> None:
    """As ``docker save`` since 1.10: a configuration, plain tars, and a list that names them."""
    writer = _ArchiveWriter(place.where)
    members: dict[str, str] = {}
    for layer, diff_id in zip(image.manifest.layers, image.config.diff_ids, strict=True):
        if diff_id in members:
            continue
        members[diff_id] = f"{digests.split(diff_id)[1]}.tar"
        events.begin(layer.digest, "write", layer.size)
        stream = _Readable(_verified(store, layer, events))
        writer.add(members[diff_id], pieces(stream))
        events.end(layer.digest)
    config = f"{digests.split(image.config.digest)[1]}.json"
    writer.add(config, iter([image.config.raw]))
    names = [place.which] if place.which else list(image.names)
    entry: dict[str, Any] = {
        "Config": config,
        "RepoTags": names,
        "Layers": [members[each] for each in image.config.diff_ids],
    }
    text = b"[" + documents.dump(entry) + b"]"
    writer.add("manifest.json", iter([text]))
    writer.finish()


class _Readable:
    def __init__(self, found: Iterator[bytes]) -> None:
        self._pieces = found

    def read(self, size: int, /) -> bytes:
        return next(filter(None, self._pieces), b"")


_WRITERS: Final[dict[str, Callable[[Store, Image, Place, Events], None]]] = {
    "oci": _oci,
    "oci-archive": _oci_archive,
    "docker-archive": _docker_archive,
    "dir": _dir,
}
