"""Where the log goes: standard error while somebody watches it, then a file or syslog.

The log is the one thing in this program that is process-global.
"""

from __future__ import annotations

import logging
import os
import sys
import syslog

from unionfsd import errors
from unionfsd.errors import UserError, one_line, reason
from unionfsd.typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from unionfsd.journal import Journal

log = logging.getLogger(__name__)

_PRIORITIES: Final = (
    (logging.CRITICAL, syslog.LOG_CRIT),
    (logging.ERROR, syslog.LOG_ERR),
    (logging.WARNING, syslog.LOG_WARNING),
    (logging.INFO, syslog.LOG_INFO),
)


def start(*, debug: bool, path: bytes | None, quiet: bool, mountpoint: bytes | None = None) -> None:
    """Begin to log: to the file `path`, else to standard error, where `quiet` leaves out what is no trouble.

    Standard error that is the journal gets entries with fields, `mountpoint` among them.
    """
    if path is None:
        handler = (_journal(mountpoint) if _to_journal() else None) or _to_stderr()
    else:
        handler = _open(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if debug else logging.WARNING if quiet and path is None else logging.INFO)


def _to_stderr() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_ForJournal() if _to_journal() else _ForPeople())
    return handler


def to_syslog() -> None:
    """Leave standard error, which is about to be closed, for syslog; a log in a file stays where it is."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
            root.addHandler(_Syslog())
            root.setLevel(min(root.level, logging.INFO))


def reopen() -> None:
    """Open a log file anew, by its name."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()  # it opens again when there is something to write


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


def _to_journal() -> bool:
    """Whether standard error is the one that systemd connected to its journal ($JOURNAL_STREAM, systemd.exec(5))."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _journal(mountpoint: bytes | None) -> logging.Handler | None:
    """What writes to the journal itself; None where it cannot be reached: then lines have to do."""
    from unionfsd.journal import Journal  # late: few mounts log to it

    try:
        return _Journal(Journal(), mountpoint)
    except OSError:
        return None


class _Journal(logging.Handler):
    """Entries of the journal (systemd.journal-fields(7)), with what tells mounts and failures apart."""

    def __init__(self, to: Journal, mountpoint: bytes | None) -> None:
        super().__init__()
        self._to = to
        self._always = {"SYSLOG_IDENTIFIER": "unionfsd"}
        if mountpoint is not None:
            self._always["UNIONFSD_MOUNTPOINT"] = os.fsdecode(mountpoint)

    def emit(self, record: logging.LogRecord) -> None:
        fields = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(_priority(record)),
            **self._always,
            "SYSLOG_PID": str(record.process),
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName or "",
            "UNIONFSD_LOGGER": record.name,
        }
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, OSError) and error.errno is not None:
            fields["ERRNO"] = str(error.errno)
        try:
            self._to.send(fields)
        except OSError:
            self.handleError(record)

    def close(self) -> None:
        self._to.close()
        super().close()


class _ForJournal(logging.Formatter):
    """Each line with its priority in front (sd-daemon(3)); the journal itself knows who and when."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"<{_priority(record)}>{line}" for line in super().format(record).splitlines())


def _priority(record: logging.LogRecord) -> int:
    return next((priority for level, priority in _PRIORITIES if record.levelno >= level), syslog.LOG_DEBUG)


class _Syslog(logging.Handler):
    """syslog(3), which drops what nobody listens to."""

    def __init__(self) -> None:
        super().__init__()
        syslog.openlog("unionfsd", syslog.LOG_PID, syslog.LOG_DAEMON)

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            syslog.syslog(_priority(record), one_line(line))


def _open(path: bytes) -> logging.Handler:
    try:
        return logging.FileHandler(os.fsdecode(path))
    except OSError as error:
        raise UserError(f"cannot log to {os.fsdecode(path)}: {reason(error)}") from None
