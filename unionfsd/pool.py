"""A number of threads, started when they are needed, for calls that may take long."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from unionfsd.typed import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from queue import SimpleQueue

Call: TypeAlias = Callable[[], object]


class Pool:
    """At most `most` threads, or as many as it takes. They end with the process: what one waits for may never come."""

    def __init__(self, most: int | None, name: str) -> None:
        self._most = most
        self._name = name
        self._calls: SimpleQueue[Call | None]
        self._threads: list[threading.Thread] = []
        #: One for each thread that waits for a call and was not promised one. Once there are all threads, it says less.
        self._idle: deque[None] = deque()

    def submit(self, call: Call) -> None:
        """Have a thread call `call`, which raises nothing; they come in order. RuntimeError: there can be no thread."""
        try:
            self._idle.pop()
        except IndexError:
            if self._most is None or len(self._threads) < self._most:
                self._start()
        self._calls.put(call)

    def close(self) -> None:
        """End the threads, and wait for that. Nothing may be under way."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _start(self) -> None:
        if not self._threads:
            from queue import SimpleQueue  # late: a mount begins without

            self._calls = SimpleQueue()
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # those there are come round to it
            if not self._threads:
                raise
        else:
            self._threads.append(thread)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # not kept alive until the next one
            self._idle.append(None)
