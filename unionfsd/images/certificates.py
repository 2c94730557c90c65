"""Whom a registry's certificate convinces: the system's authorities, and those kept for it (containers-certs.d(5)).

Directories, each with one for ``HOST[:PORT]``: ``~/.config/containers/certs.d``, ``/etc/containers/certs.d``,
``/etc/docker/certs.d``. In it ``*.crt`` are authorities, ``NAME.cert`` and ``NAME.key`` say who we are.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator

from unionfsd.errors import UserError, reason
from unionfsd.typed import Final

_SYSTEM: Final = ("/etc/containers/certs.d", "/etc/docker/certs.d")


def context(host: str, *, verify: bool) -> ssl.SSLContext:
    """How to speak TLS with ``HOST[:PORT]``; UserError for a file of these that cannot be used.

    Without `verify` anybody will do.
    """
    made = ssl.create_default_context()
    if not any(ssl.get_default_verify_paths()[:2]):  # a system without any authorities
        import certifi

        made.load_verify_locations(certifi.where())
    if not verify:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    for directory in _directories(host):
        _add(made, directory)
    return made


def _directories(host: str) -> Iterator[str]:
    """Those that there are, the most important last."""
    own = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    for base in (*reversed(_SYSTEM), os.path.join(own, "containers", "certs.d")):
        if os.path.isdir(path := os.path.join(base, host)):
            yield path


def _add(made: ssl.SSLContext, directory: str) -> None:
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        try:
            if name.endswith(".crt"):
                made.load_verify_locations(path)
            elif name.endswith(".cert"):
                made.load_cert_chain(path, path.removesuffix(".cert") + ".key")
        except OSError as error:  # ssl.SSLError is one
            raise UserError(f"{path}: cannot be used: {reason(error)}", code=1) from None
