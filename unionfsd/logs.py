"""Where the log goes: standard error while somebody watches it, then a file or syslog.

The log is the one thing in this program that is process-global.
"""

from __future__ import annotations

import logging
import os
import sys
import syslog
from typing import Final

from unionfsd import errors
from unionfsd.errors import UserError, one_line, reason

log = logging.getLogger(__name__)

_PRIORITIES: Final = (
    (logging.CRITICAL, syslog.LOG_CRIT),
    (logging.ERROR, syslog.LOG_ERR),
    (logging.WARNING, syslog.LOG_WARNING),
    (logging.INFO, syslog.LOG_INFO),
)


def start(*, debug: bool, path: bytes | None, quiet: bool) -> None:
    """Begin to log: to the file `path`, else to standard error, where `quiet` leaves out what is no trouble."""
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_ForPeople())
    else:
        handler = _open(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if debug else logging.WARNING if quiet and path is None else logging.INFO)


def to_syslog() -> None:
    """Leave standard error, which is about to be closed, for syslog; a log in a file stays where it is."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
            root.addHandler(_Syslog())
            root.setLevel(min(root.level, logging.INFO))


def explain(error: Exception) -> tuple[int, str]:
    """(exit code, one line) for whatever ended the process; a defect is logged with its traceback."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:  # trio's nurseries wrap what they raise
        error = error.exceptions[0]
    if isinstance(error, UserError):
        return error.code, str(error)
    log.error("this is a defect of unionfsd", exc_info=error)
    return errors.INTERNAL, one_line(f"internal error: {type(error).__name__}: {error}")


class _ForPeople(logging.Formatter):
    """``unionfsd: warning: what``, with a traceback beneath when there is one."""

    def format(self, record: logging.LogRecord) -> str:
        return f"unionfsd: {record.levelname.lower()}: {super().format(record)}"


class _Syslog(logging.Handler):
    """syslog(3), which drops what nobody listens to."""

    def __init__(self) -> None:
        super().__init__()
        syslog.openlog("unionfsd", syslog.LOG_PID, syslog.LOG_DAEMON)

    def emit(self, record: logging.LogRecord) -> None:
        priority = next((p for level, p in _PRIORITIES if record.levelno >= level), syslog.LOG_DEBUG)
        for line in self.format(record).splitlines():
            syslog.syslog(priority, one_line(line))


def _open(path: bytes) -> logging.Handler:
    try:
        return logging.FileHandler(os.fsdecode(path))
    except OSError as error:
        raise UserError(f"cannot log to {os.fsdecode(path)}: {reason(error)}") from None
