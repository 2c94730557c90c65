"""Who may do what: every answer, and every new object's owner, mode and ACL, are those of a plain directory."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.harness import GROUP, USER, Layers, MountFactory, as_user, in_child
from tests.trees import ACCESS, DEFAULT, Tag, acl, describe, errno_of

#: What was done and how it went.
Outcome = list[Any]

BothFactory = Callable[[Callable[[Path], None]], tuple[Path, Path]]


@pytest.fixture(params=["lower", "upper"])
def both(request: pytest.FixtureRequest, layers: Layers, plain: Path, mounted: MountFactory) -> BothFactory:
    """Build a tree in a layer and in a plain directory; the mount and the plain directory, to do the same in both."""

    def make(build: Callable[[Path], None]) -> tuple[Path, Path]:
        build(getattr(layers, request.param))
        build(plain)
        return plain, mounted().path

    return make


def facts(path: Path) -> list[object]:
    """Owner, mode and xattrs of an object."""
    description = describe(path)
    return [path.name, *(description[fact] for fact in ("owner", "mode", "xattrs"))]


# Access.


def _guarded(root: Path) -> None:
    """Files and directories of root, of the user and of a group, open to some."""
    for name, mode in (("0600", 0o600), ("0604", 0o604), ("0640", 0o640), ("0666", 0o666), ("0060", 0o060)):
        for owner, ids in (("root", (0, 0)), ("mine", (USER, 0)), ("group", (0, GROUP))):
            path = root / f"{owner}-{name}"
            path.write_bytes(b"data")
            os.chown(path, *ids)
            path.chmod(mode)
    for name, mode in (("closed", 0o700), ("search", 0o711), ("list", 0o744), ("open", 0o777), ("sticky", 0o1777)):
        (root / name).mkdir()
        (root / name / "f").write_bytes(b"inside")
        (root / name).chmod(mode)


def _try_everything(root: Path) -> Outcome:
    """As an ordinary user, every call on every object, and how it went."""
    outcome: Outcome = []
    for path in sorted(root.iterdir()):
        if path.is_file():
            outcome += [
                (path.name, "read", errno_of(path.read_bytes)),
                (path.name, "append", errno_of(_append, path)),
                (path.name, "access", [os.access(path, mode) for mode in (os.R_OK, os.W_OK, os.X_OK)]),
                (path.name, "chmod", errno_of(os.chmod, path, stat.S_IMODE(path.stat().st_mode))),
                (path.name, "chown", errno_of(os.chown, path, USER, -1)),
                (path.name, "give away", errno_of(os.chown, path, 0, -1)),
                (path.name, "utime", errno_of(os.utime, path, (1, 1))),
                (path.name, "touch", errno_of(os.utime, path)),
                (path.name, "setxattr", errno_of(os.setxattr, path, "user.a", b"1")),
                (path.name, "trusted", errno_of(os.setxattr, path, "trusted.a", b"1")),
                (path.name, "truncate", errno_of(os.truncate, path, 4)),
            ]
        else:
            outcome += [
                (path.name, "list", errno_of(os.listdir, path)),
                (path.name, "stat inside", errno_of(os.stat, path / "f")),
                (path.name, "create", errno_of(_append, path / "new")),
                (path.name, "mkdir", errno_of((path / "sub").mkdir)),
                (path.name, "unlink", errno_of((path / "f").unlink)),
                (path.name, "rename", errno_of(os.rename, path / "f", path / "g")),
                (path.name, "mknod", errno_of(os.mknod, path / "dev", stat.S_IFCHR, os.makedev(1, 3))),
            ]
    return outcome


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def test_an_ordinary_user_may_do_what_the_modes_say(both: BothFactory) -> None:
    plain, union = both(_guarded)
    for groups in ((), (0,), (GROUP, 4)):
        expected = as_user(partial(_try_everything, plain), groups=groups)
        assert as_user(partial(_try_everything, union), groups=groups) == expected
    assert [facts(path) for path in sorted(union.rglob("*"))] == [facts(path) for path in sorted(plain.rglob("*"))]


# Owner, group and mode of what is made.


def _family(root: Path) -> None:
    """Directories open to all: an ordinary one, setgid ones of root's and of another group."""
    for name, gid, mode in (("ordinary", 0, 0o777), ("setgid", 7, 0o2777), ("setgid-mine", GROUP, 0o2777)):
        (root / name).mkdir()
        os.chown(root / name, 0, gid)
        (root / name).chmod(mode)


def _populate(root: Path) -> Outcome:
    """One object of each kind in each directory, with every mode bit asked for."""
    outcome: Outcome = []
    for directory in sorted(path for path in root.iterdir() if path.is_dir()):
        os.close(os.open(directory / "file", os.O_CREAT | os.O_WRONLY, 0o7777))
        os.close(os.open(directory / "group-exec", os.O_CREAT | os.O_WRONLY, 0o2775))
        os.mkdir(directory / "directory", 0o1777)
        os.mkfifo(directory / "fifo", 0o666)
        os.mknod(directory / "node", stat.S_IFREG | 0o666)
        os.symlink("target", directory / "symlink")
        os.mkdir(directory / "directory/below")
        os.close(os.open(directory / "directory/file", os.O_CREAT | os.O_WRONLY, 0o666))
        outcome += [facts(path) for path in sorted(directory.rglob("*"))]
    return outcome


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
@pytest.mark.parametrize("who", ["root", "user"])
def test_new_objects_belong_to_their_maker(who: str, umask: int, both: BothFactory) -> None:
    """Owner and group of the caller, the group of a setgid directory instead; modes cut by the umask."""
    plain, union = both(_family)
    run_by = in_child if who == "root" else as_user
    expected, found = (run_by(partial(_populate, root), umask=umask) for root in (plain, union))
    assert found == expected


# ACLs.

_NAMED = acl((Tag.USER_OBJ, 7), (Tag.USER, 6, USER), (Tag.GROUP_OBJ, 5), (Tag.MASK, 7), (Tag.OTHER, 0))
_INHERITED = acl((Tag.USER_OBJ, 7), (Tag.USER, 7, 4242), (Tag.GROUP_OBJ, 7), (Tag.MASK, 7), (Tag.OTHER, 5))


def _with_acls(root: Path) -> None:
    for name in ("file", "closed"):
        (root / name).write_bytes(b"data")
        (root / name).chmod(0o600)
    os.setxattr(root / "file", ACCESS, _NAMED)
    (root / "d").mkdir()
    (root / "d").chmod(0o777)
    os.setxattr(root / "d", DEFAULT, _INHERITED)


def test_a_named_user_may_do_what_the_acl_says(both: BothFactory) -> None:
    plain, union = both(_with_acls)

    def attempt(root: Path) -> Outcome:
        return [
            [errno_of((root / name).read_bytes), errno_of(_append, root / name), os.access(root / name, os.X_OK)]
            for name in ("file", "closed")
        ]

    expected = as_user(partial(attempt, plain))
    assert expected == [["ok", "ok", False], ["EACCES", "EACCES", False]]
    assert as_user(partial(attempt, union)) == expected


@pytest.mark.parametrize("umask", [0, 0o077])
def test_a_default_acl_is_inherited_in_place_of_the_umask(umask: int, both: BothFactory) -> None:
    plain, union = both(_with_acls)
    expected, found = (as_user(partial(_populate, root), umask=umask) for root in (plain, union))
    assert found == expected
    assert any(ACCESS in entry[3] for entry in expected)


def test_acl_and_mode_follow_each_other(both: BothFactory) -> None:
    plain, union = both(_with_acls)
    for root in (plain, union):
        os.chmod(root / "file", 0o710)
        os.setxattr(root / "closed", ACCESS, _NAMED)
        os.setxattr(root / "d", ACCESS, acl((Tag.USER_OBJ, 7), (Tag.GROUP_OBJ, 1), (Tag.OTHER, 0)))
    for name in ("file", "closed", "d"):
        assert facts(union / name) == facts(plain / name)
        os.removexattr(union / name, ACCESS) if ACCESS in os.listxattr(union / name) else None
        os.removexattr(plain / name, ACCESS) if ACCESS in os.listxattr(plain / name) else None
        assert facts(union / name) == facts(plain / name)


def test_acls_that_cannot_be(both: BothFactory) -> None:
    plain, union = both(_with_acls)
    bad = acl((Tag.USER_OBJ, 7), (Tag.OTHER, 0))

    def attempt(root: Path) -> Outcome:
        return [
            errno_of(os.setxattr, root / "file", ACCESS, bad),
            errno_of(os.setxattr, root / "file", ACCESS, b"nonsense"),
            errno_of(os.setxattr, root / "file", DEFAULT, _NAMED),
            as_user(partial(errno_of, os.setxattr, root / "closed", ACCESS, _NAMED)),
            errno_of(os.getxattr, root / "closed", ACCESS),
            errno_of(os.removexattr, root / "closed", DEFAULT),
        ]

    assert attempt(union) == attempt(plain)
