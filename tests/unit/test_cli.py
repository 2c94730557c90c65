"""The command line without a mount: what is refused and how, what is printed, what is not even imported."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import unionfsd
from unionfsd.cli import main
from unionfsd.errors import LAYER, MOUNT, OK, USAGE
from unionfsd.options.table import OPTIONS

PROJECT = Path(__file__).resolve().parents[2]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    code = main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("unionfsd: ")
    assert err.count("\n") == 1
    return code, err.removeprefix("unionfsd: ").removesuffix("\n")


def imported_by(*arguments: str) -> set[str]:
    """The modules that a command line imports."""
    code = f"import sys; from unionfsd.cli import main; main({list(arguments)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == OK
    assert capsys.readouterr().out == f"unionfsd {unionfsd.__version__}\n"


def test_version_among_other_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-o", "ro", "--version"]) == OK
    assert capsys.readouterr().out == f"unionfsd {unionfsd.__version__}\n"


def test_version_imports_next_to_nothing() -> None:
    assert not imported_by("--version") & {"argparse", "dataclasses", "logging", "socket", "trio", "pyfuse3"}


def test_version_is_quick() -> None:
    def once() -> float:
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", "unionfsd", "--version"], capture_output=True, cwd=PROJECT, check=True)
        return time.monotonic() - begin

    assert min(once() for _ in range(10)) < 0.06


def test_a_refusal_imports_no_event_loop() -> None:
    assert not imported_by("-o", "lowerdir=/nonexistent,timeout=x", "/") & {"trio", "pyfuse3", "unionfsd.union"}


def test_the_way_to_a_mount_imports_little() -> None:
    """Until the layers are opened; each of these takes as long as all the layers of a mount."""
    imported = imported_by("-f", "-o", "lowerdir=/nonexistent", "/")
    assert "unionfsd.union" in imported
    assert not imported & {"argparse", "dataclasses", "inspect", "socket", "subprocess", "trio", "pyfuse3"}


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_option(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: unionfsd [SOURCE] MOUNTPOINT")
    assert {f"  {option.usage}" for option in OPTIONS} <= set(lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "no mountpoint given ("),
        (["-o", "lowerdir=/"], "no mountpoint given ("),
        (["-o", "lowerdir=/", ""], "no mountpoint given ("),
        (["a", "b", "c"], "too many arguments: a b c ("),
        (["--frobnicate", "/"], "unrecognized arguments: --frobnicate ("),
        (["-fx", "/"], "unrecognized arguments: -x ("),
        (["--version=1", "/"], "option --version must not have an argument ("),
        (["/", "--config"], "option --config requires argument ("),
        (["/", "-o"], "option -o requires argument ("),
        (["/"], "no layer given ("),
        (["-o", "lowerdr=/a", "/"], "no layer given; unknown option ignored: lowerdr=/a (say which"),
        (["/", "-o", "lowerdir=/,timeout=soon"], "option timeout=soon: not a number of seconds"),
        (["/", "-o", "lowerdir=/,upperdir=/a"], "upperdir needs a workdir ("),
        (["SPEC", "/", "-o", "lowerdir=/", "-o", "uid=me"], "option uid=me: "),
    ],
)
def test_a_wrong_command_line_is_refused(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused(capsys, *arguments)
    assert code == USAGE
    assert said.startswith(line)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-o", "lowerdir=/,uid=me", "/"],
        ["SPEC", "/", "-olowerdir=/,uid=me"],
        ["/", "-fdo", "lowerdir=/,uid=me"],
        ["-fd", "-o", "lowerdir=/", "/", "-o", "uid=me"],
        ["-ouid=me", "--", "-SPEC", "/"],
    ],
)
def test_words_may_stand_in_any_order_and_together(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused(capsys, *arguments)
    assert (code, said.partition(":")[0]) == (USAGE, "option uid=me")


def test_a_missing_mountpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused(capsys, "-o", f"lowerdir={tmp_path}", str(tmp_path / "mnt"))
    assert (code, said) == (MOUNT, f"cannot mount on {tmp_path / 'mnt'}: No such file or directory")


@pytest.mark.parametrize("where", [["-f"], []], ids=["foreground", "background"])
def test_a_missing_layer_is_refused(where: list[str], tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    command = [sys.executable, "-m", "unionfsd", *where, "-o", f"lowerdir={tmp_path / 'gone'}", str(tmp_path / "mnt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=False, timeout=60)
    assert done.returncode == LAYER
    assert done.stderr.startswith("unionfsd: ")
    assert str(tmp_path / "gone") in done.stderr
    assert done.stderr.count("\n") == 1


# As mount(8) calls a helper.


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/sbin/mount.fuse.unionfsd"])


@pytest.mark.usefixtures("helper")
def test_a_helper_s_dry_run_checks_the_options_and_mounts_nothing(tmp_path: Path) -> None:
    options = f"rw,lowerdir={tmp_path}"
    assert main(["unionfsd", str(tmp_path), "-sfnv", "-o", options, "-t", "fuse.unionfsd"]) == OK
    assert not tmp_path.is_mount()


@pytest.mark.usefixtures("helper")
def test_a_helper_s_dry_run_refuses_what_a_mount_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused(capsys, "unionfsd", str(tmp_path), "-f", "-o", "rw,lowerdir=/,timeout=x")
    assert code == USAGE
    assert said.startswith("option timeout=x: ")


@pytest.mark.usefixtures("helper")
def test_a_helper_does_not_enter_namespaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused(capsys, "unionfsd", str(tmp_path), "-N", "/proc/1/ns/mnt", "-o", "lowerdir=/")
    assert code == USAGE
    assert "nsenter" in said


def test_only_a_union_is_remounted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (tmp_path, "/proc"):
        code, said = refused(capsys, "unionfsd", str(place), "-o", "remount,ro,lowerdir=/")
        assert (code, said) == (MOUNT, f"cannot remount {place}: no union is mounted there")
    code, said = refused(capsys, "unionfsd", str(tmp_path), "-o", "remount,timeout=x")
    assert code == USAGE


@pytest.mark.usefixtures("helper")
def test_a_remount_is_rehearsed(tmp_path: Path) -> None:
    assert main(["unionfsd", str(tmp_path), "-f", "-o", "remount,ro"]) == 0
