"""Mounts whose layers are checked while they are used (``--verify``): what the daemon is told to check them against.

The chain to a mounted byte: a signature names a manifest, that a configuration, that the DiffIDs. A layer's own record
(``layer.json``) says which DiffID it was unpacked from, and has the digest of its index, which the daemon is given with
the file: from there on it trusts nothing on disk (`unionfsd.integrity`).
"""

from __future__ import annotations

import os

from unionfsd.errors import UserError
from unionfsd.images import containers, layering
from unionfsd.images import digest as digests
from unionfsd.images.store import Image, Layer, Store


def layers(store: Store, image: Image) -> list[Layer]:
    """The layers of an image, the lowest first; UserError unless they are those that its configuration names."""
    found = []
    for chain, diff_id in zip(image.config.chain_ids, image.config.diff_ids, strict=True):
        layer = store.layer(chain)
        if layer is None or (layer.facts.get("diff_id"), layer.facts.get("chain")) != (diff_id, chain):
            raise UserError(f"{chain}: the layer in the store is not that of the image", hint="import the image again")
        found.append(layer)
    return found


def option(store: Store, image: Image) -> str:
    """The mount option that has the layers of an image checked; UserError when one has no record to check it by."""
    files = [_index(store, layer) for layer in layers(store, image)]
    return "verify=" + ":".join(reversed(files))


def _index(store: Store, layer: Layer) -> str:
    digest = layer.facts.get("index") or layering.add_index(store, layer)
    path = os.path.join(store.link_path(layer.chain), "..", os.fsdecode(layering.INDEX))
    return f"{digests.split(digest)[1]}@{containers.escaped(path)}"
