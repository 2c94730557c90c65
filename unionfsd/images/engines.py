"""The stores of podman and Docker, read where they are: layers to be mounted in place, with no copy, or imported.

- containers/storage, driver overlay: ``overlay-images/images.json``, ``overlay-images/ID/{manifest,=BASE64}``,
  ``overlay-layers/{layers.json,ID.tar-split.gz}``, ``overlay/ID/{link,lower,diff}``.
- Docker, driver overlay2: ``image/overlay2/repositories.json``, ``imagedb/content/sha256/ID``,
  ``layerdb/sha256/CHAIN/{cache-id,tar-split.json.gz}``, ``overlay2/ID/{link,lower,diff}``.

Rules this file obeys: nothing in these stores is written, created or locked. Who mounts from them sees to it that their
engine removes nothing meanwhile.
"""

from __future__ import annotations

import base64
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Sequence

from unionfsd.errors import UserError, reason
from unionfsd.images import digest as digests
from unionfsd.images import documents, reference, tarsplit, who
from unionfsd.images.compress import Readable
from unionfsd.images.sources import Made, Source
from unionfsd.typed import Any, Final, NamedTuple

_MAX: Final = 256 << 20
_SYSTEM: Final = ("/etc/containers/storage.conf", "/usr/share/containers/storage.conf")


class KeptLayer(NamedTuple):
    """A layer of an engine: its directory, the digest of its tar, and what makes that of the directory (`tarsplit`)."""

    diff: str
    diff_id: str
    split: str


class Kept(NamedTuple):
    """An image of an engine: its names, its identity there, its layers, the lowest first.

    `config` and `manifest` are files, the latter None where there is none.
    """

    names: tuple[str, ...]
    identity: str
    layers: tuple[KeptLayer, ...]
    config: str
    manifest: str | None

    @property
    def diffs(self) -> tuple[str, ...]:
        return tuple(layer.diff for layer in self.layers)


def roots() -> list[str]:
    """Where podman keeps its images: as storage.conf says (containers-storage.conf(5)), or as it is without one."""
    found: list[str] = []
    for path in _configurations():
        try:
            with open(path, "rb") as file:
                storage = tomllib.load(file).get("storage") or {}
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}") from None
        # In the file of a user the one key counts, in the system's for users the other.
        own = path not in _SYSTEM or not who.is_user()
        given = (storage.get("graphroot") if own else None) or (who.is_user() and storage.get("rootless_storage_path"))
        found.append(_expanded(str(given or _default_root())))
        found += map(str, (storage.get("options") or {}).get("additionalimagestores") or [])
        return found
    return [_default_root()]


def _configurations() -> list[str]:
    if given := os.environ.get("CONTAINERS_STORAGE_CONF"):
        return [given]
    if not who.is_user():
        return list(_SYSTEM)
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return [os.path.join(home, "containers", "storage.conf"), *_SYSTEM]


def _expanded(path: str) -> str:
    return os.path.expandvars(path.replace("$UID", os.environ.get("_CONTAINERS_ROOTLESS_UID") or str(os.getuid())))


def _default_root() -> str:
    if not who.is_user():
        return "/var/lib/containers/storage"
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(data, "containers", "storage")


def find(where: str) -> Kept:
    """The image that ``[DIR@]NAME`` names, a name or the beginning of an identity; UserError.

    As in skopeo ``[DRIVER@DIR+RUNROOT:OPTIONS]NAME`` is taken, too, with the brackets.
    """
    places, name = _split(where)
    wanted = {str(found) for found in _meanings(name)}
    images = [image for root in places for image in every(root)]
    for image in images:
        if not wanted.isdisjoint(image.names):
            return image
    digits = name.removeprefix("@").removeprefix("sha256:")
    found = {image.identity: image for image in images if len(digits) >= 6 and image.identity.startswith(digits)}
    if len(found) == 1:
        return found.popitem()[1]
    names = ", ".join(each for image in images for each in image.names)
    raise UserError(f"{where}: no such image there", hint=f"there are: {names or 'none'}", code=1)


def _split(where: str) -> tuple[list[str], str]:
    """The stores to look in, and the name to look for."""
    if where.startswith("["):
        store, bracket, name = where[1:].partition("]")
        root = store.rpartition("@")[2].partition("+")[0].partition(":")[0]
        if not bracket or not name or not root.startswith("/"):
            raise UserError(f"{where}: not [DRIVER@DIR+RUNROOT]NAME")
        return [root], name
    if where.startswith("/") and "@" in where:
        root, _, name = where.partition("@")
        return [root], name
    return roots(), where


def source(where: str) -> Source:
    """The image that `find` finds, to be imported: its layers as the tars that they came as."""
    image = find(where)
    config = _bytes(image.config)
    layers = [(layer.diff_id, tarsplit.size(layer.split), _opener(layer)) for layer in image.layers]
    return Made(config, layers, image.names, _manifest_over(image, [layer.diff_id for layer in image.layers]))


def _opener(layer: KeptLayer) -> Callable[[], Readable]:
    return lambda: tarsplit.stream(layer.split, layer.diff)


def _manifest_over(image: Kept, diff_ids: Sequence[str]) -> bytes | None:
    """The manifest that an image has there if its layers are plain tars, which is what we have of them."""
    if image.manifest is None or not os.path.exists(image.manifest):
        return None
    raw = _bytes(image.manifest)
    if documents.kind(raw, None) not in documents.MANIFESTS:
        return None
    return raw if [layer.digest for layer in documents.manifest(raw).layers] == list(diff_ids) else None


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
    elif not os.path.isdir(root):
        raise UserError(f"{root}: there is no store", hint="containers-storage:DIR@NAME names another")
    else:
        raise UserError(f"{root}: neither podman's store nor Docker's, with the driver overlay or overlay2")


def _containers(root: str) -> Iterator[Kept]:
    layers = {layer["id"]: layer for layer in _list(os.path.join(root, "overlay-layers", "layers.json"))}
    for image in _list(os.path.join(root, "overlay-images", "images.json")):
        chain: list[KeptLayer] = []
        identity = image.get("layer") or ""
        while identity:
            if identity not in layers or len(chain) > len(layers):
                raise UserError(f"{root}: the layers of image {image.get('id')} are not all there")
            split = os.path.join(root, "overlay-layers", f"{identity}.tar-split.gz")
            diff_id = str(layers[identity].get("diff-digest") or "")
            chain.append(KeptLayer(_diff(root, "overlay", identity), diff_id, split))
            identity = layers[identity].get("parent") or ""
        names = tuple(str(name) for name in image.get("names") or [])
        place = os.path.join(root, "overlay-images", _component(root, str(image["id"])))
        config = os.path.join(place, "=" + base64.b64encode(f"sha256:{image['id']}".encode()).decode())
        yield Kept(names, str(image["id"]), tuple(reversed(chain)), config, os.path.join(place, "manifest"))


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
        path = os.path.join(content, digits)
        config = documents.config(_bytes(path))
        layers = []
        for chain, diff_id in zip(config.chain_ids, config.diff_ids, strict=True):
            place = os.path.join(base, "layerdb", *digests.split(chain))
            diff = _diff(root, "overlay2", _bytes(os.path.join(place, "cache-id")).decode().strip())
            layers.append(KeptLayer(diff, diff_id, os.path.join(place, "tar-split.json.gz")))
        yield Kept(tuple(named.get(f"sha256:{digits}", ())), digits, tuple(layers), path, None)


def _diff(root: str, driver: str, identity: str) -> str:
    path = os.path.join(root, driver, _component(root, identity), "diff")
    if not os.path.isdir(path):
        raise UserError(f"{path}: a layer that is not there")
    return path


def _component(root: str, identity: str) -> str:
    if "/" in identity or identity in ("", ".", ".."):
        raise UserError(f"{root}: {identity!r} is no layer")
    return identity


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
