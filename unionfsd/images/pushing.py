"""Pushing an image to a registry: blobs, several at a time, then the manifest, then its signatures."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterator

from unionfsd.images import archives, documents, exporting, reference, trust
from unionfsd.images.compress import Verified
from unionfsd.images.documents import Descriptor
from unionfsd.images.events import Events
from unionfsd.images.reference import Name
from unionfsd.images.registry import Registry, referrers_tag
from unionfsd.images.store import Image, Store


def push(
    store: Store, image: Image, registry: Registry, events: Events, *, referrers: bool = False, at_once: int = 4
) -> None:
    """Push `image` as the name of `registry`; UserError when a layer is not there as it came.

    `referrers`: its signatures are put among what refers to it, too (OCI 1.1).
    """
    exporting.require_blobs(store, image)
    *blobs, manifest = exporting.blobs(image)
    beside = _beside(store, registry)
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for done in [pool.submit(_upload, store, blob, registry, events, beside.get(blob.digest)) for blob in blobs]:
            done.result()
    reference = registry.name.tag or manifest.digest
    registry.put_manifest(image.manifest.raw, image.manifest.media_type, reference)
    _push_signatures(store, image, registry, referrers=referrers)


def repositories(store: Store, name: Name) -> list[str]:
    """The other repositories in the registry of `name` that images of the store are called after."""
    named = (reference.name(text) for image in store.images() for text in image.names)
    return list(dict.fromkeys(other.path for other in named if other.host == name.host and other.path != name.path))


def _beside(store: Store, registry: Registry) -> dict[str, str]:
    """Blobs, and another repository of the registry that has each, if it is as its name here says."""
    name = registry.name
    return {
        blob.digest: other.path
        for image in store.images()
        for other in map(reference.name, image.names)
        if other.host == name.host and other.path != name.path
        for blob in exporting.blobs(image)[:-1]
    }


def _upload(store: Store, blob: Descriptor, registry: Registry, events: Events, beside: str | None) -> None:
    if registry.has_blob(blob.digest) or (beside is not None and registry.mount(blob.digest, beside)):
        events.begin(blob.digest, "there", None)
        return
    events.begin(blob.digest, "upload", blob.size)

    def read() -> Iterator[bytes]:
        with store.open_blob(blob.digest) as fd:
            whole = archives.Slice(fd, 0, os.fstat(fd.fd).st_size)
            stream = Verified(whole, blob.digest, blob.size, lambda count: events.advance(blob.digest, count))
            while data := stream.read(1 << 18):
                yield data

    registry.upload(blob, read)
    events.end(blob.digest)


def _push_signatures(store: Store, image: Image, registry: Registry, *, referrers: bool) -> None:
    """Add the signatures of the manifest to those in the registry, under cosign's tag, which everybody reads."""
    mine = [each for each in trust.kept(store, image.digest) if each.signed_index is None]
    if not mine:
        return
    every = list(dict.fromkeys([*signatures(registry, image.digest, None), *mine]))
    manifest, blobs = trust.manifest(every)
    for digest, data in blobs.items():
        registry.upload(Descriptor("", digest, len(data), {}), lambda data=data: iter([data]))  # type: ignore[misc]
    registry.put_manifest(manifest.raw, manifest.media_type, trust.tag(image.digest))
    if referrers:
        manifest, _ = trust.manifest(every, image.manifest.descriptor)
        if not registry.put_manifest(manifest.raw, manifest.media_type, manifest.digest):
            _list_referrer(registry, image.digest, manifest.descriptor._replace(artifact_type=trust.ARTIFACT))


def _list_referrer(registry: Registry, digest: str, referrer: Descriptor) -> None:
    """Add to what refers to a manifest where the registry keeps no such list (distribution-spec, "Referrers Tag")."""
    tag = referrers_tag(digest)
    raw = registry.find_manifest(tag)
    known = () if raw is None else documents.index(raw)
    if any(each.digest == referrer.digest for each in known):
        return
    entries = [each.to_json() for each in (*known, referrer)]
    listed = documents.dump({"schemaVersion": 2, "mediaType": documents.OCI_INDEX, "manifests": entries})
    registry.put_manifest(listed, documents.OCI_INDEX, tag)


def signatures(registry: Registry, digest: str, index: bytes | None) -> list[trust.Signature]:
    """The signatures that a registry has of `digest`: by cosign's tag, and by what refers to it."""
    found = []
    raw = registry.find_manifest(trust.tag(digest))
    if raw is not None:
        found += trust.read(raw, registry, index)
    for entry in registry.referrers(digest):
        if entry.artifact_type == trust.ARTIFACT and entry.media_type == documents.OCI_MANIFEST:
            raw = registry.find_manifest(entry.digest)
            if raw is not None and subject(raw) == digest:
                found += trust.read(raw, registry, index)
    return found


def subject(raw: bytes) -> str | None:
    """The digest of what a manifest refers to; None when it refers to nothing."""
    found = documents.manifest(raw).subject
    return found.digest if found is not None else None
