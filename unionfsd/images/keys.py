"""Private keys in cosign's own format, "encrypted" also where the password is empty (sigstore, pkg/cosign/keys.go).

PEM around a document of JSON: a key derived from the password by scrypt opens a box (NaCl's secretbox) with the private
key in PKCS #8 (go-securesystemslib, encrypted). cosign, skopeo and podman read and write it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re

from unionfsd.errors import UserError, reason
from unionfsd.images import documents
from unionfsd.typed import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

_LABELS: Final = ("ENCRYPTED SIGSTORE PRIVATE KEY", "ENCRYPTED COSIGN PRIVATE KEY")
_PEM: Final = re.compile(rf"-----BEGIN ({'|'.join(_LABELS)})-----\s+([A-Za-z0-9+/=\s]+?)\s*-----END \1-----", re.ASCII)
_MAX_KEY: Final = 1 << 16
#: What may be asked of scrypt: any of these is in use, and more would only keep us busy.
_COSTS: Final = (1 << 15, 1 << 16, 1 << 17)
_KEY_BYTES: Final = 32
_SALT_BYTES: Final = 32
_HINT: Final = "the password is taken from $COSIGN_PASSWORD"


def load(path: str, password: bytes | None) -> PrivateKeyTypes:
    """The private key in `path`: PEM, in PKCS #8, encrypted or not, or as cosign has it. UserError."""
    from cryptography.hazmat.primitives import serialization

    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_KEY)
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from None
    match = _PEM.search(data.decode("latin-1"))
    try:
        if match is not None:
            return serialization.load_der_private_key(_opened(base64.b64decode(match[2]), password or b""), None)
        return serialization.load_pem_private_key(data, password or None)
    except (ValueError, TypeError, KeyError, binascii.Error) as error:
        raise UserError(f"{path}: not a private key that can be used: {error}", hint=_HINT) from None


def _opened(raw: bytes, password: bytes) -> bytes:
    """What is in the box `raw`; UserError for a wrong password, ValueError or KeyError for what is no such box."""
    from nacl import exceptions, secret

    document = json.loads(raw)
    kdf, cipher = document["kdf"], document["cipher"]
    params = kdf["params"]
    if kdf["name"] != "scrypt" or cipher["name"] != "nacl/secretbox":
        raise ValueError(f"made with {kdf['name']!r:.50} and {cipher['name']!r:.50}")
    if params["N"] not in _COSTS or (params["r"], params["p"]) != (8, 1):
        raise ValueError("made with other parameters than cosign uses")
    nonce, sealed = base64.b64decode(cipher["nonce"]), base64.b64decode(document["ciphertext"])
    if len(nonce) != secret.SecretBox.NONCE_SIZE:
        raise ValueError("its nonce has another length")
    box = secret.SecretBox(_derived(password, base64.b64decode(kdf["salt"]), params["N"]))
    try:
        return box.decrypt(sealed, nonce)
    except exceptions.CryptoError:
        raise UserError("not the password of the private key", hint=_HINT) from None


def _derived(password: bytes, salt: bytes, cost: int) -> bytes:
    return hashlib.scrypt(password, salt=salt, n=cost, r=8, p=1, maxmem=cost * 8 * 128 * 2, dklen=_KEY_BYTES)


def generate(prefix: str, password: bytes) -> tuple[str, str]:
    """Make a pair of keys, as cosign does: ``PREFIX.key``, encrypted, and ``PREFIX.pub``; returns where they are."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pkcs8 = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return _write(f"{prefix}.key", _sealed(pkcs8, password), 0o600), _write(f"{prefix}.pub", public, 0o644)


def _sealed(pkcs8: bytes, password: bytes) -> bytes:
    from nacl import secret

    salt, cost = os.urandom(_SALT_BYTES), _COSTS[0]
    box = secret.SecretBox(_derived(password, salt, cost)).encrypt(pkcs8)
    document: dict[str, Any] = {
        "kdf": {"name": "scrypt", "params": {"N": cost, "r": 8, "p": 1}, "salt": _text(salt)},
        "cipher": {"name": "nacl/secretbox", "nonce": _text(box.nonce)},
        "ciphertext": _text(box.ciphertext),
    }
    # The older of the labels, and the cost that came with it: whoever reads the newer ones reads these.
    label, text = _LABELS[1], _text(documents.dump(document))
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""]).encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _write(path: str, data: bytes, mode: int) -> str:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(fd, "wb") as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from None
    return path
