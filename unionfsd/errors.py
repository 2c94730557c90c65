"""Failures meant for people, and the exit codes that go with them.

Inside the core a failure is an OSError with an errno, because the kernel wants an errno. What a *person* did wrong
(an option, a layer, a mountpoint) is a `UserError`: one line that says what failed, why and what to do.
"""

from __future__ import annotations

import errno

from unionfsd.typed import Final

SCARCE: Final = frozenset((errno.ENOMEM, errno.EMFILE, errno.ENFILE))
"""What a call fails with although nothing is wrong with what it was about: to be passed on, and never drawn from."""

OK: Final = 0
USAGE: Final = 2
"""The command line or an option's value is wrong."""
LAYER: Final = 3
"""A layer cannot be used: missing, not a directory, overlapping another, lacking what an upper needs."""
BUSY: Final = 4
"""The upper or work directory is in use by another mount."""
MOUNT: Final = 5
"""The mountpoint cannot be used, or the kernel refused the mount."""
INTERNAL: Final = 70
"""A defect of unionfsd itself (``EX_SOFTWARE`` of sysexits.h)."""


class UserError(Exception):
    """Something a person can put right.

    ``message`` says what failed and why (``what: why``), ``hint`` what to do about it, ``code`` is the exit code of the
    process. ``str()`` of it is always one line, whatever bytes a path in it had.
    """

    def __init__(self, message: str, *, hint: str | None = None, code: int = USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        text = self.message if self.hint is None else f"{self.message} ({self.hint})"
        return one_line(text)


def one_line(text: str) -> str:
    """``text`` with everything unprintable (line ends, terminal escapes, undecodable bytes) written as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def reason(error: OSError) -> str:
    """The system's words for ``error``, without the number and the path that ``str(error)`` adds."""
    return error.strerror or str(error)
