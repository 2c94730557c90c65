"""The verbs of ``unionfsctl image`` that mount images and run what is in them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from unionfsd.ctl import show
from unionfsd.ctl.image_show import out, short, store_of
from unionfsd.errors import OK, UserError
from unionfsd.images import containers, policy, reference, runtime
from unionfsd.images.store import default_root
from unionfsd.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from unionfsd.images.store import Image, Store


def mount_(given: argparse.Namespace) -> int:
    place = reference.place(given.image)
    if place is not None and place.transport == "containers-storage":
        from unionfsd.images import engines

        if given.verify:
            raise UserError(
                "--verify: another engine's layers have no record to check them by", hint="import the image first"
            )
        found = engines.find(place.where)
        rules = policy.load(given.policy, given.root or default_root())
        rules.check(found.names, f"sha256:{found.identity}", [])
        containers.mount_directories(found.diffs, given.mountpoint, given.options)
        return OK
    store = store_of(given)
    image = store.image(given.image)
    _allow(store, image, given)
    containers.mount_image(store, image, given.mountpoint, _options(store, image, given))
    return OK


def _options(store: Store, image: Image, given: argparse.Namespace) -> list[str]:
    """The mount options given, and what ``--verify`` means."""
    options: list[str] = given.options
    if not given.verify:
        return options
    from unionfsd.images import checked

    return [checked.option(store, image), *options]


def _allow(store: Store, image: Image, given: argparse.Namespace) -> None:
    """UserError when the policy does not let the image be mounted."""
    rules = policy.load(given.policy, store.root)
    if rules.rules or rules.default != "accept":
        from unionfsd.images import admission

        admission.check(store, image, rules)


def umount_(given: argparse.Namespace) -> int:
    where = given.what
    if "/" not in where and not os.path.lexists(where):
        where = containers.find(store_of(given), where).merged
    containers.unmount(where)
    return OK


def hold_(given: argparse.Namespace) -> int:
    """Become a command that has the layers of an image, and keeps them from being collected."""
    store = store_of(given)
    image = store.image(given.image)
    _allow(store, image, given)
    chains = image.config.chain_ids
    words = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not words:
        raise UserError("hold needs a command", hint="unionfsctl image hold IMAGE -- COMMAND @layers")
    at = words.index("@layers") if "@layers" in words else len(words)
    command = [*words[:at], *containers.lower_paths(store, chains), *words[at + 1 :]]
    with containers.holding(store, chains) as held:
        os.execvpe(command[0], command, {**os.environ, **containers.hold_variable(held)})


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
    container = containers.find(store, given.container)
    image = store.image(container.image)
    containers.same_layers(container, image.config.chain_ids)
    _allow(store, image, given)
    where = containers.mount(store, container, _options(store, image, given), given.mountpoint)
    return out(given, {"mountpoint": where}, lambda value: str(value["mountpoint"]))


def containers_(given: argparse.Namespace) -> int:
    if given.quiet:
        return out(given, [container.name for container in containers.every(store_of(given))], "\n".join)
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


def run_(given: argparse.Namespace) -> int:
    """Run a command in a container of the image; returns its exit code."""
    if os.geteuid():
        raise UserError(
            "an ordinary user cannot run what is in an image", hint="podman unshare unionfsctl image run ..."
        )
    store = store_of(given)
    image = store.image(given.image)
    _allow(store, image, given)
    name = given.name
    existing = name is not None and any(container.name == name for container in containers.every(store))
    container = containers.find(store, name) if existing else containers.create(store, image, name)
    if container.image != image.digest:
        raise UserError(f"{name}: a container of another image, {container.image_name}")
    containers.same_layers(container, image.config.chain_ids)
    try:
        options = [*_options(store, image, given), *([] if name else ["volatile"])]
        root = containers.mount(store, container, options)
        try:
            return _run_in(image, root, container, given)
        finally:
            _take_down(root)
    finally:
        if name is None:
            containers.remove(store, container)


def _take_down(root: str) -> None:
    """Unmount; what the command left running keeps the root alive, but no mount here."""
    try:
        containers.unmount(root)
    except UserError:
        containers.unmount(root, lazy=True)


def _run_in(image: Image, root: str, container: containers.Container, given: argparse.Namespace) -> int:
    import json
    import sys

    process = runtime.process(
        image.config,
        root,
        command=given.command[1:] if given.command[:1] == ["--"] else given.command,
        env=given.env,
        workdir=given.workdir,
        user=given.user,
        entrypoint=not given.no_entrypoint,
    )
    if given.runner == "chroot":
        return _attend(*runtime.chroot_command(process, root))
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    spec = runtime.spec(process, root, terminal=terminal, hostname=container.name)
    with open(os.path.join(container.directory, "config.json"), "w") as file:
        json.dump(spec, file)
    identity = f"unionfsd-{container.name}-{os.getpid()}"
    words = [given.runner, *(["--cgroup-manager=disabled"] if given.runner == "crun" else []), "run"]
    return _attend([*words, "--bundle", container.directory, identity])


def _attend(words: list[str], environment: dict[str, str] | None = None) -> int:
    """Run a command to its end; returns what a shell would."""
    import subprocess

    with _signals_for_the_command():
        done = subprocess.run(words, env=environment, check=False)
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


@contextlib.contextmanager
def _signals_for_the_command() -> Iterator[None]:
    """Signals of the terminal are for the command to heed, which would inherit that we ignore them; its end is ours."""

    def heeded(number: int, frame: object) -> None:
        pass

    kept = [(number, signal.signal(number, heeded)) for number in (signal.SIGINT, signal.SIGQUIT)]
    try:
        yield
    finally:
        for number, handler in kept:
            signal.signal(number, handler)
