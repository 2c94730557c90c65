"""Names of images and of places where images are, as skopeo writes them (containers-transports(5)).

========================================  ===================================================
``docker://HOST/NAME[:TAG][@DIGEST]``      a registry
``oci:DIR[:TAG]``                          an OCI image layout
``oci-archive:FILE[:TAG]``                 the same in a tar
``docker-archive:FILE[:NAME]``             what ``docker save`` writes
``dir:DIR``                                manifest and blobs side by side, as skopeo writes them
``containers-storage:[DIR@]NAME``          the store of podman and buildah, or Docker's overlay2
``tar:FILE``, ``root:DIR``                 a plain root: one layer, no configuration
a path                                     what it is, it is taken for
========================================  ===================================================
"""

from __future__ import annotations

import re

from unionfsd.errors import UserError
from unionfsd.images import digest as digests
from unionfsd.typed import Final, NamedTuple

TRANSPORTS: Final = (
    "docker",
    "oci",
    "oci-archive",
    "docker-archive",
    "dir",
    "containers-storage",
    "tar",
    "root",
)

_COMPONENT: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST_LABEL: Final = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST: Final = rf"(?:{_HOST_LABEL}(?:\.{_HOST_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
_NAME: Final = re.compile(
    rf"(?:(?P<host>{_HOST})/)?(?P<path>{_COMPONENT}(?:/{_COMPONENT})*)(?::(?P<tag>\w[\w.-]{{0,127}}))?(?:@(?P<digest>\S+))?",
    re.ASCII,
)
_MAX_NAME: Final = 255
DOCKER_HUB: Final = "docker.io"
LOCAL: Final = "localhost"


class Name(NamedTuple):
    """The name of an image: `host` and `path`, a `tag` or a `digest` or both; ``latest`` where neither is."""

    host: str
    path: str
    tag: str | None
    digest: str | None

    @property
    def repository(self) -> str:
        return f"{self.host}/{self.path}"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")


class Place(NamedTuple):
    """Where an image is: a transport of `TRANSPORTS`, a path or name there, and which of the images there."""

    transport: str
    where: str
    which: str | None

    def __str__(self) -> str:
        return f"{self.transport}:{'//' if self.transport == 'docker' else ''}{self.where}" + (
            f":{self.which}" if self.which else ""
        )


def name(text: str, *, host: str = DOCKER_HUB) -> Name:
    """Read the name of an image; one without a host is taken to be of `host`, as Docker does it. UserError."""
    match = _NAME.fullmatch(text)
    if match is None or len(text) > _MAX_NAME + 256:
        raise UserError(f"not the name of an image: {text!r:.200}", hint="[HOST/]NAME[:TAG][@DIGEST], in lower case")
    found, path = match["host"], match["path"]
    if found is not None and not _is_host(found):
        found, path = None, f"{found}/{path}"
        if re.fullmatch(rf"{_COMPONENT}(?:/{_COMPONENT})*", path) is None:
            raise UserError(f"not the name of an image: {text!r:.200}", hint="names are in lower case")
    if found in ("index.docker.io", "registry-1.docker.io"):
        found = DOCKER_HUB
    found = found or host
    if found == DOCKER_HUB and "/" not in path:
        path = f"library/{path}"
    if len(f"{found}/{path}") > _MAX_NAME:
        raise UserError(f"the name of an image is too long: {text:.80}...")
    digest = digests.checked(match["digest"]) if match["digest"] else None
    return Name(found, path, match["tag"] or (None if digest else "latest"), digest)


def short(text: str) -> str | None:
    """The part of a name without a host that its tag and digest come after; None for any other name. UserError."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise UserError(f"not the name of an image: {text!r:.200}", hint="[HOST/]NAME[:TAG][@DIGEST], in lower case")
    if match["host"] is not None and _is_host(match["host"]):
        return None
    return text[: match.end("path")]


def _is_host(text: str) -> bool:
    """Whether the first part of a name is a host: Docker's rule."""
    return "." in text or ":" in text or text == LOCAL or text != text.lower()


def place(text: str) -> Place | None:
    """Read a place; None for what names no transport, which is a path. UserError for one that cannot be."""
    transport, colon, rest = text.partition(":")
    if not colon or transport not in TRANSPORTS:
        return None
    if not rest:
        raise UserError(f"{text}: nothing follows the transport")
    if transport == "docker":
        if not rest.startswith("//"):
            raise UserError(f"{text}: a registry is written docker://HOST/NAME")
        return Place(transport, str(name(rest[2:])), None)
    if transport in ("dir", "tar", "root", "containers-storage"):
        return Place(transport, rest, None)
    where, _, which = rest.partition(":")
    return Place(transport, where, which or None)
