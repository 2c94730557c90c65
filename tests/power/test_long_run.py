"""A long life in short: several users work on one mount without a pause, and what the daemon holds stays the same.

A few seconds in a run of the suite, to see that the load does what it says; UNIONFSD_SOAK_SECONDS=N for that long, with
the numbers printed (`-s`) and held flat.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.harness import PROJECT, Daemon, Layers
from tests.power.load import ROUNDS
from unionfsd.control.client import Client
from unionfsd.ctl import find

pytestmark = pytest.mark.privileged

SOAK_SECONDS: Final = float(os.environ.get("UNIONFSD_SOAK_SECONDS", "0"))
SECONDS: Final = SOAK_SECONDS or 2.0
USERS: Final = 3
#: Directories in the lower that each user has; each is copied up, changed and removed once in a life.
DIRECTORIES: Final = 4000 if SOAK_SECONDS else 40


# What the daemon holds.


class Sample(NamedTuple):
    """What it holds at a moment: `resident` in bytes, the others are numbers."""

    seconds: float
    resident: int
    fds: int
    threads: int
    nodes: int
    cached_fds: int
    names: int
    litter: int


def sample(daemon: Daemon, start: float) -> Sample:
    with Client(find.locate(os.fsencode(daemon.path)).socket) as client:
        stats = client.call("stats")
    threads = len(os.listdir(f"/proc/{daemon.pid}/task"))
    litter = len(os.listdir(daemon.layers.work / "work"))
    held = (stats["nodes"], stats["cached_fds"], stats["names"], litter)
    return Sample(time.monotonic() - start, daemon.resident(), daemon.fds(), threads, *held)


@contextlib.contextmanager
def users(root: Path, seconds: float) -> Iterator[list[subprocess.Popen[str]]]:
    """They work in directories of their own beneath `root`."""
    command = [sys.executable, "-m", "tests.power.load"]
    processes = [
        subprocess.Popen(
            [*command, str(root / f"user{number}"), str(seconds), str(number), str(DIRECTORIES)],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(USERS)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


def furnish(lower: Path) -> None:
    for number in range(USERS):
        for directory in range(DIRECTORIES):
            there = lower / f"user{number}" / f"lower{directory}"
            there.mkdir(parents=True)
            for name in ("a", "b", "c", "d"):
                (there / name).write_bytes(name.encode() * 3000)


@pytest.mark.timeout(SECONDS + 300)
def test_nothing_grows(layers: Layers) -> None:
    furnish(layers.lower)
    samples = []
    with Daemon(layers, patience=SECONDS + 250) as daemon:
        daemon.settle()
        start = time.monotonic()
        with users(daemon.path, SECONDS) as processes:
            while any(process.poll() is None for process in processes):
                time.sleep(SECONDS / 100)
                samples.append(sample(daemon, start))
            results = [(process.wait(), process.communicate()[0]) for process in processes]
        assert all(code == 0 for code, _ in results), results
        rounds = [int(text) for _, text in results]
        assert min(rounds) >= len(ROUNDS)
        print(json.dumps({"rounds": rounds, "samples": [one._asdict() for one in samples[::5]]}))
    assert max(one.litter for one in samples) < 100  # what is deleted and in use has a name there
    if SOAK_SECONDS:
        flat(samples)


def flat(samples: list[Sample]) -> None:
    """From the second quarter to the last, once the lower's directories are used up, nothing may grow."""
    quarter = len(samples) // 4
    for field, slack in (("resident", 8 << 20), ("fds", 32), ("threads", 2), ("nodes", 2000), ("names", 2000)):
        before, after = (
            statistics.median(getattr(one, field) for one in part)
            for part in (samples[quarter : 2 * quarter], samples[-quarter:])
        )
        assert after <= before * 1.05 + slack, f"{field}: {before} and then {after}"
