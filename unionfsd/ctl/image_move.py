"""The verbs of ``unionfsctl image`` that bring images in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unionfsd.ctl.image_show import out, store_of
from unionfsd.errors import UserError
from unionfsd.images import events, importing, sources
from unionfsd.images.tarread import Limits

if TYPE_CHECKING:
    import argparse

    from unionfsd.images.store import Image


def limits_of(given: argparse.Namespace) -> Limits:
    if given.max_layer < 1:
        raise UserError(f"--max-layer {given.max_layer}: not a size")
    return Limits(size=given.max_layer << 30)


def import_(given: argparse.Namespace) -> int:
    store = store_of(given)
    platform = sources.platform_of(given.platform) if given.platform else None
    source = sources.open_source(given.source, store.stage, platform).source
    told = events.make(as_json=given.json, quiet=given.quiet)
    try:
        image = importing.import_image(
            store,
            source,
            importing.names_for(source, given.name),
            events=told,
            limits=limits_of(given),
            at_once=given.jobs,
            keep_blobs=not given.discard_blobs,
        )
    finally:
        told.close()
    return out(given, summary(image), lambda value: str(value["digest"]))


def summary(image: Image) -> dict[str, object]:
    return {"names": list(image.names), "digest": image.digest}
