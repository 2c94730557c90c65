"""The protocol between an operation of the union and whoever drives it.

Rules this file and everything that uses it obey:

- An operation that never blocks is a plain function. One that may block is a generator of type ``Op[T]``.
- A generator yields a `Step`: `Blocking` (a call that may take long: run it in a thread and send back what it returns)
  or a `Gate` (another operation is at work on the same object: resume when it opens).
- What runs between two yields is atomic with respect to every other operation. What was read before a yield is stale
  after it and is read again.
- A function inside `Blocking` touches file descriptors and immutable values, nothing else.
- An operation that changes something raises `FrozenError` before it did anything, and before its first yield, while the
  union is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from unionfsd.typed import Any, TypeAlias, TypeVar

T = TypeVar("T")


class Blocking:
    """A call that may block: `fn` takes nothing, runs in a thread, and its result or exception goes back in.

    `source`: the descriptor of a lower that it reads, if it does: that may be one that waits for somebody else.
    `then`: what the thread may do once the operation goes on; it raises nothing, and nobody waits for it.
    """

    __slots__ = ("fn", "source", "then")

    def __init__(self, fn: Callable[[], Any], source: object = None, *, then: Callable[[], None] | None = None) -> None:
        self.fn = fn
        self.source = source
        self.then = then


class Calling(Blocking):
    """One of which `fn` asks the kernel for what it may do only after requests of its own, which need other threads."""

    __slots__ = ()


class Gate:
    """A one-shot barrier: closed when made, opened once, for good."""

    __slots__ = ("_callbacks", "opened")

    def __init__(self) -> None:
        self.opened = False
        self._callbacks: list[Callable[[], None]] = []

    def open(self) -> None:
        """Let everyone who waits go on; whoever comes later does not wait."""
        self.opened = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_open(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the gate opens: at once if it is open already."""
        if self.opened:
            callback()
        else:
            self._callbacks.append(callback)


class LaterError(Exception):
    """Not now, and nothing was done: the operation is to be begun again."""


class FrozenError(LaterError):
    """Nothing may be changed now: again when `gate` opens."""

    def __init__(self, gate: Gate) -> None:
        super().__init__("frozen")
        self.gate = gate


class Freeze:
    """Whether changes may begin: `gate` is what they wait for, None when they may."""

    def __init__(self) -> None:
        self.gate: Gate | None = None

    def begin(self) -> None:
        """From now on they may not. Once at a time."""
        assert self.gate is None
        self.gate = Gate()

    def end(self) -> None:
        """They may again, those first that waited."""
        gate, self.gate = self.gate, None
        if gate is not None:
            gate.open()

    def check(self) -> None:
        """FrozenError unless they may."""
        if self.gate is not None:
            raise FrozenError(self.gate)


Step: TypeAlias = Blocking | Gate
Op: TypeAlias = Generator[Step, Any, T]


class DeadlockError(RuntimeError):
    """A synchronous driver met a closed gate: nobody is left who could open it."""


def run(op: Op[T]) -> T:
    """Drive `op` to its end in this thread and return its result; raises what it raises."""
    step = _advance(op, None)
    while not isinstance(step, _Done):
        step = _perform(op, step)
    result: T = step.value
    return result


class _Done:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def _advance(op: Op[Any], value: object) -> Step | _Done:
    try:
        return op.send(value)
    except StopIteration as stop:
        return _Done(stop.value)


def _perform(op: Op[Any], step: Step) -> Step | _Done:
    if isinstance(step, Gate):
        if not step.opened:
            raise DeadlockError("operation waits for a gate that nobody can open")
        return _advance(op, None)
    try:
        value = step.fn()
    except Exception as exc:
        try:
            return op.throw(exc)
        except StopIteration as stop:
            return _Done(stop.value)
    return _advance(op, value)
