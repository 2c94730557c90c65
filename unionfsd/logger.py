"""Loggers of `logging`, which is imported when there is something to say: it would be a tenth of the start of a mount.

How to log is set before (`configure`), by calls to `logs` that are made then.
"""

from __future__ import annotations

import sys

from unionfsd.typed import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from logging import Logger

_configuration: list[Callable[[], object]] = []


def get_logger(name: str) -> Logger:
    """The logger of a module; see `_Later` for what it can do before there is one."""
    return _Later(name)  # type: ignore[return-value]


def configure(call: Callable[[], object]) -> None:
    """Make `call`, which configures logging, before anything is said; at once if something was."""
    _configuration.append(call)
    if "logging" in sys.modules:
        settle()


def settle() -> None:
    """Carry out what `configure` put off. Whoever brings in a library that logs calls this, too."""
    while _configuration:
        _configuration.pop(0)()


class _Later:
    """Becomes what it stands for, attribute by attribute."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "debug" and "logging" not in sys.modules:
            return _nothing  # who wants to see it has brought logging in
        import logging

        settle()
        value = getattr(logging.getLogger(self.name), attribute)
        setattr(self, attribute, value)
        return value


def _nothing(*_: object, **__: object) -> None:
    pass
