"""The stores of podman and Docker, read where they are: layers that can be mounted in place, with no copy.

- containers/storage, driver overlay: ``overlay-images/images.json``, ``overlay-layers/layers.json``,
  ``overlay/ID/{link,lower,diff}``.
- Docker, driver overlay2: ``image/overlay2/repositories.json``, ``imagedb/content/sha256/ID``,
  ``layerdb/sha256/CHAIN/cache-id``, ``overlay2/ID/{link,lower,diff}``.

Rules this file obeys: nothing in these stores is written, created or locked. Who mounts from them sees to it that their
engine removes nothing meanwhile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from unionfsd.errors import UserError, reason
from unionfsd.images import digest as digests
from unionfsd.images import documents, reference

_MAX: Final = 256 << 20


class Kept(NamedTuple):
    """An image of an engine: its names, its identity there, and the directories of its layers, the lowest first."""

    names: tuple[str, ...]
    identity: str
    diffs: tuple[str, ...]


def default_root() -> str:
    """Where podman keeps its images unless told."""
    if os.geteuid() == 0:
        return "/var/lib/containers/storage"
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(data, "containers", "storage")


def find(where: str) -> Kept:
    """The image that ``[DIR@]NAME`` names, a name or the beginning of an identity; UserError."""
    root, _, name = where.partition("@") if where.startswith("/") and "@" in where else ("", "", where)
    wanted = {str(found) for found in _meanings(name)}
    images = list(every(root or default_root()))
    for image in images:
        if not wanted.isdisjoint(image.names):
            return image
    found = [image for image in images if len(name) >= 6 and image.identity.startswith(name.removeprefix("sha256:"))]
    if len(found) == 1:
        return found[0]
    names = ", ".join(each for image in images for each in image.names)
    raise UserError(f"{where}: no such image there", hint=f"there are: {names or 'none'}", code=1)


def _meanings(name: str) -> Iterator[reference.Name]:
    for host in (reference.LOCAL, reference.DOCKER_HUB):
        try:
            yield reference.name(name, host=host)
        except UserError:
            return


def every(root: str) -> Iterator[Kept]:
    """All images of the store in `root`, of whichever engine it is; UserError when it is none."""
    if os.path.isdir(os.path.join(root, "overlay-images")):
        yield from _containers(root)
    elif os.path.isdir(os.path.join(root, "image", "overlay2")):
        yield from _docker(root)
    else:
        raise UserError(f"{root}: neither podman's store nor Docker's, with the driver overlay or overlay2")


def _containers(root: str) -> Iterator[Kept]:
    layers = {layer["id"]: layer for layer in _list(os.path.join(root, "overlay-layers", "layers.json"))}
    for image in _list(os.path.join(root, "overlay-images", "images.json")):
        chain: list[str] = []
        identity = image.get("layer") or ""
        while identity:
            if identity not in layers or len(chain) > len(layers):
                raise UserError(f"{root}: the layers of image {image.get('id')} are not all there")
            chain.append(_diff(root, "overlay", identity))
            identity = layers[identity].get("parent") or ""
        names = tuple(str(name) for name in image.get("names") or [])
        yield Kept(names, str(image["id"]), tuple(reversed(chain)))


def _docker(root: str) -> Iterator[Kept]:
    base = os.path.join(root, "image", "overlay2")
    repositories = _load(os.path.join(base, "repositories.json")).get("Repositories") or {}
    named: dict[str, list[str]] = {}
    for tags in repositories.values():
        for name, digest in tags.items():
            if "@" not in name:
                named.setdefault(digests.checked(digest), []).append(str(reference.name(name)))
    content = os.path.join(base, "imagedb", "content", "sha256")
    for digits in sorted(os.listdir(content)):
        config = documents.config(_bytes(os.path.join(content, digits)))
        diffs = []
        for chain in config.chain_ids:
            cache = os.path.join(base, "layerdb", *digests.split(chain), "cache-id")
            diffs.append(_diff(root, "overlay2", _bytes(cache).decode().strip()))
        yield Kept(tuple(named.get(f"sha256:{digits}", ())), digits, tuple(diffs))


def _diff(root: str, driver: str, identity: str) -> str:
    if "/" in identity or identity in ("", ".", ".."):
        raise UserError(f"{root}: {identity!r} is no layer")
    path = os.path.join(root, driver, identity, "diff")
    if not os.path.isdir(path):
        raise UserError(f"{path}: a layer that is not there")
    return path


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX)
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from None


def _load(path: str) -> dict[str, Any]:
    return documents.load(_bytes(path), path)


def _list(path: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise UserError(f"{path}: not a list of objects")
    return found
