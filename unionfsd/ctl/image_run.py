"""The verbs of ``unionfsctl image`` that mount images and run what is in them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from unionfsd.ctl import show
from unionfsd.ctl.image_show import out, short, store_of
from unionfsd.errors import OK
from unionfsd.images import containers

if TYPE_CHECKING:
    import argparse


def mount_(given: argparse.Namespace) -> int:
    store = store_of(given)
    containers.mount_image(store, store.image(given.image), given.mountpoint, given.options)
    return OK


def umount_(given: argparse.Namespace) -> int:
    where = given.what
    if "/" not in where and not os.path.lexists(where):
        where = containers.find(store_of(given), where).merged
    containers.unmount(where)
    return OK


def create_(given: argparse.Namespace) -> int:
    store = store_of(given)
    container = containers.create(store, store.image(given.image), given.name)
    return out(given, _facts(container), lambda value: str(value["name"]))


def _facts(container: containers.Container) -> dict[str, Any]:
    return {
        "name": container.name,
        "image": container.image,
        "image_name": container.image_name,
        "upper": container.upper,
        "merged": container.merged,
        "mounted": container.mounted,
    }


def start_(given: argparse.Namespace) -> int:
    store = store_of(given)
    where = containers.mount(store, containers.find(store, given.container), given.options, given.mountpoint)
    return out(given, {"mountpoint": where}, lambda value: str(value["mountpoint"]))


def containers_(given: argparse.Namespace) -> int:
    return out(given, [_facts(container) for container in containers.every(store_of(given))], _listed)


def _listed(rows: list[dict[str, Any]]) -> str:
    cells = [
        (row["name"], show.name(row["image_name"]), short(row["image"]), row["merged"] if row["mounted"] else "-")
        for row in rows
    ]
    return show.table(cells, ("container", "image", "digest", "mounted on")) if cells else ""


def remove_(given: argparse.Namespace) -> int:
    store = store_of(given)
    containers.remove(store, containers.find(store, given.container))
    return OK


def config_(given: argparse.Namespace) -> int:
    process = store_of(given).image(given.image).config.process
    value = {
        "env": [str(word) for word in process.get("Env") or []],
        "workdir": str(process.get("WorkingDir") or "/"),
        "entrypoint": [str(word) for word in process.get("Entrypoint") or []],
        "cmd": [str(word) for word in process.get("Cmd") or []],
        "user": str(process.get("User") or ""),
    }
    return out(given, value, _as_shell if given.shell else _as_lines)


def _as_lines(value: dict[str, Any]) -> str:
    rows = [(key, " ".join(found) if isinstance(found, list) else found) for key, found in value.items()]
    return show.table([(key, show.name(text)) for key, text in rows])


def _as_shell(value: dict[str, Any]) -> str:
    """Assignments that a shell can evaluate: what is a list becomes words to be given to ``eval set --``."""
    import shlex

    return "\n".join(
        f"image_{key}={shlex.quote(shlex.join(found) if isinstance(found, list) else found)}"
        for key, found in value.items()
    )
