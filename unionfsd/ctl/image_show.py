"""The verbs of ``unionfsctl image`` that look at the store, and tidy it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence

from unionfsd.ctl import show
from unionfsd.errors import OK, UserError
from unionfsd.images import collect, compare, containers, reference
from unionfsd.images.below import Below
from unionfsd.images.containers import Container
from unionfsd.images.store import NOT_FOUND, Image, Store, default_root
from unionfsd.syscalls import Fd
from unionfsd.typed import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import argparse

DAMAGED: Final = 1
_SHORT: Final = 12


def store_of(given: argparse.Namespace) -> Store:
    return Store(given.root or default_root())


def out(given: argparse.Namespace, value: Any, human: Callable[[Any], str]) -> int:
    """Print a result: as JSON if that was asked for."""
    text = json.dumps(value, indent=2) if given.json else human(value)
    if text:
        print(text)
    return OK


def short(digest: str) -> str:
    return digest.partition(":")[2][:_SHORT]


def ls_(given: argparse.Namespace) -> int:
    store = store_of(given)
    if given.quiet:
        names = [name for image in store.images() for name in image.names or (image.digest,)]
        return out(given, names, "\n".join)
    rows = [
        {
            "names": list(usage.image.names),
            "digest": usage.image.digest,
            "created": str(usage.image.config.document.get("created") or ""),
            "platform": usage.image.config.platform,
            "layers": len(usage.image.config.diff_ids),
            "size": usage.layers,
        }
        for usage in collect.usage(store)
    ]
    return out(given, rows, _images)


def _images(rows: list[dict[str, Any]]) -> str:
    cells = [
        (show.name(name), short(row["digest"]), row["created"][:10], str(row["layers"]), show.size(row["size"]))
        for row in rows
        for name in (row["names"] or ["-"])
    ]
    return show.table(cells, ("name", "digest", "created", "layers", "size"), right=(3, 4)) if cells else ""


def _layers(store: Store, image: Image) -> list[dict[str, Any]]:
    """The layers of an image, the lowest first."""
    found = []
    for descriptor, diff_id, chain in zip(
        image.manifest.layers, image.config.diff_ids, image.config.chain_ids, strict=True
    ):
        layer = store.layer(chain) if store.has_layer(chain) else None
        found.append(
            {
                "digest": descriptor.digest,
                "media_type": descriptor.media_type,
                "compressed": descriptor.size,
                "blob": store.blob_path(descriptor.digest) if store.has_blob(descriptor.digest) else None,
                "diff_id": diff_id,
                "chain_id": chain,
                "size": layer.facts["size"] if layer else None,
                "path": store.diff_path(chain) if layer else None,
                "link": store.link_path(chain) if layer else None,
                "tree": layer.facts["tree"] if layer else None,
            }
        )
    return found


def inspect_(given: argparse.Namespace) -> int:
    store = store_of(given)
    image = store.image(given.image)
    value = {
        "names": list(image.names),
        "digest": image.digest,
        "media_type": image.manifest.media_type,
        "annotations": dict(image.manifest.annotations),
        "config_digest": image.manifest.config.digest,
        "config": dict(image.config.document),
        "layers": _layers(store, image),
    }
    return out(given, value, _inspected)


def _inspected(value: dict[str, Any]) -> str:
    process = value["config"].get("config") or {}
    rows = [
        ("digest", value["digest"]),
        ("configuration", value["config_digest"]),
        ("created", str(value["config"].get("created") or "")),
        ("platform", "/".join(str(value["config"].get(key) or "?") for key in ("os", "architecture"))),
        *(("environment", show.name(str(word))) for word in process.get("Env") or []),
        ("directory", show.name(str(process.get("WorkingDir") or "/"))),
        ("entrypoint", show.name(json.dumps(process.get("Entrypoint") or []))),
        ("command", show.name(json.dumps(process.get("Cmd") or []))),
        ("user", show.name(str(process.get("User") or "root"))),
    ]
    layers = [
        (
            str(at),
            short(layer["digest"]),
            show.size(layer["compressed"]),
            show.size(layer["size"] or 0),
            layer["path"] or "-",
        )
        for at, layer in enumerate(value["layers"])
    ]
    title = show.styled(show.name(", ".join(value["names"]) or value["digest"]), "bold")
    header = ("#", "blob", "as it came", "unpacked", "directory")
    return f"{title}\n{show.table(rows)}\n{show.table(layers, header, right=(0, 2, 3))}"


def history_(given: argparse.Namespace) -> int:
    store = store_of(given)
    image = store.image(given.image)
    return out(given, _steps(store, image), _told)


def _steps(store: Store, image: Image) -> list[dict[str, Any]]:
    """The instructions, the last first, each with the layer that it made."""
    layers = iter(_layers(store, image))
    steps = [
        {
            "created": step.created,
            "created_by": step.created_by,
            "comment": step.comment,
            "layer": None if step.empty else next(layers, None),
        }
        for step in image.config.history
    ]
    steps += [{"created": "", "created_by": "", "comment": "not in the history", "layer": layer} for layer in layers]
    return steps[::-1]


def _told(steps: list[dict[str, Any]]) -> str:
    rows = [
        (
            short(step["layer"]["diff_id"]) if step["layer"] else "-",
            step["created"][:10],
            show.size(step["layer"]["size"] or 0) if step["layer"] else "",
            show.name(step["created_by"] or step["comment"]),
        )
        for step in steps
    ]
    return show.table(rows, ("layer", "created", "size", "made by"), right=(2,)) if rows else ""


def tree_(given: argparse.Namespace) -> int:
    store = store_of(given)
    images = store.images()
    root: dict[str, Any] = {}
    for image in images:
        node = root
        for chain in image.config.chain_ids:
            node = node.setdefault(chain, {})
        node.setdefault("", []).append(", ".join(image.names) or image.digest)
    return out(given, _as_json(store, root), lambda value: "\n".join(_drawn(value, "")))


def _as_json(store: Store, node: dict[str, Any]) -> list[dict[str, Any]]:
    """Nested layers; depth is that of the longest image, which documents.py bounds."""
    found = []
    for chain, inner in node.items():
        if chain:
            found.append(
                {
                    "chain_id": chain,
                    "size": store.size_of(chain),
                    "images": inner.get("", []),
                    "children": _as_json(store, inner),
                }
            )
    return found


def _drawn(nodes: list[dict[str, Any]], indent: str) -> list[str]:
    lines = []
    for at, node in enumerate(nodes):
        last = at == len(nodes) - 1
        called = "; ".join(short(name) if name.startswith("sha256:") else show.name(name) for name in node["images"])
        names = f"  {show.styled(called, 'bold')}" if called else ""
        lines.append(f"{indent}{'└─' if last else '├─'} {short(node['chain_id'])} {show.size(node['size'])}{names}")
        lines += _drawn(node["children"], indent + ("   " if last else "│  "))
    return lines


def tag_(given: argparse.Namespace) -> int:
    store = store_of(given)
    name = str(reference.name(given.name, host=reference.LOCAL))
    with store.lock(shared=True):
        image = store.image(given.image)
        store.set_name(name, image.manifest.descriptor)
    return out(given, {"name": name, "digest": image.digest}, lambda value: "")


def rm_(given: argparse.Namespace) -> int:
    names, gone = collect.remove(store_of(given), given.image)
    value = {"names": names, "removed": gone}
    return out(
        given, value, lambda _: "the image went with its last name; unionfsctl image gc frees the space" if gone else ""
    )


def gc_(given: argparse.Namespace) -> int:
    done = collect.collect(store_of(given))
    value = {"layers": done.layers, "blobs": done.blobs, "bytes": done.bytes, "in_use": done.in_use}
    return out(given, value, _collected)


def _collected(value: dict[str, Any]) -> str:
    text = f"{len(value['layers'])} layers, {len(value['blobs'])} blobs, {show.size(value['bytes'])} removed"
    return text + (f"; {len(value['in_use'])} layers are mounted and stay" if value["in_use"] else "")


def du_(given: argparse.Namespace) -> int:
    rows = [
        {
            "name": usage.image.names[0] if usage.image.names else usage.image.digest,
            "layers": usage.layers,
            "unique": usage.unique,
            "blobs": usage.blobs,
        }
        for usage in collect.usage(store_of(given))
    ]
    return out(given, rows, _used)


def _used(rows: list[dict[str, Any]]) -> str:
    cells = [
        (show.name(row["name"]), show.size(row["layers"]), show.size(row["unique"]), show.size(row["blobs"]))
        for row in rows
    ]
    return show.table(cells, ("image", "unpacked", "of it alone", "as it came"), right=(1, 2, 3)) if cells else ""


def verify_(given: argparse.Namespace) -> int:
    store = store_of(given)
    images = [store.image(text) for text in given.images] or store.images()
    found = {damage: None for image in images for damage in collect.verify(store, image, unpack=given.unpack)}
    value = [{"where": damage.where, "path": damage.path, "what": damage.what} for damage in found]
    out(given, value, _damages)
    return DAMAGED if found else OK


def _damages(value: list[dict[str, Any]]) -> str:
    return "\n".join(f"{damage['where']}: {show.name(damage['path'] or '.')}: {damage['what']}" for damage in value)


def diff_(given: argparse.Namespace) -> int:
    store = store_of(given)
    with contextlib.ExitStack() as held:
        if given.second is None:
            first = _stack_of(store, _container(store, given.first).layers)
        else:
            first = _stack(store, given.first, held)
        second = _stack(store, given.second or given.first, held)
        rows = [
            {"kind": change.kind, "path": "/" + os.fsdecode(b"/".join(change.path))}
            for change in compare.compare(Below(first), Below(second))
        ]
    return out(given, rows, lambda rows: "\n".join(f"{row['kind']} {show.name(row['path'])}" for row in rows))


def _container(store: Store, text: str) -> Container:
    """The container that is compared with its image."""
    if any(container.name == text for container in containers.every(store)):
        return containers.find(store, text)
    raise UserError(f"{text}: no container", hint="an image is compared with another: name both", code=NOT_FOUND)


def _stack(store: Store, text: str, held: contextlib.ExitStack) -> list[Fd]:
    """The layers of a container, kept still by `held`, or of an image; the top one first."""
    if not any(container.name == text for container in containers.every(store)):
        return _stack_of(store, store.image(text).config.chain_ids)
    from unionfsd.ctl.settled import settled

    container = containers.find(store, text)
    held.enter_context(settled(store, container))
    upper = Fd(os.open(container.upper, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
    return [upper, *_stack_of(store, container.layers)]


def _stack_of(store: Store, chains: Sequence[str]) -> list[Fd]:
    return [store.open_diff(chain) for chain in reversed(chains)]
