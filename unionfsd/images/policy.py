"""Which images may be imported, pulled and mounted: a file of rules in TOML.

::

    default = "reject"

    [[rule]]
    name = "registry.example.com/prod/*"
    action = "signed"
    keys = ["/etc/unionfsd/prod.pub"]

    [[rule]]
    name = "localhost/*"
    action = "accept"

The first rule whose pattern fits the name, without its tag, counts; ``*`` stands for anything. ``signed`` wants a
signature by one of the keys for this repository. An image with several names must be allowed by all of them.
"""

from __future__ import annotations

import fnmatch
import os
import tomllib
from collections.abc import Sequence

from unionfsd.errors import UserError, reason
from unionfsd.images import reference, trust
from unionfsd.images.trust import Signature, UntrustedError
from unionfsd.typed import Final, NamedTuple

SYSTEM: Final = "/etc/unionfsd/policy.toml"
ACTIONS: Final = ("accept", "reject", "signed")


class Rule(NamedTuple):
    """What happens to images whose name fits `pattern`."""

    pattern: str
    action: str
    keys: tuple[str, ...]


class Policy(NamedTuple):
    """Rules, the first that fits counts, and what happens to the rest."""

    rules: tuple[Rule, ...]
    default: str
    path: str

    def check(self, names: Sequence[str], digest: str, signatures: Sequence[Signature]) -> None:
        """UntrustedError unless the image `digest` may be called `names`, given what signatures it has."""
        for name in names or ("",):
            rule = self._rule(name)
            shown = name or digest
            if rule.action == "reject":
                raise UntrustedError(f"{shown}: rejected by {self.path}")
            if rule.action == "signed":
                trust.verify(signatures, rule.keys, digest, [name] if name else [])

    def _rule(self, name: str) -> Rule:
        repository = reference.name(name).repository if name else ""
        fits = (rule for rule in self.rules if fnmatch.fnmatchcase(repository, rule.pattern))
        return next(fits, Rule("*", self.default, ()))


ACCEPTING: Final = Policy((), "accept", "no policy")


def load(path: str | None, root: str) -> Policy:
    """The policy in `path`; else that of the store `root`, of the system, or none. UserError for one that is wrong."""
    for candidate in [path] if path else [os.path.join(root, "policy.toml"), SYSTEM]:
        try:
            with open(candidate, "rb") as file:
                return _read(tomllib.load(file), candidate)
        except FileNotFoundError:
            if path:
                raise UserError(f"{path}: no such file") from None
        except OSError as error:
            raise UserError(f"{candidate}: {reason(error)}") from None
        except ValueError as error:
            raise UserError(f"{candidate}: {error}") from None
    return ACCEPTING


def _read(document: dict[str, object], path: str) -> Policy:
    unknown = document.keys() - {"default", "rule"}
    if unknown:
        raise UserError(f"{path}: unknown key {', '.join(sorted(unknown))}")
    default = document.get("default", "accept")
    if default not in ("accept", "reject"):
        raise UserError(f"{path}: default: must be accept or reject")
    rules = document.get("rule", [])
    if not isinstance(rules, list):
        raise UserError(f"{path}: rule: must be a list of tables")
    return Policy(tuple(_rule(entry, f"{path}: rule {at + 1}") for at, entry in enumerate(rules)), str(default), path)


def _rule(entry: object, where: str) -> Rule:
    if not isinstance(entry, dict) or entry.keys() - {"name", "action", "keys"}:
        raise UserError(f"{where}: a rule has name, action and keys")
    name, action, keys = entry.get("name"), entry.get("action"), entry.get("keys", [])
    if not isinstance(name, str) or action not in ACTIONS:
        raise UserError(f"{where}: name must be a pattern, action one of {', '.join(ACTIONS)}")
    words = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not words or (action == "signed") != bool(keys):
        raise UserError(f"{where}: keys are for the action signed, which needs some")
    return Rule(name, str(action), tuple(keys))
