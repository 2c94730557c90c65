"""Who we are to a registry: the files of containers and Docker, and their credential programs.

Files, the first that knows the registry counts (containers-auth.json(5)): ``$REGISTRY_AUTH_FILE``,
``$XDG_RUNTIME_DIR/containers/auth.json``, ``~/.config/containers/auth.json``, ``~/.docker/config.json``.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping

from unionfsd.errors import UserError, reason
from unionfsd.images.reference import DOCKER_HUB
from unionfsd.typed import Any, Final, NamedTuple

_DOCKER_KEYS: Final = ("https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io")
_PATIENCE: Final = 60


class Credentials(NamedTuple):
    """A name and a password; or, when the name is ``<token>``, an identity token as Docker calls it."""

    username: str
    password: str

    @property
    def is_token(self) -> bool:
        return self.username == "<token>"

    def __repr__(self) -> str:
        return f"Credentials({self.username!r}, ...)"


def files() -> Iterator[str]:
    """The files to look in, the first one first."""
    if given := os.environ.get("REGISTRY_AUTH_FILE"):
        yield given
        return
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield os.path.join(runtime, "containers", "auth.json")
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    yield os.path.join(config, "containers", "auth.json")
    yield os.path.join(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker"), "config.json")


def find(repository: str) -> Credentials | None:
    """The credentials for ``HOST/PATH``; None when no file knows them. UserError for a damaged file."""
    for path in files():
        try:
            with open(path, "rb") as file:
                document = json.load(file)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            why = reason(error) if isinstance(error, OSError) else "not JSON"
            raise UserError(f"{path}: {why}") from None
        if isinstance(document, dict) and (found := _in_file(document, repository, path)):
            return found
    return None


def _in_file(document: Mapping[str, Any], repository: str, path: str) -> Credentials | None:
    helpers, auths = document.get("credHelpers") or {}, document.get("auths") or {}
    for key in _keys(repository):
        if isinstance(helper := helpers.get(key), str):
            return _ask(helper, key)
        if isinstance(entry := auths.get(key), dict) and (found := _entry(entry, path)):
            return found
    store = document.get("credsStore")
    host = repository.partition("/")[0]
    return _ask(store, _DOCKER_KEYS[0] if host == DOCKER_HUB else host) if isinstance(store, str) and store else None


def _keys(repository: str) -> Iterator[str]:
    """What a repository may be filed under: the whole of it, its namespaces, its host."""
    key = repository
    while key:
        yield key
        key = key.rpartition("/")[0]
    host = repository.partition("/")[0]
    yield from _DOCKER_KEYS if host == DOCKER_HUB else (f"https://{host}", f"https://{host}/v1/", f"https://{host}/v2/")


def _entry(entry: Mapping[str, Any], path: str) -> Credentials | None:
    if token := entry.get("identitytoken"):
        return Credentials("<token>", str(token))
    if entry.get("auth"):
        try:
            name, colon, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError, TypeError):
            raise UserError(f"{path}: a damaged entry") from None
        if colon:
            return Credentials(name, password.rstrip("\0"))
    if entry.get("username") and entry.get("password"):
        return Credentials(str(entry["username"]), str(entry["password"]))
    return None


def _ask(helper: str, key: str) -> Credentials | None:
    """Ask ``docker-credential-HELPER``; None when it knows nothing."""
    if re.fullmatch(r"[A-Za-z0-9_.-]+", helper) is None:
        raise UserError(f"{helper!r}: cannot be the name of a credential program")
    try:
        done = subprocess.run(
            [f"docker-credential-{helper}", "get"],
            input=key.encode(),
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
        )
        answer = json.loads(done.stdout) if done.returncode == 0 else {}
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise UserError(f"docker-credential-{helper}: {error}") from None
    if not isinstance(answer, dict) or not answer.get("Secret"):
        return None
    return Credentials(str(answer.get("Username") or ""), str(answer["Secret"]))
