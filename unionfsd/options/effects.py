"""What an option does: effects, values whose `apply` writes into a `Draft`, and the rows of the table of options.

What is in a draft's `fields` are fields of `options.MountConfig`.
"""

from __future__ import annotations

from collections.abc import Callable

from unionfsd.errors import UserError
from unionfsd.options.text import read_lowers, read_path
from unionfsd.typed import Any, NamedTuple


class Draft:
    """What has been read so far: values by MountConfig field, names given, warnings."""

    __slots__ = ("explicit", "fields", "warnings")

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.explicit: set[str] = set()
        self.warnings: list[str] = []


class Value(NamedTuple):
    """The option takes a value, read by `read` (which raises ValueError with the reason), kept in `field`."""

    field: str
    read: Callable[[str], Any]

    def apply(self, draft: Draft, name: str, text: str) -> None:
        draft.fields[self.field] = self.read(text)


class Lowers(NamedTuple):
    """The option names all lowers, the data-only ones too."""

    def apply(self, draft: Draft, name: str, text: str) -> None:
        draft.fields["lowerdirs"], data = read_lowers(text)
        if data:
            draft.fields["datadirs"] = data


class AddLower(NamedTuple):
    """One more lower beneath those given so far, in `field`; its path may hold colons unescaped."""

    field: str

    def apply(self, draft: Draft, name: str, text: str) -> None:
        draft.fields[self.field] = (*draft.fields.get(self.field, ()), read_path(text))


class Word(NamedTuple):
    """The option is a word that sets `field` to `value`."""

    field: str
    value: object

    def apply(self, draft: Draft, name: str, text: str) -> None:
        draft.fields[self.field] = self.value


class SquashToRoot(NamedTuple):
    """The option is a word for uid 0 and gid 0, where nothing more exact is said about one of them."""

    def apply(self, draft: Draft, name: str, text: str) -> None:
        for field in ("uid", "gid"):
            draft.fields.setdefault(field, 0)


class Flag(NamedTuple):
    """The option is a word that sets and clears MS_* bits."""

    on: int = 0
    off: int = 0

    def apply(self, draft: Draft, name: str, text: str) -> None:
        draft.fields["mount_flags"] = draft.fields.get("mount_flags", 0) & ~self.off | self.on


class Security(NamedTuple):
    """The option is one of the kernel's security modules, which take it before the file system sees it."""

    def apply(self, draft: Draft, name: str, text: str) -> None:
        draft.fields["security"] = (*draft.fields.get("security", ()), f"{name}={text}")


class Nothing(NamedTuple):
    """The option asks for what is the case anyway, or is meant for somebody else."""

    def apply(self, draft: Draft, name: str, text: str) -> None:
        return


class Anyway(NamedTuple):
    """An option of which all `values` come to the same."""

    values: tuple[str, ...]

    def apply(self, draft: Draft, name: str, text: str) -> None:
        if text not in self.values:
            raise ValueError(f"not one of {', '.join(self.values)}")


class Refused(NamedTuple):
    """An option that must not be ignored and is not supported."""

    hint: str

    def apply(self, draft: Draft, name: str, text: str) -> None:
        raise UserError(f"option {name}: not supported", hint=self.hint)


Effect = Value | Lowers | AddLower | Word | SquashToRoot | Flag | Security | Nothing | Anyway | Refused


class Option(NamedTuple):
    """A row of the table. `argument` is how its value is written in the documentation; without one it is a word."""

    name: str
    effect: Effect
    help: str
    argument: str = ""
    default: str = ""

    @property
    def usage(self) -> str:
        """How it is written after -o."""
        return f"{self.name}={self.argument}" if self.argument else self.name
