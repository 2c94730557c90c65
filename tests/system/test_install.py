"""What `make install` puts in place works there: programs, units, manual pages, completions."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import harness
from tests.harness import PROJECT, Layers, run
from unionfsd import __version__
from unionfsd.ctl.main import VERBS
from unionfsd.options.table import OPTIONS


@pytest.fixture(scope="module")
def prefix() -> Iterator[Path]:
    """Installed beneath a DESTDIR first, then moved to where it belongs, as a package manager does."""
    root = Path(tempfile.mkdtemp(prefix="unionfsd-", dir=harness.DISK))
    prefix, destdir = root / "prefix", root / "destdir"
    places = [f"DESTDIR={destdir}", f"PREFIX={prefix}", f"HELPERDIR={prefix}/helpers", "FUSE_OVERLAYFS=yes"]
    try:
        run("make", "--silent", f"--directory={PROJECT}", "install", *places, seconds=110)
        (destdir / prefix.relative_to("/")).rename(prefix)
        shutil.rmtree(destdir)
        yield prefix
    finally:
        harness.remove(root)


def test_everything_is_where_it_belongs(prefix: Path) -> None:
    found = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if not path.is_dir()}
    assert {path for path in found if not path.startswith("lib/unionfsd/")} == {
        "bin/fuse-overlayfs",
        "bin/unionfsctl",
        "helpers/mount.fuse.unionfsd",
        "lib/systemd/system/unionfsd@.service",
        "sbin/mount-rootfs",
        "sbin/stage-rootfs",
        "sbin/umount-rootfs",
        "sbin/unionfsd",
        "share/bash-completion/completions/unionfsctl",
        "share/bash-completion/completions/unionfsd",
        "share/doc/unionfsd/examples/fstab",
        "share/doc/unionfsd/examples/srv-web.mount",
        "share/doc/unionfsd/examples/web.toml",
        "share/fish/vendor_completions.d/unionfsctl.fish",
        "share/fish/vendor_completions.d/unionfsd.fish",
        "share/man/man1/unionfsctl.1",
        "share/man/man5/unionfsd.toml.5",
        "share/man/man8/unionfsd.8",
        "share/zsh/site-functions/_unionfsctl",
        "share/zsh/site-functions/_unionfsd",
    }


@pytest.mark.parametrize("name", ["sbin/unionfsd", "bin/fuse-overlayfs", "helpers/mount.fuse.unionfsd"])
def test_the_program_by_each_of_its_names(name: str, prefix: Path) -> None:
    assert run(prefix / name, "--version") == f"unionfsd {__version__}\n"


def test_a_python_that_others_cannot_run_is_told_of(disk: Path) -> None:
    program = disk / "open" / "closed" / "program"
    program.parent.mkdir(parents=True)
    program.touch()
    for directory in (disk, disk / "open", program.parent, program):
        directory.chmod(0o755)

    def closed() -> str:
        command = [PROJECT / "scripts" / "closed-to-others", program]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    assert closed() == ""
    program.parent.chmod(0o700)
    assert closed() == f"{program.parent}\n"
    program.chmod(0o644)
    assert closed() == f"{program}\n"


def test_the_installed_program_mounts(prefix: Path, layers: Layers) -> None:
    (layers.lower / "file").write_text("lower\n")
    run(prefix / "bin" / "fuse-overlayfs", "-o", layers.options(), layers.mnt)
    try:
        assert (layers.mnt / "file").read_text() == "lower\n"
        assert str(layers.mnt) in run(prefix / "bin" / "unionfsctl", "status", layers.mnt)
    finally:
        run("umount", layers.mnt)


def test_nothing_knows_where_it_was_staged(prefix: Path) -> None:
    assert subprocess.run(["grep", "-rlI", f"{prefix.parent}/destdir", prefix], check=False).returncode == 1


def test_the_installed_unit_runs_the_installed_programs(prefix: Path) -> None:
    unit = prefix / "lib" / "systemd" / "system" / "unionfsd@.service"
    assert run("systemd-analyze", "verify", "--man=no", unit) == ""
    assert f"ExecStart={prefix}/sbin/unionfsd -f --config /etc/unionfsd/%i.toml\n" in unit.read_text()
    assert f" exec {prefix}/bin/unionfsctl reap'\n" in unit.read_text()


def test_a_prefix_must_be_absolute() -> None:
    done = subprocess.run(
        [PROJECT / "scripts" / "install", "", "usr", "", ""], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "install: PREFIX must be an absolute path, not 'usr'\n")


# Manual pages.


def plain(page: Path) -> str:
    """A manual page as a terminal without bold type shows it, in one line."""
    shown = run("groff", "-man", "-Tutf8", "-P-cbou", page)
    return " ".join(shown.split())


@pytest.mark.parametrize("name", ["man8/unionfsd.8", "man1/unionfsctl.1", "man5/unionfsd.toml.5"])
def test_groff_finds_no_fault_with_a_page(name: str, prefix: Path) -> None:
    page = prefix / "share" / "man" / name
    assert run("groff", "-man", "-ww", "-z", "-Tutf8", page) == ""
    assert page.read_text().count(".SH NAME\n") == 1
    assert "](" not in page.read_text()


def test_the_pages_tell_all_there_is(prefix: Path) -> None:
    manual = prefix / "share" / "man"
    of_program = plain(manual / "man8" / "unionfsd.8")
    assert [option.usage for option in OPTIONS if option.usage not in of_program] == []
    of_control = plain(manual / "man1" / "unionfsctl.1")
    assert [verb.name for verb in VERBS if verb.name.upper() not in of_control] == []
    assert 'lowerdir = ["/layers/site", "/layers/base"]' in plain(manual / "man5" / "unionfsd.toml.5")


# Completions.

_ASK_BASH = """\
source "$1"
COMP_LINE=$2 COMP_POINT=${#2}
# As readline splits, with the COMP_WORDBREAKS that bash has by itself.
mapfile -t COMP_WORDS < <(grep -o '[=:]\\|[^ =:]*' <<<"$2")
[[ $2 != *[\\ =:] ]] || COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
compopt() { :; }
"_${COMP_WORDS[0]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def bash(prefix: Path, line: str) -> list[str]:
    """What bash offers when tab is pressed at the end of `line`."""
    program = line.split()[0]
    script = prefix / "share" / "bash-completion" / "completions" / program
    return run("bash", "-c", _ASK_BASH, "bash", script, line).split()


def test_bash_completes(prefix: Path) -> None:
    assert bash(prefix, "unionfsd -o lowerd") == ["lowerdir=", "lowerdir+="]
    assert bash(prefix, "unionfsd -o noatime,upp") == ["noatime,upperdir="]
    assert bash(prefix, f"unionfsd -o ro,lowerdir={prefix}/sb") == [f"{prefix}/sbin"]
    assert bash(prefix, f"unionfsd -o lowerdir=/a:{prefix}/sb") == [f"{prefix}/sbin"]
    assert bash(prefix, "unionfsd -o lowerdir=/a:/b,volat") == ["/b,volatile"]
    assert bash(prefix, f"unionfsd -o ro {prefix}/sb") == [f"{prefix}/sbin"]
    assert bash(prefix, "unionfsd --conf") == ["--config"]
    assert bash(prefix, "unionfsctl expl") == ["explain"]
    assert bash(prefix, "unionfsctl du --dep") == ["--depth"]
    assert bash(prefix, f"unionfsctl status {prefix}/sb") == [f"{prefix}/sbin"]


def fish(prefix: Path, line: str) -> list[str]:
    """The same of fish, without descriptions."""
    script = prefix / "share" / "fish" / "vendor_completions.d" / f"{line.split()[0]}.fish"
    home = {"HOME": str(prefix), "XDG_CONFIG_HOME": str(prefix / "none"), "XDG_DATA_HOME": str(prefix / "none")}
    asked = ["fish", "--no-config", "-c", 'source $argv[1]; complete -C "$argv[2]"', str(script), line]
    done = subprocess.run(asked, capture_output=True, text=True, env=os.environ | home, check=True)
    assert done.stderr == ""
    return sorted(row.partition("\t")[0] for row in done.stdout.splitlines())


def test_fish_completes(prefix: Path) -> None:
    assert fish(prefix, "unionfsd -o noatime,upp") == ["noatime,upperdir="]
    assert fish(prefix, "unionfsctl expl") == ["explain"]
    assert "--depth" in fish(prefix, "unionfsctl du --")


@pytest.mark.parametrize("name", ["_unionfsd", "_unionfsctl"])
def test_zsh_understands_its_files(name: str, prefix: Path) -> None:
    run("zsh", "--no-rcs", "-n", prefix / "share" / "zsh" / "site-functions" / name)


def zsh(prefix: Path, line: str) -> str:
    """What a zsh on a terminal shows once Tab was pressed twice behind `line`."""
    functions = prefix / "share" / "zsh" / "site-functions"
    pid, terminal = pty.fork()
    if not pid:
        os.execvpe("zsh", ["zsh", "--no-rcs", "-i"], os.environ | {"TERM": "dumb"})
    try:
        os.write(
            terminal, f"fpath=({functions} $fpath); autoload -Uz compinit; compinit -u -D; echo rea''dy\n".encode()
        )
        _shown(terminal, "ready")
        os.write(terminal, f"{line}\t\t".encode())
        return _shown(terminal, None)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def _shown(terminal: int, until: str | None) -> str:
    """What is shown until it has `until`, or nothing more is for a second."""
    shown = ""
    while until is None or until not in shown:
        if not select.select([terminal], [], [], 1 if until is None else 20)[0]:
            break
        shown += os.read(terminal, 1 << 16).decode(errors="replace")
    return shown


def test_zsh_completes_on_a_terminal(prefix: Path) -> None:
    shown = zsh(prefix, "unionfsctl stat")
    assert "what a mount did" in shown
    assert "status" in shown
    assert "lowerdir=" in zsh(prefix, "unionfsd -o low")
