"""What the methods of the control socket do. Each is the function of its name, with the parameters that `schema` has.

Rules this file obeys:

- The event loop serves the mount. What reads layers runs in a thread, with a resolver of its own, and stops soon after
  it was cancelled; the loop sees small pieces only.
- Nothing is kept from one call to the next.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import resource
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, suppress
from functools import partial
from time import monotonic

import trio

from unionfsd import __version__, changes, explain, holders, mountinfo, syscalls, usage
from unionfsd.control import following, schema, to_json
from unionfsd.control.mounted import Mounted
from unionfsd.control.protocol import BUSY, FAILED, REFUSED, UNSUPPORTED, Json, RpcError
from unionfsd.logger import get_logger, settle
from unionfsd.metrics import Samples
from unionfsd.remote import AskedError
from unionfsd.typed import TYPE_CHECKING, Final, Protocol, TypeVar

if TYPE_CHECKING:
    from unionfsd.layers import Layer
    from unionfsd.lookup import Resolver
    from unionfsd.refresh import Looked

T = TypeVar("T")

log = get_logger(__name__)

#: Threads for walks at once, in one mount; others wait.
_WALKS: Final = 2
#: Between two looks of a walk at whether it is still wanted, and between two reports of progress.
_TICKS: Final = 64
_REPORT: Final = 0.25
#: Items in one notification to a client, and nodes in one to the kernel.
_BATCH: Final = 256
_PRUNE: Final = 256


class Call(Protocol):
    """The call that a method answers."""

    async def notify(self, method: str, params: dict[str, Json]) -> None:
        """Send a notification that belongs to it."""

    async def rest(self) -> None:
        """Let everybody else have a turn; between two notifications of many."""


class Methods:
    """The methods for one mount. `census` gives the figures of the server itself."""

    def __init__(self, mounted: Mounted, census: Callable[[], dict[str, int]]) -> None:
        self._mounted = mounted
        self._union = mounted.union
        self._config = mounted.union.config
        self._census = census
        self._walks = trio.CapacityLimiter(_WALKS)
        self._thawing = trio.CancelScope()
        self._frozen_since = 0.0

    def named(self, name: str) -> Callable[..., Awaitable[Json]]:
        """The function of a method of the table."""
        function: Callable[..., Awaitable[Json]] = getattr(self, name.replace(".", "_"))
        return function

    # What there is.

    async def status(self, call: Call) -> Json:
        mounted, config = self._mounted, self._config
        line = self._line()
        given = {*config.explicit, "lowerdir", "flags", *(["datadir"] if config.datadirs else [])}
        return {
            "mountpoint": to_json.text(line.path if line else config.mountpoint),
            "mounted": line is not None,
            "id": mounted.number,
            "pid": os.getpid(),
            "keeper": mounted.keeper if mounted.keeper == os.getppid() else None,
            "restarts": mounted.restarts,
            "owner": os.geteuid(),
            "socket": to_json.text(mounted.socket),
            "source": config.fsname,
            "transport": mounted.transport,
            "io": mounted.io,
            "read_only": config.read_only,
            "volatile": config.volatile,
            "frozen": self._union.frozen,
            "layers": [to_json.layer(*row) for row in self._layers()],
            "version": __version__,
            "uptime": round(monotonic() - mounted.since, 3),
            "options": {name: value for name, value in to_json.options(config).items() if name in given},
        }

    def _line(self) -> mountinfo.MountLine | None:
        """Where the mount is now; None when it is detached, or somebody else made it in a place we cannot see."""
        lines = (line for line in mountinfo.read() if line.device == (0, self._mounted.number))
        found = list(lines)
        ours = (line for line in found if line.mount_id == self._mounted.mount_id)
        return next(ours, found[0] if found else None)

    def _layers(self) -> Iterator[tuple[int, Layer, bool]]:
        stack = self._union.stack
        every = [stack.upper, *stack.lowers] if stack.upper else list(stack.lowers)
        for rank, layer in enumerate(every):
            assert layer is not None
            yield rank, layer, layer is stack.upper

    async def layers(self, call: Call) -> Json:
        rows = list(self._layers())
        return {"layers": await self._in_thread(partial(to_json.layers, rows)), "upper": self._upper()}

    def _upper(self) -> Json:
        able = self._union.abilities
        if able is None:
            return None
        return {
            "workdir": to_json.text(self._config.workdir or b""),
            "whiteout": able.whiteout,
            "xattrs": None if able.namespace is None else to_json.text(able.namespace),
            "tmpfile": able.tmpfile,
            "exchange": able.exchange,
            "rename_whiteout": able.rename_whiteout,
        }

    async def stats(self, call: Call) -> Json:
        counters = self._union.statistics()._asdict()
        holdings = self._union.holdings()._asdict()
        fds = await self._in_thread(lambda: len(os.listdir("/proc/self/fd")))
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "uptime": round(monotonic() - self._mounted.since, 3),
            "counters": counters,
            "operations": to_json.operations(self._union.counters.operations, self._mounted.requests),
            "bounds": list(to_json.BOUNDS),
            **holdings,
            "fds": fds,
            "threads": threading.active_count(),
            "cpu": round(used.ru_utime + used.ru_stime, 3),
            "memory": {"resident": _resident(), "peak": used.ru_maxrss * 1024},
            "control": self._census(),
        }

    async def events(self, call: Call, *, path: bytes, since: int | None, follow: bool, limit: int) -> Json:
        events = self._union.events
        if follow:
            await following.follow(events, call, since, path)
        return following.kept(events, since, limit, path)

    async def open(self, call: Call, *, path: bytes) -> Json:
        line, number = self._line(), self._mounted.number
        unseen = holders.Unseen()
        if number is None:
            raise RpcError(UNSUPPORTED, "the device number of this mount is not known")
        look = partial(self._holders, (0, number), unseen, b"" if line is None else line.path, path)
        held = await self._in_thread(look)
        told = self._mounted.transport == "pyfuse3" or self._mounted.io == "passthrough"
        opened = self._union.memory.opened() if told else []
        return {
            "holders": held,
            "unseen": unseen.count,
            "handles": [to_json.opened(file) for file in opened] if told else None,
        }

    def _holders(self, device: tuple[int, int], unseen: holders.Unseen, mountpoint: bytes, path: bytes) -> list[Json]:
        found = holders.holders(device, unseen, trio.from_thread.check_cancelled)
        return [to_json.held(row, mountpoint) for row in found if _concerns(row, mountpoint, path)]

    async def work(self, call: Call) -> Json:
        now = monotonic()
        return {"work": [to_json.work(work, now) for work in self._union.counters.work.values()]}

    async def hot(self, call: Call, *, limit: int) -> Json:
        counters, memory = self._union.counters, self._union.memory
        taken = {} if counters.samples is None else counters.samples.by_node
        counters.samples = Samples()
        paths: dict[bytes | None, int] = {}
        for nodeid, count in taken.items():
            path = memory.path(nodeid)
            paths[path] = paths.get(path, 0) + count
        most = sorted(paths.items(), key=lambda item: -item[1])[:limit]
        rows = [{"path": None if path is None else to_json.text(path), "samples": count} for path, count in most]
        return {"samples": sum(taken.values()), "paths": rows}

    async def options(self, call: Call) -> Json:
        return {
            "options": to_json.options(self._config),
            "explicit": sorted(self._config.explicit),
            "warnings": list(self._config.warnings),
        }

    # Looking into the layers.

    async def explain(self, call: Call, *, path: bytes) -> Json:
        return await self._with_reader(lambda reader: to_json.explanation(explain.explain(reader, path)))

    async def diff(self, call: Call, *, path: bytes, limit: int, stream: bool, progress: bool) -> Json:
        items = _Items(call, limit, stream=stream)
        ticker = _Ticker(call, progress=progress)
        names = explain.split(path)

        def walk(reader: Resolver) -> Json:
            for change in changes.changes(reader, names, ticker.tick):
                items.add(to_json.change(change), change.kind)
            return items.end()

        with self._working("diff", path, ticker.done):
            return await self._with_reader(walk)

    async def du(self, call: Call, *, path: bytes, depth: int, limit: int, progress: bool) -> Json:
        ticker = _Ticker(call, progress=progress)
        names = explain.split(path)
        with self._working("du", path, ticker.done):
            rows = await self._with_reader(lambda reader: usage.usage(reader, names, depth, ticker.tick))
        found = [row._asdict() | {"path": to_json.text(row.path)} for row in rows[: limit + 1]]
        return {"total": found[0] if found else None, "items": found[1:], "truncated": len(rows) > limit + 1}

    def _working(self, kind: str, path: bytes, done: Callable[[], int]) -> AbstractContextManager[None]:
        return self._union.counters.working(kind, path, None, done)

    async def _with_reader(self, look: Callable[[Resolver], T]) -> T:
        """What `look` finds, in a thread; the error of a system call becomes the caller's."""

        def run() -> T:
            reader = self._union.reader()
            try:
                return look(reader)
            finally:
                reader.fds.close()

        return await self._in_thread(run)

    async def _in_thread(self, fn: Callable[[], T]) -> T:
        # Not abandoned when it is cancelled: it uses descriptors of layers, which are closed when everybody is gone.
        return await trio.to_thread.run_sync(fn, limiter=self._walks)

    # Acting.

    async def sync(self, call: Call, *, progress: bool) -> Json:
        start = monotonic()
        failed: OSError | None = None
        async with trio.open_nursery() as nursery:
            if progress:
                nursery.start_soon(_tell_time, call)
            try:
                with self._working("sync", b"/", lambda: 0):
                    await self._collect()
                    await self._mounted.drive(self._union.syncfs())
            except OSError as error:  # kept, because the nursery would wrap it
                failed = error
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed
        return {"seconds": round(monotonic() - start, 6), "volatile": self._config.volatile}

    async def freeze(self, call: Call, *, timeout: float) -> Json:  # noqa: ASYNC109  # not of this call
        if self._mounted.io == "passthrough" and not self._config.read_only:
            raise RpcError(UNSUPPORTED, "with io=passthrough, writes do not come by")
        start = monotonic()
        if self._union.frozen:
            raise RpcError(BUSY, "frozen already")
        await self._collect()
        if self._union.frozen:
            raise RpcError(BUSY, "frozen already")
        self._union.freeze()
        self._frozen_since = monotonic()
        self._thawing.deadline = trio.current_time() + timeout
        try:
            await self._mounted.quiesce()
            await self._mounted.drive(self._union.syncfs())
        except BaseException:
            self._union.thaw()
            raise
        return {"seconds": round(monotonic() - start, 6), "thaws_in": timeout}

    async def _collect(self) -> None:
        """Have the kernel hand over what it keeps of this mount: by syncfs(2), which Linux 6.18 does not wait for on a
        FUSE mount, then file by file."""
        await trio.to_thread.run_sync(self._write_back)
        if self._mounted.transport == "channel" and self._config.writeback != "off":
            await self._mounted.notifier.hand_over(self._union.memory.files())

    def _write_back(self) -> None:
        """Start the writing of what the kernel keeps of this mount, as far as we see it."""
        line = self._line()
        if line is None or any(other.parent_id == line.mount_id for other in mountinfo.read()):
            return
        with syscalls.Fd(os.open(line.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
            syscalls.syncfs(fd.fd)

    async def thaw(self, call: Call) -> Json:
        frozen_for = monotonic() - self._frozen_since if self._union.frozen else 0.0
        self._union.thaw()
        self._thawing.deadline = math.inf
        return {"frozen_for": round(frozen_for, 6)}

    async def keep(self) -> None:
        """End every freeze when its time is over; runs beside the methods."""
        while True:
            with trio.CancelScope() as self._thawing:
                await trio.sleep_forever()
            if self._union.frozen:
                log.warning("thawed: the time of the freeze is over")
                self._union.thaw()

    async def refresh(self, call: Call, *, path: bytes, progress: bool) -> Json:
        counts = {"nodes": 0, "replaced": 0}
        epoch = await self._supported(self._mounted.notifier.inc_epoch())
        due = monotonic() + _REPORT
        for looked in self._union.memory.refresh(explain.split(path)):
            if isinstance(looked, AskedError):
                await self._in_thread(looked.find_out)
                continue
            counts["nodes"] += len(looked.kept) + len(looked.replaced)
            counts["replaced"] += len(looked.replaced)
            await self._tell(looked, epoch=epoch)
            if progress and monotonic() > due:
                await call.notify("progress", {"done": counts["nodes"]})
                due = monotonic() + _REPORT
        return {**counts, "kernel": epoch}

    async def _tell(self, looked: Looked, *, epoch: bool) -> None:
        """Have the kernel ask again about a directory that was looked at, and about what is known in it."""
        notifier = self._mounted.notifier
        await notifier.inval_inode(looked.nodeid)
        for name, nodeid, lower in looked.kept:
            await notifier.inval_inode(nodeid, 0 if lower else -1)
            if not epoch:
                await notifier.inval_entry(looked.nodeid, name)
        for name in looked.replaced if epoch else (*looked.replaced, *looked.others):
            await notifier.inval_entry(looked.nodeid, name)

    async def _supported(self, notification: Awaitable[bool]) -> bool:
        """Whether the kernel is new enough for a notification, which is sent."""
        try:
            await notification
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    async def drop_caches(self, call: Call) -> Json:
        notifier, memory = self._mounted.notifier, self._union.memory
        dropped = memory.drop()
        nodeids = memory.nodeids()
        for nodeid in nodeids:
            await notifier.inval_inode(nodeid)
        pruned = True
        for start in range(0, len(nodeids), _PRUNE):
            pruned = pruned and await self._supported(notifier.prune(nodeids[start : start + _PRUNE]))
        return {**dropped._asdict(), "nodes": len(nodeids), "kernel": pruned}

    async def log(self, call: Call, *, level: str | None) -> Json:
        settle()
        root = logging.getLogger()
        before = logging.getLevelName(root.level).lower()
        if level is not None:
            root.setLevel(level.upper())
        return {"level": logging.getLevelName(root.level).lower(), "before": before}

    async def unmount(self, call: Call, *, lazy: bool) -> Json:
        if self._mounted.mount_id is None:
            raise RpcError(UNSUPPORTED, "somebody else made this mount, and unmounts it")
        return {"result": await self._mounted.unmount(lazy)}

    async def reexec(self, call: Call) -> Json:
        keeper = self._mounted.keeper
        if keeper is None or keeper != os.getppid():
            raise RpcError(UNSUPPORTED, "the mount has no keeper")
        why = await self._in_thread(self._mounted.trial)
        if why is not None:
            raise RpcError(REFUSED, why)
        os.kill(keeper, signal.SIGUSR1)
        return {"keeper": keeper}

    async def rpc_discover(self, call: Call) -> Json:
        return schema.openrpc()


async def _tell_time(call: Call) -> None:
    """Report that something goes on of which nobody knows how far it is."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):  # it acts all the same
        while True:
            await trio.sleep(_REPORT)
            await call.notify("progress", {"done": 0})


def _concerns(held: holders.Held, mountpoint: bytes, path: bytes) -> bool:
    top = mountpoint.rstrip(b"/") + b"/" + path.strip(b"/")
    return path.strip(b"/") == b"" or held.path == top or held.path.startswith(top + b"/")


class _Ticker:
    """Stops a walk that nobody waits for any more, and reports how far it is. `tick` is called in its thread."""

    def __init__(self, call: Call, *, progress: bool) -> None:
        self._call = call
        self._progress = progress
        self._done = 0
        self._due = monotonic() + _REPORT

    def done(self) -> int:
        return self._done

    def tick(self) -> None:
        self._done += 1
        if self._done % _TICKS:
            return
        trio.from_thread.check_cancelled()
        if self._progress and monotonic() > self._due:
            trio.from_thread.run(self._call.notify, "progress", {"done": self._done})
            self._due = monotonic() + _REPORT


class _Items:
    """Collects the items of a walk, or sends them on in batches. Used in the walk's thread."""

    def __init__(self, call: Call, limit: int, *, stream: bool) -> None:
        self._call = call
        self._limit = limit
        self._stream = stream
        self._items: list[Json] = []
        self._counts: dict[str, int] = {}
        self._truncated = False

    def add(self, item: Json, kind: str) -> None:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if not self._stream and len(self._items) >= self._limit:
            self._truncated = True
            return
        self._items.append(item)
        if self._stream and len(self._items) >= _BATCH:
            self._send()

    def _send(self) -> None:
        trio.from_thread.run(self._call.notify, "items", {"items": self._items})
        self._items = []

    def end(self) -> Json:
        if self._stream and self._items:
            self._send()
        return {"items": self._items, "counts": self._counts, "truncated": self._truncated}


def _resident() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def failure(error: OSError) -> RpcError:
    """The answer to a call that a system call ended."""
    name = errno.errorcode.get(error.errno or 0, "EIO")
    where = "" if error.filename is None else f": {os.fsdecode(error.filename)}"
    return RpcError(FAILED, f"{error.strerror or error}{where}", {"errno": name})
