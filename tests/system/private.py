"""Commands in mount and pid namespaces of their own: whatever they mount, or leave running, ends with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.harness import DISK, PROJECT

UNSHARE: Final = ("unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc")

# As on a real host: mounts are shared, so a careless unmount of a copy unmounts the original. With hybrid cgroups
# container runtimes take the unified hierarchy for all there is. Copies of the mounts of tests that run at the same
# time would keep their daemons alive.
PROLOGUE: Final = f"""\
set -e
mount --make-rprivate /
findmnt -nlo TARGET | grep -E '^({DISK}|/dev/shm)/unionfsd-' | xargs --no-run-if-empty umount --lazy || :
mount --make-rshared /
! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified
"""

_PROGRAM: Final = """\
#!{python}
import sys
sys.path.insert(0, {project!r})
from unionfsd.cli import main
sys.exit(main())
"""


def install(path: Path) -> None:
    """Put the command line of this project at `path`, as a program."""
    path.write_text(_PROGRAM.format(python=sys.executable, project=str(PROJECT)))
    path.chmod(0o755)


def shell(
    script: str, *, seconds: float | None = 60, shown: bool = False, **environment: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run a shell script to its end; its output goes where ours does if it is to be `shown`."""
    return subprocess.run(
        [*UNSHARE, "sh", "-c", PROLOGUE + "set +e\n" + script],
        stdin=subprocess.DEVNULL,
        capture_output=not shown,
        text=True,
        cwd="/",
        env=os.environ | {name: str(value) for name, value in environment.items()},
        timeout=seconds,
        check=False,
    )
