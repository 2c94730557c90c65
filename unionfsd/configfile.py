"""Mounts described in a TOML file: ``unionfsd --config FILE NAME``.

.. code-block:: toml

    [defaults]               # for all mounts of the file
    noatime = true

    [mount.web]              # NAME
    mountpoint = "/srv/web"
    lowerdir = ["/layers/site", "/layers/base"]
    upperdir = "/var/lib/web/upper"
    workdir = "/var/lib/web/work"

Rules this file obeys:

- It knows no option: a key is the name of one in `options.table`, and what it says is handed on as text of -o. So
  whatever a command line can mount can be said in a file, and is checked by the same code.
- Strings are literal: nothing in them needs an escape beyond TOML's own. A relative path starts at the directory of
  the file.
- Whatever is wrong is said with ``FILE:LINE``, where the key stands. tomllib does not tell; see `_line`.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass

from unionfsd import options
from unionfsd.errors import UserError, reason
from unionfsd.options.effects import Option, Security, Value
from unionfsd.options.table import OPTIONS
from unionfsd.options.text import read_path
from unionfsd.typed import Any, Final, NoReturn

_BY_NAME: Final = {
    option.name.removesuffix("+"): option for option in OPTIONS if option.name not in ("x-*", "lowerdir+")
}
_OPPOSITES: Final = {"ro": "rw", "rw": "ro", "sync": "async", "async": "sync"}


@dataclass(frozen=True, slots=True)
class Described:
    """A mount as a file describes it."""

    mountpoint: str
    options: tuple[str, ...]
    """Texts of -o. All paths are absolute."""


def read(path: str, name: str | None = None) -> Described:
    """The mount `name` of the file at `path`; without a name its only one. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None
    return describe(text, path, name)


def describe(text: str, path: str, name: str | None = None) -> Described:
    """The same for the `text` of the file at `path`."""
    document = _Document(text, path)
    document.check()
    name = document.only() if name is None else name
    mountpoint, pieces = document.mount(name)
    return Described(mountpoint, tuple(pieces))


class _Document:
    """A file that was parsed; whatever is wrong with it raises UserError with the line."""

    def __init__(self, text: str, path: str) -> None:
        self._text = text
        self._path = path
        self._directory = os.path.dirname(os.path.abspath(path))
        try:
            self._tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise _syntax_error(path, text, str(error)) from None

    def check(self) -> None:
        """Every mount of the file, so that a mistake shows before its mount is needed."""
        for key in self._tables:
            if key not in ("defaults", "mount"):
                self._refuse((key,), f"unknown table '{key}'", "a file has [defaults] and [mount.NAME]")
        for where in (("defaults",), ("mount",)):
            self._table(where)
        self._pieces(("defaults",))
        for name in self._table(("mount",)):
            self.mount(name)

    def only(self) -> str:
        """The name of the mount, if there is one and no other."""
        names = list(self._table(("mount",)))
        if len(names) != 1:
            what = f"{len(names)} mounts" if names else "no mount"
            hint = f"say which: {', '.join(names)}" if names else "add a table [mount.NAME]"
            raise UserError(f"{self._path}: describes {what}", hint=hint)
        return names[0]

    def mount(self, name: str) -> tuple[str, list[str]]:
        """(mountpoint, texts of -o) of the mount `name`."""
        where = ("mount", name)
        if name not in self._table(("mount",)):
            known = ", ".join(self._table(("mount",))) or "none"
            raise UserError(f"{self._path}: no mount '{name}'", hint=f"there is: {known}")
        table = self._table(where)
        if "mountpoint" not in table:
            self._refuse(where, "no mountpoint", 'add mountpoint = "DIR"')
        mountpoint = self._absolute((*where, "mountpoint"), table["mountpoint"])
        # Of two that contradict each other the later one counts, so what the mount says follows the defaults.
        return mountpoint, [*self._pieces(("defaults",)), *self._pieces(where)]

    def _table(self, where: tuple[str, ...]) -> dict[str, Any]:
        table: Any = self._tables
        for key in where:
            table = table.get(key, {})
            if not isinstance(table, dict):
                self._refuse(where, f"'{key}' must be a table", f"write [{'.'.join(where)}]")
        return dict(table)

    def _pieces(self, where: tuple[str, ...]) -> list[str]:
        """What the keys of a table say, as texts of -o."""
        said: list[str] = []
        for key, value in self._table(where).items():
            if key == "mountpoint" and where != ("defaults",):
                continue
            pieces = list(self._say((*where, key), value))
            try:
                options.parse(pieces)
            except UserError as error:
                self._refuse((*where, key), error.message, error.hint)
            said += pieces
        return said

    def _say(self, where: tuple[str, ...], value: object) -> Iterator[str]:
        """A key and its value as text of -o; more than one for lists of layers."""
        key = where[-1]
        option = self._option(where)
        if key in ("lowerdir", "datadir"):
            paths = value if isinstance(value, list) else [value]
            if not paths:
                self._refuse(where, f"{key} is empty")
            texts = [_escaped(self._absolute(where, path)) for path in paths]
            if key == "lowerdir":
                yield f"lowerdir={texts.pop(0)}"
            yield from (f"{key}+={text}" for text in texts)
        elif not option.argument:
            if not isinstance(value, bool):
                self._refuse(where, f"{key} must be true or false")
            yield from [key] if value else _opposite(key)
        elif isinstance(option.effect, Value) and option.effect.read is read_path:
            yield f"{key}={_escaped(self._absolute(where, value))}"
        elif isinstance(option.effect, Security):
            yield f'{key}="{self._string(where, value)}"'
        elif isinstance(value, bool):
            yield f"{key}={'on' if value else 'off'}"
        elif isinstance(value, int | float):
            yield f"{key}={value}"
        else:
            yield f"{key}={_escaped(self._string(where, value))}"

    def _option(self, where: tuple[str, ...]) -> Option:
        option = _BY_NAME.get(where[-1])
        if option is None:
            near = difflib.get_close_matches(where[-1], [*_BY_NAME, "mountpoint"], 1)
            self._refuse(where, f"unknown option '{where[-1]}'", f"did you mean {near[0]}?" if near else None)
        return option

    def _string(self, where: tuple[str, ...], value: object) -> str:
        if not isinstance(value, str):
            self._refuse(where, f"{where[-1]} must be a string")
        if not value or "\0" in value:
            self._refuse(where, f"{where[-1]} must not be empty or contain a NUL")
        return value

    def _absolute(self, where: tuple[str, ...], value: object) -> str:
        return os.path.join(self._directory, self._string(where, value))

    def _refuse(self, where: tuple[str, ...], message: str, hint: str | None = None) -> NoReturn:
        raise UserError(f"{self._path}:{_line(self._text, where)}: {message}", hint=hint)


def _escaped(text: str) -> str:
    return re.sub(r'([\\,:"])', r"\\\1", text)


def _opposite(word: str) -> list[str]:
    """The option that says that `word` is not wanted; none where its absence says so."""
    names = [_OPPOSITES.get(word, ""), word.removeprefix("no"), f"no{word}"]
    return [name for name in names if name in _BY_NAME and name != word][:1]


def _line(text: str, where: tuple[str, ...]) -> int:
    """The number of the line on which the key or table at `where` begins.

    It is the first line that belongs to no shorter beginning of the file that is TOML and lacks the key.
    """
    lines = text.split("\n")
    before = 0
    for count in range(1, len(lines) + 1):
        try:
            table: Any = tomllib.loads("\n".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            continue
        for key in where:
            table = table.get(key) if isinstance(table, dict) else None
        if table is not None:
            break
        before = count
    return min(before + 1, len(lines))


def _syntax_error(path: str, text: str, message: str) -> UserError:
    """tomllib's words, with its place moved to the front."""
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message, re.DOTALL)
    if match is None:
        return UserError(f"{path}: {message}")
    what, line, column = match.groups()
    place = f"{line}:{column}" if line else str(text.rstrip("\n").count("\n") + 1)
    return UserError(f"{path}:{place}: {what}", hint="the file must be TOML: https://toml.io")
