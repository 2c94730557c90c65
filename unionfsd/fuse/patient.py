"""The channel of a mount with lowers that wait for somebody else (`remote`): only who needs them waits with them.

Rules of this file:

- A request that has to ask such a lower is put aside, and begun again with the answer, between two others. What it did
  before it asked came to nothing.
- So who waits for one may be let go: a caller that is being killed is answered EINTR, as the kernel keeps it until it
  is answered, whatever killed it. That a caller has merely got a signal changes nothing: a program may not expect EINTR
  of stat(2). What has begun to change something goes on.
- When the mount is gone, nobody waits for what was put aside. Operations that have begun are given `_PARTING`; what
  they leave then is what a crash leaves.
"""

from __future__ import annotations

import errno
import signal

from unionfsd import remote
from unionfsd.fuse import wire
from unionfsd.fuse.abi import Opcode
from unionfsd.fuse.channel import Channel
from unionfsd.fuse.exchange import Deferred
from unionfsd.logger import get_logger
from unionfsd.remote import Answers, AskedError
from unionfsd.typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from unionfsd.options import MountConfig
    from unionfsd.steps import LaterError
    from unionfsd.union import Union

log = get_logger(__name__)

_PARTING: Final = 2.0
"""Seconds."""
_LOOK: Final = 0.5
"""Seconds between two looks at callers that got a signal."""
_KILLED: Final = 1 << (signal.SIGKILL - 1)


class Aside(Deferred):
    """A request that waits for an answer. `wanted`: somebody waits for it still."""

    __slots__ = ("answers", "request", "wanted")

    changes = False

    def __init__(self, header: tuple[int, ...], request: bytes, answers: Answers) -> None:
        self.header = header  # type: ignore[assignment]
        self.held = self.ended = None
        self.place = -1
        self.request = request
        self.answers = answers
        self.wanted = True


class Begun:
    """What it takes to begin an operation anew that has yielded: its request, or where that is, and its answers."""

    __slots__ = ("answers", "request")

    def __init__(self, answers: Answers, request: bytes | None) -> None:
        self.answers = answers
        self.request = request


class PatientChannel(Channel):
    """A channel that does not wait for lowers."""

    def __init__(self, union: Union, fuse_fd: int, config: MountConfig, started: Callable[[], None]) -> None:
        super().__init__(union, fuse_fd, config, started)
        self._begun: dict[Deferred, Begun] = {}
        self._answers: Answers = {}
        self._signalled: dict[int, Deferred] = {}
        self._is_looking = False
        self._fill({Opcode.INTERRUPT: self._interrupt})

    def begin(self, wanted: Callable[[], bool] = lambda: False, patience: float = 0.0) -> None:
        """As ever, but goes on as soon as INIT is answered: trio is there already, and a task may be needed."""
        super().begin(lambda: True, 0.0)

    # Requests.

    def _answer(self, received: int) -> None:
        self._attempt(received, {})

    def _attempt(self, received: int, answers: Answers) -> None:
        self._answers = answers
        with remote.attend(answers):
            super()._answer(received)

    def _put_aside(self, later: LaterError, request: bytes) -> None:
        if isinstance(later, AskedError):
            self._ask(later, request)
        else:
            super()._put_aside(later, request)

    def _ask(self, asked: AskedError, request: bytes) -> None:
        aside = Aside(wire.IN_HEADER.unpack_from(request), request, asked.answers)
        if self._holds:
            aside.place = self._ledger.hold(aside.header[2])
        self.counters.threaded += 1
        self._deferred.add(aside)
        self._workers.submit_to(asked.system.questions, aside, asked.find_out)

    def _defer(self, deferred: Deferred) -> None:
        length, opcode = deferred.header[:2]
        # A WRITE took its buffer along.
        request = None if opcode == Opcode.WRITE else self._exchange.buf[:length]
        self._begun[deferred] = Begun(self._answers, request)
        super()._defer(deferred)

    def _go_on(self) -> None:
        deferred = self._workers.ready[0].deferred
        if isinstance(deferred, Aside):
            self._workers.take()
            self._drop(deferred)
            if deferred.wanted:
                self._exchange.buf[: len(deferred.request)] = deferred.request
                self._attempt(len(deferred.request), deferred.answers)
            return
        self._answers = self._begun[deferred].answers
        with remote.attend(self._answers):
            super()._go_on()

    def _drop(self, aside: Aside) -> None:
        self._deferred.discard(aside)
        self._ledger.let_go(aside.place)

    def _begin_anew(self, deferred: Deferred, later: LaterError) -> None:
        if not isinstance(later, AskedError):
            raise later
        request = self._begun[deferred].request
        if request is None:
            assert deferred.held is not None
            request = deferred.held.map[: deferred.header[0]]
        self._over(deferred)
        self._ask(later, request)

    def _over(self, deferred: Deferred) -> None:
        del self._begun[deferred]
        super()._over(deferred)

    # Callers that wait no longer.

    def _interrupt(self, nodeid: int, end: int) -> None:
        (unique,) = wire.INTERRUPT_IN.unpack_from(self._exchange.buf, wire.BODY)
        waiting = next((each for each in self._deferred if each.header[2] == unique and not each.changes), None)
        if waiting is None or self._let_go(waiting):
            return
        self._signalled[unique] = waiting
        if self._nursery is not None and not self._is_looking:
            self._is_looking = True
            self._nursery.start_soon(self._look_at_callers)

    def _let_go(self, waiting: Deferred) -> bool:
        """Answer EINTR to a caller that is being killed; whether it is."""
        if not _is_killed(waiting.header[6]):
            return False
        self._fail(waiting.header, errno.EINTR)
        if isinstance(waiting, Aside):
            waiting.wanted = False
        return True

    async def _look_at_callers(self) -> None:
        """Of several signals the kernel tells of the first only."""
        import trio

        while self._signalled:
            for unique, waiting in list(self._signalled.items()):
                if waiting not in self._deferred or self._let_go(waiting):
                    del self._signalled[unique]
            await trio.sleep(_LOOK)
        self._is_looking = False

    async def _end(self) -> None:
        import trio

        for deferred in [each for each in self._deferred if not each.changes]:
            self._deferred.discard(deferred)
            if isinstance(deferred, Aside):
                deferred.wanted = False
        with trio.move_on_after(_PARTING) as parting:
            await super()._end()
        if parting.cancelled_caught:
            log.warning("%d operations are given up: a lower does not answer", len(self._deferred))


def _is_killed(pid: int) -> bool:
    """Whether a thread is being killed, or is gone; as far as can be told of one that we cannot see (0)."""
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            pending = next((line for line in status if line.startswith(b"SigPnd:")), b"SigPnd: 0")
    except OSError:
        return True
    return bool(int(pending.split()[1], 16) & _KILLED)
