"""Options mean what overlayfs, mount(8) and podman mean by them; what is wrong is refused in words."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfsd.errors import USAGE, UserError
from unionfsd.options import MountConfig, mountflags, parse
from unionfsd.options.__main__ import MARK, renewed, tables
from unionfsd.options.effects import Anyway, Nothing, Option, Refused, Security, Value, Word
from unionfsd.options.table import GROUPS, OPTIONS
from unionfsd.options.text import split, split_options, unescape

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "options.md"
PATHS = st.binary(min_size=1, max_size=30).map(lambda raw: raw.replace(b"\0", b"?"))


def config(*texts: str, root: bool = True, source: str = "") -> MountConfig:
    """The configuration that options make, of a union with one lower unless they say otherwise."""
    return parse(["lowerdir=/low", *texts]).config(b"/mnt", source, cwd=b"/here", root=root)


def escaped(path: bytes) -> str:
    """`path` as overlayfs wants it in an option."""
    text = os.fsdecode(path)
    for special in "\\:,":
        text = text.replace(special, "\\" + special)
    return text


def refused(*texts: str) -> str:
    """The line with which options are refused."""
    with pytest.raises(UserError) as caught:
        config(*texts)
    assert caught.value.code == USAGE
    return str(caught.value)


# Paths.


def test_lowers_come_top_first_and_relative_ones_start_at_the_current_directory() -> None:
    assert config("lowerdir=/a:b:../c/").lowerdirs == (b"/a", b"/here/b", b"/here/../c/")


def test_upper_work_log_and_mountpoint_are_made_absolute_too() -> None:
    made = parse(["lowerdir=l,upperdir=u,workdir=w,log=f"]).config(b"m", cwd=b"/here", root=True)
    assert (made.upperdir, made.workdir, made.log, made.mountpoint) == (b"/here/u", b"/here/w", b"/here/f", b"/here/m")


def test_the_current_directory_is_the_process_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(["lowerdir=l"]).config(b"/m", root=True).lowerdirs == (os.fsencode(tmp_path / "l"),)


@given(st.lists(PATHS, min_size=1, max_size=6), PATHS, PATHS)
def test_any_path_can_be_said_with_escapes(lowers: list[bytes], upper: bytes, work: bytes) -> None:
    lowers, upper, work = [b"/" + path for path in lowers], b"/" + upper, b"/" + work
    text = f"ro,lowerdir={':'.join(map(escaped, lowers))},upperdir={escaped(upper)},workdir={escaped(work)},volatile"
    made = config(text)
    assert made.lowerdirs == tuple(lowers)
    assert (made.upperdir, made.workdir) == (upper, work)
    assert made.ro
    assert made.volatile


@given(st.lists(PATHS, min_size=1, max_size=4))
def test_lowers_added_one_by_one_need_no_escaped_colons(lowers: list[bytes]) -> None:
    lowers = [b"/" + path for path in lowers]
    texts = [f"lowerdir+={escaped(path).replace(chr(92) + ':', ':')}" for path in lowers]
    assert parse(texts).config(b"/m", root=True).lowerdirs == tuple(lowers)


def test_lowerdir_starts_anew_and_lowerdir_plus_adds() -> None:
    assert config("lowerdir=/a:/b,lowerdir+=/c:d").lowerdirs == (b"/a", b"/b", b"/c:d")
    assert config("lowerdir+=/x,lowerdir=/a").lowerdirs == (b"/a",)


def test_data_only_layers_come_after_two_colons_each() -> None:
    made = config("lowerdir=/a:/b::/d::/e,datadir+=/f:g")
    assert (made.lowerdirs, made.datadirs) == ((b"/a", b"/b"), (b"/d", b"/e", b"/f:g"))


@pytest.mark.parametrize("redirects", ["off", "nofollow", "follow"])
def test_metacopy_needs_redirects(redirects: str) -> None:
    assert "metacopy=on" in refused(f"metacopy=on,redirect_dir={redirects},upperdir=/u,workdir=/w")


def test_thousands_of_lowers_are_fine() -> None:
    assert len(config("lowerdir=" + ":".join(f"/layer/{i}" for i in range(5000))).lowerdirs) == 5000


@pytest.mark.parametrize(
    "text",
    [
        "lowerdir=",
        "lowerdir=/a:",
        "lowerdir=:/a",
        "lowerdir=/a::",
        "lowerdir=/a::/b:/c",
        "lowerdir=/a:::/b",
        "lowerdir+=",
    ],
)
def test_an_empty_path_is_refused(text: str) -> None:
    assert "empty path" in refused(text)


# Text.


@given(st.text(alphabet='ab\\,:="', max_size=20))
def test_splitting_loses_nothing(text: str) -> None:
    assert ",".join(split(text, ",")) == text
    assert ":".join(split(text, ":")) == text


@given(st.text(alphabet="ab\\,:", max_size=20))
def test_what_was_escaped_comes_back(text: str) -> None:
    written = "".join("\\" + char if char in "\\,:" else char for char in text)
    assert unescape(written) == text
    assert split(written, ",") == [written]


@pytest.mark.parametrize("text", ["", ",", ",,,"])
def test_empty_options_are_skipped(text: str) -> None:
    assert split_options(text) == []


def test_podman_ends_its_list_with_a_comma() -> None:
    made = config("lowerdir=/l/A:/l/B,upperdir=/u,workdir=/w,")
    assert made.lowerdirs == (b"/l/A", b"/l/B")
    assert made.warnings == ()


def test_a_quoted_value_may_hold_commas() -> None:
    made = config('ro,context="system_u:object_r:container_file_t:s0:c1,c2",volatile')
    assert made.security == ('context="system_u:object_r:container_file_t:s0:c1,c2"',)
    assert made.volatile
    assert made.warnings == ()


def test_quotes_around_a_path_are_not_part_of_it() -> None:
    assert config('upperdir="/u,v",workdir=/w').upperdir == b"/u,v"


def test_a_quote_that_nobody_closes_is_an_ordinary_character() -> None:
    assert config('upperdir="/u,workdir=/w').upperdir == b'/here/"/u'


def test_a_backslash_at_the_end_is_itself() -> None:
    assert config("lowerdir=/a\\").lowerdirs == (b"/a\\",)


# Values.


def test_defaults_are_those_of_the_configuration() -> None:
    bare = MountConfig(lowerdirs=(b"/low",), mountpoint=b"/mnt")
    assert config(root=False) == bare._replace(explicit=frozenset({"lowerdir"}))


def test_without_an_upper_the_union_is_read_only() -> None:
    assert config().read_only
    assert not config("upperdir=/u,workdir=/w").read_only
    assert config("upperdir=/u,workdir=/w,ro").read_only
    assert not config("upperdir=/u,workdir=/w,ro,rw").read_only


def test_root_lets_others_in_and_a_user_must_ask() -> None:
    assert config(root=True).allow_other
    assert not config(root=False).allow_other
    assert config("allow_other", root=False).allow_other


def test_mount_flags_accumulate_and_the_later_one_wins() -> None:
    assert config("nodev,nosuid,noexec,dev").mount_flags == mountflags.MS_NOSUID | mountflags.MS_NOEXEC
    assert config("noatime,relatime").mount_flags == mountflags.MS_RELATIME
    assert config("strictatime,noatime,atime").mount_flags == 0
    assert config("sync,dirsync,nodiratime").mount_flags == (
        mountflags.MS_SYNCHRONOUS | mountflags.MS_DIRSYNC | mountflags.MS_NODIRATIME
    )


def test_the_source_names_the_file_system_unless_fsname_does() -> None:
    assert config().fsname == "unionfsd"
    assert config(source="overlay").fsname == "overlay"
    assert config("fsname=a\\,b", source="overlay").fsname == "a,b"


def test_ids_times_and_choices_are_read() -> None:
    made = config("uid=1000,gid=0,timeout=1.5,whiteout=xattr,transport=pyfuse3,io=cached,userxattr")
    assert (made.uid, made.gid, made.timeout) == (1000, 0, 1.5)
    assert (made.whiteout, made.transport, made.io, made.userxattr) == ("xattr", "pyfuse3", "cached", True)


def test_what_was_given_can_be_told_from_what_was_not() -> None:
    assert config("timeout=1,x-systemd.automount,whiteout=auto").explicit == {
        "lowerdir",
        "timeout",
        "x-systemd.automount",
        "whiteout",
    }


@pytest.mark.parametrize(
    "text",
    [
        "timeout=-1",
        "timeout=soon",
        "timeout=nan",
        "timeout=inf",
        "timeout=",
        "uid=root",
        "uid=-1",
        "gid=4294967295",
        "gid=٣",
        "whiteout=maybe",
        "transport=telepathy",
        "io=",
        "fsname=",
        "redirect_dir=maybe",
        "verity=maybe",
        "uidmapping=0:1000",
        "uidmapping=0:a:1",
        "gidmapping=0:4294967295:1",
        "gidmapping=0:0:0",
        "xattr_permissions=3",
        "fsync=yes",
    ],
)
def test_a_wrong_value_refuses_the_mount(text: str) -> None:
    name = text.partition("=")[0]
    assert refused(text).startswith(f"option {text}: ")
    assert f"usage: {name}=" in refused(text)


def test_a_word_with_a_value_and_a_value_that_is_missing_are_refused() -> None:
    assert refused("volatile=1") == "option volatile=1: takes no value (usage: volatile)"
    assert refused("timeout") == "option timeout: needs a value (usage: timeout=SECONDS)"


def test_a_refusal_is_one_line_whatever_was_given() -> None:
    assert refused("timeout=1\n2\x1b[31m").isprintable()


# What others pass.


def test_an_unknown_option_is_ignored_with_a_warning() -> None:
    assert config("frobnicate=3,ro").warnings == ("unknown option ignored: frobnicate=3",)


@pytest.mark.parametrize(
    "text",
    [
        "rw,dev,suid,exec,auto,nouser,async,relatime,nofail",  # mount(8) and mount.fuse3
        "_netdev,x-systemd.requires=network.target,X-mount.mkdir,comment=why,user=joe,defaults",
        "private",  # buildah's :O volumes
        "default_permissions,allow_other,nonempty,big_writes,lazytime",
        "redirect_dir=off,metacopy=off,index=off,nfs_export=off,xino=off,uuid=null,verity=off",
        "redirect_dir=nofollow,xino=on,uuid=auto",
        "clone_fd,threaded=1,max_idle_threads=10,max_threads=4,fast_ino=1,writeback=0,noxattrs=0",  # fuse-overlayfs
    ],
)
def test_what_callers_add_passes_in_silence(text: str) -> None:
    assert config(text).warnings == ()


def test_file_handles_need_the_index_and_a_work_directory() -> None:
    assert config("nfs_export=on", "workdir=/w").workdir == b"/w"
    assert config("nfs_export=off", "workdir=/w").workdir is None
    assert "index=off" in refused("nfs_export=on,index=off")


def test_owners_as_fuse_overlayfs_has_them() -> None:
    mapped = config("uidmapping=:0:1000:1:1:110000:65536,gidmapping=0:5:2,xattr_permissions=2,noacl,static_nlink")
    assert mapped.uidmapping == ((0, 1000, 1), (1, 110000, 65536))
    assert mapped.gidmapping == ((0, 5, 2),)
    assert (mapped.xattr_permissions, mapped.noacl, mapped.static_nlink) == ("2", True, True)
    squashed = config("squash_to_uid=7,squash_to_root")
    assert (squashed.uid, squashed.gid) == (7, 0)


def test_syncs_that_are_skipped() -> None:
    assert [config(text).syncs for text in ("fsync=1", "fsync=0", "volatile")] == [True, False, False]
    assert not config("fsync=0").volatile


@pytest.mark.parametrize("text", ["remount", "plugins=/lib/plugin.so"])
def test_what_must_not_be_ignored_is_refused(text: str) -> None:
    assert "not supported" in refused(text)


# Layers.


def test_a_union_needs_a_layer() -> None:
    with pytest.raises(UserError, match="no layer given"):
        parse(["ro"]).config(b"/mnt", root=True)


def test_an_upper_needs_a_work_directory() -> None:
    assert "upperdir needs a workdir" in refused("upperdir=/u")


def test_a_work_directory_alone_is_ignored_with_a_warning() -> None:
    made = config("workdir=/w")
    assert made.workdir is None
    assert made.warnings == ("workdir ignored: without upperdir the union is read-only",)


# The table.


def test_names_are_unique() -> None:
    names = [option.name for option in OPTIONS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("row", OPTIONS, ids=lambda row: row.name)
def test_a_row_is_whole(row: Option) -> None:
    assert row.help.endswith(".")
    fields = set(MountConfig._fields)
    match row.effect:
        case Value(field):
            assert field in fields
            assert row.argument
        case Word(field):
            assert field in fields
            assert not row.argument
        case Anyway(values):
            assert row.argument == "|".join(values)
            assert row.default in values
        case Security():
            assert row.argument


CHOICES = [(row, row.effect.field) for row in OPTIONS if "|" in row.argument and isinstance(row.effect, Value)]


@pytest.mark.parametrize(("row", "field"), CHOICES, ids=lambda value: getattr(value, "name", ""))
def test_a_choice_takes_what_its_usage_says(row: Option, field: str) -> None:
    for choice in row.argument.split("|"):
        assert said(getattr(config(f"{row.name}={choice}"), field)) == choice
    assert said(getattr(config(), field)) == row.default


def said(value: object) -> object:
    """How a field is written as an option: a switch is 0 or 1."""
    return str(int(value)) if isinstance(value, bool) else value


def test_default_seconds_are_as_documented() -> None:
    (row,) = (row for row in OPTIONS if row.name == "timeout")
    assert math.isclose(float(row.default), config().timeout)


def test_options_without_effect_and_refused_ones_stand_in_groups_of_their_own() -> None:
    groups = dict(GROUPS)
    assert all(isinstance(row.effect, Refused) for row in groups["Refused"])
    assert all(isinstance(row.effect, Nothing) for row in groups["Accepted, without effect"])


def test_the_document_has_the_table() -> None:
    text = DOCUMENT.read_text()
    assert renewed(text) == text, "run: python -m unionfsd.options docs/options.md"


def test_the_document_s_tables_come_below_its_mark() -> None:
    assert renewed(f"head\n{MARK}\nold").startswith(f"head\n{MARK}\n\n## Layers\n")
    with pytest.raises(SystemExit, match="the line is missing"):
        renewed("head")


def test_a_table_s_cells_stay_cells() -> None:
    rows = [line for line in tables() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {4}
