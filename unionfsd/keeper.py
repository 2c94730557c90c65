"""The keeper: a parent that holds a mount's connection, and starts a successor when the process that serves it dies.

It is made by a fork, once the mount is there and before it answers, so it has all that serving takes: the layers, their
locks, the control socket, the ledger. A successor is a fork of it, and so serves a few milliseconds later.

Rules of this file:

- The keeper has one thread, touches no layer and asks nothing of the mount.
- A process that ends with an exit code has ended in order, and the keeper with it. One that a signal ended, or that
  failed over a defect (`CRASHED`), gets a successor.
- A request that was in hand at `BLAMED` deaths in a row, each soon after the last, is not tried again. A successor that
  dies before it can answer is a strike. The next one waits longer each time; after `STRIKES` in a row the mount answers
  errors, but it answers.
- A server that is at one request for `HUNG` seconds, or leaves others waiting so long, is treated as one that died, its
  stacks in the log first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
from collections.abc import Callable
from time import monotonic, sleep

from unionfsd import systemd
from unionfsd.fuse.abi import FUSE_UNIQUE_RESEND
from unionfsd.logger import get_logger
from unionfsd.typed import TYPE_CHECKING, Final, NamedTuple, NoReturn

if TYPE_CHECKING:
    import socket
    from types import FrameType

    from unionfsd.ledger import Ledger

log = get_logger(__name__)

CRASHED: Final = 71
"""Exit code of a server that failed over a defect (EX_OSERR of sysexits.h)."""
LEFT: Final = 75
"""Exit code of a server that left the mount to whoever the service manager starts next (EX_TEMPFAIL)."""
BLAMED: Final = 4
STRIKES: Final = 10
HUNG: Final = 30.0
_LOOK: Final = 5.0
"""Seconds between two looks at whether requests are being answered."""
_GLANCE: Final = 0.001
_MOMENT: Final = 0.25
"""Seconds within which a request is to blame for a death."""
_FREE: Final = 3
"""Strikes without a pause."""
_PAUSE: Final = 0.1
_LONGEST: Final = 2.0
MAKE_ROOM: Final = signal.SIGUSR1
"""To the keeper: execute the program anew. To who serves: end between two requests, somebody else goes on."""
_PATIENCE: Final = 2.0
"""Seconds in which who makes room has to end; what it was at is done again."""
_FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MESSAGE: Final = 1 << 16
_FDS: Final = 16


class Life(NamedTuple):
    """In the process that serves: how many did before, the pid of the keeper, the unique of a request to refuse."""

    number: int
    keeper: int
    refused: int


class Over(NamedTuple):
    """In the keeper, when all is over: the exit code of the process that served, or minus the signal that ended it."""

    code: int


class Keeper:
    """The keeper of one mount. `unmount` is called when a signal asks for it and nobody serves."""

    def __init__(
        self,
        ledger: Ledger,
        fuse_fd: int,
        control: int | None,
        unmount: Callable[[], object],
        renew: Callable[[int, int], NoReturn],
    ) -> None:
        """`control` is the descriptor of the listening control socket.

        `renew` executes the program anew; it is told the pid of who serves, and how many did before.
        """
        self._ledger = ledger
        self._fuse_fd = fuse_fd
        self._control = control
        self._unmount = unmount
        self._renew = renew
        self._to_renew = False
        self._strikes = 0
        self._suspect = self._blamed = 0
        self._signals: list[int] = []
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stacks = os.memfd_create("stacks", os.MFD_CLOEXEC)

    def keep(self, alone: Callable[[], None], serving: int = 0, lives: int = 0) -> Life | Over:
        """Returns more than once: a `Life` in each process that is to serve, `Over` in the keeper.

        `alone` is called in the keeper once the first process has been started. Signals that stop us are blocked when
        this is called, and in whoever is to serve. `serving` is a child that makes room first, `lives` how many did.
        """
        own, refused = os.getpid(), 0
        before = self._dispositions()
        if serving:
            _make_room(serving)
            lives += 1
        while True:
            born = monotonic()
            self._ledger.serving = False
            ours, theirs = _relay()
            signal.pthread_sigmask(signal.SIG_BLOCK, (*_FORWARDED, MAKE_ROOM, signal.SIGCHLD))
            pid = os.fork()
            if not pid:
                _close(ours)
                self._serve(before, theirs)
                return Life(lives, own, refused)
            _close(theirs)
            self._listen_for_signals()
            if not lives:
                alone()
            code = self._watch(pid, ours, lives)
            _close(ours)
            lives += 1
            if code >= 0 and code != CRASHED:
                return Over(code)
            if self._ready() & select.POLLERR or not self._ledger.up:
                return Over(code)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed over a defect"
            log.error("the process that served (%d) %s; another takes its place", pid, how)
            refused = self._judge(monotonic() - born)
            if self._strikes >= STRIKES:
                return self._give_up()

    def _judge(self, lasted: float) -> int:
        """Take note of a death after so many seconds; returns the unique of a request that is not to be tried again."""
        hand = self._ledger.hand & ~FUSE_UNIQUE_RESEND
        if not self._ledger.serving:
            self._strikes += 1
            if self._strikes > _FREE:
                sleep(min(_PAUSE * 2 ** (self._strikes - _FREE - 1), _LONGEST))
            return 0
        self._strikes = 0
        self._blamed = self._blamed + 1 if lasted < _MOMENT and hand == self._suspect else 1
        self._suspect = hand
        return hand if self._blamed >= BLAMED else 0

    # Signals.

    def _dispositions(self) -> dict[int, Callable[[int, FrameType | None], object] | int | None]:
        return {number: signal.getsignal(number) for number in (*_FORWARDED, MAKE_ROOM, signal.SIGCHLD)}

    def _listen_for_signals(self) -> None:
        for number in _FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, lambda number, _: self._signals.append(number))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(MAKE_ROOM, lambda *_: setattr(self, "_to_renew", True))
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_FORWARDED, MAKE_ROOM, signal.SIGCHLD))

    def _serve(
        self, before: dict[int, Callable[[int, FrameType | None], object] | int | None], theirs: socket.socket | None
    ) -> None:
        """Become a process that serves, with a group of its own: a terminal's Ctrl-C is the keeper's to pass on."""
        import faulthandler

        signal.set_wakeup_fd(-1)
        for number, disposition in before.items():
            signal.signal(number, disposition)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD,))
        with contextlib.suppress(PermissionError):  # a session leader has one
            os.setpgid(0, 0)
        faulthandler.register(signal.SIGQUIT, self._stacks, all_threads=True)
        if theirs is not None:
            systemd.relay(theirs)
        os.close(self._woken)
        os.close(self._wake)

    # Watching.

    def _watch(self, pid: int, messages: socket.socket | None, lives: int) -> int:
        """Wait for the end of `pid`; its exit code, negative for the number of a signal."""
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if messages is not None:
            poll.register(messages, select.POLLIN)
        hand, since = -1, monotonic()
        while True:
            for fd, _ in poll.poll(_LOOK * 1000):
                if fd == self._woken:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._woken, 4096)
                elif messages is not None and not _pass_on(messages):
                    poll.unregister(messages)
            for number in self._signals:
                self._ledger.pass_signal()
                os.kill(pid, number)
            self._signals.clear()
            if self._to_renew:
                self._to_renew = False
                self._try_to_renew(pid, lives)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                while messages is not None and _pass_on(messages):
                    pass
                return os.waitstatus_to_exitcode(status)
            idle = self._ledger.rests and not self._ready() & select.POLLIN
            if hand != self._ledger.hand or idle or _is_stopped(pid):
                hand, since = self._ledger.hand, monotonic()
            elif monotonic() - since > HUNG:
                self._end_hung(pid)
                since = monotonic()

    def _try_to_renew(self, pid: int, lives: int) -> None:
        heeded = (*_FORWARDED, MAKE_ROOM)
        signal.pthread_sigmask(signal.SIG_BLOCK, heeded)  # the program that comes listens in its own time
        try:
            self._renew(pid, lives)
        except OSError as error:
            log.error("the program cannot be executed anew, and goes on as it is: %s", error)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, heeded)

    def _ready(self) -> int:
        """What poll(2) says of the connection: POLLIN for requests that wait, POLLERR when it has ended."""
        poll = select.poll()
        poll.register(self._fuse_fd, select.POLLIN)
        return sum(event for _, event in poll.poll(0))

    def _end_hung(self, pid: int) -> None:
        os.ftruncate(self._stacks, 0)
        os.kill(pid, signal.SIGQUIT)
        sleep(_MOMENT)
        stacks = os.pread(self._stacks, 1 << 20, 0).decode(errors="replace").strip() or "(it tells nothing)"
        log.error("for %.0f s no request was answered. What the process was doing:\n%s", HUNG, stacks)
        os.kill(pid, signal.SIGKILL)

    # The end.

    def _give_up(self) -> Over:
        """Answer errors until the mount is gone: nobody is left waiting."""
        from unionfsd.refusal import Refusal  # late: it is rarely needed

        log.critical(
            "%d processes died one after the other without answering anything; every request fails from now on. "
            "Unmount with: unionfsctl reap",
            STRIKES,
        )
        systemd.notify("STATUS=failed: its processes died one after the other; every request is answered with EIO")
        with Refusal(self._fuse_fd, self._control, self._woken) as refusal:
            while refusal.serve():
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken, 4096)
                if self._signals:
                    self._signals.clear()
                    self._unmount()
        return Over(CRASHED)


def _make_room(pid: int) -> None:
    """Have the child `pid` end, at the latest when patience does."""
    os.kill(pid, MAKE_ROOM)
    deadline = monotonic() + _PATIENCE
    while monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        sleep(_GLANCE)
    log.warning("the process that served (%d) takes its time, and is ended: what it was at is done again", pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _relay() -> tuple[socket.socket, socket.socket] | tuple[None, None]:
    """Two ends of what passes messages to the service manager on, which heeds only its main process; none without."""
    if not systemd.listening():
        return None, None
    import socket  # late: most mounts have no service manager, and the import is not free

    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _close(end: socket.socket | None) -> None:
    if end is not None:
        end.close()


def _pass_on(messages: socket.socket) -> bool:
    """Pass one message to the service manager; False when there is none now, or none will come any more."""
    import socket

    try:
        message, fds, _, _ = socket.recv_fds(messages, _MESSAGE, _FDS, socket.MSG_DONTWAIT)
    except OSError as error:
        return error.errno == errno.EINTR
    if not message:
        return False
    systemd.pass_on(message, fds)
    for fd in fds:
        os.close(fd)
    return True


def _is_stopped(pid: int) -> bool:
    """Whether somebody looks into the process, or has stopped it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b") ")[2][:1] in b"tT"
    except OSError:
        return False
