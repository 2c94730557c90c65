"""Fixtures of the mount tests; the machinery is in `tests.harness`."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import harness
from tests.harness import (
    MODES,
    REFERENCE,
    WRITETHROUGH,
    Daemon,
    DaemonFactory,
    FuseOverlayFS,
    Layers,
    LogPolicy,
    Mode,
    Mount,
    MountFactory,
    OverlayFS,
)

#: A hung mount is forced off so long before pytest gives the test up.
_MARGIN = 15.0


# A run of the suite is the same every time; what random programs find is looked for by the soak (docs/conformance.md).
# How long an example takes says nothing on a busy machine.
for name, same in (("same", True), ("random", False)):
    hypothesis.settings.register_profile(
        name, derandomize=same, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
hypothesis.settings.load_profile("random" if os.environ.get("UNIONFSD_SOAK_SECONDS") else "same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--mode",
        action="append",
        choices=[str(mode) for mode in (*MODES, WRITETHROUGH, REFERENCE)],
        help="run the mount tests over this mode only; may be repeated (default: every mode but the reference)",
    )
    parser.addoption(
        "--rootless",
        choices=("userns", "user"),
        help="run the tests as root of a user namespace, or as an ordinary user who mounts through fusermount3",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "deviates: the kernel's overlayfs does otherwise; docs/deviations.md says why")
    config.addinivalue_line("markers", "privileged: needs root's rights over the machine, or other users")
    config.addinivalue_line("markers", "owners: gives things to other users, which an ordinary user cannot")
    config.addinivalue_line("markers", "mounting: mounts something itself, which an ordinary user cannot")
    # Under nohup, or in the background of a script, daemons would inherit that these signals are nothing to them.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """With --rootless, pytest within pytest, with the same arguments."""
    who = config.getoption("--rootless")
    if who is None:
        return None
    from tests.system.rootless import run_pytest

    words = [str(word) for word in config.invocation_params.args]
    at = next(index for index, word in enumerate(words) if word.startswith("--rootless"))
    del words[at : at + (1 if "=" in words[at] else 2)]
    with tempfile.TemporaryDirectory(dir=harness.DISK, prefix="unionfsd-") as root:
        return run_pytest(who, Path(root), words, seconds=None, shown=True).returncode


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mode" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("mode")
        modes = [*MODES, *getattr(metafunc.module, "MORE_MODES", ())]
        if wanted:
            modes = [mode for mode in (*MODES, WRITETHROUGH, REFERENCE) if str(mode) in wanted]
        elif harness.ROOTLESS:  # the kernel passes files on for nobody else than root
            modes = [mode for mode in modes if mode.io != "passthrough"]
        metafunc.parametrize("mode", modes, ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, over the reference, what it is known to do otherwise; without rights, what needs them."""
    skipped = [
        item
        for item in items
        if (item.get_closest_marker("deviates") and str(REFERENCE) in item.nodeid)
        or (item.get_closest_marker("privileged") and harness.ROOTLESS)
        or (harness.ROOTLESS == "user" and (item.get_closest_marker("owners") or item.get_closest_marker("mounting")))
    ]
    if skipped:
        config.hook.pytest_deselected(items=skipped)
        items[:] = [item for item in items if item not in skipped]


@pytest.fixture
def disk() -> Iterator[Path]:
    """An empty directory on a real disk, open to every user; gone after the test with all that was mounted in it."""
    if os.geteuid() != 0 and not harness.ROOTLESS:
        pytest.fail("the mount tests mount file systems: run them as root")
    root = Path(tempfile.mkdtemp(prefix="unionfsd-", dir=harness.DISK))
    root.chmod(0o755)
    yield root
    harness.remove(root)


@pytest.fixture
def layers(disk: Path) -> Layers:
    """One empty lower, an upper and a work directory."""
    return Layers(disk)


@pytest.fixture
def plain(disk: Path) -> Path:
    """A directory on the same disk without a union over it: what a test does there is the answer to expect."""
    directory = disk / "plain"
    directory.mkdir()
    return directory


@pytest.fixture
def log_policy() -> LogPolicy:
    return LogPolicy()


@pytest.fixture
def expect_warning(log_policy: LogPolicy) -> Callable[[str], None]:
    """Declare that the daemon must log a line that matches a regular expression."""
    return log_policy.expect


@pytest.fixture
def mounted(
    request: pytest.FixtureRequest, mode: Mode, layers: Layers, log_policy: LogPolicy
) -> Iterator[MountFactory]:
    """Mount `layers` (or others) in this test's mode; unmounted and checked after the test."""
    patience = _timeout(request) - _MARGIN
    default = layers
    with contextlib.ExitStack() as stack:

        def mount(*options: str, layers: Layers | None = None, upper: bool = True) -> Mount:
            if mode == REFERENCE:
                return stack.enter_context(OverlayFS(layers or default, *options, upper=upper))
            daemon = Daemon(
                layers or default, [*mode.options, *options], upper=upper, log_policy=log_policy, patience=patience
            )
            return stack.enter_context(daemon)

        yield mount


def _timeout(request: pytest.FixtureRequest) -> float:
    marker = request.node.get_closest_marker("timeout")
    return float(marker.args[0] if marker else request.config.getini("timeout"))


@pytest.fixture
def daemon(mode: Mode, mounted: DaemonFactory) -> DaemonFactory:
    """The same as `mounted`, for tests that look at the daemon's process."""
    return mounted


@pytest.fixture
def overlayfs(layers: Layers) -> Iterator[MountFactory]:
    """Mount layers with the kernel's overlayfs, to compare."""
    with _peer(OverlayFS, layers) as factory:
        yield factory


@pytest.fixture
def fuse_overlayfs(layers: Layers) -> Iterator[MountFactory]:
    """Mount layers with fuse-overlayfs, to compare."""
    with _peer(FuseOverlayFS, layers) as factory:
        yield factory


@contextlib.contextmanager
def _peer(kind: type[OverlayFS | FuseOverlayFS], default: Layers) -> Iterator[MountFactory]:
    with contextlib.ExitStack() as stack:

        def mount(*options: str, layers: Layers | None = None, upper: bool = True) -> Mount:
            return stack.enter_context(kind(layers or default, *options, upper=upper))

        yield mount
