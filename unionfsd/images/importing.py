"""Importing an image: its layers into the store, several at a time, then its documents, and last its name."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable

from unionfsd import syscalls
from unionfsd.errors import UserError
from unionfsd.images import documents, reference
from unionfsd.images.documents import Config, Manifest
from unionfsd.images.events import Events
from unionfsd.images.layering import CancelledError, Fetched, Layering, Wanted
from unionfsd.images.sources import Source
from unionfsd.images.store import Image, Store
from unionfsd.images.tarread import Limits
from unionfsd.typed import Final

_MAX_JOBS: Final = 4
#: Seconds for threads to notice that they are not wanted any more.
_GRACE: Final = 3.0


def jobs() -> int:
    """How many layers are unpacked at once unless told."""
    return max(2, min(_MAX_JOBS, os.cpu_count() or 1))


def import_image(
    into: Store,
    source: Source,
    names: tuple[str, ...],
    *,
    events: Events | None = None,
    limits: Limits | None = None,
    at_once: int | None = None,
    keep_blobs: bool = True,
    allowed: Callable[[Source], None] = lambda source: None,
) -> Image:
    """Import the image of `source` under `names`; without any it is found by its digest.

    What is interrupted leaves whole layers and parts of blobs behind, so that the next attempt goes on with them.
    UserError for an image that is not what it says it is; then it has no name, and what is wrong was not kept.
    """
    layers = layers_of(source)
    with into.lock(shared=True):
        into.sweep()
        allowed(source)
        layering = Layering(into, source.blob, limits or Limits(), events or Events(), keep_blobs=keep_blobs)
        _make(layering, layers, at_once or jobs())
        into.add_document(source.config.raw)
        into.add_document(source.manifest.raw)
        syscalls.syncfs(into.fd.fd)
        for name in names or (None,):
            into.set_name(name, source.manifest.descriptor)
    return into.image(source.manifest.digest)


def layers_of(source: Source) -> list[Wanted]:
    """The layers of an image, the lowest first; UserError when manifest and configuration disagree."""
    return wanted(source.manifest, source.config)


def wanted(manifest: Manifest, config: Config) -> list[Wanted]:
    """The same of its documents."""
    layers, diff_ids = manifest.layers, config.diff_ids
    if not diff_ids and manifest.config.media_type not in (documents.OCI_CONFIG, documents.DOCKER_CONFIG):
        raise UserError(f"no container image, but an artifact: {manifest.artifact_type or manifest.config.media_type}")
    if len(layers) != len(diff_ids):
        raise UserError(f"the manifest has {len(layers)} layers, the configuration {len(diff_ids)}")
    if not layers:
        raise UserError("the image has no layers", hint="it may be an artifact that is no container image")
    chains = config.chain_ids
    return [
        Wanted(layer, diff_id, chain, parent)
        for layer, diff_id, chain, parent in zip(layers, diff_ids, chains, (None, *chains[:-1]), strict=True)
    ]


class AbandonedError(Exception):
    """Interrupted, while threads wait for a place that says nothing: the process should end without them."""


def _make(layering: Layering, wanted: list[Wanted], at_once: int) -> None:
    pending: list[concurrent.futures.Future[Fetched | None]] = []
    done: list[str] = []
    stuck = False
    pool = concurrent.futures.ThreadPoolExecutor(at_once, thread_name_prefix="layer")
    try:
        pending = [pool.submit(layering.fetch, layer) for layer in wanted]
        for layer, future in zip(wanted, pending, strict=True):
            fetched = future.result()
            if fetched is not None:
                layering.settle(fetched, done)
            done.append(layer.chain)
    except BaseException as error:
        layering.cancel()
        for future in pending:
            future.cancel()
        stuck = isinstance(error, KeyboardInterrupt) and bool(concurrent.futures.wait(pending, _GRACE).not_done)
        if stuck:
            raise AbandonedError from None
        failed = _first_failure(pending[len(done) :], error)
        if failed is error:
            raise
        raise failed from None
    finally:
        pool.shutdown(wait=not stuck)


def _first_failure(pending: list[concurrent.futures.Future[Fetched | None]], error: BaseException) -> BaseException:
    """Let the others end, and their stages go; returns what went wrong in the first place."""
    failed = error
    for future in pending:
        try:
            fetched = future.result()
        except concurrent.futures.CancelledError:
            continue
        except CancelledError:
            continue
        except BaseException as other:
            failed = other if isinstance(failed, CancelledError) else failed
            continue
        if fetched is not None:
            fetched.stage.__exit__()
    return failed


def names_for(source: Source, given: list[str]) -> tuple[str, ...]:
    """The names an image gets: those given, or those it has where it comes from."""
    if given:
        return tuple(str(reference.name(text, host=reference.LOCAL)) for text in given)
    return source.names
