"""`unionfsctl` without a mount: its table of verbs, completion scripts, and what it prints."""

from __future__ import annotations

import argparse
import os
import pty
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfsd import mountinfo
from unionfsd.control import places
from unionfsd.ctl import completion, find, prometheus, show
from unionfsd.ctl.main import VERBS, Verb, main, parser
from unionfsd.errors import UserError


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_verb_of_the_table_has_its_function(verb: Verb) -> None:
    function = getattr(import_module(f"unionfsd.ctl.{verb.where}"), verb.function)
    assert callable(function)
    assert verb.help[0].islower()


def test_a_verb_knows_its_arguments() -> None:
    given = parser().parse_args(["du", "--json", "--depth", "3", "/mnt"])
    assert (given.verb.name, given.json, given.depth, given.path) == ("du", True, 3, "/mnt")
    assert parser().parse_args(["status"]).path == "."
    with pytest.raises(UserError, match="--depth"):
        parser().parse_args(["du", "--depth", "x"])


def test_the_version_and_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("unionfsctl ")
    assert main(["nope"]) == 2
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.count("unionfsctl: ") == 2


# Completion.


def test_bash_completes() -> None:
    def complete(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in ("unionfsctl", *words))
        script = f"{completion.bash()}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; compopt() {{ :; }}; _unionfsctl"
        done = subprocess.run(
            ["bash", "-c", script + '\nprintf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return set(done.stdout.split())

    assert complete("st") == {"status", "stats"}
    assert complete("explain", "--") == {"--json", "--help", "--socket"}
    assert complete("log", "--level", "") == {"debug", "info", "warning", "error"}
    assert "/etc" in complete("diff", "/et")
    assert complete("image", "mo") == {"mount"}
    assert complete("image", "mount", "--v") == {"--verify"}
    assert complete("image", "commit", "--compression", "") == {"gzip", "zstd", "none"}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_names_of_images_are_completed(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    (tmp_path / "unionfsctl").write_text(
        f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\n[ "$2" = ls ] && echo localhost/app || echo work\n'
    )
    (tmp_path / "unionfsctl").chmod(0o755)
    line = ["unionfsctl", "image", "diff", "--root", "/a b", ""]
    if shell == "bash":
        words = " ".join(f"'{word}'" for word in line)
        script = f"{completion.bash()}\nCOMP_WORDS=({words}); COMP_CWORD=5; compopt() {{ :; }}; _unionfsctl"
        script += '\nprintf "%s\\n" "${COMPREPLY[@]}"'
    else:
        script = f"{completion.fish()}\ncomplete -C \"unionfsctl image diff --root '/a b' \""
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    options = ["--no-config"] if shell == "fish" else []
    done = subprocess.run([shell, *options, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""
    assert {"localhost/app", "work"} <= {row.partition("\t")[0] for row in done.stdout.splitlines()}
    asked = (tmp_path / "asked").read_text().splitlines()
    assert sorted(asked) == ["image containers --quiet --root /a b", "image ls --quiet --root /a b"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_verb_and_option_is_completed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.completion(argparse.Namespace(shell=shell)) == 0
    script = capsys.readouterr().out
    for verb in VERBS:
        assert verb.name in script
        for argument in verb.arguments:
            if argument.name.startswith("--"):
                assert argument.name.removeprefix("--") in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


# What is printed.


@given(st.text() | st.binary().map(os.fsdecode))
def test_no_name_drives_the_terminal(text: str) -> None:
    shown = show.name(text)
    assert shown.isprintable()
    shown.encode()


def test_names_are_shown_as_they_are_where_they_can_be() -> None:
    assert show.name("ünïcode name") == "ünïcode name"
    assert show.name("a\nb\x1b[31m") == "a\\nb\\x1b[31m"
    assert show.name(os.fsdecode(b"\xff")) == "\\xff"


def test_tables_are_aligned() -> None:
    assert show.table([("a", "1", "x"), ("bbb", "22", "y")], right=(1,)) == "a     1  x\nbbb  22  y"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (200 * 1024, "200 KiB"),
        (3 << 30, "3.0 GiB"),
        (1 << 60, "1024.0 PiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert show.size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (61, "1 min 1 s"), (3600, "1 h"), (200_000, "2 d 7 h")])
def test_durations(seconds: float, text: str) -> None:
    assert show.duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.096e-6, "4.1 us")])
def test_moments(seconds: float, text: str) -> None:
    assert show.moment(seconds) == text


def test_quantiles_are_bounds_of_columns() -> None:
    bounds = (1.0, 2.0, 4.0)
    assert show.quantile(bounds, (0, 0, 0, 0), 0.5) == 0
    assert show.quantile(bounds, (5, 4, 1, 0), 0.5) == 1.0
    assert show.quantile(bounds, (5, 4, 1, 0), 0.9) == 2.0
    assert show.quantile(bounds, (0, 0, 1, 1), 0.99) == float("inf")


def test_labels_are_escaped() -> None:
    status = {"mountpoint": 'a"b\\c\nd\udcff', "transport": "channel"}
    stats = {
        "uptime": 1.0, "nodes": 1, "fds": 1, "cached_fds": 1, "fd_limit": 1, "threads": 1, "cpu": 0.5,
        "memory": {"resident": 1, "peak": 1}, "control": {"clients": 1, "calls": 1},
        "counters": {"requests": 5, "new_figure": 6},
    }  # fmt: skip
    text = prometheus.text([(status, stats)])
    assert 'unionfsd_requests_total{mountpoint="a\\"b\\\\c\\nd\ufffd",transport="channel"} 5' in text
    assert "unionfsd_new_figure_total" in text
    assert prometheus.text([]) == ""


# Where sockets are.


def test_names_of_sockets() -> None:
    assert places.name(53) == b"53.sock"
    assert places.number(b"53.sock") == 53
    assert [places.number(other) for other in (b"53", b"x.sock", b".53.sock.9", b"-1.sock", b"9" * 20 + b".sock")] == [
        None
    ] * 5


def test_places_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/somewhere")
    assert places.own() == [b"/somewhere/unionfsd"]
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert places.own() == [b"/run/user/1000/unionfsd"]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert places.own()[0] == places.SYSTEM
    assert b"/run/user/7/unionfsd" in places.everywhere(7)


def test_only_sockets_are_known(tmp_path: Path) -> None:
    for name in ("7.sock", "other", "x.sock"):
        (tmp_path / name).touch()
    directory = bytes(tmp_path)
    assert list(places.known([directory, b"/nowhere"])) == [(7, directory + b"/7.sock")]


def test_a_mount_of_somebody_else_that_has_the_number_of_a_dead_one_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale socket says nothing about the FUSE file system that got its number."""
    (tmp_path / "53.sock").touch()
    line = mountinfo.MountLine(1, 0, (0, 53), b"/", b"/mnt", b"fuse.sshfs", b"x", b"user_id=0")
    monkeypatch.setattr(mountinfo, "read", lambda: iter([line]))
    monkeypatch.setattr(places, "everywhere", lambda owner: [bytes(tmp_path)])
    (seen,) = find.everything()
    assert (seen.state, seen.lines) == ("dead", ())


def test_a_bar_is_for_terminals_only() -> None:
    script = "from unionfsd.ctl.show import Progress; p = Progress('diff'); p.update(1234); p.clear(); print('end')"
    command = [sys.executable, "-c", script]
    piped = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (piped.stdout, piped.stderr) == ("end\n", "")
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True, env=os.environ | {"TERM": "xterm"}
        )
        assert done.stdout == "end\n"
        assert b"1,234 objects" in os.read(ours, 4096)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("owner", [0, 54321])
def test_of_two_sockets_of_one_number_the_owner_s_is_taken(
    owner: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is left of a mount that ended badly, and whose device number another mount has now."""
    directories = [os.fsencode(tmp_path / name) for name in ("system", "personal")]
    for directory, uid in zip(directories, (0, 54321), strict=True):
        os.mkdir(directory)
        socket = os.path.join(directory, places.name(77))
        Path(os.fsdecode(socket)).touch()
        os.chown(socket, uid, uid)
    monkeypatch.setattr(places, "everywhere", lambda uid: directories)
    line = mountinfo.MountLine(1, 1, (0, 77), b"/", b"/mnt", b"fuse.unionfsd", b"x", b"rw,user_id=%d" % owner)
    assert find._socket(line) == os.path.join(directories[owner != 0], places.name(77))
