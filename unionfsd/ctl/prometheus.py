"""Figures of mounts in the text format of Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from unionfsd.control.protocol import Json

#: Name, kind, help and where the figure is in the answer to `stats`; counters come besides these.
_FIGURES: Final[tuple[tuple[str, str, str, Callable[[Json], float]], ...]] = (
    ("uptime_seconds", "gauge", "Since the mount was made.", lambda stats: stats["uptime"]),
    ("nodes", "gauge", "Objects the kernel knows, and their parents.", lambda stats: stats["nodes"]),
    ("open_fds", "gauge", "Descriptors the daemon has open.", lambda stats: stats["fds"]),
    ("cached_fds", "gauge", "Those of them that may be closed.", lambda stats: stats["cached_fds"]),
    ("fd_limit", "gauge", "How many of those there may be.", lambda stats: stats["fd_limit"]),
    ("threads", "gauge", "Threads of the daemon.", lambda stats: stats["threads"]),
    ("cpu_seconds_total", "counter", "Processor time the daemon used.", lambda stats: stats["cpu"]),
    ("resident_memory_bytes", "gauge", "Memory in use.", lambda stats: stats["memory"]["resident"]),
    ("peak_memory_bytes", "gauge", "The most there was in use.", lambda stats: stats["memory"]["peak"]),
    ("control_clients", "gauge", "Clients of the control socket.", lambda stats: stats["control"]["clients"]),
    ("control_calls_total", "counter", "Calls over the control socket.", lambda stats: stats["control"]["calls"]),
)
_COUNTERS: Final = {
    "requests": "Requests taken from the kernel.",
    "errors": "Requests answered with an errno; most are ENOENT.",
    "faults": "Requests answered EIO because of a defect.",
    "threaded": "Steps that left the event loop for a thread.",
    "copy_ups": "Objects copied up.",
    "copied_bytes": "Bytes of file data copied up.",
    "skipped_marks": "Best-effort steps of copy-ups that failed.",
}


def text(samples: Iterable[tuple[Json, Json]]) -> str:
    """The exposition of (status, stats) of each mount."""
    mounts = [(_labels(status), stats) for status, stats in samples]
    lines: list[str] = []
    for name, kind, help_text, figure in _FIGURES:
        lines += _family(name, kind, help_text, [(labels, figure(stats)) for labels, stats in mounts])
    counters = dict.fromkeys(name for _, stats in mounts for name in stats["counters"])
    for name in counters:
        help_text = _COUNTERS.get(name, name.replace("_", " ").capitalize() + ".")
        values = [(labels, stats["counters"][name]) for labels, stats in mounts if name in stats["counters"]]
        lines += _family(f"{name}_total", "counter", help_text, values)
    return "\n".join(lines) + "\n" if mounts else ""


def _family(name: str, kind: str, help_text: str, values: list[tuple[str, float]]) -> list[str]:
    full = f"unionfsd_{name}"
    return [f"# HELP {full} {help_text}", f"# TYPE {full} {kind}", *(f"{full}{{{at}}} {value}" for at, value in values)]


def _labels(status: Json) -> str:
    return f'mountpoint="{_escaped(status["mountpoint"])}",transport="{_escaped(status["transport"])}"'


def _escaped(value: str) -> str:
    plain = value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return plain.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
