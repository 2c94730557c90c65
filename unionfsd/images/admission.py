"""Letting images in and out of the store under a policy: signatures found where the image is, judged, and kept."""

from __future__ import annotations

from collections.abc import Sequence

from unionfsd.images import checked, documents, pushing, trust
from unionfsd.images import digest as digests
from unionfsd.images.blobs import FlatBlobs
from unionfsd.images.policy import Policy
from unionfsd.images.registry import Remote
from unionfsd.images.sources import Resolved, Source
from unionfsd.images.store import Image, Store
from unionfsd.images.trust import Signature


def signatures_of(source: Source) -> list[Signature]:
    """The signatures that stand beside an image, of its manifest or of the index it was found in."""
    if not isinstance(source, Resolved):
        return []
    if isinstance(source.blobs, FlatBlobs):
        return [each for raw in source.blobs.signatures() if (each := trust.in_file(raw)) is not None]
    found = _of(source, source.manifest.digest, None)
    if digests.of(source.top) != source.manifest.digest:
        found += _of(source, digests.of(source.top), source.top)
    return found


def _of(source: Resolved, digest: str, index: bytes | None) -> list[Signature]:
    """Those of the manifest `digest`, or of the `index` that has it."""
    if isinstance(source, Remote):
        return pushing.signatures(source.registry, digest, index)
    return _in_layout(source, digest, index)


def _in_layout(source: Resolved, digest: str, index: bytes | None) -> list[Signature]:
    found = []
    for entry in source.beside:
        name = entry.annotations.get(documents.REF_NAME, "")
        if name == trust.tag(digest) or name.endswith(":" + trust.tag(digest)):
            raw = source.blobs.document(entry.digest)
            if digests.matches(entry.digest, raw):
                found += trust.read(raw, source.blobs, index)
        elif entry.artifact_type == trust.ARTIFACT and entry.media_type == documents.OCI_MANIFEST:
            raw = source.blobs.document(entry.digest)
            if digests.matches(entry.digest, raw) and pushing.subject(raw) == digest:
                found += trust.read(raw, source.blobs, index)
    return found


def admit(store: Store, source: Source, names: Sequence[str], policy: Policy) -> None:
    """Keep the signatures of an image that `policy` lets in as `names`; UntrustedError for any other.

    The names it has where it comes from count, too: another name is no way around a rule.
    """
    found = signatures_of(source)
    every = list(dict.fromkeys([*names, *source.names]))
    policy.check(every, source.manifest.digest, found)
    trust.keep(store, source.manifest.digest, found)


def check(store: Store, image: Image, policy: Policy) -> None:
    """UserError unless `policy` allows an image of the store, and its layers are those its configuration names."""
    policy.check(image.names, image.digest, trust.kept(store, image.digest))
    checked.layers(store, image)
