"""unionfsd beneath a service manager, whose part the tests play: readiness, status, watchdog, reload; and the unit."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import PROJECT, Layers, children, mounts, run, wait_for
from tests.system.service import Service, served
from unionfsd import errors

UNIT = PROJECT / "systemd" / "unionfsd@.service"
EXAMPLES = PROJECT / "systemd" / "examples"


@pytest.fixture
def service(layers: Layers) -> Iterator[Service]:
    with served(layers) as service:
        yield service


def test_ready_comes_first_and_with_the_mount(service: Service) -> None:
    service.start()
    assert service.hear() == {"READY": "1", "MAINPID": str(service.pid)}
    assert service.layers.mnt in mounts()
    assert (service.layers.mnt / "file").read_text() == "lower\n"


def test_what_cannot_be_mounted_is_never_ready(service: Service) -> None:
    service.config.write_text(service.config.read_text().replace(str(service.layers.lower), "/nonexistent"))
    service.start()
    assert service.end() == errors.LAYER
    assert service.messages() == 0


def test_the_watchdog_is_pinged_while_the_loop_runs(service: Service) -> None:
    service.start(watchdog=400_000)
    service.hear_of("READY")
    for _ in range(5):
        assert service.hear()["WATCHDOG"] == "1"
    os.kill(service.pid, signal.SIGSTOP)
    assert service.messages() <= 1, "a stopped loop goes on pinging"
    os.kill(service.pid, signal.SIGCONT)
    assert service.hear()["WATCHDOG"] == "1"


def test_the_status_has_figures(service: Service) -> None:
    service.start(watchdog=400_000)
    service.hear_of("READY")
    (service.layers.mnt / "file").write_text("x" * 5000)
    (service.layers.mnt / "file").chmod(0o600)
    wait_for(lambda: ", 1 copied up" in service.hear_of("STATUS")["STATUS"], "the status never told of the copy-up")
    assert re.fullmatch(r"[1-9]\d* requests, 1 copied up \(0 KiB\), [1-9]\d* objects known", service.hear()["STATUS"])


def test_without_a_watchdog_there_is_a_status_alone(service: Service) -> None:
    service.start()
    service.hear_of("READY")
    assert set(service.hear()) == {"STATUS"}


def test_reload_opens_the_log_anew(service: Service) -> None:
    log = service.layers.root / "own.log"
    service.config.write_text(service.config.read_text() + f"log = '{log}'\n")
    service.start()
    service.hear_of("READY")
    log.rename(log.with_suffix(".1"))
    os.kill(service.pid, signal.SIGHUP)
    assert int(service.hear_of("RELOADING")["MONOTONIC_USEC"]) > 0
    assert service.hear() == {"READY": "1"}
    os.kill(service.pid, signal.SIGTERM)
    assert service.end() == errors.OK
    assert "mounted on" in log.with_suffix(".1").read_text()
    assert "stopping: SIGTERM" in log.read_text()


def test_stopping_unmounts(service: Service) -> None:
    service.start()
    service.hear_of("READY")
    os.kill(service.pid, signal.SIGTERM)
    service.hear_of("STOPPING")
    assert service.end() == errors.OK
    assert service.layers.mnt not in mounts()


#: Runs a command where /run is empty but for the journal's socket, which is $1 if there is one.
_OWN_RUN = """
mount -t tmpfs run /run && mkdir -p /run/systemd/journal
[ -z "$1" ] || { touch /run/systemd/journal/socket && mount --bind "$1" /run/systemd/journal/socket; }
shift; exec "$@"
"""


def own_run(journal: str = "") -> tuple[str, ...]:
    return ("unshare", "--mount", "--propagation=private", "sh", "-ec", _OWN_RUN, "sh", journal)


def test_entries_of_the_journal_have_fields(service: Service, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        journal.settimeout(20)
        service.start(*own_run(str(tmp_path / "journal")))
        service.hear_of("READY")
        entry = journal.recv(65536).decode().splitlines()
        while not entry[0].startswith("MESSAGE=mounted on"):
            entry = journal.recv(65536).decode().splitlines()
        assert entry[0] == f"MESSAGE=mounted on {service.layers.mnt}"
        assert {
            "PRIORITY=6",
            f"UNIONFSD_MOUNTPOINT={service.layers.mnt}",
            f"SYSLOG_PID={children(service.pid)[0]}",
        } <= set(entry)
        assert service.log.read_text() == ""
        os.kill(service.pid, signal.SIGTERM)
        assert service.end() == errors.OK


def test_lines_for_the_journal_carry_their_priority(service: Service) -> None:
    service.config.write_text(service.config.read_text() + "nfs_export = 'on'\nkeeper = 'on'\n")
    service.start(*own_run())
    service.hear_of("READY")
    lines = service.log.read_text().splitlines()
    assert f"<6>mounted on {service.layers.mnt}" in lines
    assert any(line.startswith("<4>keeper=off: with nfs_export=on") for line in lines)


# The unit.


def settings(name: str) -> list[str]:
    """All words that the unit's service section gives to a setting."""
    lines = UNIT.read_text().splitlines()
    return [word for line in lines if line.startswith(name + "=") for word in line.partition("=")[2].split()]


def test_the_unit_s_privileges_are_enough(service: Service) -> None:
    """What a container root needs, under the capabilities that the unit leaves."""
    bounds = ",".join(["-all", *(word.removeprefix("CAP_").lower() for word in settings("CapabilityBoundingSet"))])
    service.start("setpriv", f"--bounding-set={bounds.replace(',', ',+')}", "--inh-caps=-all", "--no-new-privs")
    service.hear_of("READY")
    mnt, upper = service.layers.mnt, service.layers.upper
    assert "CapBnd:\t0000" in Path(f"/proc/{service.pid}/status").read_text()
    (mnt / "file").chmod(0o6755)
    os.chown(mnt / "file", 5, 6)
    (mnt / "file").chmod(0o6755)
    run("setcap", "cap_net_raw+ep", mnt / "file")
    os.setxattr(mnt / "file", "trusted.mine", b"value")
    os.mknod(mnt / "null", 0o20666, os.makedev(1, 3))
    assert (mnt / "null").read_bytes() == b""
    (mnt / "private").mkdir(mode=0)
    os.chown(mnt / "private", 54321, 54321)
    (mnt / "private" / "file").write_text("root's\n")
    (service.layers.mnt / "file").unlink()
    assert (upper / "file").is_char_device()
    os.kill(service.pid, signal.SIGTERM)
    assert service.end() == errors.OK


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as they are once installed, with programs that exist."""
    unit = re.sub(r"(?m)^Exec.*?\b(?=unionfs\w+ )", lambda found: f"{found[0]}{tmp_path}/", UNIT.read_text())
    (tmp_path / UNIT.name).write_text(unit)
    for name in ("unionfsd", "unionfsctl"):
        shutil.copy("/bin/true", tmp_path / name)
    shutil.copy(EXAMPLES / "srv-web.mount", tmp_path)
    return tmp_path


def test_systemd_understands_the_line_of_fstab(tmp_path: Path) -> None:
    generator = Path("/usr/lib/systemd/system-generators/systemd-fstab-generator")
    environment = os.environ | {"SYSTEMD_FSTAB": str(EXAMPLES / "fstab")}
    subprocess.run([generator, tmp_path, tmp_path, tmp_path], env=environment, check=True, timeout=30)
    unit = (tmp_path / "srv-web.mount").read_text()
    assert "Type=fuse.unionfsd\n" in unit
    assert "RequiresMountsFor=/layers\n" in unit
    assert run("systemd-analyze", "verify", "--man=no", tmp_path / "srv-web.mount") == ""
    assert not (tmp_path / "local-fs.target.requires" / "srv-web.mount").exists()  # nofail


@pytest.mark.parametrize("name", [UNIT.name, "srv-web.mount"])
def test_systemd_understands_the_units(name: str, installed: Path) -> None:
    assert run("systemd-analyze", "verify", "--man=no", installed / name) == ""


def test_the_unit_is_confined_as_far_as_a_mount_allows(installed: Path) -> None:
    """systemd's own figure, in tenths: what is left is what gives a service a mount namespace of its own."""
    run("systemd-analyze", "security", "--offline=yes", "--threshold=48", installed / UNIT.name)


def test_the_unit_gives_no_mount_namespace(installed: Path) -> None:
    """Any of these would hide the mount from the host (systemd.exec(5))."""
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(installed / UNIT.name)
    forbidden = (
        r"Private(?!Users|Network)\w+|Protect\w+|\w+Paths|BindReadOnlyPaths|Root\w+|MountAPIVFS|TemporaryFileSystem"
    )
    assert not [name for name in parser["Service"] if re.fullmatch(forbidden, name)]
