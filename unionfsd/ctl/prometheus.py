"""Figures of mounts in the text format of Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from unionfsd.typed import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from unionfsd.control.protocol import Json

#: Name, kind, help and where the figure is in the answer to `stats`; counters come besides these.
_FIGURES: Final[tuple[tuple[str, str, str, Callable[[Json], float]], ...]] = (
    ("uptime_seconds", "gauge", "Since the mount was made.", lambda stats: stats["uptime"]),
    ("nodes", "gauge", "Objects the kernel knows, and their parents.", lambda stats: stats["nodes"]),
    ("open_fds", "gauge", "Descriptors the daemon has open.", lambda stats: stats["fds"]),
    ("cached_fds", "gauge", "Those of them that may be closed.", lambda stats: stats["cached_fds"]),
    ("fd_limit", "gauge", "How many of those there may be.", lambda stats: stats["fd_limit"]),
    ("fd_hits_total", "counter", "Times that a cached descriptor was there.", lambda stats: stats["fd_hits"]),
    ("fd_misses_total", "counter", "Times that it had to be opened.", lambda stats: stats["fd_misses"]),
    ("fd_evictions_total", "counter", "Those closed to make room.", lambda stats: stats["fd_evictions"]),
    ("kept_lists", "gauge", "Merged lower directories whose names are kept.", lambda stats: stats["lists"]),
    ("kept_names", "gauge", "The names in all of them.", lambda stats: stats["names"]),
    ("lists_read_total", "counter", "Times that one was read.", lambda stats: stats["lists_read"]),
    ("threads", "gauge", "Threads of the daemon.", lambda stats: stats["threads"]),
    ("cpu_seconds_total", "counter", "Processor time the daemon used.", lambda stats: stats["cpu"]),
    ("resident_memory_bytes", "gauge", "Memory in use.", lambda stats: stats["memory"]["resident"]),
    ("peak_memory_bytes", "gauge", "The most there was in use.", lambda stats: stats["memory"]["peak"]),
    ("control_clients", "gauge", "Clients of the control socket.", lambda stats: stats["control"]["clients"]),
    ("control_calls_total", "counter", "Calls over the control socket.", lambda stats: stats["control"]["calls"]),
)
_COUNTERS: Final = {
    "requests": "Requests of the kernel that were dealt with.",
    "errors": "Requests answered with an errno; most are ENOENT.",
    "faults": "Requests answered EIO because of a defect.",
    "threaded": "Requests that could not be answered at once.",
    "copy_ups": "Objects copied up.",
    "copied_bytes": "Bytes of file data copied up.",
    "skipped_marks": "Best-effort steps of copy-ups that failed.",
    "corrupt": "Times that something of a lower was not what it must be, and was refused.",
}


_TOOK: Final = "Requests, from being read to being answered."
_FAILED: Final = "Requests answered with an errno."


def text(samples: Iterable[tuple[Json, Json]]) -> str:
    """The exposition of (status, stats) of each mount."""
    mounts = [(_labels(status), stats) for status, stats in samples]
    lines: list[str] = []
    for name, kind, help_text, figure in _FIGURES:
        lines += _family(name, kind, help_text, list(_told(mounts, figure)))
    counters = dict.fromkeys(name for _, stats in mounts for name in stats["counters"])
    for name in counters:
        help_text = _COUNTERS.get(name, name.replace("_", " ").capitalize() + ".")
        values = [(labels, stats["counters"][name]) for labels, stats in mounts if name in stats["counters"]]
        lines += _family(f"{name}_total", "counter", help_text, values)
    lines += _family("request_seconds", "histogram", _TOOK, [row for mount in mounts for row in _histograms(*mount)])
    lines += _family("request_errors_total", "counter", _FAILED, [row for mount in mounts for row in _errors(*mount)])
    return "\n".join(lines) + "\n" if mounts else ""


def _told(mounts: list[tuple[str, Json]], figure: Callable[[Json], float]) -> Iterator[tuple[str, float]]:
    """A figure of the mounts that tell it: a daemon may be older than this program."""
    for labels, stats in mounts:
        with contextlib.suppress(KeyError):
            yield labels, figure(stats)


def _histograms(labels: str, stats: Json) -> Iterator[tuple[str, float, str]]:
    for name, operation in stats.get("operations", {}).items():
        at = f'{labels},operation="{name}"'
        total = 0
        for bound, count in zip([*stats["bounds"], "+Inf"], operation["histogram"], strict=True):
            total += count
            yield f'{at},le="{bound}"', total, "_bucket"
        yield at, operation["seconds"], "_sum"
        yield at, operation["count"], "_count"


def _errors(labels: str, stats: Json) -> Iterator[tuple[str, float]]:
    for name, operation in stats.get("operations", {}).items():
        for number, count in operation["errors"].items():
            yield f'{labels},operation="{name}",errno="{number}"', count


def _family(name: str, kind: str, help_text: str, values: Sequence[tuple[Any, ...]]) -> list[str]:
    """A metric with its samples, if any: (labels, value) each, and what is appended to the name, if something is."""
    full = f"unionfsd_{name}"
    samples = (f"{full}{''.join(suffix)}{{{at}}} {value}" for at, value, *suffix in values)
    return [f"# HELP {full} {help_text}", f"# TYPE {full} {kind}", *samples] if values else []


def _labels(status: Json) -> str:
    return f'mountpoint="{_escaped(status["mountpoint"])}",transport="{_escaped(status["transport"])}"'


def _escaped(value: str) -> str:
    plain = value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return plain.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
