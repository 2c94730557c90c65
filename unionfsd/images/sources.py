"""Where images come from: each kind of place as a `Source`, which gives a manifest, a configuration and blobs.

A place that has no manifest (a Docker archive, a plain root) gets one made, the same each time: its layers are plain
tars, so that their digests are their DiffIDs.
"""

from __future__ import annotations

import os
import platform as machine
from collections.abc import Callable, Mapping, Sequence

from unionfsd.errors import UserError, reason
from unionfsd.images import archives, beneath, compress, documents, pack, reference
from unionfsd.images import digest as digests
from unionfsd.images.archives import Archive
from unionfsd.images.blobs import ArchiveBlobs, Blobs, DirectoryBlobs, FlatBlobs, open_directory
from unionfsd.images.compress import Readable
from unionfsd.images.documents import Config, Descriptor, Manifest
from unionfsd.images.reference import Place
from unionfsd.images.tarread import BLOCK, TarError
from unionfsd.syscalls import Fd
from unionfsd.typed import Any, Final, NamedTuple, Protocol, TypeVar

_CONTAINERD_NAME: Final = "io.containerd.image.name"
_EPOCH: Final = "1970-01-01T00:00:00Z"
_ARCHITECTURES: Final = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i686": "386",
    "i386": "386",
}


def here() -> dict[str, str]:
    """The platform that images are wanted for unless told."""
    name = machine.machine()
    return {"os": "linux", "architecture": _ARCHITECTURES.get(name, name)}


def platform_of(text: str) -> dict[str, str]:
    """Read ``OS/ARCHITECTURE[/VARIANT]``; UserError."""
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise UserError(f"--platform {text}: not OS/ARCHITECTURE[/VARIANT]", hint="for example linux/arm64")
    parts[1] = _ARCHITECTURES.get(parts[1], parts[1])
    return dict(zip(("os", "architecture", "variant"), parts, strict=False))


class Source(Protocol):
    """An image somewhere. `names` are those it has there, whole ones."""

    manifest: Manifest
    config: Config
    names: tuple[str, ...]

    def blob(self, descriptor: Descriptor, start: int = 0) -> Readable:
        """The bytes of a layer from `start` on, yet to be verified."""


class Resolved:
    """An image in a place with blobs by digest, found by its manifest or by an index it is in."""

    def __init__(
        self, blobs: Blobs, raw: bytes, announced: str | None, platform: Mapping[str, str], names: tuple[str, ...]
    ) -> None:
        self.blobs = blobs
        #: What it was found by, which may be an index.
        self.top = raw
        #: What else stands in the layout that the image was found in.
        self.beside: tuple[Descriptor, ...] = ()
        self.names = names
        for _ in range(4):  # an index may be in an index
            media_type = documents.kind(raw, announced)
            if media_type not in documents.INDEXES:
                break
            entry = documents.choose(documents.index(raw), platform)
            raw, announced = verified(blobs.nested(entry.digest), entry), entry.media_type
        self.manifest = documents.manifest(raw, announced)
        self.config = documents.config(verified(blobs.document(self.manifest.config.digest), self.manifest.config))

    def blob(self, descriptor: Descriptor, start: int = 0) -> Readable:
        stream = self.blobs.open(descriptor.digest)
        while start > 0 and (data := stream.read(min(start, 1 << 20))):
            start -= len(data)
        return stream


def verified(data: bytes, descriptor: Descriptor) -> bytes:
    """`data` if it is what the descriptor says, else UserError."""
    if len(data) != descriptor.size or not digests.matches(descriptor.digest, data):
        raise UserError(f"{descriptor.digest}: its content has another digest or size")
    return data


# An OCI layout, as a directory or in an archive; and skopeo's directories.


def _layout(blobs: Blobs, index: bytes, place: Place, platform: Mapping[str, str]) -> Resolved:
    entries = documents.index(index)
    chosen = _chosen(entries, place, platform)
    found = _resolved(blobs, chosen, platform)
    same = [entry for entry in entries if entry.digest == chosen.digest]
    found.names = tuple(dict.fromkeys(name for entry in same for name in _names_of(entry)))
    found.beside = entries
    return found


def _resolved(blobs: Blobs, entry: Descriptor, platform: Mapping[str, str]) -> Resolved:
    return Resolved(blobs, verified(blobs.document(entry.digest), entry), entry.media_type, platform, ())


def _chosen(entries: tuple[Descriptor, ...], place: Place, platform: Mapping[str, str]) -> Descriptor:
    able = [entry for entry in entries if documents.is_image(entry)]
    if place.which is not None:
        named = _numbered(able, place.which) or [entry for entry in able if _is_named(entry, place.which)]
        if not named:
            tags = [name for entry in able if (name := entry.annotations.get(documents.REF_NAME))]
            raise UserError(
                f"{place}: no image of that name", hint=f"there are: {', '.join(tags) or 'none with names'}"
            )
        return named[0]
    able = list({entry.digest: entry for entry in reversed(able)}.values())[::-1]
    if len(able) > 1 and not any(documents.REF_NAME in entry.annotations for entry in able):
        return documents.choose(able, platform)
    if len(able) != 1:
        tags = [
            entry.annotations.get(_CONTAINERD_NAME) or entry.annotations.get(documents.REF_NAME, entry.digest)
            for entry in able
        ]
        raise UserError(f"{place}: {len(able)} images are there", hint=f"add one of: {', '.join(tags)}")
    return able[0]


def _is_named(entry: Descriptor, which: str) -> bool:
    wanted = {which, *_whole(which)}
    return entry.digest == which or not wanted.isdisjoint(
        (entry.annotations.get(documents.REF_NAME), entry.annotations.get(_CONTAINERD_NAME))
    )


_Any = TypeVar("_Any")


def _numbered(found: Sequence[_Any], which: str) -> list[_Any]:
    """That of the images that ``@NUMBER`` means, as skopeo writes it, the first is 0; none for another word."""
    number = which.removeprefix("@")
    return [found[int(number)]] if number != which and number.isdecimal() and int(number) < len(found) else []


def _names_of(entry: Descriptor) -> tuple[str, ...]:
    for key in (_CONTAINERD_NAME, documents.REF_NAME):
        text = entry.annotations.get(key)
        if text and (key == _CONTAINERD_NAME or "/" in text):
            try:
                return (str(reference.name(text)),)
            except UserError:
                continue
    return ()


def _oci(place: Place, platform: Mapping[str, str], spool: Fd) -> Source:
    blobs = DirectoryBlobs(place.where)
    try:
        index = beneath.read_file(blobs.fd.fd, b"index.json", 64 << 20)
    except OSError as error:
        raise UserError(f"{place}: no OCI layout: index.json: {reason(error)}") from None
    return _layout(blobs, index, place, platform)


def _oci_archive(place: Place, platform: Mapping[str, str], spool: Fd) -> Source:
    archive = Archive(archives.open_plain(place.where, spool))
    return _layout(ArchiveBlobs(archive), archive.document("index.json"), place, platform)


def _dir(place: Place, platform: Mapping[str, str], spool: Fd) -> Source:
    fd = open_directory(place.where)
    try:
        raw = beneath.read_file(fd.fd, b"manifest.json", documents.MAX_DOCUMENT)
    except OSError as error:
        raise UserError(f"{place}: manifest.json: {reason(error)}") from None
    return Resolved(FlatBlobs(fd), raw, None, platform, ())


# Docker archives, of every era.


class Made:
    """An image without a manifest of its own: layers as streams of plain tars by their DiffIDs."""

    def __init__(
        self,
        config: bytes,
        layers: list[tuple[str, int, Callable[[], Readable]]],
        names: tuple[str, ...],
        manifest: bytes | None = None,
    ) -> None:
        """`layers`: DiffID, size and stream of each; `manifest`: one that says the same, if there is."""
        self.names = names
        self._streams = {diff_id: stream for diff_id, _, stream in layers}
        self.config = documents.config(config)
        if self.config.diff_ids != tuple(diff_id for diff_id, _, _ in layers):
            raise UserError("the configuration of the image is about other layers")
        descriptors = [Descriptor(documents.OCI_LAYER, diff_id, size, {}) for diff_id, size, _ in layers]
        raw = manifest or documents.dump(
            {
                "schemaVersion": 2,
                "mediaType": documents.OCI_MANIFEST,
                "config": Descriptor(documents.OCI_CONFIG, digests.of(config), len(config), {}).to_json(),
                "layers": [descriptor.to_json() for descriptor in descriptors],
            }
        )
        self.manifest = documents.manifest(raw)

    def blob(self, descriptor: Descriptor, start: int = 0) -> Readable:
        source = compress.Source(compress.pieces(self._streams[descriptor.digest]()), algorithm=None)
        source.skip(start)
        return source


def _docker_archive(place: Place, platform: Mapping[str, str], spool: Fd) -> Source:
    archive = Archive(archives.open_plain(place.where, spool))
    if "index.json" in archive and "oci-layout" in archive:
        return _since_25(archive, place, platform)
    if "manifest.json" in archive:  # since Docker 1.10
        return _since_1_10(archive, place)
    if "repositories" in archive:
        return _before_1_10(archive, place)
    raise UserError(f"{place}: neither manifest.json nor repositories is in it")


def _since_25(archive: Archive, place: Place, platform: Mapping[str, str]) -> Source:
    """A layout with a ``manifest.json``, which has the names in full, and by which an image may be asked for."""
    blobs, index = ArchiveBlobs(archive), archive.document("index.json")
    entries = _entries(archive) if "manifest.json" in archive else []
    try:
        found = _layout(blobs, index, place, platform)
    except UserError:
        if place.which is None or not entries:
            raise
        wanted = _entry_of(entries, place.which).get("Config")
        able = (_resolved(blobs, entry, platform) for entry in documents.index(index) if documents.is_image(entry))
        same = next((each for each in able if _blob_name(each) == wanted), None)
        if same is None:
            raise
        found = same
        found.beside = documents.index(index)
    tags = [tag for entry in entries if entry.get("Config") == _blob_name(found) for tag in _tags(entry)]
    found.names = tuple(dict.fromkeys(tags)) or found.names
    return found


def _blob_name(found: Resolved) -> str:
    return "blobs/" + found.config.digest.replace(":", "/")


def _entries(archive: Archive) -> list[Mapping[str, Any]]:
    entries = documents.load(b'{"all":' + archive.document("manifest.json") + b"}", "manifest.json")["all"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError("manifest.json: not a list of images")
    return entries


def _entry_of(entries: Sequence[Mapping[str, Any]], which: str | None) -> Mapping[str, Any]:
    if which is not None:
        wanted = _whole(which)
        found = _numbered(entries, which) or [entry for entry in entries if not wanted.isdisjoint(_tags(entry))]
        if not found:
            tags = [tag for entry in entries for tag in _tags(entry)]
            raise UserError(
                f"{which}: no image of that name in the archive", hint=f"there are: {', '.join(tags) or 'none'}"
            )
        return found[0]
    if len(entries) != 1:
        tags = [tag for entry in entries for tag in _tags(entry)]
        raise UserError(f"the archive has {len(entries)} images", hint=f"add one of: {', '.join(tags)}")
    return entries[0]


def _tags(entry: Mapping[str, Any]) -> list[str]:
    return [str(reference.name(tag)) for tag in entry.get("RepoTags") or [] if isinstance(tag, str)]


def _whole(which: str) -> set[str]:
    try:
        return {str(reference.name(which)), str(reference.name(which, host=reference.LOCAL))}
    except UserError:
        return set()


def _since_1_10(archive: Archive, place: Place) -> Source:
    entry = _entry_of(_entries(archive), place.which)
    members, config_name = entry.get("Layers"), entry.get("Config")
    if not isinstance(members, list) or not isinstance(config_name, str):
        raise UserError("manifest.json: an image without layers or configuration")
    raw = archive.document(config_name)
    diff_ids = documents.config(raw).diff_ids
    if len(diff_ids) != len(members):
        raise UserError(f"the image has {len(members)} layers, and its configuration knows {len(diff_ids)}")
    layers = [_member(archive, str(name), diff_id) for name, diff_id in zip(members, diff_ids, strict=True)]
    return Made(raw, layers, tuple(_tags(entry)))


def _member(archive: Archive, name: str, diff_id: str) -> tuple[str, int, Callable[[], Readable]]:
    if compress.is_compressed(archive.open(name).read(BLOCK)):
        source = compress.Source(compress.pieces(archive.open(name)), algorithm=None)
        source.drain()
        return diff_id, source.count, lambda: archive.open(name)
    return diff_id, archive.size(name), lambda: archive.open(name)


def _before_1_10(archive: Archive, place: Place) -> Source:
    repositories = documents.load(archive.document("repositories"), "repositories")
    named = {
        str(reference.name(f"{name}:{tag}")): str(identity)
        for name, tags in repositories.items()
        if isinstance(tags, dict)
        for tag, identity in tags.items()
    }
    wanted = _whole(place.which) if place.which else set(named)
    tops = {identity for name, identity in named.items() if name in wanted}
    if len(tops) != 1:
        raise UserError(f"{place}: {len(tops)} images are there", hint=f"add one of: {', '.join(named)}")
    top = tops.pop()
    steps = _steps(archive, top)
    layers = []
    for identity, _ in steps:
        source = compress.Source(compress.pieces(archive.open(f"{identity}/layer.tar")))
        source.drain()
        layers.append((source.digest, source.count, _opener(archive, f"{identity}/layer.tar")))
    names = tuple(name for name, identity in named.items() if identity == top)
    return Made(_config_of(steps, [diff_id for diff_id, _, _ in layers]), layers, names)


def _opener(archive: Archive, name: str) -> Callable[[], Readable]:
    return lambda: archive.open(name)


def _steps(archive: Archive, top: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(identity, its ``json``) of every layer, the lowest first, found by their parents."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    identity: str | None = top
    while identity:
        if "/" in identity or any(identity == known for known, _ in found):
            raise UserError("the layers of the archive do not make a line")
        document = documents.load(archive.document(f"{identity}/json"), f"{identity}/json")
        found.append((identity, document))
        parent = document.get("parent")
        identity = parent if isinstance(parent, str) else None
    return found[::-1]


def _config_of(steps: list[tuple[str, Mapping[str, Any]]], diff_ids: list[str]) -> bytes:
    """The configuration of an image from before there were such: what its top layer says."""
    top = steps[-1][1]
    history = []
    for _, step in steps:
        command = (step.get("container_config") or {}).get("Cmd") or []
        history.append({"created": step.get("created", _EPOCH), "created_by": " ".join(map(str, command))})
    return documents.dump(
        {
            "created": top.get("created", _EPOCH),
            "architecture": top.get("architecture", "amd64"),
            "os": top.get("os", "linux"),
            "config": top.get("config") or {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": history,
        }
    )


# Plain roots.


def _tar(place: Place, platform: Mapping[str, str], spool: Fd) -> Source:
    opened = archives.open_plain(place.where, spool)
    if not os.fstat(opened.fd).st_size:
        raise UserError(f"{place}: nothing is in it")
    return _one_layer(opened, f"import of {os.path.basename(place.where)}", platform)


def _root(place: Place, platform: Mapping[str, str], spool: Fd) -> Source:
    fd = open_directory(place.where)
    made = archives.spooled(pack.directory(fd), spool)
    return _one_layer(made, f"import of {os.path.basename(place.where.rstrip('/'))}", platform)


def _one_layer(fd: Fd, what: str, platform: Mapping[str, str]) -> Source:
    source = compress.Source(compress.pieces(archives.stream(fd)))
    source.drain()
    config = documents.dump(
        {
            "created": _EPOCH,
            **platform,
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [source.digest]},
            "history": [{"created": _EPOCH, "created_by": what}],
        }
    )
    return Made(config, [(source.digest, source.count, lambda: archives.stream(fd))], ())


def _engine(place: Place, platform: Mapping[str, str], spool: Fd) -> Source:
    from unionfsd.images import engines  # it makes sources of this module

    return engines.source(place.where)


_OPENERS: Final[dict[str, Callable[[Place, Mapping[str, str], Fd], Source]]] = {
    "oci": _oci,
    "oci-archive": _oci_archive,
    "docker-archive": _docker_archive,
    "dir": _dir,
    "tar": _tar,
    "root": _root,
    "containers-storage": _engine,
}


class Opened(NamedTuple):
    """A source, and what it was taken for."""

    place: Place
    source: Source


def open_source(text: str, spool: Fd, platform: Mapping[str, str] | None = None) -> Opened:
    """Open the image that `text` names, a place or a path. `spool` is a directory for files that must be seekable."""
    place = reference.place(text) or guess(text, spool)
    if place.transport not in _OPENERS:
        raise UserError(f"{place}: cannot be imported from there", hint="unionfsctl image pull takes docker://")
    try:
        return Opened(place, _OPENERS[place.transport](place, platform or here(), spool))
    except TarError as error:
        raise UserError(f"{place}: not an archive that can be read: {error.message}") from None


def guess(path: str, spool: Fd) -> Place:
    """What a path is: an OCI layout, a directory of skopeo's, a root; an archive of an image, or of a root."""
    if path == "-":
        raise UserError("standard input may be anything", hint="say what: docker-archive:- or tar:-")
    if os.path.isdir(path):
        for transport, mark in (("oci", "oci-layout"), ("dir", "manifest.json")):
            if os.path.isfile(os.path.join(path, mark)):
                return Place(transport, path, None)
        return Place("root", path, None)
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: neither a file nor a directory", hint="say what comes: tar:- or docker-archive:-")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file, and no transport", hint="see unionfsctl image import --help")
    if not archives.is_tar(path):
        raise UserError(f"{path}: not an archive")
    archive = Archive(archives.open_plain(path, spool))
    if "manifest.json" in archive or "repositories" in archive:
        return Place("docker-archive", path, None)
    return Place("oci-archive" if "index.json" in archive and "oci-layout" in archive else "tar", path, None)
