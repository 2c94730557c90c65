"""Nothing outside the layers is read or changed, whatever the layers hold and whatever happens to them meanwhile.

The layers here belong to an attacker, who plants symlinks and marks in them and swaps directories for symlinks while
the union works; `outside` lies beside the layers, has the names that the union uses, and must never be touched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator

import pytest

from tests.union.client import RENAME_EXCHANGE, UMASK, Client, renameat2, union_snapshot
from tests.union.stack import Stack, scratch_directory
from tests.union.trees import Entry, Obj, Tree, Whiteout, build, directory, regular, snapshot, symlink
from unionfsd import steps
from unionfsd.union import Caller, SetAttr, Union

SECRET = b"SECRET"
CALLER = Caller(uid=0, gid=0, pid=0, umask=UMASK)
RACE_SECONDS = float(os.environ.get("UNIONFSD_SOAK_SECONDS", "0")) / 10 or 1.5

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


class SecretLeakedError(Exception):
    """Something outside the layers was read."""


class Outside:
    """A directory with secrets beside the layers."""

    def __init__(self, path: bytes) -> None:
        self.directory = path
        secrets = {name: regular(SECRET) for name in (b"f", b"g", b"n", b"m")}
        build(path, directory({**secrets, b"sub": directory(secrets)}))
        self.before = self.state()

    def state(self) -> tuple[Tree, list[int]]:
        tree = snapshot(self.directory)
        return tree, [os.lstat(self.directory + b"/" + path).st_ctime_ns for path in sorted(tree)]

    def check(self) -> None:
        assert self.state() == self.before


@pytest.fixture
def scratch() -> Iterator[bytes]:
    with scratch_directory() as path:
        yield path


@pytest.fixture
def outside(scratch: bytes) -> Iterator[Outside]:
    place = Outside(scratch + b"/outside")
    yield place
    place.check()


def make_stack(scratch: bytes, lower: Obj, upper: Obj | None) -> Stack:
    os.mkdir(scratch + b"/layers")
    return Stack(scratch + b"/layers", [lower], upper)


def operations(client: Client, at: tuple[bytes, ...]) -> Iterator[Callable[[], object]]:
    """Every operation on names in the directory `at`, as thunks."""
    f, n, m = (*at, b"f"), (*at, b"n"), (*at, b"m")
    yield lambda: client.stat(f)
    yield lambda: client.read(f, 100, 0)
    yield lambda: client.listdir(at)
    yield lambda: client.write(f, b"overwritten", 0)
    yield lambda: client.chmod(f, 0o777)
    yield lambda: client.chown(f, 99, 99)
    yield lambda: client.utimens(f, 1, 1)
    yield lambda: client.truncate(f, 0)
    yield lambda: client.setxattr(f, b"user.evil", b"1", 0)
    yield lambda: client.getxattr(f, b"user.evil")
    yield lambda: client.create(n, 0o666)
    yield lambda: client.mkdir(m, 0o777)
    yield lambda: client.rename(f, n, 0)
    yield lambda: client.link(f, m)
    yield lambda: client.symlink(b"x", (*at, b"g"))
    yield lambda: client.mknod((*at, b"h"), stat.S_IFIFO | 0o666, 0)
    yield lambda: client.unlink(f)
    yield lambda: client.unlink(n)
    yield lambda: client.rmdir(m)
    yield lambda: client.rmdir(at)


def run_all(client: Client, at: tuple[bytes, ...]) -> None:
    """Run every operation; each may fail with an errno, and none may give a secret away."""
    for operation in operations(client, at):
        try:
            result = operation()
        except OSError:
            continue
        if SECRET in repr(result).encode():
            raise SecretLeakedError(repr(result))


LAYERS = ["lower", "upper"]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_planted_symlink(scratch: bytes, outside: Outside, layer: str, depth: int) -> None:
    """A symlink at any component of a path is shown as what it is and never followed."""
    planted: Entry = symlink(outside.directory)
    for name in [b"b", b"a"][2 - depth :]:
        planted = directory({name: planted})
    planted = directory({b"d": planted, b"x": symlink(outside.directory + b"/f")})
    stack = make_stack(
        scratch, planted if layer == "lower" else directory(), planted if layer == "upper" else directory()
    )
    union = stack.union()
    parent = union.root
    for name in [b"d", b"a", b"b"][: depth + 1]:
        parent = union.lookup(parent, name).nodeid
    assert union.readlink(parent) == outside.directory
    for name in (b"f", b"sub", b"absent"):
        with pytest.raises(OSError) as caught:
            union.lookup(parent, name)
        assert caught.value.errno in (errno.ENOTDIR, errno.ENOENT)
    attack_nodes(union, parent, union.lookup(union.root, b"x").nodeid)
    union.close()


def attack_nodes(union: Union, parent: int, leaf: int) -> None:
    """Use a symlink as the directory of every operation, and another as the file: what no honest kernel does."""
    attempts: list[Callable[[], object]] = [
        lambda: steps.run(union.create(parent, b"new", stat.S_IFREG | 0o644, os.O_RDWR, CALLER)),
        lambda: union.mkdir(parent, b"new", 0o755, CALLER),
        lambda: union.mknod(parent, b"new", stat.S_IFIFO, 0, CALLER),
        lambda: union.symlink(parent, b"new", b"x", CALLER),
        lambda: steps.run(union.unlink(parent, b"f")),
        lambda: union.rmdir(parent, b"sub"),
        lambda: steps.run(union.link(leaf, parent, b"new")),
        lambda: steps.run(union.rename(parent, b"f", union.root, b"stolen", 0)),
        lambda: steps.run(union.rename(union.root, b"x", parent, b"f", 0)),
        lambda: list(union.listdir(parent, 0)),
        lambda: steps.run(union.open(leaf, os.O_RDWR)),
        lambda: steps.run(union.read(leaf, 100, 0)),
        lambda: steps.run(union.write(leaf, b"overwritten", 0)),
        lambda: steps.run(union.setattr(leaf, SetAttr(size=0), CALLER)),
    ]
    for attempt in attempts:
        with pytest.raises(OSError):
            attempt()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("what", ["directory", "file"])
@pytest.mark.parametrize("warm", [False, True])
def test_swapped_for_a_symlink(scratch: bytes, outside: Outside, layer: str, what: str, warm: bool) -> None:
    """A directory or file that the kernel knows becomes a symlink in the layer behind the union's back."""
    content = directory({b"d": directory({b"f": regular(b"mine"), b"g": regular(b"mine")})})
    stack = make_stack(
        scratch, content if layer == "lower" else directory(), content if layer == "upper" else directory()
    )
    at = (stack.lowers[0] if layer == "lower" else stack.path + b"/upper") + b"/d"
    union = stack.union()
    client = Client(union)
    client.stat((b"d", b"f"))
    if warm:
        client.listdir((b"d",))
        assert client.read((b"d", b"f"), 100, 0) == b"mine"
    victim = at if what == "directory" else at + b"/f"
    os.rename(victim, victim + b".away")
    os.symlink(outside.directory if what == "directory" else outside.directory + b"/f", victim)
    run_all(client, (b"d",))
    client.forget_all()
    run_all(client, (b"d",))
    union.close()


@pytest.mark.timeout(60 + 2 * RACE_SECONDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_race_with_a_swapper(scratch: bytes, outside: Outside, layer: str) -> None:
    """Another process exchanges a directory of the layer and a symlink to the outside as fast as it can."""
    files = {name: regular(b"mine") for name in (b"f", b"g", b"n", b"m")}
    content = directory({b"d": directory({**files, b"sub": directory(files)}), b"evil": symlink(outside.directory)})
    stack = make_stack(
        scratch, content if layer == "lower" else directory(), content if layer == "upper" else directory()
    )
    layer_root = stack.lowers[0] if layer == "lower" else stack.path + b"/upper"
    swapper = start_swapper(layer_root + b"/d", layer_root + b"/evil")
    try:
        rounds = race(stack, time.monotonic() + RACE_SECONDS)
    finally:
        os.kill(swapper, signal.SIGKILL)
        os.waitpid(swapper, 0)
    assert rounds > 3


def race(stack: Stack, deadline: float) -> int:
    """Operations on a union whose layer changes all the time, until the deadline; returns how many rounds of them."""
    union = stack.union()
    rounds = 0
    while time.monotonic() < deadline:
        client = Client(union)
        for at in ((b"d",), (b"d", b"sub"), (b"evil",), (b"evil", b"sub")):
            # The client's own cache of names may get as confused as a kernel's would.
            with contextlib.suppress(AssertionError):
                run_all(client, at)
        client.forget_all()
        rounds += 1
    union.close()
    return rounds


def start_swapper(left: bytes, right: bytes) -> int:
    """pid of a process that exchanges two paths until it is killed."""
    pid = os.fork()
    if pid:
        return pid
    try:
        while True:
            try:
                renameat2(left, right, RENAME_EXCHANGE)
            except OSError:
                time.sleep(0.001)
    finally:
        os._exit(1)


@pytest.mark.parametrize("name", [b"..", b".", b"", b"a/b", b"/etc", b"../outside", b"a\0b"], ids=repr)
def test_names_are_single_components(scratch: bytes, outside: Outside, name: bytes) -> None:
    content = directory({b"a": directory({b"b": regular()}), b"file": regular()})
    stack = make_stack(scratch, content, directory())
    union = stack.union()
    root, file = union.root, union.lookup(union.root, b"file").nodeid
    attempts: list[Callable[[], object]] = [
        lambda: union.lookup(root, name),
        lambda: steps.run(union.create(root, name, stat.S_IFREG | 0o644, os.O_RDWR, CALLER)),
        lambda: union.mkdir(root, name, 0o755, CALLER),
        lambda: union.mknod(root, name, stat.S_IFIFO, 0, CALLER),
        lambda: union.symlink(root, name, b"x", CALLER),
        lambda: steps.run(union.unlink(root, name)),
        lambda: union.rmdir(root, name),
        lambda: steps.run(union.link(file, root, name)),
        lambda: steps.run(union.rename(root, b"file", root, name, 0)),
        lambda: steps.run(union.rename(root, name, root, b"new", 0)),
    ]
    before = union_snapshot(union)
    for attempt in attempts:
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno in (errno.EINVAL, errno.ENOENT, errno.EEXIST, errno.EPERM, errno.EBUSY)
    assert union_snapshot(union) == before
    union.close()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "node",
    [
        Obj(stat.S_IFCHR, rdev=os.makedev(1, 5)),
        Obj(stat.S_IFBLK, rdev=os.makedev(7, 0)),
        Obj(stat.S_IFIFO),
        Obj(stat.S_IFSOCK),
    ],
    ids=["chardev", "blockdev", "fifo", "socket"],
)
def test_special_files_are_never_opened(scratch: bytes, outside: Outside, layer: str, node: Obj) -> None:
    """The kernel opens devices and FIFOs itself; a daemon that did would run drivers or hang on request of a layer."""
    content = directory({b"node": node})
    stack = make_stack(
        scratch, content if layer == "lower" else directory(), content if layer == "upper" else directory()
    )
    union = stack.union()
    nodeid = union.lookup(union.root, b"node").nodeid
    for attempt in (
        lambda: steps.run(union.open(nodeid, os.O_RDWR)),
        lambda: steps.run(union.read(nodeid, 100, 0)),
        lambda: steps.run(union.write(nodeid, b"x", 0)),
        lambda: steps.run(union.setattr(nodeid, SetAttr(size=0), CALLER)),
        lambda: steps.run(union.fallocate(nodeid, 0, 0, 1)),
    ):
        with pytest.raises(OSError):
            attempt()
    steps.run(union.setattr(nodeid, SetAttr(mode=0o600), CALLER))
    assert stat.S_IMODE(union.getattr(nodeid).st.st_mode) == 0o600
    union.close()


def test_lower_hard_links_are_left_alone(scratch: bytes, outside: Outside) -> None:
    """A file of a lower that also lies outside of it: a change through the union leaves the other name alone."""
    stack = make_stack(scratch, directory({b"d": directory()}), directory())
    lower_file = stack.lowers[0] + b"/d/f"
    os.link(outside.directory + b"/f", lower_file)
    outside.before = outside.state()
    union = stack.union()
    client = Client(union)
    assert client.read((b"d", b"f"), 100, 0) == SECRET
    for operation in list(operations(client, (b"d",)))[3:]:
        try:
            operation()
        except OSError:
            continue
    union.close()


@pytest.mark.parametrize("layer", LAYERS)
def test_hostile_marks(scratch: bytes, outside: Outside, layer: str) -> None:
    """Whiteouts and xattrs of the format in forms that no union writes: errors or plain files, never a way out."""
    content = directory(
        {
            b".wh..wh..opq": directory({b"f": regular()}),
            b".wh.a": symlink(outside.directory),
            b".wh.": regular(b""),
            b".wh...": regular(b""),
            b"d": directory({b".wh..wh..opq": symlink(outside.directory), b"f": regular(b"mine")}),
            b"r": Obj(stat.S_IFDIR, mode=0o755, xattrs=((b"trusted.overlay.redirect", b"/../../outside"),)),
            b"q": Obj(stat.S_IFDIR, mode=0o755, xattrs=((b"trusted.overlay.redirect", b"../../outside"),)),
            b"m": Obj(
                stat.S_IFREG,
                xattrs=((b"trusted.overlay.metacopy", b""), (b"trusted.overlay.redirect", outside.directory + b"/f")),
            ),
            b"o": Obj(stat.S_IFREG, b"mine", xattrs=((b"trusted.overlay.origin", b"\0\xfb\xff" + b"\xff" * 40),)),
            b"w": Obj(stat.S_IFREG, b"mine", xattrs=((b"trusted.overlay.whiteout", b"y"),)),
            b"z": Obj(stat.S_IFDIR, mode=0o755, xattrs=((b"trusted.overlay.opaque", b"\xff" * 100),)),
        }
    )
    below = directory({name: directory({b"f": regular(b"below")}) for name in (b"a", b"r", b"q", b"z", b"d")})
    os.mkdir(scratch + b"/layers")
    uppermost = content if layer == "upper" else directory({b"d": directory(), b"w": Whiteout()})
    stack = Stack(scratch + b"/layers", [content, below] if layer == "lower" else [below], uppermost)
    union = stack.union()
    names = {name for name, *_ in union.listdir(union.root, 0)}
    assert not any(name.startswith(b".wh.") for name in names)
    client = Client(union)
    for name in sorted(names | {b"a"}):
        run_all(client, (name,))
    for name in (b"m", b"o", b"w"):
        try:
            assert SECRET not in client.read((name,), 100, 0)
        except OSError:
            continue
    union.close()
