"""The kernel channel: our own reader and writer of /dev/fuse, under trio.

What it does, and what it is worth, is in docs/performance.md; in short: one buffer reused for every request, a request
answered before the next is read, no task for what cannot block, no event loop while requests keep coming.

Rules of this file:

- Only the channel's thread reads requests, and operations go on in it, one at a time, between two requests: what is
  between two steps of an operation is atomic for all others.
- Every request that expects a reply gets exactly one: from `_answer`, or from `_go_on` if its operation was deferred.
- An operation that was begun runs to its end, whatever is cancelled: half of one would leave a staged object
  unpublished, or a gate closed for ever.
- A guard in each of the two turns exceptions into errnos: OSError into its own, WireError and anything unexpected into
  EIO, the unexpected with a traceback in the log.
- trio is imported when nobody asks for anything. Until then `begin` serves, without a loop or a task, so that a mount
  answers, and works at full speed, while most of its start is still to come.
- INTERRUPT is ignored, as the protocol allows: what is inline is over before it could be read, what is deferred is a
  copy-up or a sync that somebody else may already count on.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic, perf_counter_ns

from unionfsd.errors import UserError
from unionfsd.events import Who
from unionfsd.fuse import negotiate, notify, readahead, wire
from unionfsd.fuse.abi import FUSE_KERNEL_VERSION, FUSE_UNIQUE_RESEND, InitFlag, Opcode
from unionfsd.fuse.acting import Acting
from unionfsd.fuse.dirs import Dirs
from unionfsd.fuse.distrust import Distrust
from unionfsd.fuse.exchange import Deferred, Exchange, Handler, Payload
from unionfsd.fuse.files import Files
from unionfsd.fuse.linger import SLEEP_MS, Lingerer
from unionfsd.fuse.names import Names
from unionfsd.fuse.passthrough import Passthrough
from unionfsd.fuse.resent import Resent
from unionfsd.fuse.workers import Workers
from unionfsd.logger import get_logger
from unionfsd.steps import FrozenError, Gate, LaterError
from unionfsd.typed import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import trio

    from unionfsd.fuse.pressure import Pressure
    from unionfsd.heir import Inheritance
    from unionfsd.options import MountConfig
    from unionfsd.steps import Step
    from unionfsd.union import Union

log = get_logger(__name__)

_SLICE: Final = 0.005
"""Seconds the channel may keep the thread to itself while requests keep coming; then everybody else has a turn."""
_LOOK: Final = 1.0
"""Seconds between two looks at how much is known."""
_BURST: Final = 32
"""Requests between two looks at the clock when they come faster than they are answered."""

_QUIET_MS: Final = 20
"""Milliseconds without a request after which the start may go on; up to five times that before each further look."""
_BEGINNING: Final = 5.0
"""Seconds after which it goes on even while requests keep coming, or as soon as somebody else waits for us."""
_GLANCE: Final = 0.05
"""Seconds between two looks at whether somebody does."""
_DEFECT: Final = "request failed with an unexpected error"
_OUT: Final = wire.OUT_HEADER
_OUT_SIZE: Final = wire.OUT_HEADER.size
_GONE: Final = frozenset((errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN))
_NO_REPLY: Final = frozenset((Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY))


class Channel:
    """One connection to the kernel."""

    def __init__(self, union: Union, fuse_fd: int, config: MountConfig, started: Callable[[], None]) -> None:
        valid = wire.Validity.of(config.timeout, config.timeout)
        self.counters = union.counters
        self._times = union.counters.operations.times
        self._totals = union.counters.operations.totals
        self._began = 0
        self._ledger = union.ledger
        self._resent: Resent | None = None
        self._holds = False
        self._acting = Acting()
        union.events.who = self._who
        self._fd = fuse_fd
        self._started = started
        self._mountpoint = config.mountpoint
        self._wanted = negotiate.Wanted.of(config)
        self._explicit = "io" in config.explicit
        self._insisted = config.writeback == "on"
        self._exchange = Exchange(union, valid, self._defer)
        self._names = Names(self._exchange)
        self._workers = Workers()
        self._distrust = Distrust(fuse_fd, union, self._workers)
        self._files = Files(self._exchange, self._distrust)
        self._dirs = Dirs(self._exchange)
        self._handlers: list[Handler] = [self._unknown] * wire.OPCODES
        self._fill(self._names.table() | self._files.table() | self._dirs.table())
        self._fill({Opcode.INIT: self._init, Opcode.DESTROY: _ok, Opcode.INTERRUPT: _silent})
        self._nursery: trio.Nursery | None = None
        self.gone = False
        self._readable: Callable[[int], Awaitable[None]]
        self._checkpoint: Callable[[], Awaitable[None]]
        self._deferred: set[Deferred] = set()
        self._alone = Lingerer(fuse_fd)
        self._beside = Lingerer(fuse_fd, self._workers.fd, ready=self._workers.ready)
        self._turn = 0.0
        self._pressure: Pressure
        self._look = 0.0

    def _fill(self, table: dict[Opcode, Handler]) -> None:
        for opcode, handler in table.items():
            self._handlers[opcode] = handler

    # --- the loop ----------------------------------------------------------------------------------------------------

    def begin(self, wanted: Callable[[], bool] = lambda: False, patience: float = 0.0) -> None:
        """Answer INIT and what comes with it, until nothing comes for a moment or `wanted` says that we must go on.

        With `patience` it goes on for so many seconds although nothing comes. `gone`: the mount ended before, and there
        is nothing to run. UserError: the kernel is too old.
        """
        os.set_blocking(self._fd, False)
        now = monotonic()
        end, calm, glance, quiet = now + _BEGINNING, now + patience, 0.0, _QUIET_MS
        while (busy := self._serve_one(quiet)) or (now < calm and not self.gone):
            now = monotonic()
            quiet = _QUIET_MS if busy else min(2 * quiet, 5 * _QUIET_MS)
            if not busy:
                self._ledger.rest()
            if now > glance or not busy:
                glance = now + _GLANCE
                if now > end or wanted():
                    return

    def close(self) -> None:
        """What takes the place of `run` where the mount is `gone`."""
        self._workers.close()

    def _serve_one(self, quiet: int) -> bool:
        """Answer the next request, or go on with an operation; False when for `quiet` ms there is nothing to do."""
        if self._workers.ready:
            self._go_on()
            return True
        try:
            received = os.readv(self._fd, self._exchange.inbox.vector)
        except BlockingIOError:
            return self._linger(quiet) or bool(self._deferred)
        except OSError as exc:
            self.gone = exc.errno in _GONE and not self._deferred
            return False  # `run` meets it again, and knows what to do
        if received < wire.BODY:
            self.gone = not received and not self._deferred
            return False
        self._answer(received)
        return True

    async def run(self) -> None:
        """Serve until the mount is gone and every deferred operation has ended."""
        import trio

        from unionfsd.fuse.pressure import Pressure

        os.set_blocking(self._fd, False)
        self._pressure = Pressure(self._exchange.union, notify.Notifier(self._fd))
        self._readable, self._checkpoint = trio.lowlevel.wait_readable, trio.lowlevel.checkpoint
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                with select.epoll() as both:
                    both.register(self._fd, select.EPOLLIN)
                    both.register(self._workers.fd, select.EPOLLIN)
                    await self._loop(both.fileno())
            except Exception as exc:  # kept, because the nursery would wrap it
                failure = exc
            finally:
                with trio.CancelScope(shield=True):
                    await self._end()
        if failure is not None:
            raise failure

    async def _loop(self, both: int) -> None:
        fd, exchange, answer = self._fd, self._exchange, self._answer
        readv, ready = os.readv, self._workers.ready
        left = _BURST
        while True:
            while ready:
                self._go_on()
            try:
                received = readv(fd, exchange.inbox.vector)
            except BlockingIOError:
                await self._idle(both)
                continue
            except OSError as exc:
                if exc.errno in _GONE:
                    return
                if exc.errno not in (errno.ENOENT, errno.EINTR):
                    raise
                continue
            if received < wire.BODY:
                if not received:
                    return
                log.warning("%d bytes are no request", received)
                continue
            answer(received)
            left -= 1
            if not left:
                left = _BURST
                await self._turn_over()

    async def _idle(self, both: int) -> None:
        """Wait for the next request: as long as it is likely to come at once outside the event loop, then in it."""
        await self._turn_over()
        if self._linger():
            return
        if self._nursery is not None and self._pressure.spare():
            self._nursery.start_soon(self._pressure.give_back)
        self._ledger.rest()
        start = monotonic()
        if self._deferred:
            await self._sleep(both)
            lingerer = self._beside
        else:
            await self._readable(self._fd)
            lingerer = self._alone
        now = monotonic()
        lingerer.woken(now - start)
        self._turn = now + _SLICE

    def _linger(self, milliseconds: int = SLEEP_MS) -> bool:
        """Wait a moment for a request, or for an operation that can go on. True: there is something."""
        if not self._deferred:
            return self._alone.spin() or self._alone.sleep(milliseconds)
        workers, lingerer = self._workers, self._beside
        if not workers.fresh and lingerer.spin():
            return True
        workers.sleeping = True
        woken = bool(workers.ready) or lingerer.sleep(milliseconds)
        workers.awake()
        return woken

    async def _sleep(self, fd: int) -> None:
        """Wait in the event loop until `fd` is readable, which it is when a thread has something for us."""
        workers = self._workers
        workers.sleeping = True
        try:
            if not workers.ready:
                await self._readable(fd)
        finally:
            workers.awake()

    async def _end(self) -> None:
        """See what was begun to its end; nobody is there any more for the answers."""
        while self._deferred:
            if self._workers.ready:
                self._go_on()
            else:
                await self._sleep(self._workers.fd)
        self._workers.close()

    async def _turn_over(self) -> None:
        """Let every other task run if the channel's turn is over."""
        if self.counters.samples is not None:
            self.counters.sample(self._exchange.header[3])
        if monotonic() > self._turn:
            await self._checkpoint()
            now = monotonic()
            self._turn = now + _SLICE
            if now > self._look:
                self._look = now + _LOOK
                if self._nursery is not None and self._pressure.due():
                    self._nursery.start_soon(self._pressure.relieve)

    # --- one request -------------------------------------------------------------------------------------------------

    def _answer(self, received: int) -> None:
        """Dispatch the request in the inbox, `received` bytes, and write its reply unless it is due later or never."""
        exchange = self._exchange
        began = self._began = perf_counter_ns()
        opcode = 0
        try:
            header = exchange.header = wire.IN_HEADER.unpack_from(exchange.buf)
            opcode = header[1]
            wire.check(header[0], opcode, received)
            self._ledger.begin(header[2])
            handler = self._handlers[opcode] if opcode < wire.OPCODES else self._unknown
            if self._resent is None or header[2] < FUSE_UNIQUE_RESEND:
                payload = handler(header[3], received)
            else:
                payload = self._resent.answer(handler, self._files.passthrough, header[3], received)
        except OSError as exc:
            self._fail(exchange.header, exc.errno or errno.EIO)
        except wire.WireError as exc:
            log.warning("request refused: %s", exc)
            self._fail(exchange.header, errno.EIO)
        except LaterError as later:
            self._put_aside(later, exchange.buf[:received])
            return
        except UserError:
            self._fail(exchange.header, errno.EPROTO)
            raise
        except Exception:
            log.exception(_DEFECT)
            self._fault(exchange.header)
        else:
            if payload is not None:
                self._reply(header[2], payload)
            elif opcode not in _NO_REPLY:
                return  # it takes longer, see `_finish`
        if opcode >= wire.OPCODES:
            opcode = 0
        took = perf_counter_ns() - began
        self._times[opcode][took.bit_length()] += 1
        self._totals[opcode] += took

    def _put_aside(self, later: LaterError, request: bytes) -> None:
        """Have the request taken up `_again`."""
        assert isinstance(later, FrozenError)
        later.gate.on_open(partial(self._again, request))

    def _again(self, request: bytes) -> None:
        """Take a request up that was put aside; between two of the loop's awaits nothing is in the inbox."""
        self._exchange.buf[: len(request)] = request
        self._answer(len(request))

    def _reply(self, unique: int, payload: Payload) -> None:
        size = len(payload)
        self._write([_OUT.pack(_OUT_SIZE + size, 0, unique), payload])

    def _fail(self, header: tuple[int, ...], code: int) -> None:
        opcode = header[1]
        if opcode not in _NO_REPLY:
            self.counters.errors += 1
            self.counters.operations.failed(opcode if opcode < wire.OPCODES else 0, code)
            self._write([wire.error(header[2], code)])

    def _fault(self, header: tuple[int, ...]) -> None:
        self.counters.faults += 1
        self._fail(header, errno.EIO)

    def _write(self, parts: list[Payload]) -> None:
        try:
            os.writev(self._fd, parts)
        except OSError as exc:
            # ENOENT: the caller was killed and nobody waits for this. Gone: the loop will see it when it reads.
            if exc.errno != errno.ENOENT and exc.errno not in _GONE:
                log.error("reply refused by the kernel: %s", exc)

    # --- operations that yielded -------------------------------------------------------------------------------------

    def _defer(self, deferred: Deferred) -> None:
        deferred.began = self._began
        if self._holds:
            deferred.place = self._ledger.hold(deferred.header[2])
        self.counters.threaded += 1
        self._deferred.add(deferred)
        self._perform(deferred, deferred.step)

    def _who(self) -> Who:
        header = self._exchange.header
        return self._acting.now or Who(header[6], header[4])

    def _perform(self, deferred: Deferred, step: Step) -> None:
        """See that `step` is done; the operation is then due."""
        if isinstance(step, Gate):
            step.on_open(partial(self._workers.due, deferred))
        else:
            self._workers.submit(deferred, step)

    def _go_on(self) -> None:
        """Take the operation that is due first to its next step, or to its end and answer its request."""
        deferred, value, error = self._workers.take()
        header = deferred.header
        self._acting.now = Who(header[6], header[4])
        self._ledger.begin(header[2])
        try:
            step = deferred.op.send(value) if error is None else deferred.op.throw(error)
        except StopIteration as stop:
            self._finish(deferred, stop.value)
        except OSError as exc:
            self._fail(header, exc.errno or errno.EIO)
            self._over(deferred)
        except LaterError as later:
            self._begin_anew(deferred, later)
        except Exception:
            log.exception(_DEFECT)
            self._fault(header)
            self._over(deferred)
        else:
            self._perform(deferred, step)
        finally:
            # An error holds this frame. If the frame held it, too, the descriptors in its frames would stay open until
            # the next collection of garbage, and the space of a deleted file taken.
            del error
            self._acting.now = None

    def _begin_anew(self, deferred: Deferred, later: LaterError) -> None:
        raise later  # see `patient`

    def _finish(self, deferred: Deferred, result: Any) -> None:
        try:
            self._reply(deferred.header[2], deferred.done(result))
        except OSError as exc:
            self._fail(deferred.header, exc.errno or errno.EIO)
        except Exception:
            log.exception(_DEFECT)
            self._fault(deferred.header)
        self._over(deferred)

    def _over(self, deferred: Deferred) -> None:
        self._deferred.discard(deferred)
        self._ledger.let_go(deferred.place)
        self.counters.operations.took(deferred.header[1], perf_counter_ns() - deferred.began)
        if deferred.held is not None:
            self._exchange.give_back(deferred.held)
        if deferred.ended is not None:
            deferred.ended.open()

    async def quiesce(self) -> None:
        """Wait until every operation that is deferred now has ended, but for those that only read."""
        from unionfsd.fuse.driver import opened  # late, like trio

        ended = [deferred.end() for deferred in self._deferred if deferred.changes]
        for gate in ended:
            await opened(gate)

    def resends(self) -> bool:
        """Whether the kernel sends again what was not answered, to whoever takes the place of this process."""
        return not self._holds

    # --- the connection itself ---------------------------------------------------------------------------------------

    def _init(self, nodeid: int, end: int) -> Payload | None:
        offer = wire.init(self._exchange.buf, end)
        if offer.major > FUSE_KERNEL_VERSION:
            return negotiate.other_major()
        session = negotiate.settle(offer, self._wanted)
        self._apply(session)
        self._ledger.remember_session(session.pack())
        self._reply(self._exchange.header[2], session.reply)
        self.counters.operations.took(Opcode.INIT, perf_counter_ns() - self._began)
        readahead.widen(self._mountpoint)
        self._started()
        return None

    def resume(self, inherited: Inheritance, refused: int = 0) -> None:
        """Take the place of a process that is no more, whose union was resumed; `refused` is a request to fail."""
        settled = self._ledger.session()
        assert settled is not None
        self._apply(negotiate.Session.unpack(settled))
        if self._files.passthrough is not None:
            self._files.passthrough.restore(inherited.opens)
        self._resent = Resent(self._exchange, inherited, refused)
        begun = filter(None, (inherited.hand, *self._ledger.under_way()))
        resends = notify.resend(self._fd)
        for unique in () if resends else begun:  # the mount goes on, who waits for one of these learns that it failed
            self._write([wire.error(unique, errno.EIO)])
        self._started()
        if resends:
            self._resent.take_up(self._fd, self._reply, self._again)

    def _apply(self, session: negotiate.Session) -> None:
        self._holds = InitFlag.HAS_RESEND not in session.flags
        self._names.setxattr_ext = InitFlag.SETXATTR_EXT in session.flags
        if InitFlag.NO_OPEN_SUPPORT in session.flags:
            self._files.handles = False
        if InitFlag.PASSTHROUGH in session.flags:
            self._files.passthrough = Passthrough(
                self._fd, self._exchange.union, self._exchange.unsettled, asked_for=self._explicit
            )
        elif self._wanted.passthrough and self._explicit:
            log.warning("io=passthrough is not possible: the kernel does not offer it (Linux 6.9)")
        if InitFlag.WRITEBACK_CACHE in session.flags:
            self._files.flush = partial(notify.drop, self._fd, place=None)
            self._names.drop = self._distrust.drop
        if self._insisted and InitFlag.WRITEBACK_CACHE not in session.flags:
            log.warning("writeback=on ignored: it cannot be had together with io=passthrough")
        if InitFlag.NO_OPENDIR_SUPPORT in session.flags:
            self._dirs.handles = False
            self._fill({Opcode.OPENDIR: self._unknown})

    def _unknown(self, nodeid: int, end: int) -> Payload:
        raise OSError(errno.ENOSYS, "not served")


def _ok(nodeid: int, end: int) -> Payload:
    return b""


def _silent(nodeid: int, end: int) -> None:
    return None
