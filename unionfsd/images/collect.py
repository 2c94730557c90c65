"""What a store holds and for whom: removing images, collecting what nothing needs, sizes, verification."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from unionfsd import syscalls
from unionfsd.errors import BUSY, UserError, reason
from unionfsd.images import containers, importing, layering, tree, trust
from unionfsd.images.below import Below
from unionfsd.images.compress import Verified
from unionfsd.images.incoming import At
from unionfsd.images.store import Image, Store, layer_name, possible_names
from unionfsd.syscalls import Fd
from unionfsd.typed import NamedTuple


def remove(store: Store, text: str) -> tuple[list[str], bool]:
    """Remove a name, or what a digest names with all its names; (names that went, whether the image went).

    UserError when a container is made of it.
    """
    image = store.image(text)
    gone = [name for name in image.names if name in possible_names(text)] or list(image.names)
    if len(gone) < len(image.names):
        for name in gone:
            store.remove_name(name)
        return gone, False
    users = [container.name for container in containers.every(store) if container.image == image.digest]
    if users:
        raise UserError(f"{text}: in use by container {', '.join(users)}", hint="remove it first", code=BUSY)
    store.remove_image(image.digest)
    return gone, True


class Collected(NamedTuple):
    """What a collection removed; `bytes` counts blobs, and files of layers."""

    layers: tuple[str, ...]
    blobs: tuple[str, ...]
    bytes: int
    in_use: tuple[str, ...]


def collect(store: Store) -> Collected:
    """Remove layers and blobs of no image and no container, and what was left half made.

    Never a layer that is mounted: those come back as `in_use`. UserError while an import runs.
    """
    with store.lock(shared=False, wait=False):
        store.sweep(everything=True)
        images = store.images()
        kept = {layer_name(chain) for image in images for chain in image.config.chain_ids}
        kept |= {layer_name(chain) for container in containers.every(store) for chain in container.layers}
        blobs = {image.digest for image in images} | {container.image for container in containers.every(store)}
        blobs |= {image.manifest.config.digest for image in images}
        blobs |= {layer.digest for image in images for layer in image.manifest.layers}
        gone = [chain for chain in store.all_layers() if layer_name(chain) not in kept]
        sizes = {chain: store.size_of(chain) for chain in gone}
        removed = tuple(chain for chain in gone if store.remove_layer(chain))
        used = tuple(chain for chain in gone if chain not in removed)
        freed = sum(sizes[chain] for chain in removed)
        dropped = tuple(digest for digest in store.all_blobs() if digest not in blobs)
        freed += sum(store.remove_blob(digest) for digest in dropped)
        trust.forget(store, {image.digest for image in images})
    return Collected(removed, dropped, freed, used)


class Usage(NamedTuple):
    """Bytes of an image: files of its layers, of those no other image has, and its layers as they came."""

    image: Image
    layers: int
    unique: int
    blobs: int


def usage(store: Store) -> list[Usage]:
    """What every image takes."""
    images = store.images()
    users = Counter(chain for image in images for chain in image.config.chain_ids)
    sizes = {chain: store.size_of(chain) for chain in users}
    return [
        Usage(
            image,
            sum(sizes[chain] for chain in image.config.chain_ids),
            sum(sizes[chain] for chain in image.config.chain_ids if users[chain] == 1),
            sum(layer.size for layer in image.manifest.layers if store.has_blob(layer.digest)),
        )
        for image in images
    ]


class Damage(NamedTuple):
    """Something that is not as it was made: in `where`, a layer or a blob, the object `path` differs in `what`."""

    where: str
    path: str
    what: str


def verify(
    store: Store, image: Image, seen: Callable[[str], None] = lambda what: None, *, unpack: bool = False
) -> Iterator[Damage]:
    """Everything of an image that is not what it was: documents, blobs, and every file of every layer, read again.

    With `unpack` the manifests of trees, too, which are made again of the blobs.
    """
    for layer in image.manifest.layers:
        if store.has_blob(layer.digest):
            seen(layer.digest)
            yield from _verify_blob(store, layer.digest, layer.size)
    for chain in image.config.chain_ids:
        seen(chain)
        yield from verify_layer(store, chain)
    if unpack:
        for wanted in importing.wanted(image.manifest, image.config):
            seen(wanted.chain)
            yield from _verify_by_blob(store, wanted, image.config.chain_ids)


def _verify_by_blob(store: Store, wanted: layering.Wanted, chains: Sequence[str]) -> Iterator[Damage]:
    """Where the manifest of a layer's tree says otherwise than the layer's blob, unpacked beside it."""
    if not store.has_blob(wanted.descriptor.digest):
        yield Damage(wanted.chain, "", "its blob was not kept: it cannot be unpacked again")
        return
    below = [store.open_diff(chain) for chain in reversed(chains[: chains.index(wanted.chain)])]
    try:
        with layering.unpacked(store, wanted, Below(below)) as again:
            for difference in tree.compare(layering.read_manifest(store, wanted.chain), again):
                yield Damage(wanted.chain, difference.path, f"not as in its blob: {difference.what}")
    except UserError as error:
        yield Damage(wanted.chain, "", error.message)


def _verify_blob(store: Store, digest: str, size: int) -> Iterator[Damage]:
    with store.open_blob(digest) as fd:
        try:
            stream = Verified(At(fd.fd, 0), digest, size)
            while stream.read(1 << 20):
                pass
        except UserError as error:
            yield Damage(digest, "", error.message)
        except OSError as error:
            yield Damage(digest, "", f"cannot be read: {reason(error)}")


def verify_layer(store: Store, chain: str) -> Iterator[Damage]:
    """Everything of a layer that is not what its manifest says."""
    try:
        with store.open_diff(chain) as root, _private(root) as seen:
            for difference in tree.compare(layering.read_manifest(store, chain), tree.lines(seen)):
                yield Damage(chain, difference.path, difference.what)
            if not layering.index_holds(store, chain):
                yield Damage(chain, "", "the index of its tree is not what it was")
    except UserError as error:
        yield Damage(chain, "", error.message)
    except OSError as error:
        yield Damage(chain, "", f"cannot be read: {reason(error)}")


def _private(root: Fd) -> Fd:
    """The directory again; through a private copy of its mount that keeps no access times, where that is allowed."""
    try:
        return syscalls.clone_mount(syscalls.proc_path(root.fd), syscalls.MOUNT_ATTR_NOATIME)
    except OSError:
        return syscalls.reopen(root.fd, os.O_PATH | os.O_DIRECTORY)
