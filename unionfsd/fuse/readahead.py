"""The readahead of a mount's backing device, which INIT can lower but not raise.

Sequential reads then arrive in requests of up to `KIB` KiB; docs/performance.md has what that is worth.
"""

from __future__ import annotations

from unionfsd import mountinfo
from unionfsd.logger import get_logger
from unionfsd.typed import Final

log = get_logger(__name__)

KIB: Final = 512

_MOUNTINFO: Final = "/proc/self/mountinfo"


def widen(mountpoint: bytes) -> None:
    """Set the readahead of what is mounted on `mountpoint`, where the system lets us; nothing depends on it."""
    try:
        device = _device(mountpoint)
        if device is None:
            log.debug("readahead stays as it is: %r is not in the mount table", mountpoint)
            return
        with open(f"/sys/class/bdi/{device}/read_ahead_kb", "w") as setting:
            setting.write(str(KIB))
    except OSError as exc:
        log.debug("readahead stays as it is: %s", exc)


def _device(mountpoint: bytes) -> str | None:
    """``MAJ:MIN`` of what was mounted last on `mountpoint`: proc(5), mountinfo, fields 3 and 5."""
    with open(_MOUNTINFO, "rb") as table:
        found = [fields[2] for fields in map(bytes.split, table) if mountinfo.plain(fields[4]) == mountpoint]
    return found[-1].decode() if found else None
