"""Manifests, indexes and configurations of images, read strictly: JSON from outside that is checked once, here.

Both families are read: OCI (image-spec) and Docker (distribution, "Image Manifest V2, Schema 2"). Of a document only
what we act upon is checked; it is kept and passed on as the bytes it came as, because its digest is over them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from unionfsd.errors import UserError
from unionfsd.images import digest as digests
from unionfsd.typed import Any, Final, NamedTuple

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
OCI_EMPTY: Final = "application/vnd.oci.empty.v1+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER: Final = "application/vnd.docker.image.rootfs.diff.tar.gzip"
INDEXES: Final = (OCI_INDEX, DOCKER_LIST)
MANIFESTS: Final = (OCI_MANIFEST, DOCKER_MANIFEST)

_ATTESTATION: Final = "vnd.docker.reference.type"
REF_NAME: Final = "org.opencontainers.image.ref.name"

#: Registries take no larger ones (distribution-spec: 4 MiB).
MAX_DOCUMENT: Final = 4 << 20
_MAX_LAYERS: Final = 2000

Json = Any


class Descriptor(NamedTuple):
    """What refers to a blob: its digest and size in bytes, what it is, and for which platform."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str]
    platform: Mapping[str, Any] | None = None
    artifact_type: str | None = None

    def to_json(self) -> dict[str, Any]:
        made: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            made["annotations"] = dict(self.annotations)
        if self.platform:
            made["platform"] = dict(self.platform)
        if self.artifact_type:
            made["artifactType"] = self.artifact_type
        return made


class Manifest(NamedTuple):
    """An image manifest: its bytes, and what they say."""

    raw: bytes
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]
    subject: Descriptor | None = None
    artifact_type: str | None = None

    @property
    def digest(self) -> str:
        return digests.of(self.raw)

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(self.media_type, self.digest, len(self.raw), {})


class History(NamedTuple):
    """An instruction that made an image; `empty` ones made no layer."""

    created: str
    created_by: str
    comment: str
    empty: bool


class Config(NamedTuple):
    """The configuration of an image: its bytes and what they say; `diff_ids` are of the layers, the lowest first."""

    raw: bytes
    document: Mapping[str, Any]
    diff_ids: tuple[str, ...]
    history: tuple[History, ...]

    @property
    def digest(self) -> str:
        return digests.of(self.raw)

    @property
    def process(self) -> Mapping[str, Any]:
        """What a container runs by default: the member ``config``, ``Entrypoint``, ``Cmd``, ``Env`` and so on."""
        return _mapping(self.document.get("config") or {}, "config")

    @property
    def chain_ids(self) -> tuple[str, ...]:
        return tuple(digests.chain_ids(self.diff_ids))

    @property
    def platform(self) -> dict[str, str]:
        return {key: str(self.document[key]) for key in ("os", "architecture", "variant") if self.document.get(key)}


def load(raw: bytes, what: str) -> dict[str, Any]:
    """The JSON object that `raw` is; UserError when it is none, too large, or says one thing twice."""
    if len(raw) > MAX_DOCUMENT:
        raise UserError(f"{what}: {len(raw)} bytes are too many for a document")
    try:
        return dict(_mapping(json.loads(raw, object_pairs_hook=_once), what))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: not the JSON it should be: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two members of one name they take; a signature must not depend on it."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a member stands twice in an object")
    return made


def dump(document: Mapping[str, Any]) -> bytes:
    """A document of ours as bytes: the same for the same content."""
    return json.dumps(document, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()


def descriptor(value: Json, what: str) -> Descriptor:
    """Read a descriptor (descriptor.md); UserError."""
    found = _mapping(value, what)
    media_type, size = found.get("mediaType"), found.get("size")
    if not isinstance(media_type, str) or isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise UserError(f"{what}: not a descriptor")
    platform = found.get("platform")
    return Descriptor(
        media_type,
        digests.checked(found.get("digest")),
        size,
        _strings(found.get("annotations"), what),
        None if platform is None else _mapping(platform, what),
        found["artifactType"] if isinstance(found.get("artifactType"), str) else None,
    )


def kind(raw: bytes, announced: str | None = None) -> str:
    """The media type of a manifest or an index: what it says itself, else what was `announced`, else what it looks.

    UserError when it says one thing and is another (CVE-2021-41190), or is of a kind that nobody should use.
    """
    document = load(raw, "manifest")
    said = document.get("mediaType") or announced
    looks = "index" if "manifests" in document else "manifest"
    if "manifests" in document and ("layers" in document or "config" in document):
        raise UserError("manifest: it is both an index and an image")
    if document.get("schemaVersion") == 1 or "fsLayers" in document:
        raise UserError("manifest: of Docker's schema 1", hint="write the image again with a newer tool")
    if said in (None, "", "application/json"):
        return OCI_INDEX if looks == "index" else OCI_MANIFEST
    if not isinstance(said, str) or said not in (*INDEXES, *MANIFESTS):
        raise UserError(f"manifest: of unknown kind {said!r:.100}")
    if (said in INDEXES) != (looks == "index"):
        raise UserError(f"manifest: it says it is {said}, and is not")
    return said


def manifest(raw: bytes, announced: str | None = None) -> Manifest:
    """Read an image manifest; UserError."""
    media_type = kind(raw, announced)
    if media_type in INDEXES:
        raise UserError("manifest: an index, where the manifest of one image was to be")
    document = load(raw, "manifest")
    layers = _list(document.get("layers"), "manifest: layers")
    if len(layers) > _MAX_LAYERS:
        raise UserError(f"manifest: {len(layers)} layers are too many")
    subject = document.get("subject")
    return Manifest(
        raw,
        media_type,
        descriptor(document.get("config"), "manifest: config"),
        tuple(descriptor(layer, "manifest: layer") for layer in layers),
        _strings(document.get("annotations"), "manifest"),
        None if subject is None else descriptor(subject, "manifest: subject"),
        document["artifactType"] if isinstance(document.get("artifactType"), str) else None,
    )


def index(raw: bytes) -> tuple[Descriptor, ...]:
    """The descriptors of an index; UserError."""
    entries = _list(load(raw, "index").get("manifests"), "index: manifests")
    return tuple(descriptor(entry, "index: entry") for entry in entries)


def config(raw: bytes) -> Config:
    """Read the configuration of an image; UserError."""
    document = load(raw, "configuration")
    rootfs = _mapping(document.get("rootfs") or {}, "configuration: rootfs")
    diff_ids = tuple(digests.checked(value) for value in _list(rootfs.get("diff_ids") or [], "diff_ids"))
    steps = [_mapping(step, "history") for step in _list(document.get("history") or [], "history")]
    history = tuple(
        History(
            str(step.get("created") or ""),
            str(step.get("created_by") or ""),
            str(step.get("comment") or ""),
            bool(step.get("empty_layer")),
        )
        for step in steps
    )
    return Config(raw, document, diff_ids, history)


_BESIDE: Final = re.compile(r"(.*:)?sha(256-[0-9a-f]{64}|512-[0-9a-f]{128})(\.\w+)?", re.ASCII)


def is_image(entry: Descriptor) -> bool:
    """Whether an entry of an index may be an image: not what is about another one, a signature or an attestation."""
    if entry.media_type not in (*MANIFESTS, *INDEXES) or entry.artifact_type not in (None, OCI_CONFIG, DOCKER_CONFIG):
        return False
    # By cosign's tags, by the tag for lists of referrers (distribution-spec), as BuildKit marks them.
    return not _BESIDE.fullmatch(entry.annotations.get(REF_NAME, "")) and _ATTESTATION not in entry.annotations


def choose(entries: Sequence[Descriptor], wanted: Mapping[str, str]) -> Descriptor:
    """The entry of an index for the platform `wanted` (os, architecture, perhaps variant); UserError."""
    able = [entry for entry in entries if is_image(entry)]
    fits = [entry for entry in able if _fits(entry.platform, wanted)]
    if not fits and len(able) == 1 and not able[0].platform:
        return able[0]
    if not fits:
        have = sorted({_platform(entry.platform) for entry in able})
        raise UserError(f"no image for {'/'.join(wanted.values())}", hint=f"there are: {', '.join(have) or 'none'}")
    if "variant" not in wanted:
        fits.sort(key=lambda entry: bool(entry.platform and entry.platform.get("variant")))
    return fits[0]


def _fits(platform: Mapping[str, Any] | None, wanted: Mapping[str, str]) -> bool:
    return platform is not None and all(platform.get(key) == value for key, value in wanted.items())


def _platform(platform: Mapping[str, Any] | None) -> str:
    found = platform or {}
    return "/".join(str(found[key]) for key in ("os", "architecture", "variant") if found.get(key)) or "any"


def _mapping(value: Json, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{what}: not an object")
    return value


def _list(value: Json, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{what}: not a list")
    return value


def _strings(value: Json, what: str) -> dict[str, str]:
    found = _mapping(value or {}, what)
    return {key: text for key, text in found.items() if isinstance(text, str)}
