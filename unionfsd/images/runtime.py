"""What runs in a container: the process an image asks for, and the bundle of the runtime-spec for crun or runc."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence

from unionfsd.errors import UserError
from unionfsd.images import beneath, enter
from unionfsd.images.documents import Config
from unionfsd.syscalls import Fd
from unionfsd.typed import Any, Final, NamedTuple

_PATH: Final = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MAX_TABLE: Final = 16 << 20
#: What containers may do by default: what Docker and podman let them.
_CAPABILITIES: Final = [
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP"),
        *("SETUID", "SYS_CHROOT"),
    )
]
_MASKED: Final = [
    *("/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list"),
    *("/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"),
]
_READ_ONLY: Final = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


class Process(NamedTuple):
    """What to run: words, environment, directory, and as whom."""

    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    uid: int
    gid: int
    groups: tuple[int, ...]


def process(
    config: Config,
    root: str,
    *,
    command: Sequence[str] = (),
    env: Sequence[str] = (),
    workdir: str | None = None,
    user: str | None = None,
    entrypoint: bool = True,
) -> Process:
    """What an image runs in the root `root`; `command` takes the place of ``Cmd``. UserError when there is nothing."""
    asked = config.process
    first = [str(word) for word in asked.get("Entrypoint") or []] if entrypoint else []
    words = [*first, *(command or [str(word) for word in asked.get("Cmd") or []])]
    if not words:
        raise UserError("the image says nothing of what to run", hint="give a command after --")
    merged = {word.partition("=")[0]: word for word in (_PATH, *map(str, asked.get("Env") or []), *env)}
    uid, gid, groups, home = whom(root, user or str(asked.get("User") or ""))
    merged.setdefault("HOME", f"HOME={home}")
    if os.environ.get("TERM"):
        merged.setdefault("TERM", f"TERM={os.environ['TERM']}")
    cwd = workdir or str(asked.get("WorkingDir") or "/")
    return Process(tuple(words), tuple(merged.values()), cwd if cwd.startswith("/") else f"/{cwd}", uid, gid, groups)


def whom(root: str, user: str) -> tuple[int, int, tuple[int, ...], str]:
    """(uid, gid, more groups, home) of ``USER[:GROUP]``, names or numbers (config.md, "User"); UserError."""
    name, _, group = user.partition(":")
    users = _table(root, b"passwd", 7)
    groups = _table(root, b"group", 4)
    found = next((row for row in users if name and (row[0] == name or row[2] == name)), None)
    if not name or name == "0":
        found = found or next((row for row in users if row[2] == "0"), None)
    if found is None and name and not name.isdigit():
        raise UserError(f"the image runs as {name!r}, whom its /etc/passwd does not know")
    uid = int(found[2]) if found else int(name or 0)
    gid = int(found[3]) if found else 0
    if group:
        row = next((row for row in groups if group in (row[0], row[2])), None)
        if row is None and not group.isdigit():
            raise UserError(f"the image runs in group {group!r}, which its /etc/group does not know")
        gid = int(row[2]) if row else int(group)
    more = tuple(int(row[2]) for row in groups if found and not group and found[0] in row[3].split(","))
    return uid, gid, more, found[5] if found else "/"


def _table(root: str, name: bytes, columns: int) -> list[list[str]]:
    """A table of /etc in a root, reached without following a symlink; empty when there is none."""
    with contextlib.suppress(OSError), Fd(os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as top:
        directory = beneath.Tree(top).directory((b"etc",))
        text = beneath.read_file(directory.fd, name, _MAX_TABLE).decode(errors="replace")
        rows = [line.split(":") for line in text.splitlines()]
        return [row for row in rows if len(row) == columns and row[2].isdigit() and (columns < 7 or row[3].isdigit())]
    return []


def spec(run: Process, root: str, *, terminal: bool, hostname: str) -> Mapping[str, Any]:
    """The ``config.json`` of a bundle (runtime-spec, config.md): its own namespaces, but the host's network."""
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": terminal,
            "user": {"uid": run.uid, "gid": run.gid, "additionalGids": list(run.groups)},
            "args": list(run.args),
            "env": list(run.env),
            "cwd": run.cwd,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
            "noNewPrivileges": True,
        },
        "root": {"path": root, "readonly": False},
        "hostname": hostname,
        "mounts": _mounts(),
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")],
            "maskedPaths": _MASKED,
            "readonlyPaths": _READ_ONLY,
        },
    }


def _mounts() -> list[dict[str, Any]]:
    quiet = ["nosuid", "noexec", "nodev"]
    found: list[dict[str, Any]] = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": quiet},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
        },
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*quiet, "mode=1777", "size=65536k"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": quiet},
        {"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", "ro", *quiet]},
    ]
    if os.path.exists("/etc/resolv.conf"):
        found.append(
            {
                "destination": "/etc/resolv.conf",
                "type": "bind",
                "source": "/etc/resolv.conf",
                "options": ["bind", "ro", "nosuid", "nodev"],
            }
        )
    return found


#: Run in a mount namespace of its own: what a root needs, then the command. A symlink there could lead out of the root.
_FURNISH: Final = """\
set -eu
root=$1
shift
for name in proc sys dev; do
    [ ! -L "$root/$name" ] || continue
    [ -d "$root/$name" ] || mkdir "$root/$name" 2>/dev/null || continue
    case $name in
    # In a user namespace it has to be the /proc that is there.
    proc) mount -t proc -o nosuid,nodev,noexec proc "$root/proc" 2>/dev/null && continue ;;
    esac
    mount --rbind --make-rslave "/$name" "$root/$name"
done
exec "$@"
"""


def chroot_command(run: Process, root: str) -> tuple[list[str], dict[str, str]]:
    """(words, environment) that run `run` in a root, with proc, sys and dev there for as long as it runs."""
    given = {**run._asdict(), "root": root, "groups": list(dict.fromkeys((run.gid, *run.groups)))}
    program = [sys.executable, "-I", "-S", enter.__file__]
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _FURNISH, "chroot", root, *program]
    return words, {**os.environ, enter.VARIABLE: json.dumps(given)}
