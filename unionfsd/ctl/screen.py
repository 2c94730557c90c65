"""What the live screen of a mount shows: figures of two moments, and what changed in between. It only draws."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.layout import Layout
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from unionfsd.ctl import show
from unionfsd.typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

    from unionfsd.control.protocol import Json

_EVENT_STYLES: Final = {
    **dict.fromkeys(("unlink", "rmdir"), "red"),
    **dict.fromkeys(("create", "mkdir", "mknod", "symlink", "link"), "green"),
    **dict.fromkeys(("rename", "exchange", "setattr", "setxattr", "removexattr", "write"), "yellow"),
    "copy-up": "cyan",
    "corrupt": "bold red",
}


@dataclass(frozen=True, slots=True)
class Moment:
    """The answers of a mount at one time, `at` of the monotonic clock."""

    at: float
    status: Json
    stats: Json
    work: Json
    hot: Json
    events: tuple[Json, ...]


def screen(before: Moment | None, now: Moment) -> Layout:
    """The whole screen; figures are of the time between the two moments, or since the mount was made."""
    layout = Layout()
    layout.split_column(
        Layout(_head(before, now), name="head", size=5),
        Layout(name="middle", ratio=3),
        Layout(_events(now.events), name="events", ratio=2),
        Layout(Text(" q quits", style="dim"), name="foot", size=1),
    )
    layout["middle"].split_row(
        Layout(_operations(before, now), ratio=8), Layout(Group(_work(now.work), _hot(now.hot)), ratio=5)
    )
    return layout


def _plain(name: str | None) -> Text:
    """A name as it is: what a file is called is no markup, and does not drive the terminal."""
    return Text("(no name)" if name is None else show.name(name), no_wrap=True, overflow="ellipsis")


def _seconds(before: Moment | None, now: Moment) -> float:
    return now.stats["uptime"] if before is None else max(now.at - before.at, 1e-6)


def _grown(before: Moment | None, now: Moment, *path: str) -> float:
    """How much a figure of `stats` grew, a second."""
    grown = _at(now.stats, path) - (0 if before is None else _at(before.stats, path))
    return grown / max(_seconds(before, now), 1e-6)


def _at(value: Json, path: Sequence[str]) -> float:
    for name in path:
        value = value.get(name, 0) if isinstance(value, dict) else 0
    number: float = value
    return number


def _head(before: Moment | None, now: Moment) -> RenderableType:
    status, stats = now.status, now.stats
    state = Text("frozen", "cyan") if status["frozen"] else Text("serving", "green")
    hits = _grown(before, now, "fd_hits")
    wanted = hits + _grown(before, now, "fd_misses")
    grid = Table.grid(padding=(0, 3), expand=True)
    for _ in range(4):
        grid.add_column(ratio=1)
    grid.add_row(
        Text.assemble((f"{_grown(before, now, 'counters', 'requests'):,.0f}", "bold"), " requests/s"),
        f"{_grown(before, now, 'counters', 'errors'):,.0f} errors/s",
        f"{_grown(before, now, 'cpu'):.0%} of a processor",
        f"{show.size(stats['memory']['resident'])} memory",
    )
    grid.add_row(
        f"{stats['counters']['copy_ups']:,} copied up",
        f"{show.size(stats['counters']['copied_bytes'])} of data",
        f"{_grown(before, now, 'counters', 'copied_bytes') / 1e6:,.1f} MB/s now",
        f"{stats['counters']['faults']:,} defects",
    )
    grid.add_row(
        f"{stats['nodes']:,} nodes",
        f"{stats['fds']:,} descriptors",
        f"{hits / wanted:.1%} of them cached" if wanted else "none wanted",
        f"{stats['names']:,} lower names kept",
    )
    title = Text.assemble(
        _plain(status["mountpoint"]), " ", state, f" for {show.duration(stats['uptime'])}", style="not bold"
    )
    what = f"{status['transport']}, {status['io']}, {len(status['layers'])} layers, pid {status['pid']}"
    return Panel(grid, title=title, title_align="left", subtitle=what, subtitle_align="right", box=box.ROUNDED)


def _operations(before: Moment | None, now: Moment) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("request", style="bold", no_wrap=True, min_width=12)
    for title, width in (("/s", 6), ("mean", 7), ("99 %", 9), ("errors/s", 8), ("in all", 9)):
        table.add_column(title, justify="right", no_wrap=True, min_width=width)
    for name, row in sorted(_rows(before, now), key=lambda item: (-item[1][0], -item[1][-1])):
        rate, mean, most, errors, total = row
        table.add_row(
            name,
            f"{rate:,.0f}",
            show.moment(mean) if rate else "",
            f"< {show.moment(most)}" if rate else "",
            Text(f"{errors:,.0f}", "red") if errors else "",
            f"{total:,}",
            style="" if rate else "dim",
        )
    return Panel(table, title="requests of the kernel", title_align="left", box=box.ROUNDED)


def _rows(before: Moment | None, now: Moment) -> Iterable[tuple[str, tuple[float, float, float, float, int]]]:
    """Of each kind of request: a second, mean, 99 % quantile, errors a second, and how many in all."""
    seconds, bounds = _seconds(before, now), now.stats["bounds"]
    nothing: Json = {"count": 0, "seconds": 0.0, "errors": {}, "histogram": [0] * (len(bounds) + 1)}
    for name, after in now.stats["operations"].items():
        was = nothing if before is None else before.stats["operations"].get(name, nothing)
        count = after["count"] - was["count"]
        columns = [new - old for new, old in zip(after["histogram"], was["histogram"], strict=True)]
        mean = (after["seconds"] - was["seconds"]) / count if count else 0.0
        errors = sum(after["errors"].values()) - sum(was["errors"].values())
        yield name, (count / seconds, mean, show.quantile(bounds, columns, 0.99), errors / seconds, after["count"])


def _work(work: Json) -> RenderableType:
    rows = work["work"]
    if not rows:
        return Panel(Text("nothing", style="dim"), title="under way", title_align="left", box=box.ROUNDED)
    return Panel(under_way(rows), title="under way", title_align="left", box=box.ROUNDED)


def under_way(rows: Sequence[Json]) -> Table:
    """Work, with a bar each."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=2, no_wrap=True, overflow="ellipsis")
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True)
    for row in rows:
        done, total = row["done"], row["total"]
        bar = ProgressBar(total=total, completed=done, pulse=total is None, animation_time=row["seconds"])
        if total is None:
            how = f"{done:,}" if done else show.duration(row["seconds"])
        else:
            how = "to disk" if done >= total else f"{done / max(row['seconds'], 1e-3) / 1e6:,.0f} MB/s"
        table.add_row(row["kind"], _plain(row["path"]), bar, how)
    return table


def _hot(hot: Json) -> RenderableType:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for row in hot["paths"]:
        table.add_row(f"{row['samples'] / hot['samples']:.0%}", _plain(row["path"]))
    body = table if hot["paths"] else Text("nothing", style="dim")
    return Panel(body, title="asked about most", title_align="left", box=box.ROUNDED)


def _events(events: Sequence[Json]) -> RenderableType:
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for event in reversed(events):
        path = _plain(event["path"])
        if event["to"] is not None:
            path = Text.assemble(path, " -> ", _plain(event["to"]))
        table.add_row(
            time.strftime("%H:%M:%S", time.localtime(event["time"])),
            "" if event["pid"] is None else f"pid {event['pid']}",
            Text(event["kind"], _EVENT_STYLES.get(event["kind"], "")),
            path,
        )
    body = table if events else Text("nothing", style="dim")
    return Panel(body, title="changes, newest first", title_align="left", box=box.ROUNDED)
