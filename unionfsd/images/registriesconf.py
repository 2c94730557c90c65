"""Which registries stand for a name: containers' registries.conf, version 2 (containers-registries.conf(5)).

Files: ``$CONTAINERS_REGISTRIES_CONF`` alone; else ``~/.config/containers/registries.conf`` and what is in the directory
``registries.conf.d`` beside it; else those of /etc/containers, and then the user's directory. What comes later counts.
Aliases of short names that podman wrote down count most.

Rules this file obeys: the name of an image stays what the user said, wherever it comes from; nothing here is for
pushing, but for `insecure`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping

from unionfsd.errors import UserError, reason
from unionfsd.images import reference, who
from unionfsd.images.reference import Name
from unionfsd.typed import Any, Final, NamedTuple

_SYSTEM: Final = "/etc/containers"
_MODES: Final = ("", "enforcing", "permissive", "disabled")
_PULLS: Final = ("", "all", "digest-only", "tag-only")


class Endpoint(NamedTuple):
    """A place that has what a name stands for: host and port, a path there; `insecure`: it may do without TLS."""

    host: str
    path: str
    insecure: bool


class Mirror(NamedTuple):
    location: str
    insecure: bool
    pulls: str


class Table(NamedTuple):
    """A ``[[registry]]``: what it says of names that begin with `prefix`; an empty `location` leaves them be."""

    prefix: str
    location: str
    insecure: bool
    blocked: bool
    mirrors: tuple[Mirror, ...]


class Registries(NamedTuple):
    """What all files say together."""

    tables: Mapping[str, Table]
    search: tuple[str, ...]
    aliases: Mapping[str, str]
    mode: str

    def endpoints(self, name: Name) -> list[Endpoint]:
        """Where to ask for an image, the best place first, the last one its own; UserError for a blocked name."""
        table = self._table(str(name))
        if table is None:
            return [Endpoint(name.host, name.path, False)]
        if table.blocked:
            raise UserError(f"{name}: {table.prefix} is blocked by registries.conf", code=1)
        wrong = "tag-only" if name.digest else "digest-only"
        found = [
            _moved(name, table.prefix, mirror.location, mirror.insecure)
            for mirror in table.mirrors
            if mirror.pulls != wrong
        ]
        found.append(_moved(name, table.prefix, table.location, table.insecure))
        return [at for at in found if at.path]  # a host alone can stand for what is in a registry, not for all of it

    def insecure(self, name: Name) -> bool:
        """Whether the registry of a name may do without TLS."""
        table = self._table(str(name))
        return table is not None and table.insecure

    def _table(self, text: str) -> Table | None:
        able = [table for table in self.tables.values() if _matches(text, table.prefix)]
        return max(able, key=lambda table: len(table.prefix), default=None)

    def resolve(self, text: str) -> list[Name]:
        """The images that `text` may mean, to be tried in this order; UserError when that is not for us to choose."""
        short = reference.short(text)
        if short is None:
            return [reference.name(text)]
        if alias := self.aliases.get(short):
            return [reference.name(alias + text[len(short) :])]
        if self.mode == "enforcing" and len(self.search) > 1:
            raise UserError(
                f"{text}: may be of {', '.join(self.search)}", hint="name the registry: registries.conf wants it so"
            )
        return [reference.name(text, host=host) for host in self.search] or [reference.name(text)]


def _matches(text: str, prefix: str) -> bool:
    if prefix.startswith("*."):
        return text.partition("/")[0].partition(":")[0].endswith(prefix[1:])
    if not text.startswith(prefix):
        return False
    # A colon after a host begins its port, and then it is another one.
    return text[len(prefix) :][:1] in ("", "/", "@", ":" if "/" in prefix else "")


def _moved(name: Name, prefix: str, location: str, insecure: bool) -> Endpoint:
    """What `name`, which `prefix` fits, is called at `location`."""
    text = name.repository
    if location and not prefix.startswith("*."):
        text = location + text[len(prefix) :]
    elif location:
        text = f"{location}/{name.path}"
    host, _, path = text.partition("/")
    return Endpoint(host, path.partition("@")[0].partition(":")[0], insecure)


# Reading.


def load() -> Registries:
    """What the files say; UserError for one that cannot be understood."""
    tables: dict[str, Table] = {}
    aliases: dict[str, str] = {}
    search: tuple[str, ...] = ()
    mode = ""
    for path in _files():
        document = _document(path)
        if document is None:
            continue
        tables |= {table.prefix: table for table in _tables(document, path)}
        aliases |= _aliases(document, path)
        if "unqualified-search-registries" in document:
            search = tuple(_words(document["unqualified-search-registries"], path))
        mode = str(document.get("short-name-mode") or mode)
        if mode not in _MODES:
            raise UserError(f"{path}: short-name-mode: not one of {', '.join(_MODES[1:])}")
    return Registries(tables, search, aliases, mode or "permissive")


def _files() -> Iterator[str]:
    home = os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "containers")
    if given := os.environ.get("CONTAINERS_REGISTRIES_CONF"):
        yield given
    else:
        own = os.path.join(home, "registries.conf")
        if os.path.exists(own):
            yield own
        else:
            yield os.path.join(_SYSTEM, "registries.conf")
            yield from _beside(_SYSTEM)
        yield from _beside(home)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    yield os.path.join(cache if who.is_user() else "/var/cache", "containers", "short-name-aliases.conf")


def _beside(directory: str) -> Iterator[str]:
    directory = os.path.join(directory, "registries.conf.d")
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return
    yield from (os.path.join(directory, name) for name in names if name.endswith(".conf"))


def _document(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if "registries" in document:
        raise UserError(
            f"{path}: has the format of version 1", hint="containers-registries.conf(5) describes version 2"
        )
    return document


def _tables(document: Mapping[str, Any], path: str) -> Iterator[Table]:
    for entry in _entries(document.get("registry"), path):
        location = _word(entry, "location", path).rstrip("/")
        prefix = _word(entry, "prefix", path).rstrip("/") or location
        wildcard = prefix.startswith("*.") and "/" not in prefix and ":" not in prefix
        if not prefix:
            raise UserError(f"{path}: a registry without prefix and location")
        if "*" in prefix and not wildcard:
            raise UserError(f"{path}: {prefix}: a * stands at the beginning, before the last parts of a host")
        if not location and not wildcard:
            raise UserError(f"{path}: {prefix}: a registry without location")
        by_digest = _flag(entry, "mirror-by-digest-only", path)
        mirrors = tuple(_mirror(mirror, by_digest, path) for mirror in _entries(entry.get("mirror"), path))
        yield Table(
            prefix,
            location,
            _flag(entry, "insecure", path),
            _flag(entry, "blocked", path),
            mirrors,
        )


def _mirror(entry: Mapping[str, Any], by_digest: bool, path: str) -> Mirror:
    location, pulls = _word(entry, "location", path).rstrip("/"), _word(entry, "pull-from-mirror", path)
    if not location:
        raise UserError(f"{path}: a mirror without location")
    if pulls not in _PULLS or (pulls and by_digest):
        raise UserError(f"{path}: mirror {location}: pull-from-mirror: not one of {', '.join(_PULLS[1:])}, or twice")
    return Mirror(location, _flag(entry, "insecure", path), "digest-only" if by_digest else pulls)


def _aliases(document: Mapping[str, Any], path: str) -> dict[str, str]:
    found = document.get("aliases") or {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise UserError(f"{path}: aliases: must be a table of names")
    for name, value in found.items():
        whole = reference.name(value) if value else None
        if reference.short(name) != name or (whole is not None and (reference.short(value) or whole.digest)):
            raise UserError(f"{path}: aliases: {name} = {value!r}: a short name stands for a whole one, without a tag")
    return dict(found)


def _entries(found: Any, path: str) -> list[dict[str, Any]]:
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise UserError(f"{path}: registry and mirror are lists of tables: [[registry]], [[registry.mirror]]")
    return found


def _words(found: Any, path: str) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise UserError(f"{path}: unqualified-search-registries: must be a list of hosts")
    return found


def _word(entry: Mapping[str, Any], key: str, path: str) -> str:
    found = entry.get(key, "")
    if not isinstance(found, str):
        raise UserError(f"{path}: {key}: must be a string")
    return found


def _flag(entry: Mapping[str, Any], key: str, path: str) -> bool:
    found = entry.get(key, False)
    if not isinstance(found, bool):
        raise UserError(f"{path}: {key}: must be true or false")
    return found
