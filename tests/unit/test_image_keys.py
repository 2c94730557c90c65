"""Keys and signatures as cosign makes them: those that it made, and ours, which others read (test_image_registry)."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.images import Made, descriptor, files, write
from unionfsd.errors import UserError
from unionfsd.images import admission, documents, keys, policy, sources, trust
from unionfsd.images import digest as digests
from unionfsd.images.store import Store
from unionfsd.images.trust import Signature, UntrustedError

#: By cosign 2, with an empty password (conforma/cli, internal/validate/vsa).
EMPTY: Final = """\
-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----
eyJrZGYiOnsibmFtZSI6InNjcnlwdCIsInBhcmFtcyI6eyJOIjo2NTUzNiwiciI6
OCwicCI6MX0sInNhbHQiOiJLYU9OQzduQVJLOVgxM1FoaWFucjAwTTBGYys2Sitr
dnAxN1FuanpiVk9nPSJ9LCJjaXBoZXIiOnsibmFtZSI6Im5hY2wvc2VjcmV0Ym94
Iiwibm9uY2UiOiJVOHZqWWtqMlZOUFZGdlZFZWZ3bXZ5VGloUERrelBoaCJ9LCJj
aXBoZXJ0ZXh0IjoidWNWMnQ4TTZVNFJvb29FOXc0d3dkc3E1RDYrS2RKY245dERT
KzFwRDRGN040SVJOWEgzSTBua3h1a3NackFOUHR1emIvTkVYQ201dUp3Zjh3Qzl1
VlprbXdwNU5jRUZ6b3ZNS3JCZmNvdXdjaEkrMzkrQ0NhbVZPbzBucmRnZjhvcmpK
dXdrWDBYL1phY0RUTERGaUxyc1laMWVMMmlqMGU1MVRpZmVQNTl4WXNPK1FnM1Jv
OURRVjNQMk9ndDFDaVFHeGg1VXhUZytGc3c9PSJ9
-----END ENCRYPTED SIGSTORE PRIVATE KEY-----"""
#: By cosign 1, and its password (elastic/harp, samples).
OLD: Final = """\
-----BEGIN ENCRYPTED COSIGN PRIVATE KEY-----
eyJrZGYiOnsibmFtZSI6InNjcnlwdCIsInBhcmFtcyI6eyJOIjozMjc2OCwiciI6
OCwicCI6MX0sInNhbHQiOiJORWY0SzZ3VWZRWW1Ya3FySXB0WStLd3VHcnBJSkZ4
UUNJQzA3cGVndkZrPSJ9LCJjaXBoZXIiOnsibmFtZSI6Im5hY2wvc2VjcmV0Ym94
Iiwibm9uY2UiOiJxOXlEbUNUa2t1bi9jWjV4Mzc5Vlh4WDBSTmgrc2djeSJ9LCJj
aXBoZXJ0ZXh0IjoiN1NIWjZMbkdpS0NiUUhuWG1ZamFxV0YrUzI5NXhhc3ZWOVJ4
dzVFNXJmM0FRa2lCZVNOSVE2RlpMSExsaDNkdGhFdi82NzJ3V2VBM3dHNHBRZEx4
UU54aWQ4b0MzRURZNkNtM3laaDRyZGhqUUNsTlVxVmhCWTlCSUxud1JsOE5nVm9s
a2RiazVHZVFyQUF1SG5uSks1RDQ1dUlUS0k0YWIzRzN3amF3WUx3azVjNXYydDhJ
ajFMWjVyRlNZamNkMXBYc3Bveml0eU56RkE9PSJ9
-----END ENCRYPTED COSIGN PRIVATE KEY-----
"""
OLD_PASSWORD: Final = rb"7cqF]\FP0ss9uO![olGf32L+UobBCn:BqVWRZbV6=FEhv3jt>I240Ew)SYwe`ncD"

#: An image that cosign signed (containers/image, signature/fixtures/dir-img-cosign-valid), and the key.
MANIFEST: Final = (
    b'{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json","config":'
    b'{"mediaType":"application/vnd.docker.container.image.v1+json","size":1512,"digest":'
    b'"sha256:961769676411f082461f9ef46626dd7a2d1e2b2a38e6a44364bcbecf51e66dd4"},"layers":[{"mediaType":'
    b'"application/vnd.docker.image.rootfs.diff.tar.gzip","size":2896510,"digest":'
    b'"sha256:9d16cba9fb961d1aafec9542f2bf7cb64acfc55245f9e4eb5abecd4cdc38d749"}]}'
)
SIGNED: Final = Signature(
    base64.b64decode(
        "eyJjcml0aWNhbCI6eyJpZGVudGl0eSI6eyJkb2NrZXItcmVmZXJlbmNlIjoiMTkyLjE2OC42NC4yOjUwMDAvY29zaWduLXNpZ25lZC1zaW5n"
        "bGUtc2FtcGxlIn0sImltYWdlIjp7ImRvY2tlci1tYW5pZmVzdC1kaWdlc3QiOiJzaGEyNTY6NjM0YThmMzViNWYxNmRjZjRhYWEwODIyYWRj"
        "MGIxOTY0YmI3ODZmY2ExMmY2ODMxZGU4ZGRjNDVlNTk4NmEwMCJ9LCJ0eXBlIjoiY29zaWduIGNvbnRhaW5lciBpbWFnZSBzaWduYXR1cmUi"
        "fSwib3B0aW9uYWwiOm51bGx9"
    ),
    base64.b64decode(
        "MEYCIQDmtamqYPjMg81nqeBhptrPls44aA/r7PwLmspINJY4MwIhANKRpqe2E9UCBtGFdPoz/8jAbaQm4uP4h+IpwKTE6ClR"
    ),
)
PUBLIC: Final = """\
-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEFNLqFhf4fiN6o/glAuYnq2jYUeL0
vRuLu/z39pmbVwS9ff5AYnlwaP9sxREajdLY9ynM6G1sy6AAmb7Z63TsLg==
-----END PUBLIC KEY-----
"""
NAME: Final = "192.168.64.2:5000/cosign-signed-single-sample:1"


@pytest.mark.parametrize(("text", "password"), [(EMPTY, None), (EMPTY, b""), (OLD, OLD_PASSWORD)])
def test_keys_of_cosign_are_read(tmp_path: Path, text: str, password: bytes | None) -> None:
    (tmp_path / "key").write_text(text)
    key = keys.load(str(tmp_path / "key"), password)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp256r1"
    with pytest.raises(UserError, match="not the password"):
        keys.load(str(tmp_path / "key"), b"wrong")


@pytest.mark.parametrize("password", [b"", "pässword".encode()])
def test_our_keys_are_such(tmp_path: Path, password: bytes) -> None:
    private, public = keys.generate(str(tmp_path / "mine"), password)
    assert Path(private).stat().st_mode & 0o777 == 0o600
    digest = digests.of(b"manifest")
    signature = trust.sign(private, "example.com/app:1", digest, password)
    assert trust.verify([signature], [public], digest, ["example.com/app:2"]) == signature
    with pytest.raises(UserError, match="not the password"):
        trust.sign(private, "example.com/app:1", digest, password + b"x")
    with pytest.raises(UserError, match="File exists"):
        keys.generate(str(tmp_path / "mine"), password)


def changed(change: dict[str, Any]) -> str:
    """The key with an empty password, with something changed in its document."""
    document = json.loads(base64.b64decode("".join(EMPTY.splitlines()[1:-1])))
    for path, value in change.items():
        *above, last = path.split(".")
        at = document
        for name in above:
            at = at[name]
        at[last] = value
    text = base64.b64encode(json.dumps(document).encode()).decode()
    return f"-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\n{text}\n-----END ENCRYPTED SIGSTORE PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    "text",
    [
        changed({"kdf.name": "argon2"}),
        changed({"kdf.params.N": 1 << 30}),
        changed({"kdf.params.r": 1 << 20}),
        changed({"kdf": {}}),
        changed({"cipher.name": "aes"}),
        changed({"cipher.nonce": "AAAA"}),
        changed({"ciphertext": 5}),
        EMPTY.replace("eyJ", "???"),
        EMPTY.replace("SIGSTORE", "OTHER"),
        "noise",
    ],
)
def test_other_keys_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    with pytest.raises(UserError, match="not a private key"):
        keys.load(str(tmp_path / "key"), None)


def test_a_key_of_openssl_with_a_password(tmp_path: Path) -> None:
    private, _ = keys.generate(str(tmp_path / "mine"), b"")
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    encrypted = serialization.BestAvailableEncryption(b"secret")
    (tmp_path / "other").write_bytes(keys.load(private, b"").private_bytes(pem, pkcs8, encrypted))
    keys.load(str(tmp_path / "other"), b"secret")
    with pytest.raises(UserError, match="not a private key"):
        keys.load(str(tmp_path / "other"), b"wrong")


def test_a_signature_of_cosign(tmp_path: Path) -> None:
    key, digest = tmp_path / "cosign.pub", digests.of(MANIFEST)
    key.write_text(PUBLIC)
    assert trust.verify([SIGNED], [str(key)], digest, [NAME]) == SIGNED
    for signature, about, name in (
        (SIGNED._replace(payload=SIGNED.payload + b" "), digest, NAME),
        (SIGNED._replace(signature=SIGNED.signature[:-1] + b"R"), digest, NAME),
        (SIGNED, digests.of(MANIFEST + b" "), NAME),
        (SIGNED, digest, "example.com/other:1"),
    ):
        with pytest.raises(UntrustedError):
            trust.verify([signature], [str(key)], about, [name])


def file_of(signature: Signature) -> bytes:
    """The file in ``dir:``, as containers/image's fixture has it."""
    document = {
        "mimeType": "application/vnd.dev.cosign.simplesigning.v1+json",
        "payload": base64.b64encode(signature.payload).decode(),
        "annotations": {"dev.cosignproject.cosign/signature": base64.b64encode(signature.signature).decode()},
    }
    return b"\0sigstore-json\n" + json.dumps(document, separators=(",", ":")).encode()


def test_signatures_beside_an_image_in_a_directory(tmp_path: Path) -> None:
    assert trust.in_file(file_of(SIGNED)) == SIGNED
    for raw in (b"", b"\0sigstore-json\n", b"\0sigstore-json\n{}", file_of(SIGNED)[1:], b"\xa3 of GnuPG"):
        assert trust.in_file(raw) is None
    made = Made([files({"a": b"1"})])
    private, public = keys.generate(str(tmp_path / "mine"), b"")
    where = write(tmp_path / "dir", made.dir_files())
    rules = policy.Policy((policy.Rule("example.com/*", "signed", (public,)),), "reject", "policy")
    store = Store(str(tmp_path / "store"))
    for signature in (None, SIGNED, trust.sign(private, "example.com/app:1", made.digest)):
        if signature is not None:
            (where / "signature-1").write_bytes(b"of GnuPG, which counts for nothing here")
            (where / "signature-2").write_bytes(file_of(signature))
        source = sources.open_source(f"dir:{where}", store.stage).source
        if signature in (None, SIGNED):
            with pytest.raises(UntrustedError):
                admission.admit(store, source, ["example.com/app:1"], rules)
        else:
            admission.admit(store, source, ["example.com/app:1"], rules)
            assert trust.kept(store, made.digest) == [signature]


@pytest.mark.parametrize("found_by", ["tag", "subject"])
@pytest.mark.parametrize("signed", ["manifest", "index"])
def test_signatures_beside_an_image_in_a_layout(tmp_path: Path, signed: str, found_by: str) -> None:
    """Of the manifest, or of the index for several machines that has it."""
    made = Made([files({"a": b"1"})])
    private, public = keys.generate(str(tmp_path / "mine"), b"")
    entry = {**descriptor(documents.OCI_MANIFEST, made.manifest), "platform": {"os": "linux", "architecture": "amd64"}}
    index = json.dumps({"schemaVersion": 2, "mediaType": documents.OCI_INDEX, "manifests": [entry]}).encode()
    what = {"manifest": (documents.OCI_MANIFEST, made.manifest), "index": (documents.OCI_INDEX, index)}[signed]
    signature = trust.sign(private, "example.com/app:1", digests.of(what[1]))
    subject = documents.descriptor(descriptor(*what), "subject") if found_by == "subject" else None
    manifest, blobs = trust.manifest([signature], subject)
    beside = descriptor(documents.OCI_MANIFEST, manifest.raw)
    if found_by == "tag":
        beside["annotations"] = {documents.REF_NAME: trust.tag(digests.of(what[1]))}
    else:
        beside["artifactType"] = trust.ARTIFACT
    content = made.oci_files(None, index=index, signature=manifest.raw, **dict(zip("ab", blobs.values(), strict=True)))
    entries = [beside, descriptor(documents.OCI_INDEX, index)]
    content["index.json"] = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    store = Store(str(tmp_path / "store"))
    rules = policy.Policy((policy.Rule("example.com/*", "signed", (public,)),), "reject", "policy")
    source = sources.open_source(f"oci:{write(tmp_path / 'oci', content)}", store.stage).source
    admission.admit(store, source, ["example.com/app:1"], rules)
    other = policy.Policy(
        (policy.Rule("example.com/*", "signed", (keys.generate(str(tmp_path / "k"), b"")[1],)),), "reject", ""
    )
    with pytest.raises(UntrustedError):
        admission.admit(store, source, ["example.com/app:1"], other)
