"""Layers on file systems that wait for somebody else: for a server, on a network or in a process of this machine.

What is asked of such a file system takes as long as its server pleases, perhaps for ever. A union has one thread for
all that is done in place, so that thread asks it nothing.

Rules of this file:

- A descriptor of such a file system has a `Number`, an int that knows its `FileSystem`; so has what is opened beneath.
- The functions of `syscalls` in `ASKING` look at it. While a request is attended to (`attend`) they make no call: they
  have the answer among those that the request has been given, or raise `AskedError`. Then a thread of the file system's
  own makes the call, and the operation is begun again, with one answer more. Anywhere else they make the call.
- So an operation may be begun several times. It publishes once (ARCHITECTURE.md), what it asks lowers it asks before,
  and what ends before leaves nothing behind: tests/union/test_faults.py has each call of each operation fail.
- Lowers do not change, so an answer stays right for as long as its request waits. It goes with the request, and with it
  the descriptors that the answer is about.
- What is asked of the names in a directory most is asked when it is listed, and known as long as it is open
  (`Number.ahead`). This is not for speed: the kernel holds a directory while a name in it is looked up, and nobody
  could make a file in it while a name of a silent layer is.
- A descriptor is closed when nobody has its number any more, in a thread: closing a file may mean to wait (FUSE_FLUSH).
- Nothing of this concerns other unions: the functions are replaced when the first such layer is opened.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic

from . import syscalls
from .pool import Pool
from .steps import LaterError
from .syscalls import Fd
from .typed import Any, Final, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")

#: Types of file systems whose server is elsewhere (linux/magic.h and the headers of each), by statfs(2).
TYPES: Final = {
    0x65735546: "FUSE",
    0x6969: "NFS",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB2",
    0x517B: "SMB",
    0x01021997: "9P",
    0x00C36400: "Ceph",
    0x5346414F: "AFS",
    0x6B414653: "kAFS",
    0x73757245: "Coda",
    0x0BD00BD0: "Lustre",
    0x01161970: "GFS2",
    0x7461636F: "OCFS2",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
    0x20030528: "OrangeFS",
    0xAAD7AAEA: "PanFS",
    0x786F4256: "vboxsf",
    0x7C7C6673: "prl_fs",
    0xBACBACBC: "vmhgfs",
}

#: Functions of `syscalls` that ask the file system of the descriptor whose number they are given first.
ASKING: Final = (
    "open_dir",
    "open_object",
    "open_data",
    "reopen",
    "open_by_handle",
    "stat_at",
    "fstat",
    "fstatvfs",
    "getxattr",
    "getxattr_at",
    "listxattr",
    "listxattr_at",
    "readlink",
    "attributes_at",
    "birth_time",
    "file_handle",
    "flag_ioctl",
    "lseek",
)

#: Questions that one file system is asked at once, and files of it that are read at once; the others queue.
_QUESTIONS: Final = 8
_READERS: Final = 16
#: What is known ahead at most, of one file system.
_MOST_KNOWN: Final = 200_000
#: Seconds after which a server is asked no more about a directory if its answers take `_SLOW` each, and in any case.
_LONG: Final = 0.25
_SLOW: Final = 0.001
_LONGEST: Final = 2.0


class Number(int):
    """The number of a descriptor of `system`. The descriptor is closed with its last reference."""

    system: FileSystem
    is_path: bool
    #: What is known of names in the directory: by function and further arguments what it returns.
    ahead: Known | None = None

    def __new__(cls, number: int, system: FileSystem, *, is_path: bool) -> Number:
        """`is_path`: closing it asks nobody anything (O_PATH)."""
        self = super().__new__(cls, number)
        self.system = system
        self.is_path = is_path
        return self

    def __del__(self) -> None:
        self.forget()
        if self.is_path:
            os.close(self)
        else:
            self.system.close(int(self))

    def keep(self, known: Known) -> None:
        """From now on `known` is known of the directory, if that is not too much in all."""
        self.forget()
        if self.system.count(len(known)):
            self.ahead = known

    def forget(self) -> None:
        """Nothing is known of the directory."""
        if self.ahead is not None:
            self.system.count(-len(self.ahead))
            self.ahead = None


class RemoteFd(Fd):
    """A descriptor of a file system that waits for somebody else. Closing it leaves others the number."""

    __slots__ = ()

    def close(self) -> None:
        self.fd = -1


Known: TypeAlias = dict[tuple[Callable[..., Any], tuple[Any, ...]], Any]
Key: TypeAlias = tuple[Callable[..., Any], int, tuple[Any, ...]]


class Answer:
    """What a call returned or raised. It keeps what was asked about from being closed, and so the key unique."""

    __slots__ = ("_about", "_error", "_value")

    def __init__(self, about: Number, value: object, error: OSError | None) -> None:
        self._about = about
        self._value = value
        self._error = error

    def get(self) -> Any:
        if self._error is not None:
            raise self._error.with_traceback(None)
        return RemoteFd(self._value) if type(self._value) is Number else self._value


Answers: TypeAlias = dict[Key, Answer]
"""What one request has been told."""


class Question(NamedTuple):
    """A call to make."""

    function: Callable[..., Any]
    number: Number
    rest: tuple[Any, ...]

    @property
    def key(self) -> Key:
        return self.function, id(self.number), self.rest

    def ask(self) -> Answer:
        try:
            value = self.number.system.call(self.function, self.number, self.rest)
        except OSError as error:
            return Answer(self.number, None, error)
        return Answer(self.number, value.fd if isinstance(value, RemoteFd) else value, None)


class AskedError(LaterError):
    """Something has to be asked first: have a thread `find_out`, then begin again with `answers`."""

    def __init__(self, questions: Sequence[Question], answers: Answers) -> None:
        super().__init__("asked")
        self.answers = answers
        self.questions = questions

    @property
    def system(self) -> FileSystem:
        """Who is asked."""
        return self.questions[0].number.system

    def find_out(self) -> None:
        """In a thread: ask."""
        for question in self.questions:
            self.answers[question.key] = question.ask()


def together(asked: Sequence[AskedError]) -> AskedError:
    """All of `asked` at once that the first file system is to be asked; the others come after it."""
    system, answers = asked[0].system, asked[0].answers
    return AskedError([each for one in asked if one.system is system for each in one.questions], answers)


class _Attention(threading.local):
    """What the request has been told that this thread attends to, if it does to any."""

    answers: Answers | None = None


_attention: Final = _Attention()


@contextmanager
def attend(answers: Answers | None) -> Iterator[None]:
    """For the time of this, have this thread ask nobody, but look in `answers`."""
    before, _attention.answers = _attention.answers, answers
    try:
        yield
    finally:
        _attention.answers = before


class Patience:
    """How long may be waited in place, in all: at the start of a process that takes over, when it must be."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def get(self, look: Callable[[], T]) -> T:
        """What `look` returns, begun again as often as it takes; ETIMEDOUT when the time is over."""
        answers: Answers = {}
        while True:
            try:
                with attend(answers):
                    return look()
            except AskedError as asked:
                self._wait(asked)

    def _wait(self, asked: AskedError) -> None:
        over, start = threading.Event(), monotonic()

        def find_out() -> None:
            asked.find_out()
            over.set()

        asked.system.questions.submit(find_out)
        answered = over.wait(self._seconds)
        self._seconds = max(0.0, self._seconds - (monotonic() - start))
        if not answered:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


class FileSystem:
    """A file system that waits for somebody else, and the threads that wait with it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known = 0
        self._counting = threading.RLock()
        self.questions = Pool(_QUESTIONS, f"{kind} question")
        self.readers = Pool(_READERS, f"{kind} reader")
        self._closers = Pool(1, f"{kind} closer")

    def ask(self, function: Callable[..., Any], number: Number, rest: tuple[Any, ...]) -> Any:
        """What ``function(number, *rest)`` returns or raises; AskedError when that has to be found out."""
        answers = _attention.answers
        if answers is None:
            return self.call(function, number, rest)
        answer = answers.get((function, id(number), rest))
        if answer is not None:
            return answer.get()
        if number.ahead is None or (function, rest) not in number.ahead:
            raise AskedError([Question(function, number, rest)], answers)
        return number.ahead[function, rest]

    def call(self, function: Callable[..., Any], number: Number, rest: tuple[Any, ...]) -> Any:
        """The same by making the call."""
        value = function(number, *rest)
        return self.own(value) if isinstance(value, Fd) else value

    def own(self, fd: Fd) -> RemoteFd:
        """`fd`, which is spent, as a descriptor of this file system."""
        number, fd.fd = fd.fd, -1
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
        return RemoteFd(Number(number, self, is_path=bool(flags & os.O_PATH)))

    def count(self, more: int) -> bool:
        """Whether so much more may be known of its directories; from then on it is."""
        with self._counting:
            if self._known + more > _MOST_KNOWN:
                return False
            self._known += more
            return True

    def close(self, number: int) -> None:
        """Close a descriptor in a thread."""
        try:
            self._closers.submit(partial(os.close, number))
        except RuntimeError:  # no thread can be had: at the end of the process, too, which closes it itself
            pass


_systems: Final[dict[int, FileSystem]] = {}
"""By st_dev: layers on one file system wait for the same server."""


def layer_root(root: Fd) -> Fd:
    """The root of a lower, which is spent if its file system waits for somebody: then what is returned says so."""
    kind = TYPES.get(syscalls.fs_type(root.fd) & 0xFFFFFFFF)
    if kind is None:
        return root
    _replace_functions()
    dev = os.fstat(root.fd).st_dev
    system = _systems.get(dev)
    if system is None:
        system = _systems[dev] = FileSystem(kind)
    return system.own(root)


def system_of(fd: object) -> FileSystem | None:
    """Whom `fd` waits for, if it is a descriptor that does for anybody."""
    return fd.fd.system if isinstance(fd, RemoteFd) and isinstance(fd.fd, Number) else None


_functions: Final[dict[str, Callable[..., Any]]] = {}
"""Those of `ASKING`, as they are where nobody is asked."""


def _replace_functions() -> None:
    if not _systems:
        for name in ASKING:
            _functions[name] = getattr(syscalls, name)
            setattr(syscalls, name, partial(ask, _functions[name]))
        syscalls.preadv = _reading(syscalls.preadv)


def ask(function: Callable[..., T], number: int, *rest: Any) -> T:
    """What ``function(number, *rest)`` returns, which asks the file system of the descriptor `number`."""
    if type(number) is Number:
        answer: T = number.system.ask(function, number, rest)
        return answer
    return function(number, *rest)


def foresee(number: int, questions: Iterable[tuple[Callable[..., Any], bytes]]) -> Known:
    """In a thread: what the functions return for names in the directory `number`, as far as that is told soon."""
    known: Known = {}
    start = monotonic()
    for function, name in questions:
        with suppress(OSError):  # who asks is told
            known[function, (name,)] = function(number, name)
        if monotonic() - start > min(max(_LONG, _SLOW * len(known)), _LONGEST):
            break
    return known


def about(name: bytes) -> Iterator[tuple[Callable[..., Any], bytes]]:
    """What everybody wants to know of a name."""
    yield _functions["stat_at"], name
    yield _functions["attributes_at"], name


def _reading(preadv: Callable[..., int]) -> Callable[..., int]:
    """preadv(2) in place, of what the page cache has: such a file system is asked whether that is so still."""

    def reading(number: int, *rest: Any) -> int:
        if type(number) is Number and _attention.answers is not None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return preadv(number, *rest)

    return reading
