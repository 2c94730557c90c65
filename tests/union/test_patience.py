"""Lowers that wait for somebody: every operation comes to what it comes to elsewhere, and asks nothing in place."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.union.client import UMASK, Client
from tests.union.scenarios import Scenario
from tests.union.stack import Stack, scratch_directory
from tests.union.test_crash import EVERY, SCENARIOS, Case, attempt
from tests.union.test_faults import SOAK, open_descriptors
from tests.union.trees import Entry, Whiteout, diff, directory, regular
from unionfsd import remote, steps, syscalls
from unionfsd.remote import Answers, AskedError, Number
from unionfsd.union import Caller, Union

#: Calls of `os` that take a descriptor of what they ask.
CALLS_OF_OS = ("open", "stat", "fstat", "preadv", "pread", "lseek", "scandir", "readlink", "fstatvfs", "listdir")


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(UMASK)
    yield
    os.umask(before)


@pytest.fixture
def scratch() -> Iterator[bytes]:
    with scratch_directory() as path:
        yield path


@contextlib.contextmanager
def lowers_wait(*paths: bytes) -> Iterator[None]:
    """Every lower, or those at `paths`, waits for somebody if opened meanwhile, and is not to be asked in place."""
    makes_wait, numbers = remote.layer_root, {os.stat(path).st_ino for path in paths}

    def layer_root(root: syscalls.Fd) -> syscalls.Fd:
        return makes_wait(root) if not paths or os.fstat(root.fd).st_ino in numbers else root

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "layer_root", layer_root)
        patch.setattr(remote, "_systems", {})
        for name in (*remote.ASKING, "preadv", "proc_path"):
            patch.setattr(syscalls, name, getattr(syscalls, name))
        patch.setattr(remote, "TYPES", Everything())
        for name in CALLS_OF_OS:
            patch.setattr(os, name, not_in_place(getattr(os, name)))
        patch.setattr(syscalls, "proc_path", not_in_place(syscalls.proc_path))
        yield


class Everything(dict[int, str]):
    """Every type of file system."""

    def get(self, key: int, default: Any = None) -> Any:
        return "test"


def not_in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        in_place = threading.current_thread() is threading.main_thread() and remote._attention.answers is not None
        numbers = [arg for arg in (*args, *kwargs.values()) if type(arg) is Number]
        assert not (in_place and numbers), f"{function.__name__} in place"
        return function(*args, **kwargs)

    return call


class Patient:
    """A union as the channel drives it: what must be asked is asked by a thread, and the operation begun again."""

    def __init__(self, union: Union) -> None:
        self._union = union
        self._thread = ThreadPoolExecutor(1)
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._union, name)
        if name == "listdir":
            return self._attended(lambda *args: list(found(*args)))
        return found if not callable(found) or name in ("forget", "close") else self._attended(found)

    def _attended(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            answers: Answers = {}

            def attempt() -> Any:
                with remote.attend(answers):
                    result = function(*args, **kwargs)
                return self._driven(result, answers) if isinstance(result, Generator) else result

            while True:
                try:
                    result = attempt()
                except AskedError as asked:
                    self._find_out(asked)
                else:
                    return _done(result) if isinstance(result, Driven) else result

        return call

    def _find_out(self, asked: AskedError) -> None:
        self.asked += 1
        assert self.asked < 10_000
        self._thread.submit(asked.find_out).result()

    def _driven(self, op: steps.Op[Any], answers: Answers) -> Driven:
        resume: Callable[[], Any] = lambda: op.send(None)  # noqa: E731
        while True:
            with remote.attend(answers):
                try:
                    step = resume()
                except StopIteration as stop:
                    return Driven(stop.value)
            try:
                value = self._thread.submit(step.fn).result() if isinstance(step, steps.Blocking) else None
            except Exception as error:
                resume = raising(op, error)
            else:
                resume = sending(op, value)


def sending(op: steps.Op[Any], value: object) -> Callable[[], Any]:
    return lambda: op.send(value)


def raising(op: steps.Op[Any], error: Exception) -> Callable[[], Any]:
    return lambda: op.throw(error)


class Driven:
    """What an operation has returned."""

    def __init__(self, value: object) -> None:
        self.value = value


def _done(driven: Driven) -> steps.Op[Any]:
    yield from ()
    return driven.value


@pytest.mark.parametrize("scenario", SCENARIOS if EVERY or SOAK else SCENARIOS[::7], ids=lambda each: each.name)
def test_result(scenario: Scenario, scratch: bytes) -> None:
    case = Case(scenario, scratch)
    stack = case.stack()
    descriptors = open_descriptors()
    with lowers_wait():
        union = case.union(stack)
        patient = Patient(union)
        client = Client(patient)  # type: ignore[arg-type]
        assert attempt(scenario.operation, client) == case.errno
        assert patient.asked
        assert case.seen(union) == case.after
        client.forget_all()
        assert union.known() == 1
        union.close()
        patient._thread.shutdown()
        del union, patient, client
        gc.collect()
        wait_for_closers()
    assert open_descriptors() == descriptors
    assert stack.litter() == []
    assert diff(case.view(stack), case.after) == []


def wait_for_closers() -> None:
    for system in remote._systems.values():
        closed = threading.Event()
        system._closers.submit(closed.set)
        assert closed.wait(10)
        for pool in (system.questions, system.readers, system._closers):
            pool.close()


@pytest.fixture
def below(scratch: bytes) -> Iterator[Union]:
    """A union of an upper, a lower that answers, and a lower that waits for somebody."""
    near: dict[bytes, Entry] = {
        b"near": regular(),
        b"both": regular(),
        b"gone": Whiteout(),
        b"sealed": directory(opaque="trusted"),
    }
    far: dict[bytes, Entry] = {name: regular(b"far") for name in (b"far", b"both", b"gone", b"hidden")}
    upper = directory({b"mine": regular(), b"hidden": Whiteout(), b"dir": directory(opaque="trusted")})
    stack = Stack(scratch, [directory(near), directory({**far, b"dir": directory(), b"sealed": directory()})], upper)
    with lowers_wait(stack.lowers[1]):
        union = stack.union()
        yield union
        union.close()
        del union
        gc.collect()
        wait_for_closers()


def test_what_others_decide_is_not_asked(below: Union) -> None:
    with remote.attend({}):
        for name in (b"near", b"both", b"sealed", b"mine", b"dir"):
            assert below.lookup(below.root, name)
        for name in (b"gone", b"hidden"):
            with pytest.raises(FileNotFoundError):
                below.lookup(below.root, name)
        for name in (b"far", b"none"):
            with pytest.raises(AskedError):
                below.lookup(below.root, name)
        with pytest.raises(AskedError):
            below.listdir(below.root, 0)


def test_names_are_asked_for_once(below: Union) -> None:
    listed = [name for name, *_ in below.listdir(below.root, 0)]
    assert b"far" in listed
    caller = Caller(0, 0, 1, UMASK)
    with remote.attend({}):
        with pytest.raises(FileNotFoundError):
            below.lookup(below.root, b"none")
        below.mkdir(below.root, b"new", 0o755, caller)
        steps.run(below.unlink(below.root, b"near"))
        steps.run(below.rename(below.root, b"mine", below.root, b"renamed", 0))
        assert b"renamed" in [name for name, *_ in below.listdir(below.root, 0)]
        far = below.lookup(below.root, b"far").nodeid
        assert below.getattr(far).st.st_size == 3
        with pytest.raises(AskedError):
            steps.run(below.open(far, os.O_RDONLY))
        steps.run(below.unlink(below.root, b"far"))
        assert below.lookup(below.root, b"sealed")


def test_a_listing_asks_together(scratch: bytes) -> None:
    """Whiteouts, which only a stat tells, and what was copied up, whose inode numbers are those of the lowers."""
    many = [b"%d" % number for number in range(200)]
    top = directory({name: Whiteout() for name in many[::2]})
    stack = Stack(scratch, [top, directory({name: regular() for name in many})], directory())
    with lowers_wait():
        union = stack.union()
        patient = Patient(union)
        client = Client(patient)  # type: ignore[arg-type]
        assert len(client.listdir(())) == 100
        assert patient.asked < 15
        for name in many[1::2]:
            client.chmod((name,), 0o600)
        client.forget_all()
        patient.asked = 0
        numbers = dict(client.listdir(()))
        assert len(numbers) == 100
        assert patient.asked < 15
        union.close()
        patient._thread.shutdown()
        del union, patient, client
        gc.collect()
        wait_for_closers()
