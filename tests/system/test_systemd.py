"""The unit beneath a real systemd: a user's manager with root's rights, in namespaces of its own."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.harness import PROJECT, Layers
from tests.system import private
from tests.system.test_fdstore import LOAD

MANAGER: Final = Path("/lib/systemd/systemd")
UNIT: Final = PROJECT / "systemd" / "unionfsd@.service"

#: Starts the manager and the unit. Control groups are taken away in the end, as far as they are the manager's own.
_BEGIN: Final = """
mount -t tmpfs run /run
# Of the other hierarchies systemd does not learn when a group is empty, and waits for what has ended.
[ ! -d /sys/fs/cgroup/unified ] || mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
mkdir -p /run/user/0 /run/systemd/system
export XDG_RUNTIME_DIR=/run/user/0 SYSTEMD_UNIT_PATH="$units:" SYSTEMD_LOG_TARGET=console DBUS_SESSION_BUS_ADDRESS=
"$manager" --user --unit=none.target >"$log" 2>&1 & manager=$!
groups=$(find /sys/fs/cgroup -maxdepth 2 -name init.scope)
end() {
    systemctl --user stop 'unionfsd@*' || :
    kill -KILL "$manager"
    wait "$manager" || :
    find /sys/fs/cgroup -depth -path '*/app.slice*' -type d -exec rmdir {} + || :
    [ -n "$groups" ] || find /sys/fs/cgroup -maxdepth 2 -name init.scope -exec rmdir {} + || :
}
trap end EXIT
waited=0
until systemctl --user show-environment >/dev/null 2>&1; do
    sleep 0.1
    [ $((waited += 1)) -lt 100 ] || exit 9
done
served() { systemctl --user show --property=MainPID --value unionfsd@test; }
systemctl --user start unionfsd@test
"""


@pytest.fixture
def units(layers: Layers) -> Path:
    """The unit as it is installed, but for where the mount is described; and a target with nothing in it."""
    directory = layers.root / "units"
    directory.mkdir()
    for name, what in (("unionfsd", "unionfsd.cli import program"), ("unionfsctl", "unionfsd.ctl.main import main")):
        path = directory / name
        path.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(PROJECT)!r})\n"
            f"from {what}\nsys.exit({what.split()[-1]}())\n"
        )
        path.chmod(0o755)
    (layers.lower / "file").write_text("lower\n")
    (layers.root / "test.toml").write_text(
        f"[mount.test]\nmountpoint = '{layers.mnt}'\nlowerdir = '{layers.lower}'\n"
        f"upperdir = '{layers.upper}'\nworkdir = '{layers.work}'\nlog = '{layers.root}/unionfsd.log'\n"
    )
    text = re.sub(r"(?m)^Exec.*?\b(?=unionfs\w+ )", lambda found: f"{found[0]}{directory}/", UNIT.read_text())
    text = text.replace("[Service]\n", f"[Service]\nStandardError=append:{layers.root}/stderr.log\n")
    (directory / UNIT.name).write_text(text.replace("/etc/unionfsd/", f"{layers.root}/"))
    (directory / "none.target").write_text("[Unit]\nDescription=Nothing\n")
    return directory


def manage(layers: Layers, units: Path, script: str) -> list[str]:
    """The lines that a script says which runs beneath the manager, the unit started."""
    done = private.shell(
        f"set -e\n{_BEGIN}\n{script}",
        units=units,
        manager=MANAGER,
        log=layers.root / "manager.log",
        mnt=layers.mnt,
        config=layers.root / "test.toml",
        python=sys.executable,
        load=LOAD,
        seconds=100,
    )
    logs = [(layers.root / name) for name in ("manager.log", "stderr.log", "unionfsd.log")]
    told = "".join(path.read_text() for path in logs if path.exists())
    assert done.returncode == 0, f"exit {done.returncode}: {done.stdout}{done.stderr}{told}"
    return done.stdout.splitlines()


#: What happens while somebody works on the mount, who must see no error; the mount is the same afterwards.
_WORK: Final = """
mkfifo "$XDG_RUNTIME_DIR/over"
"$python" -c "$load" "$mnt" <"$XDG_RUNTIME_DIR/over" & user=$!
exec 9>"$XDG_RUNTIME_DIR/over"
before=$(stat -c %d "$mnt") first=$(served)
DISTURB
[ "$(served)" != "$first" ]
[ "$(stat -c %d "$mnt")" = "$before" ]
exec 9>&-
wait "$user"
systemctl --user stop unionfsd@test
! mountpoint -q "$mnt"
"""


def test_a_restart_leaves_the_mount_to_the_next_process(layers: Layers, units: Path) -> None:
    restart = "for turn in 1 2 3; do systemctl --user restart unionfsd@test; done"
    said = manage(layers, units, _WORK.replace("DISTURB", restart))
    assert said[0] == "at work"
    assert float(said[1]) < 5
    log = (layers.root / "unionfsd.log").read_text()
    assert log.count("restarting: the mount is left to the next process") == 3
    assert log.count("is served again") == 3


def test_what_is_killed_is_started_and_goes_on(layers: Layers, units: Path) -> None:
    said = manage(
        layers,
        units,
        _WORK.replace(
            "DISTURB",
            """
            systemctl --user kill --signal=KILL unionfsd@test
            state() { systemctl --user show --property=NRestarts,SubState --value unionfsd@test | xargs; }
            waited=0
            until [ "$(state)" = "1 running" ]; do
                sleep 0.05
                [ $((waited += 1)) -lt 200 ] || { systemctl --user status unionfsd@test; exit 7; }
            done
            """,
        ),
    )
    assert said[0] == "at work"
    assert float(said[1]) < 5
    assert (layers.root / "unionfsd.log").read_text().count("is served again") == 1


def test_a_restart_with_another_configuration_mounts_anew(layers: Layers, units: Path) -> None:
    """What was written is put into the upper first, as at every unmount."""
    said = manage(
        layers,
        units,
        """
        echo written >"$mnt/new"
        echo 'noexec = true' >>"$config"
        systemctl --user restart unionfsd@test
        ls "$mnt"
        cat "$mnt/new"
        findmnt --noheadings --output OPTIONS "$mnt" | grep --only-matching noexec
        """,
    )
    assert said == ["file", "new", "written", "noexec"]
    assert (
        "restarting, and unmounting: unionfsd: the running mount has other options: mount_flags, noexec (unmount"
        in ((layers.root / "unionfsd.log").read_text())
    )


def test_a_stop_unmounts_and_nothing_is_kept(layers: Layers, units: Path) -> None:
    said = manage(
        layers,
        units,
        """
        systemctl --user show --property=NFileDescriptorStore --value unionfsd@test
        systemctl --user stop unionfsd@test
        ! mountpoint -q "$mnt"
        systemctl --user show --property=NFileDescriptorStore --value unionfsd@test
        systemctl --user show --property=Result --value unionfsd@test
        """,
    )
    assert said == ["8", "0", "success"]
