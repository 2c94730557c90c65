"""The verbs of ``unionfsctl image`` that bring images in and out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from unionfsd.ctl.image_show import out, store_of
from unionfsd.errors import OK, UserError
from unionfsd.images import commit, containers, events, exporting, importing, reference, sources
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


def commit_(given: argparse.Namespace) -> int:
    store = store_of(given)
    container = containers.find(store, given.container)
    source = commit.Committed(
        store,
        container,
        changes=given.change,
        author=given.author,
        message=given.message,
        compression=given.compression,
        timestamp=timestamp_of(given),
    )
    told = events.make(as_json=given.json, quiet=True)
    image = importing.import_image(store, source, importing.names_for(source, [given.name]), events=told)
    return out(given, summary(image), lambda value: str(value["digest"]))


def timestamp_of(given: argparse.Namespace) -> int | None:
    """The latest time of what is made; reproducible builds have it in the environment."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    found: int | None = given.timestamp
    return found if found is not None else int(text) if text.isdigit() else None


def export_(given: argparse.Namespace) -> int:
    store = store_of(given)
    place = reference.place(given.to)
    if place is None:
        raise UserError(f"{given.to}: names no transport", hint="for example oci:DIR:TAG or docker-archive:FILE")
    told = events.make(as_json=given.json, quiet=given.quiet)
    try:
        with store.lock(shared=True):
            exporting.export(store, store.image(given.image), place, told)
    finally:
        told.close()
    return OK


def export_layer_(given: argparse.Namespace) -> int:
    store = store_of(given)
    if given.layer is None:
        latest = timestamp_of(given)
        container = containers.find(store, given.what)
        packed = commit.pack_upper(store, container, None if latest is None else latest * 10**9)
    else:
        packed = commit.layer_tar(store, store.image(given.what), given.layer)
    exporting.write_file(given.file, packed.fd)
    return out(given, {"diff_id": packed.diff_id, "size": packed.size}, lambda value: str(value["diff_id"]))
