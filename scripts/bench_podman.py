"""podman over unionfsd and over fuse-overlayfs, timed in turns: an image of 20 layers, containers alone and at once.

    python -m scripts.bench_podman [--rounds N] [--rootless] [--options OPTION,...]

Needs root, podman, buildah, crun, busybox and fuse-overlayfs; no network. Every program has a store of its own in
namespaces of their own, see tests/system/containers.py.
"""

from __future__ import annotations

import argparse
import shutil
import site
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Final

from tests import harness
from tests.system.containers import Store

LAYERS: Final = 20
CONTAINERS: Final = 20

CONTAINERFILE: Final = """\
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
""" + "".join(
    f"RUN mkdir -p /data/{number} && for i in 0 1 2 3 4 5 6 7 8 9; do echo {number} >/data/{number}/$i; done"
    f" && echo {number} >/data/last\n"
    for number in range(LAYERS - 2)
)


def build(store: Store) -> None:
    """An image of 20 layers, each a step of its own."""
    store.build(store.share, "--layers", "--no-cache", "--quiet", "--tag=image")


def one_by_one(store: Store) -> None:
    """20 containers, one after the other."""
    for _ in range(CONTAINERS):
        store.podman("run", "--rm", "image", "cat", "/data/last")


def at_once(store: Store) -> None:
    """20 containers at the same time."""
    script = "echo $$ >/data/last; cat /data/*/0 >/dev/null"
    started = [store.start("podman", "run", "--rm", "image", "sh", "-c", script) for _ in range(CONTAINERS)]
    for process in started:
        store.finish(process)


TASKS: Final[tuple[Callable[[Store], None], ...]] = (build, one_by_one, at_once)


def main() -> None:
    """Print the seconds of every task, the median of all rounds, as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rootless", action="store_true")
    parser.add_argument("--options", default="spare=30", help="mount options of unionfsd, '' for none")
    given = parser.parse_args()
    programs = ("fuse-overlayfs", "unionfsd")
    took: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        options = list(filter(None, given.options.split(",")))
        stores = {name: _store(stack, name, options, given.rootless) for name in programs}
        for number in range(given.rounds):
            for task in TASKS:
                # In turns, and each of them first every other time.
                for name in sorted(stores, reverse=number % 2 == 1):
                    start = monotonic()
                    task(stores[name])
                    took.setdefault((task.__name__, name), []).append(monotonic() - start)
                    print(f"{task.__name__} {name} {took[task.__name__, name][-1]:.2f} s", file=sys.stderr)
    print(f"| seconds | {' | '.join(programs)} |\n| --- |{' ---: |' * len(programs)}")
    for task in TASKS:
        medians = [statistics.median(took[task.__name__, name]) for name in programs]
        what = (task.__doc__ or "").rstrip(".")
        print(f"| {what} | {' | '.join(f'{seconds:.2f}' for seconds in medians)} |")


def _store(stack: ExitStack, program: str, options: list[str], rootless: bool) -> Store:
    root = Path(tempfile.mkdtemp(prefix="unionfsd-bench-", dir=harness.DISK))
    root.chmod(0o755)
    stack.callback(harness.remove, root)
    if program == "unionfsd" and not rootless:
        path: Path | None = root / program
        assert path is not None
        _install(path)
    else:
        path = None if program == "unionfsd" else Path(f"/usr/bin/{program}")
    wanted = options if program == "unionfsd" else []
    store = stack.enter_context(Store(root, *wanted, program=path, rootless=rootless))
    (store.share / "Containerfile").write_text(CONTAINERFILE)
    shutil.copy("/bin/busybox", store.share / "busybox")
    return store


def _install(path: Path) -> None:
    """The program as `make install` makes it."""
    where = [str(harness.PROJECT), *site.getsitepackages()]
    path.write_text(
        f"#!{Path(sys.executable).resolve()} -IS\nimport sys\nsys.path[:0] = {where!r}\n"
        "from unionfsd.start import program\nprogram()\n"
    )
    path.chmod(0o755)


if __name__ == "__main__":
    main()
