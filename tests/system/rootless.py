"""The mount tests run by somebody who is not root: pytest within pytest, in namespaces of its own.

- `userns`: root of a user namespace with the ids of an ordinary user with subordinate ones, as rootless podman has it.
  It may mount, but has no rights over the machine: no ``trusted.`` xattrs, no device nodes.
- `user`: an ordinary user without any, who mounts through fusermount3.

/dev/fuse is open to everybody there, as distributions ship it.
"""

from __future__ import annotations

import shlex
import site
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from tests.harness import GROUP, PROJECT, USER
from tests.system import private

Who = Literal["userns", "user"]

# Python and the project are where everybody may read them; what the tests make is in a directory of their user's.
_PREPARE: Final = """\
cd {root}
mkdir -p python project site disk venv/bin venv/lib/{name}
mkdir -m 700 disk/run
mknod -m 666 fuse c 10 229
mount --bind fuse /dev/fuse
mount --bind {python} python
mount --bind {project} project
mount --bind {site} site
echo 'home = {root}/python/bin' >venv/pyvenv.cfg
ln -s {root}/python/bin/{name} venv/bin/python
ln -s {root}/site venv/lib/{name}/site-packages
{{ cat /etc/passwd; echo 'tester:x:{uid}:{gid}::{root}/disk:/bin/sh'; }} >passwd
mount --bind passwd /etc/passwd
chown -R {owner} disk
export LD_LIBRARY_PATH={root}/python/lib PYTHONPATH={root}/project PYTHONDONTWRITEBYTECODE=1
export UNIONFSD_TEST_DIR={root}/disk UNIONFSD_TEST_ROOTLESS={who} XDG_RUNTIME_DIR={root}/disk/run
export HOME={root}/disk TMPDIR={root}/disk HYPOTHESIS_STORAGE_DIRECTORY={root}/disk/hypothesis
cd project
"""

# Who enters a user namespace from outside has all rights in it; a process that made one has them until it execs.
_USERNS: Final = """\
unshare --user sleep 1000 &
holder=$!
until [ "$(readlink /proc/$holder/ns/user)" != "$(readlink /proc/self/ns/user)" ]; do sleep 0.01; done
echo 0 100000 65536 >/proc/$holder/uid_map
echo 0 100000 65536 >/proc/$holder/gid_map
set +e
nsenter --user=/proc/$holder/ns/user --setuid=0 --setgid=0 unshare --mount --propagation=private {pytest}
code=$?
kill $holder
exit $code
"""

_USER: Final = "exec setpriv --reuid={uid} --regid={gid} --clear-groups {pytest}\n"


def run_pytest(
    who: Who, root: Path, words: Sequence[str], *, seconds: float | None, shown: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run pytest with `words` as its arguments; `root` is an empty directory."""
    root.chmod(0o755)
    values = {
        "root": shlex.quote(str(root)),
        "name": f"python{sys.version_info.major}.{sys.version_info.minor}",
        "python": shlex.quote(sys.base_prefix),
        "project": shlex.quote(str(PROJECT)),
        "site": shlex.quote(site.getsitepackages()[0]),
        "who": who,
        "uid": USER,
        "gid": GROUP,
        "owner": "100000:100000" if who == "userns" else f"{USER}:{GROUP}",
        "pytest": shlex.join([f"{root}/venv/bin/python", "-m", "pytest", "-p", "no:cacheprovider", "-q", *words]),
    }
    script = "set -e\n" + (_PREPARE + (_USERNS if who == "userns" else _USER)).format(**values)
    return private.shell(script, seconds=seconds, shown=shown)
