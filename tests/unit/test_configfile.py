"""Mounts described in TOML: what a file says as options, and where it says that something is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfsd import configfile, options
from unionfsd.configfile import Described, describe
from unionfsd.errors import USAGE, UserError
from unionfsd.options import MountConfig
from unionfsd.options.table import OPTIONS

PATH = "/etc/unionfsd/test.toml"

MINIMAL = """\
[mount.web]
mountpoint = "/srv/web"
lowerdir = ["/top", "/bottom"]
"""


def config(text: str, name: str | None = None) -> MountConfig:
    described = describe(text, PATH, name)
    return options.parse(described.options).config(os.fsencode(described.mountpoint), root=True)


def refusal(text: str, name: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        describe(text, PATH, name)
    assert caught.value.code == USAGE
    return str(caught.value)


# What a file says.


def test_the_only_mount_needs_no_name() -> None:
    assert describe(MINIMAL, PATH) == describe(MINIMAL, PATH, "web")
    assert config(MINIMAL).mountpoint == b"/srv/web"
    assert config(MINIMAL).lowerdirs == (b"/top", b"/bottom")


def test_values_are_of_toml_types() -> None:
    text = MINIMAL + 'upperdir = "/u"\nworkdir = "/w"\nvolatile = true\nuid = 5\ntimeout = 1.5\nwhiteout = "xattr"\n'
    made = config(text)
    assert (made.upperdir, made.workdir, made.volatile) == (b"/u", b"/w", True)
    assert (made.uid, made.timeout, made.whiteout) == (5, 1.5, "xattr")
    assert config(MINIMAL.replace('["/top", "/bottom"]', '"/a:b"')).lowerdirs == (b"/a:b",)


def test_one_of_several_mounts_over_the_defaults_of_all() -> None:
    text = '[defaults]\nnoexec = true\nro = true\ntimeout = 2\n[mount.a]\nmountpoint = "/a"\nlowerdir = "/l"\n'
    text += '[mount.b]\nmountpoint = "/b"\nlowerdir = "/l"\ntimeout = 3\nro = false\nnoexec = false\n'
    assert (config(text, "a").timeout, config(text, "b").timeout) == (2, 3)
    assert (config(text, "a").ro, config(text, "b").ro) == (True, False)
    assert (config(text, "a").mount_flags, config(text, "b").mount_flags) == (8, 0)


@pytest.mark.parametrize(
    ("said", "piece"),
    [
        ("exec = false", ["noexec"]),
        ("nodev = false", ["dev"]),
        ("ro = false", ["rw"]),
        ("sync = false", ["async"]),
        ("nonempty = false", []),
        ("volatile = false", []),
        ("xino = false", ["xino=off"]),
        ('context = "a:b,c"', ['context="a:b,c"']),
        ("timeout = 0", ["timeout=0"]),
    ],
)
def test_words_and_their_opposites(said: str, piece: list[str]) -> None:
    assert list(describe(MINIMAL + said + "\n", PATH).options[2:]) == piece


def test_relative_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts.toml").write_text(
        '[mount.x]\nmountpoint = "m"\nlowerdir = ["l", "/l"]\nupperdir = "u"\nworkdir = "w"\nlog = "log"\n'
    )
    monkeypatch.chdir(tmp_path.parent)
    described = configfile.read(f"{tmp_path.name}/mounts.toml")
    made = options.parse(described.options).config(os.fsencode(described.mountpoint), root=True)
    here = os.fsencode(tmp_path)
    assert made.lowerdirs == (here + b"/l", b"/l")
    assert [made.mountpoint, made.upperdir, made.workdir, made.log] == [
        here + b"/" + name for name in (b"m", b"u", b"w", b"log")
    ]


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_strings_are_literal(names: list[str]) -> None:
    def quoted(text: str) -> str:
        return '"' + "".join(f"\\U{ord(char):08x}" for char in text) + '"'

    lowers = ", ".join(quoted("/" + name) for name in names)
    text = f"[mount.x]\nmountpoint = {quoted('/' + names[0])}\nlowerdir = [{lowers}]\n"
    made = config(text + f"upperdir = {quoted('/' + names[-1])}\nworkdir = '/w'\n")
    assert made.lowerdirs == tuple(os.fsencode("/" + name) for name in names)
    assert (made.mountpoint, made.upperdir) == (os.fsencode("/" + names[0]), os.fsencode("/" + names[-1]))


@pytest.mark.parametrize(
    "option", [option.name.removesuffix("+") for option in OPTIONS if option.name not in ("x-*", "lowerdir+")]
)
def test_every_option_can_be_said(option: str) -> None:
    """No option is unknown; those that are refused say so themselves."""
    values = ("true", '"on"', '"off"', '"auto"', "5", '"channel"', "0", '"0:1000:1"')
    said = []
    for value in values:
        try:
            describe(f'[mount.x]\nmountpoint = "/m"\n{option} = {value}\n', PATH)
        except UserError as error:
            said.append(str(error))
    assert len(said) < len(values) or any("not supported" in line for line in said)
    assert not any("unknown" in line for line in said)


# What is wrong, and where.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[mount.web\n", ":1:11: Expected ']' at the end of a table declaration"),
        ('[mount.web]\nx = "', ":2: Unterminated string (the file must be TOML"),
        ("web = 1\n", ":1: unknown table 'web' (a file has [defaults] and [mount.NAME])"),
        ("\n\nmount = 1\n", ":3: 'mount' must be a table"),
        ("\n[mount]\nweb = 1\n", ":3: 'web' must be a table (write [mount.web])"),
        ("# none\n\n[mount.web]\nro = true\n", ':3: no mountpoint (add mountpoint = "DIR")'),
        (MINIMAL + "\nuperdir = '/u'\n", ":5: unknown option 'uperdir' (did you mean upperdir?)"),
        (MINIMAL + "ro = 'yes'\n", ":4: ro must be true or false"),
        (MINIMAL + "upperdir = 3\n", ":4: upperdir must be a string"),
        (MINIMAL + "upperdir = ''\n", ":4: upperdir must not be empty"),
        (
            MINIMAL + "timeout = -1\n",
            ":4: option timeout=-1: not a number of seconds, 0 or more (usage: timeout=SECONDS)",
        ),
        (MINIMAL + "remount = true\n", ":4: option remount: not supported"),
        ("[mount.x]\nmountpoint='/m'\nlowerdir = [\n  '/a',\n  3,\n]\n", ":3: lowerdir must be a string"),
        ("[mount.x]\nmountpoint='/m'\nlowerdir = []\n", ":3: lowerdir is empty"),
        ('[mount]\nx.mountpoint = "/m"\nx.note = """\nro = 3\n"""\nx.ro = 3\n', ":3: unknown option 'note'"),
        ("[mount.x]\nmountpoint='/m'\nlog = '''\nro = 1\n'''\n# ro = 1\n\nro = 1 # ro\n", ":8: ro must be"),
        ("defaults = { ro = true, rw = 1 }\n", ":1: rw must be true or false"),
        (MINIMAL + "[mount.other]\nmountpoint = '/o'\nnot = 1\n", ":6: unknown option 'not'"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, said: str) -> None:
    name = "web" if "other" in text else None
    assert refusal(text, name).startswith(PATH + said)


def test_names() -> None:
    two = MINIMAL + "[mount.b]\nmountpoint = '/b'\n"
    assert refusal(two) == f"{PATH}: describes 2 mounts (say which: web, b)"
    assert refusal("") == f"{PATH}: describes no mount (add a table [mount.NAME])"
    assert refusal(two, "c") == f"{PATH}: no mount 'c' (there is: web, b)"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*/none: No such file or directory"):
        configfile.read(str(tmp_path / "none"))
    (tmp_path / "latin").write_bytes(b"# \xe9\n")
    with pytest.raises(UserError, match="latin: not UTF-8"):
        configfile.read(str(tmp_path / "latin"))


def test_described_is_a_value() -> None:
    assert describe(MINIMAL, PATH) == Described("/srv/web", ("lowerdir=/top", "lowerdir+=/bottom"))
