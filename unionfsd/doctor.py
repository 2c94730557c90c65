"""What is wrong with an upper that no mount has, by the rules of the format (docs/doctor.md has the table of codes).

Rules this file obeys:

- It only looks: nothing is written anywhere. The upper is locked, so nobody changes it meanwhile.
- The walk goes over the upper as it is, marks and all; what a name means is asked of `lookup`, where lowers are given.
- A mark that cannot be read ends no walk: it is a finding, and the directory is taken for one without lowers.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from . import format as fmt
from . import syscalls
from .entries import UPPER, Entry
from .errors import one_line
from .fdcache import FdCache
from .identity import other_lowers
from .inodes import DirNode
from .layers import LayerStack, exists, optional_xattr, xattr_names
from .lookup import Resolver
from .syscalls import stat_or_none
from .typed import Final, NamedTuple

#: Findings that are a matter of taste: unionfsd understands them, others may not.
NOTES: Final = frozenset(
    (
        "foreign-opaque",
        "mixed-whiteouts",
        "mixed-namespaces",
        "needless-whiteout",
        "dead-origin",
        "aufs-leftover",
        "copied-lowers",
    )
)


class Finding(NamedTuple):
    """One thing that is not as it should be: its `code`, where (from the root of the layer, or of work), and why."""

    code: str
    path: bytes
    detail: str
    where: str = "upper"

    @property
    def is_problem(self) -> bool:
        """Whether it is more than a note."""
        return self.code not in NOTES

    @property
    def line(self) -> str:
        """It, for people."""
        return f"{self.code}: {self.where}:{one_line(os.fsdecode(self.path))}: {one_line(self.detail)}"


class Whiteout(NamedTuple):
    """A whiteout of the upper: of which `form`, and the `name` that it hides."""

    form: str
    name: bytes


class Directory(NamedTuple):
    """A directory of the upper on the walk: the number of its fd, and what the union makes of it."""

    path: bytes
    fd: int
    node: DirNode
    marks: fmt.Marks
    names: tuple[bytes, ...]


class Walk:
    """The directories of an upper, from the root down; `findings` are those about reading it."""

    def __init__(self, stack: LayerStack) -> None:
        assert stack.upper is not None
        self.resolver = Resolver(stack, FdCache(FdCache.MINIMUM), follow_redirects=True)
        self.has_lowers = bool(stack.lowers)
        self._upper = stack.upper
        self.findings: list[Finding] = []

    def run(self) -> Iterator[Directory]:
        """Each is good until the next is asked for."""
        root = DirNode(0, None, b"", self.resolver.root().entry if self.has_lowers else UPPER, 0)
        pending = [(root, b"/")]
        while pending:
            node, path = pending.pop()
            with syscalls.reopen(self.resolver.upper_dir(node), os.O_PATH | os.O_DIRECTORY) as fd:
                directory = self._read(node, path, fd.fd)
                if directory is not None:
                    yield directory
                    pending += reversed([(child, join(path, child.name)) for child in self._children(directory)])
            node.doubt()

    def _read(self, node: DirNode, path: bytes, fd: int) -> Directory | None:
        try:
            names = tuple(sorted(name for name, _ in self._upper.scan(fd)))
        except PermissionError as exc:
            self.findings.append(Finding("unreadable", path, exc.strerror or ""))
            return None
        return Directory(path, fd, node, self._marks(fd), names)

    def _children(self, at: Directory) -> Iterator[DirNode]:
        for name in at.names:
            st = stat_or_none(at.fd, name)
            if st is not None and stat.S_ISDIR(st.st_mode) and not fmt.is_reserved(name):
                yield DirNode(0, at.node, name, self._entry(at.node, name), 0)

    def _marks(self, fd: int) -> fmt.Marks:
        values = [value for name in fmt.OPAQUE_NAMES if (value := optional_xattr(fd, name)) is not None]
        marks = fmt.marks(values)
        return marks._replace(opaque=True) if exists(fd, fmt.WH_OPAQUE) else marks

    def _entry(self, parent: DirNode, name: bytes) -> Entry:
        try:
            hit = self.resolver.find(parent, name) if self.has_lowers else None
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            return UPPER  # a redirect that says nothing; `_redirect` reports it
        return UPPER if hit is None else hit.entry


def join(path: bytes, name: bytes) -> bytes:
    """`name` in the directory `path`, which begins with a slash."""
    return path.rstrip(b"/") + b"/" + name


def whiteout_of(directory: Directory, name: bytes, st: os.stat_result) -> Whiteout | None:
    """The whiteout that the entry `name` of the upper is, if it is one."""
    if fmt.is_reserved(name):
        target = fmt.wh_target(name)
        return None if target is None else Whiteout("wh", target)
    if fmt.is_whiteout_device(st.st_mode, st.st_rdev):
        return Whiteout("chardev", name)
    if stat.S_ISREG(st.st_mode) and not st.st_size and directory.marks.xwhiteouts and bears_whiteout(directory, name):
        return Whiteout("xattr", name)
    return None


def bears_whiteout(directory: Directory, name: bytes) -> bool:
    """Whether the entry has the xattr of a whiteout."""
    with syscalls.open_object(directory.fd, name) as fd:
        return any(attr in fmt.WHITEOUT_NAMES for attr in xattr_names(fd.fd))


def examine(stack: LayerStack) -> Iterator[Finding]:
    """Everything that is wrong with the upper of `stack`, by directory; at last what concerns it as a whole.

    With lowers also what does not fit them. `stack.work` None: the work directory is not looked at.
    """
    walk = Walk(stack)
    check = _Check(walk, stack)
    for directory in walk.run():
        yield from check.directory(directory)
    yield from walk.findings
    yield from check.whole()
    yield from _identity(stack)
    if stack.work is not None:
        yield from _work(stack)


class _Check:
    def __init__(self, walk: Walk, stack: LayerStack) -> None:
        self._resolver = walk.resolver
        self._has_lowers = walk.has_lowers
        self._stack = stack
        assert stack.upper is not None
        self._override = stack.upper.override
        self._forms: set[str] = set()
        self._namespaces: set[bytes] = set()
        self._overrides = 0
        self._decodes = _decodes(stack)

    def directory(self, at: Directory) -> Iterator[Finding]:
        yield from self._opaque(at)
        if at.path == b"/":
            yield from self._object_marks(at, b"", b"/", os.fstat(at.fd))
        for name in at.names:
            st = stat_or_none(at.fd, name)
            if st is None:
                continue
            path = join(at.path, name)
            whiteout = whiteout_of(at, name, st)
            if whiteout is not None:
                yield from self._whiteout(at, path, whiteout)
            elif fmt.is_reserved(name):
                if name != fmt.WH_OPAQUE:
                    yield Finding("aufs-leftover", path, "hidden, and without a meaning")
            else:
                yield from self._object(at, name, path, st)

    def _opaque(self, at: Directory) -> Iterator[Finding]:
        if not at.marks.opaque:
            return
        opaque = fmt.OPAQUE_YES
        if not any((optional_xattr(at.fd, name) or b"")[:1] == opaque for name in fmt.OPAQUE_NAMES[:2]):
            yield Finding("foreign-opaque", at.path, "the kernel does not see that it is opaque")
        elif exists(at.fd, fmt.WH_OPAQUE):
            yield Finding("foreign-opaque", at.path, "the kernel shows .wh..wh..opq as a file")

    def _whiteout(self, at: Directory, path: bytes, whiteout: Whiteout) -> Iterator[Finding]:
        self._forms.add(whiteout.form)
        if whiteout.form == "wh" and exists(at.fd, whiteout.name):
            return  # says that the entry beside it is not merged
        if not self._has_lowers:
            return
        if not at.node.entry.lowers:
            yield Finding("needless-whiteout", path, "in a directory without lowers, where the kernel lists it")
        elif not self._resolver.lower_has(at.node, whiteout.name):
            yield Finding("needless-whiteout", path, "no lower has the name")

    def _object(self, at: Directory, name: bytes, path: bytes, st: os.stat_result) -> Iterator[Finding]:
        if stat.S_ISREG(st.st_mode) and not st.st_size and bears_whiteout(at, name):
            yield Finding("unmarked-whiteout", path, "its directory is not marked to have such, so it shows as a file")
        yield from self._object_marks(at, name, path, st)

    def _object_marks(self, at: Directory, name: bytes, path: bytes, st: os.stat_result) -> Iterator[Finding]:
        opened = syscalls.open_object(at.fd, name) if name else syscalls.reopen(at.fd, os.O_PATH)
        with opened as fd:
            names = set(xattr_names(fd.fd))
            self._namespaces |= {ns for ns in (fmt.TRUSTED, fmt.USER) if any(n.startswith(ns) for n in names)}
            yield from self._redirect(at, name, path, fd.fd, names)
            yield from self._origin(path, fd.fd, names)
            yield from self._metacopy(at, name, path, names, st)
            yield from self._record(path, fd.fd, names, st)

    def _redirect(self, at: Directory, name: bytes, path: bytes, fd: int, names: set[bytes]) -> Iterator[Finding]:
        for attr in fmt.REDIRECT_NAMES:
            if attr not in names:
                continue
            value = syscalls.getxattr(fd, attr)
            try:
                redirect = fmt.decode_redirect(value)
            except OSError:
                yield Finding("bad-redirect", path, f"not a name and not a path: {os.fsdecode(value)}")
                continue
            if self._has_lowers and name and not self._leads(at, name):
                yield Finding("dangling-redirect", path, f"no lower has {os.fsdecode(redirect.encode())}")

    def _leads(self, at: Directory, name: bytes) -> bool:
        hit = self._resolver.find(at.node, name)
        return hit is None or not stat.S_ISDIR(hit.st.st_mode) or bool(hit.entry.lowers)

    def _origin(self, path: bytes, fd: int, names: set[bytes]) -> Iterator[Finding]:
        for attr in fmt.ORIGIN_NAMES:
            value = syscalls.getxattr(fd, attr) if attr in names else b""
            if not value:
                continue
            origin = fmt.decode_origin(value)
            if origin is None:
                yield Finding("bad-origin", path, f"{os.fsdecode(attr)} is damaged, or of another machine")
            elif self._has_lowers and not self._found(origin):
                yield Finding("dead-origin", path, "what it was copied from is in none of the lowers' file systems")

    def _found(self, origin: fmt.Origin) -> bool:
        """Whether the origin is still there; True where we may not ask."""
        if not self._decodes:
            return True
        return any(layer.stat_handle(origin.kind, origin.handle) is not None for layer in self._stack.lowers)

    def _metacopy(
        self, at: Directory, name: bytes, path: bytes, names: set[bytes], st: os.stat_result
    ) -> Iterator[Finding]:
        if not names.intersection(fmt.METACOPY_NAMES) or not self._has_lowers:
            return
        if names.intersection(fmt.REDIRECT_NAMES):
            return
        found = self._resolver.find_lower(at.node, name) if at.node.entry.lowers else None
        if not stat.S_ISREG(st.st_mode) or found is None or not stat.S_ISREG(found.st.st_mode):
            yield Finding("metacopy-without-data", path, "no lower has its data")

    def _record(self, path: bytes, fd: int, names: set[bytes], st: os.stat_result) -> Iterator[Finding]:
        for form in fmt.OVERRIDE_FORMS:
            if form.name not in names:
                continue
            self._overrides += form is not self._override
            try:
                fmt.decode_override(syscalls.getxattr(fd, form.name), stat.S_IFMT(st.st_mode))
            except OSError:
                yield Finding("bad-owner", path, f"{os.fsdecode(form.name)} makes no sense")

    def whole(self) -> Iterator[Finding]:
        """What only the whole upper shows."""
        if len(self._forms) > 1:
            yield Finding("mixed-whiteouts", b"/", "deletions are recorded as " + " and ".join(sorted(self._forms)))
        if len(self._namespaces) > 1:
            yield Finding("mixed-namespaces", b"/", "marks are in both namespaces; the kernel reads one")
        if self._overrides:
            yield Finding(
                "unused-owners",
                b"/",
                f"{self._overrides} objects have an owner in an xattr that the root does not have",
            )


def _decodes(stack: LayerStack) -> bool:
    """Whether we may ask what file handles mean, which takes CAP_DAC_READ_SEARCH: those of the roots, for a test."""
    for layer in stack.lowers:
        try:
            kind, handle = syscalls.file_handle(layer.root.fd, b"")
        except OSError:
            return False
        if layer.stat_handle(kind, handle) is None:
            return False
    return True


def _identity(stack: LayerStack) -> Iterator[Finding]:
    other = other_lowers(stack) if stack.lowers else None
    if other is not None:
        code = "copied-lowers" if other.copied else "other-lowers"
        yield Finding(code, b"/", f"was used with {os.fsdecode(other.path)}, which is none of the lowers")


# The work directory.


def _work(stack: LayerStack) -> Iterator[Finding]:
    assert stack.work is not None
    for name in sorted(_scan(stack.work.fd)):
        if name == fmt.WORK:
            with syscalls.open_dir(stack.work.fd, name) as fd:
                yield from _staged(fd.fd)
        elif name == fmt.INDEX:
            with syscalls.open_dir(stack.work.fd, name) as fd:
                yield from _index(fd.fd, stack)
        elif name not in (fmt.EXPORTS, fmt.EXPORTS_STAGED):
            yield Finding("foreign-work", b"/" + name, "not a union's: the work directory is refused", "work")


def _staged(fd: int) -> Iterator[Finding]:
    for name in sorted(_scan(fd)):
        path = b"/work/" + name
        if name == fmt.INCOMPAT:
            with syscalls.open_dir(fd, name) as incompat:
                for feature in sorted(_scan(incompat.fd)):
                    yield Finding("incompat", path + b"/" + feature, "mounts refuse the upper because of it", "work")
        else:
            yield Finding("leftover", path, "of a mount that did not end; the next one sweeps it", "work")


def _index(fd: int, stack: LayerStack) -> Iterator[Finding]:
    for name in sorted(_scan(fd)):
        path = b"/index/" + name
        try:
            origin = fmt.decode_origin(bytes.fromhex(name.decode("ascii")))
        except ValueError:
            origin = None
        if origin is None:
            yield Finding("bad-index", path, "its name is no file handle", "work")
        elif stack.lowers and _decodes(stack):
            found = (layer.stat_handle(origin.kind, origin.handle) for layer in (*stack.lowers, stack.upper) if layer)
            if not any(st is not None for st in found):
                yield Finding("orphan-index", path, "no layer has what it is of", "work")


def _scan(fd: int) -> list[bytes]:
    with os.scandir(syscalls.proc_path(fd)) as entries:
        return [entry.name for entry in entries]
