"""Signatures of images in cosign's format (sigstore/cosign, specs/SIGNATURE_SPEC.md), and whom they convince.

What is signed is a payload, "simple signing", that names the digest of a manifest, or of an index that it is in. From
there on digests lead: manifest, configuration, DiffIDs, and the tree manifests made when the layers were unpacked.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Iterable, Sequence

from unionfsd import syscalls
from unionfsd.errors import UserError, reason
from unionfsd.images import beneath, documents, reference
from unionfsd.images import digest as digests
from unionfsd.images.documents import Descriptor, Manifest
from unionfsd.typed import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from unionfsd.images.store import Store

PAYLOAD: Final = "application/vnd.dev.cosign.simplesigning.v1+json"
ARTIFACT: Final = "application/vnd.dev.cosign.artifact.sig.v1+json"
ANNOTATION: Final = "dev.cosignproject.cosign/signature"
_TYPES: Final = ("cosign container image signature", "atomic container signature")
_SIGSTORE: Final = b"\0sigstore-json\n"
_MAX_KEY: Final = 1 << 16
_MAX_SIGNATURES: Final = 100
_DIRECTORY: Final = b"signatures"


class Signature(NamedTuple):
    """A payload and its signature, as bytes; `signed_index` is what was signed when it was an index."""

    payload: bytes
    signature: bytes
    signed_index: bytes | None = None


class Blobs(Protocol):
    """A place that has blobs and manifests by digest."""

    def document(self, digest: str) -> bytes: ...


class UntrustedError(UserError):
    """A policy, or a key, does not accept an image."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint, code=1)


# The format.


def tag(digest: str, suffix: str = "sig") -> str:
    """The tag under which signatures of a manifest are kept: ``sha256-HEX.sig``."""
    return f"{digest.replace(':', '-')}.{suffix}"


def payload(name: str, digest: str) -> bytes:
    """What is signed for the manifest `digest` as the image `name`."""
    critical = {
        "identity": {"docker-reference": name},
        "image": {"docker-manifest-digest": digest},
        "type": _TYPES[0],
    }
    return documents.dump({"critical": critical, "optional": None})


def manifest(signatures: Sequence[Signature], subject: Descriptor | None = None) -> tuple[Manifest, dict[str, bytes]]:
    """(the manifest that holds signatures, its blobs by digest), as cosign writes it.

    With a `subject`, it refers to that, and needs no tag (image-spec 1.1, manifest.md).
    """
    layers = [
        Descriptor(
            PAYLOAD,
            digests.of(each.payload),
            len(each.payload),
            {ANNOTATION: base64.b64encode(each.signature).decode()},
        )
        for each in signatures
    ]
    config = documents.dump(
        {
            "architecture": "",
            "os": "",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        }
    )
    kind = documents.OCI_CONFIG if subject is None else ARTIFACT
    refers = {} if subject is None else {"subject": subject.to_json(), "artifactType": ARTIFACT}
    raw = documents.dump(
        {
            "schemaVersion": 2,
            "mediaType": documents.OCI_MANIFEST,
            "config": Descriptor(kind, digests.of(config), len(config), {}).to_json(),
            "layers": [layer.to_json() for layer in layers],
            **refers,
        }
    )
    blobs = {digests.of(each.payload): each.payload for each in signatures} | {digests.of(config): config}
    return documents.manifest(raw), blobs


def read(raw: bytes, blobs: Blobs, index: bytes | None = None) -> list[Signature]:
    """The signatures in a manifest that holds such; damaged ones are left out, for they convince nobody."""
    found = []
    for layer in documents.manifest(raw).layers[:_MAX_SIGNATURES]:
        if layer.media_type != PAYLOAD or ANNOTATION not in layer.annotations or layer.size > _MAX_KEY:
            continue
        with contextlib.suppress(binascii.Error, UserError):
            data = blobs.document(layer.digest)
            if digests.matches(layer.digest, data):
                found.append(Signature(data, base64.b64decode(layer.annotations[ANNOTATION], validate=True), index))
    return found


def in_file(raw: bytes) -> Signature | None:
    """The signature in a file that skopeo writes into ``dir:`` (containers/image, internal/signature); None for others.

    One that is damaged is none: it convinces nobody.
    """
    if not raw.startswith(_SIGSTORE):
        return None
    with contextlib.suppress(binascii.Error, ValueError, TypeError, UserError):
        document = documents.load(raw.removeprefix(_SIGSTORE), "signature")
        made = (document.get("annotations") or {}).get(ANNOTATION)
        if document.get("mimeType") == PAYLOAD and isinstance(made, str):
            return Signature(
                base64.b64decode(document["payload"], validate=True), base64.b64decode(made, validate=True)
            )
    return None


# Keys.


def _load_public(path: str) -> Any:
    from cryptography.hazmat.primitives import serialization

    try:
        with open(path, "rb") as file:
            return serialization.load_pem_public_key(file.read(_MAX_KEY))
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from None
    except ValueError:
        raise UserError(f"{path}: not a public key", hint="PEM, as cosign.pub is") from None


def _genuine(key: Any, signature: Signature) -> bool:
    """Whether `key` made the signature: ECDSA or RSA (PKCS #1 v1.5) with SHA-256, or Ed25519."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature.signature, signature.payload, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature.signature, signature.payload, padding.PKCS1v15(), hashes.SHA256())
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature.signature, signature.payload)
        else:
            raise UserError("a key of a kind that signs no images")
    except InvalidSignature:
        return False
    return True


def sign(path: str, name: str, digest: str, password: bytes | None = None) -> Signature:
    """Sign a manifest as the image `name` with the private key in `path` (`keys`)."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

    from unionfsd.images import keys

    key = keys.load(path, password)
    data = payload(name, digest)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return Signature(data, key.sign(data, ec.ECDSA(hashes.SHA256())))
    if isinstance(key, rsa.RSAPrivateKey):
        return Signature(data, key.sign(data, padding.PKCS1v15(), hashes.SHA256()))
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return Signature(data, key.sign(data))
    raise UserError(f"{path}: a key of a kind that signs no images")


# What a signature says.


def verify(signatures: Iterable[Signature], keys: Sequence[str], digest: str, names: Sequence[str]) -> Signature:
    """The first of `signatures` by one of `keys` that is about the manifest `digest`, and an image of one of `names`.

    `keys` are files; a name stands for its repository, whatever the tag; without names any will do. UntrustedError.
    """
    loaded = [_load_public(path) for path in keys]
    why = "it has no signature"
    for signature in signatures:
        if not any(_genuine(key, signature) for key in loaded):
            why = "its signatures are not by a key that counts"
            continue
        fault = _fault(signature, digest, names)
        if fault is None:
            return signature
        why = fault
    raise UntrustedError(f"{names[0] if names else digest}: not trusted: {why}")


def _fault(signature: Signature, digest: str, names: Sequence[str]) -> str | None:
    """Why a genuine signature is not about the image; None when it is."""
    critical = documents.load(signature.payload, "payload").get("critical")
    if not isinstance(critical, dict) or critical.get("type") not in _TYPES:
        return "what was signed is no statement about an image"
    image, identity = critical.get("image"), critical.get("identity")
    signed = image.get("docker-manifest-digest") if isinstance(image, dict) else None
    if signed != digest and not _in_index(signature.signed_index, signed, digest):
        return "its signature is about another image"
    said = identity.get("docker-reference") if isinstance(identity, dict) else None
    if names and (not isinstance(said, str) or _repository(said) not in {_repository(name) for name in names}):
        return f"it was signed as {said!r:.200}"
    return None


def _in_index(index: bytes | None, signed: object, digest: str) -> bool:
    if index is None or not isinstance(signed, str) or not digests.matches(digests.checked(signed), index):
        return False
    return any(entry.digest == digest for entry in documents.index(index))


def _repository(text: str) -> str:
    try:
        return reference.name(text).repository
    except UserError:
        return text


# In a store: a file for each image that has any.


def kept(store: Store, digest: str) -> list[Signature]:
    """The signatures that a store has of the manifest `digest`."""
    try:
        with syscalls.open_dir(store.fd.fd, _DIRECTORY) as directory:
            raw = beneath.read_file(directory.fd, tag(digest, "json").encode(), documents.MAX_DOCUMENT)
    except FileNotFoundError:
        return []
    try:
        return [_from_json(entry) for entry in documents.load(raw, "signatures").get("signatures") or []]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{digest}: its signatures are damaged in the store {store.root}", code=1) from None


def keep(store: Store, digest: str, signatures: Sequence[Signature]) -> None:
    """Add signatures of the manifest `digest` to those a store has."""
    if not signatures:
        return
    with store.lock(b"names.lock", shared=False):
        every = list(dict.fromkeys([*kept(store, digest), *signatures]))[:_MAX_SIGNATURES]
        document = {"signatures": [_to_json(each) for each in every]}
        with contextlib.suppress(FileExistsError):
            syscalls.mkdir_at(store.fd.fd, _DIRECTORY, 0o711)
        with syscalls.open_dir(store.fd.fd, _DIRECTORY) as directory:
            beneath.replace_file(directory.fd, tag(digest, "json").encode(), documents.dump(document))


def forget(store: Store, digests_kept: set[str]) -> None:
    """Remove the signatures of images that are gone."""
    with contextlib.suppress(FileNotFoundError), syscalls.open_dir(store.fd.fd, _DIRECTORY) as directory:
        for name in beneath.names(directory.fd):
            if name.decode() not in {tag(digest, "json") for digest in digests_kept}:
                syscalls.unlink_at(directory.fd, name)


def _from_json(entry: dict[str, str]) -> Signature:
    index = entry.get("index")
    return Signature(
        base64.b64decode(entry["payload"], validate=True),
        base64.b64decode(entry["signature"], validate=True),
        base64.b64decode(index, validate=True) if index else None,
    )


def _to_json(signature: Signature) -> dict[str, str]:
    made = {
        "payload": base64.b64encode(signature.payload).decode(),
        "signature": base64.b64encode(signature.signature).decode(),
    }
    if signature.signed_index is not None:
        made["index"] = base64.b64encode(signature.signed_index).decode()
    return made
