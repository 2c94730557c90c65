"""Faults: every operation from every state, with each of its system calls failing, those that only read included.

What must hold of the call that fails, whatever fails it: the caller is told that errno, or what the operation ends in
without the fault; the view is the one before, or if success was told the one after; nothing is left open, known, or in
the work directory; and the same operation, asked for again, does what it does without a fault.

One state for each operation and every fifth call; all of them with UNIONFSD_SOAK_SECONDS.
"""

from __future__ import annotations

import errno
import gc
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.union.client import UMASK, Client
from tests.union.scenarios import Scenario
from tests.union.seam import READING, READING_OF_OS, Failing, Seam
from tests.union.stack import scratch_directory
from tests.union.test_crash import EVERY, SAMPLE, SCENARIOS, Case, attempt
from tests.union.trees import diff
from unionfsd import syscalls

#: Calls that remove what is staged: what they fail to is logged, and left to the next mount.
CLEANING = ("unlink_at", "rmdir_at", "stat_at", "open_dir", "scandir")
SOAK = bool(os.environ.get("UNIONFSD_SOAK_SECONDS"))
#: What a call may fail with at any time: any, and one that changes something.
ANY = (errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
CHANGING = (errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
#: Calls that may come when all is done: for the answer, or because a copy-up has cut the file already.
AFTERWARDS = (*READING, *READING_OF_OS, "truncate")


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(UMASK)
    yield
    os.umask(before)


@pytest.fixture(autouse=True)
def unlogged() -> Iterator[None]:
    """A failure that is logged holds descriptors for as long as pytest keeps the log."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def scratch() -> Iterator[bytes]:
    with scratch_directory() as path:
        yield path


@pytest.mark.parametrize("scenario", SCENARIOS if EVERY or SOAK else SAMPLE, ids=lambda scenario: scenario.name)
def test_fault_anywhere(scenario: Scenario, scratch: bytes) -> None:
    case = Case(scenario, scratch)
    numbers, changing = itertools.cycle(ANY), itertools.cycle(CHANGING)
    for index, name in list(enumerate(calls(case)))[:: 1 if SOAK else 5]:
        fail_once(case, index, next(changing if name in syscalls.MUTATING else numbers), name)


def calls(case: Case) -> list[str]:
    """Every system call of the operation."""
    union = case.union(case.stack())
    with Seam(everything=True) as seam:
        attempt(case.scenario.operation, Client(union))
    union.close()
    return seam.calls


def fail_once(case: Case, index: int, number: int, name: str) -> None:
    stack = case.stack()
    descriptors = open_descriptors()
    union = case.union(stack)
    client = Client(union)
    where = f"{errno.errorcode[number]} from call {index}, {name}"
    with Failing(index, number, everything=True):
        got = attempt(case.scenario.operation, client)
    assert got in (number, case.errno), f"errno {got}: {where}"
    seen = case.seen(union)
    case.must_be_whole(seen, where)
    if got == 0:
        assert seen == case.after, where
    elif case.errno == 0 and not (name in AFTERWARDS and seen == case.after):
        assert seen == case.before, where
        assert attempt(case.scenario.operation, client) == case.errno, f"again after {where}"
        assert case.seen(union) == case.after, f"again after {where}"
    client.forget_all()
    assert union.known() == 1, where
    union.close()
    gc.collect()
    assert open_descriptors() == descriptors, where
    if name not in CLEANING:
        assert stack.litter() == [], where
    if got == 0 or case.errno == 0:
        assert diff(case.view(stack), case.after) == [], where


def open_descriptors() -> list[str]:
    """What this process has open."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(entry.readlink()))
        except FileNotFoundError:
            pass  # the one that was listing
    return sorted(links)
