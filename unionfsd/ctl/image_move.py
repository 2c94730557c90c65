"""The verbs of ``unionfsctl image`` that bring images in and out."""

from __future__ import annotations

import json
import os
import sys

from unionfsd.ctl.image_show import out, store_of
from unionfsd.ctl.settled import settled
from unionfsd.errors import OK, UserError
from unionfsd.images import commit, containers, events, exporting, importing, policy, reference, sources, trust
from unionfsd.images.tarread import Limits
from unionfsd.typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import argparse

    from unionfsd.images.store import Image, Store


_MAX_JOBS: Final = 64
#: What a shell reports for a command that SIGINT ended.
INTERRUPTED: Final = 130


def limits_of(given: argparse.Namespace) -> Limits:
    if given.max_layer < 1:
        raise UserError(f"--max-layer {given.max_layer}: not a size")
    return Limits(size=given.max_layer << 30)


def jobs_of(given: argparse.Namespace) -> int | None:
    """How many layers at once; None leaves it to us."""
    jobs: int | None = given.jobs
    if jobs is not None and not 1 <= jobs <= _MAX_JOBS:
        raise UserError(f"--jobs {jobs}: not a number of layers", hint=f"1 to {_MAX_JOBS}")
    return jobs


def import_(given: argparse.Namespace) -> int:
    store = store_of(given)
    platform = sources.platform_of(given.platform) if given.platform else None
    return _bring(given, store, sources.open_source(given.source, store.stage, platform).source)


def pull_(given: argparse.Namespace) -> int:
    from unionfsd.images import registry

    store = store_of(given)
    place = reference.place(given.source)
    if place is not None and place.transport != "docker":
        raise UserError(f"{given.source}: not in a registry", hint="unionfsctl image import takes it")
    platform = sources.platform_of(given.platform) if given.platform else sources.here()
    text = place.where if place else given.source
    source = registry.find(text, given.mirror, platform, **_ways(given))
    with source.registry:
        return _bring(given, store, source)


def _ways(given: argparse.Namespace) -> dict[str, bool]:
    """How much of TLS a registry must have."""
    return {"plain_http": given.plain_http, "insecure": given.tls_verify == "false"}


def tags_(given: argparse.Namespace) -> int:
    from unionfsd.images import registry

    place = reference.place(given.repository)
    if place is not None and place.transport != "docker":
        raise UserError(f"{given.repository}: not in a registry", hint="docker://HOST/NAME")
    found = registry.tags(place.where if place else given.repository, **_ways(given))
    return out(given, found, "\n".join)


def _bring(given: argparse.Namespace, store: Store, source: sources.Source) -> int:
    from unionfsd.images import admission

    names = importing.names_for(source, given.name)
    rules = policy.load(given.policy, store.root)
    told = events.make(as_json=given.json, quiet=given.quiet)
    try:
        image = importing.import_image(
            store,
            source,
            names,
            events=told,
            limits=limits_of(given),
            at_once=jobs_of(given),
            keep_blobs=not given.discard_blobs,
            allowed=lambda source: admission.admit(store, source, names, rules),
        )
    except importing.AbandonedError:
        told.close()
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # what is left behind is what a killed import leaves: nothing that counts
    finally:
        told.close()
    return out(given, summary(image), lambda value: str(value["digest"]))


def push_(given: argparse.Namespace) -> int:
    from unionfsd.images import pushing, registry

    store = store_of(given)
    image = store.image(given.image)
    place = reference.place(given.to) if given.to else None
    text = place.where if place else given.to or (image.names[0] if image.names else None)
    if text is None:
        raise UserError(f"{given.image}: has no name to push it as")
    name = reference.name(text)
    told = events.make(as_json=given.json, quiet=given.quiet)
    try:
        with (
            store.lock(shared=True),
            registry.writable(name, also=pushing.repositories(store, name), **_ways(given)) as target,
        ):
            pushing.push(store, image, target, told, referrers=given.referrers)
    finally:
        told.close()
    return out(given, summary(image), lambda value: str(value["digest"]))


def sign_(given: argparse.Namespace) -> int:
    store = store_of(given)
    image = store.image(given.image)
    name = given.name or (image.names[0] if image.names else None)
    if name is None:
        raise UserError(f"{given.image}: has no name to be signed as", hint="--as NAME")
    password = os.environ.get("COSIGN_PASSWORD")
    signature = trust.sign(given.key, name, image.digest, password.encode() if password else None)
    trust.keep(store, image.digest, [signature])
    return out(given, {"name": name, "digest": image.digest}, lambda value: "")


def generate_key_(given: argparse.Namespace) -> int:
    from unionfsd.images import keys

    private, public = keys.generate(given.prefix, os.environ.get("COSIGN_PASSWORD", "").encode())
    value = {"private": private, "public": public, "encrypted": bool(os.environ.get("COSIGN_PASSWORD"))}
    if not value["encrypted"]:
        print("unionfsctl: no $COSIGN_PASSWORD: the key has an empty password", file=sys.stderr)
    return out(given, value, lambda value: f"{value['private']}\n{value['public']}")


def verify_signature_(given: argparse.Namespace) -> int:
    store = store_of(given)
    image = store.image(given.image)
    signature = trust.verify(trust.kept(store, image.digest), given.key, image.digest, image.names)
    payload = json.loads(signature.payload)
    return out(given, payload, lambda value: json.dumps(value, indent=2))


def summary(image: Image) -> dict[str, object]:
    return {"names": list(image.names), "digest": image.digest}


def commit_(given: argparse.Namespace) -> int:
    store = store_of(given)
    container = containers.find(store, given.container)
    with settled(store, container):
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
        with settled(store, container):
            packed = commit.pack_upper(store, container, None if latest is None else latest * 10**9)
    else:
        packed = commit.layer_tar(store, store.image(given.what), given.layer)
    exporting.write_file(given.file, packed.fd)
    return out(given, {"diff_id": packed.diff_id, "size": packed.size}, lambda value: str(value["diff_id"]))
