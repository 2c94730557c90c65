"""Loss of power: what the disk has kept at any moment is a union in which each operation is done or not done.

A real mount is worked on whose upper lies on a disk that is recorded; then the disk is put back to what it had at
moments of that, with the writes since its last flush kept in part, and mounted again by us and by the kernel.

A few hundred moments in a run of the suite; UNIONFSD_SOAK_SECONDS=N goes on with other programs for N seconds.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests import harness
from tests.harness import Daemon, Layers
from tests.power import disks
from tests.power.disks import Loss, Replay
from tests.power.programs import LIVES, Expectation, Group, Program, scenario_group
from tests.power.recorder import read_log, recording
from tests.union.client import union_snapshot
from tests.union.scenarios import double_scenarios, single_scenarios
from tests.union.stack import MS_RDONLY, SCRATCH, overlay
from tests.union.trees import Tree, build, diff, merged, plant, settled, snapshot, timeless
from unionfsd.options import MountConfig
from unionfsd.union import Union

pytestmark = pytest.mark.privileged

SOAK_SECONDS: Final = float(os.environ.get("UNIONFSD_SOAK_SECONDS", "0"))
SCENARIOS: Final = [*single_scenarios(), *double_scenarios(every=False)]
#: Of one program: groups of the crash matrix, and moments that are looked at.
GROUPS: Final = 60 if SOAK_SECONDS else 16
MOMENTS: Final = 150 if SOAK_SECONDS else 20
UMASK: Final = 0o022


#: The daemon, with the disk committing names, but no data, after each of its calls that changes something.
COMMITTING: Final = """
import os, sys
from unionfsd import cli, syscalls
other = os.open({other!r}, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
def committed(call):
    def wrapped(*args, **kwargs):
        result = call(*args, **kwargs)
        os.write(other, b"other")
        os.fsync(other)
        return result
    return wrapped
for name in syscalls.MUTATING:
    setattr(syscalls, name, committed(getattr(syscalls, name)))
sys.exit(cli.main())
"""


class Setup(NamedTuple):
    """A file system for the upper and how to mount: `options` of ours; of the kernel's those of `overlayfs`.

    `alone`: the kernel is only shown the layers, for there is something that only we repair. `each_call`: the disk
    commits after each call of the daemon's that changes something, and not at any moment.
    """

    kind: str
    options: dict[str, Any]
    overlayfs: bytes = b""
    alone: bool = False
    each_call: bool = False


SETUPS: Final = {
    "ext4": Setup("ext4", {}),
    "ext4, call by call": Setup("ext4", {}, each_call=True),
    "ext4, metacopy": Setup("ext4", {"metacopy": "on"}, b",metacopy=on,redirect_dir=on"),
    "ext4, xattr whiteouts": Setup("ext4", {"whiteout": "xattr"}, alone=True, each_call=True),
    "xfs": Setup("xfs", {"metacopy": "on"}, b",metacopy=on,redirect_dir=on"),
}


@pytest.fixture
def scratch() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="unionfsd-power-", dir=SCRATCH))
    before = os.umask(UMASK)
    yield root
    os.umask(before)
    harness.remove(root)


class Trial:
    """One program on one mount, recorded, and the losses of power in it."""

    def __init__(self, setup: Setup, root: Path, scratch: Path, seed: int) -> None:
        self._setup = setup
        self._root = root
        self._scratch = scratch
        self._rng = random.Random(seed)
        self._since_ns = time.time_ns() - 10**9
        self._image = scratch / "image"
        self._lower = root / "lower"
        self._merged = root / "merged"
        self._program = Program([*LIVES, *self._choose()], self._rng)
        self._merged.mkdir()

    def _choose(self) -> list[Callable[[bytes], Group]]:
        return [scenario_group(scenario) for scenario in self._rng.sample(SCENARIOS, GROUPS)]

    def record(self) -> Replay:
        """Run the program on the mount; what is on disk before it begins is not part of the trial."""
        disks.make(self._setup.kind, self._image)
        with disks.mounted(self._setup.kind, self._image, self._scratch / "fs") as fs:
            build(os.fsencode(fs / "upper"), self._program.upper)
            (fs / "work").mkdir()
        build(os.fsencode(self._lower), self._program.lower)
        with (
            recording(self._scratch, self._image) as recorder,
            disks.mounted(self._setup.kind, recorder.disk, self._scratch / "fs") as fs,
        ):
            layers = Layers(self._root, lowers=[self._lower], upper_root=fs)
            with self._daemon(layers, fs), self._committing(fs):
                self._results = self._program.run(
                    os.fsencode(layers.mnt),
                    lambda number: recorder.note("begun"),
                    lambda number: recorder.note("ended"),
                )
        self._records = read_log(recorder.log)
        return Replay(self._image, self._records, self._scratch)

    def _daemon(self, layers: Layers, fs: Path) -> Daemon:
        options = [f"{name}={value}" for name, value in self._setup.options.items()]
        if self._setup.each_call:
            return Daemon(layers, options, program=("-c", COMMITTING.format(other=str(fs / "other"))))
        return Daemon(layers, options)

    def _committing(self, fs: Path) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._setup.each_call else committing(fs, self._rng.random())

    def expect(self) -> Expectation:
        """The states that may be found, from a run of the program on a plain directory."""
        plain = os.fsencode(self._root / "plain")
        plant(plain, merged([self._program.upper, self._program.lower]))
        results, trees = self._program.states(plain)
        assert results == self._results, [
            (step.name, a, b) for step, a, b in zip(self._program.steps, results, self._results, strict=True) if a != b
        ]
        return Expectation(self._program.steps, [self._comparable(tree) for tree in trees])

    def losses(self) -> list[Loss]:
        """Moments of the program: right after a flush, and between two with the last writes kept in every way."""
        first = next(index for index, record in enumerate(self._records) if record.data == b"begun")
        flushes = [at for at in disks.flushes(self._records) if at > first]
        rng = self._rng
        losses = [
            Loss(at, lossy=False, seed=rng.randrange(2)) for at in rng.sample(flushes, min(MOMENTS // 3, len(flushes)))
        ]
        while len(losses) < MOMENTS:
            at = rng.randrange(first, len(self._records)) + 1
            losses.append(Loss(at, lossy=rng.random() < 0.7, seed=rng.randrange(1 << 30)))
        return sorted(losses)

    def suffer(self, replay: Replay, loss: Loss, expected: Expectation) -> None:
        """Mount what is left, twice, and look whether it may be so."""
        notes = replay.notes(loss.at)
        image = replay.disk(loss)
        try:
            with disks.mounted(self._setup.kind, image, self._scratch / "left") as fs:
                seen = self._mount_again(fs, kernel_first=loss.seed % 2 == 1)
        finally:
            image.unlink()
        lines = expected.differences(self._comparable(seen), notes.count("ended"), notes.count("begun"))
        assert not lines, f"{loss} with {len(notes)} notes:\n" + "\n".join(lines)

    def _mount_again(self, fs: Path, *, kernel_first: bool) -> Tree:
        if self._setup.alone:
            seen = self._ours(fs)
            kernel = self._layers_shown(fs)
        elif kernel_first:
            kernel = self._kernels(fs)
            seen = self._ours(fs)
        else:
            seen = self._ours(fs)
            kernel = self._kernels(fs)
        assert diff(timeless(seen), timeless(kernel)) == []
        return seen

    def _ours(self, fs: Path) -> Tree:
        union = Union.mount(
            MountConfig(
                lowerdirs=(os.fsencode(self._lower),),
                upperdir=os.fsencode(fs / "upper"),
                workdir=os.fsencode(fs / "work"),
                mountpoint=os.fsencode(self._merged),
                **self._setup.options,
            )
        )
        try:
            seen = union_snapshot(union)
        finally:
            union.close()
        assert harness.litter(fs / "work") == []
        return seen

    def _kernels(self, fs: Path) -> Tree:
        layers = b"lowerdir=%b,upperdir=%b,workdir=%b" % tuple(
            map(os.fsencode, (self._lower, fs / "upper", fs / "work"))
        )
        return self._overlay(layers)

    def _layers_shown(self, fs: Path) -> Tree:
        return self._overlay(b"lowerdir=%b:%b" % (os.fsencode(fs / "upper"), os.fsencode(self._lower)), MS_RDONLY)

    def _overlay(self, layers: bytes, flags: int = 0) -> Tree:
        merged = os.fsencode(self._merged)
        with overlay(merged, layers + self._setup.overlayfs, flags=flags):
            return snapshot(merged)

    def _comparable(self, tree: Tree) -> Tree:
        return timeless(settled(tree, self._since_ns))


@contextlib.contextmanager
def committing(fs: Path, pause: float) -> Iterator[None]:
    """Meanwhile have the file system commit at any moment, again and again: as it does by itself, only more often.

    With all data, or with that of another file alone.
    """
    over = threading.Event()

    def run() -> None:
        rng = random.Random(pause)
        with (fs / "other").open("wb", buffering=0) as other:
            while not over.wait(rng.random() * pause * 0.01):
                if rng.random() < 0.5:
                    disks.commit(fs)
                else:
                    other.write(b"other")
                    os.fsync(other.fileno())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def seeds() -> Iterator[int]:
    """One, or as many as there is time for."""
    yield 1
    deadline = time.monotonic() + SOAK_SECONDS / len(SETUPS)
    while time.monotonic() < deadline:
        yield random.SystemRandom().randrange(10**6)


@pytest.mark.timeout(SOAK_SECONDS + 120)
@pytest.mark.parametrize("name", SETUPS)
def test_power_loss(name: str, scratch: Path) -> None:
    for seed in seeds():
        place = scratch / str(seed)
        (place / "union").mkdir(parents=True)
        trial = Trial(SETUPS[name], place / "union", place, seed)
        replay = trial.record()
        expected = trial.expect()
        suffer_all(trial, replay, expected, seed)
        harness.remove(place)


def suffer_all(trial: Trial, replay: Replay, expected: Expectation, seed: int) -> None:
    losses: Sequence[Loss] = trial.losses()
    for loss in losses:
        try:
            trial.suffer(replay, loss, expected)
        except BaseException as exc:
            exc.add_note(f"seed {seed}, {loss}")
            raise
