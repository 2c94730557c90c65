"""Mount options: from the text of `-o` to a frozen `MountConfig`. The table of what there is stands in `options.table`.

Rules this file obeys:

- It reads text and touches nothing; whether a path exists is the business of whoever opens it.
- An option that nobody knows is ignored with a warning, because podman, mount(8) and fstab pass theirs to every
  mount program. A known option with a wrong value refuses the mount.
- An option whose neglect would show wrong owners or skip a check is refused until it is supported, not ignored.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from unionfsd.errors import UserError, one_line
from unionfsd.options.effects import Draft, Nothing, Option, Refused, Security
from unionfsd.options.table import FOREVER, OPTIONS
from unionfsd.options.text import TreeFile, split_options, unquote
from unionfsd.typed import Any, Final, Literal, NamedTuple, TypedDict

Whiteout = Literal["auto", "chardev", "xattr", "wh"]
RedirectDir = Literal["on", "follow", "nofollow", "off"]
Uuid = Literal["null", "off", "auto", "on"]
Verity = Literal["off", "on", "require"]
Transport = Literal["auto", "channel", "pyfuse3"]
Io = Literal["auto", "cached", "passthrough"]
Switch = Literal["on", "off"]
XattrPermissions = Literal["0", "1", "2"]

IdTriples = tuple[tuple[int, int, int], ...]
"""Runs of ids: the first on disk, the first in the mount, how many."""


class Rules(TypedDict):
    """What a resolver of `lookup` follows."""

    follow_redirects: bool
    metacopy: bool
    verity: Verity


class MountConfig(NamedTuple):
    """Everything that is asked of one mount. Paths are absolute, not normalised, and may be or contain symlinks."""

    lowerdirs: tuple[bytes, ...]
    """At least one, the top one first."""
    mountpoint: bytes
    """A directory, or ``/dev/fd/N`` when somebody mounted already and N is their /dev/fuse."""
    datadirs: tuple[bytes, ...] = ()
    """Layers that show nothing and have the data of files above, top first."""
    verify: tuple[TreeFile | None, ...] = ()
    """What lowers, and then data-only layers, must hold; empty when nothing is checked, else one for each of them."""
    upperdir: bytes | None = None
    workdir: bytes | None = None
    """Set when `upperdir` is; without, only to keep there what file handles mean."""
    source: str = ""
    """The first word of a mount table line, as given; empty when none was."""
    fsname: str = "unionfsd"
    subtype: str = "unionfsd"
    ro: bool = False
    """Asked for. A union with no upper is read-only without it, see `read_only`."""
    volatile: bool = False
    """Nothing is synced, and the work directory says so from then on."""
    accept_volatile: bool = False
    """An upper that was volatile before is mounted."""
    fsync: bool = True
    """False: nothing is synced."""
    whiteout: Whiteout = "auto"
    userxattr: bool | None = None
    """user.* instead of trusted.* for internal xattrs; None leaves it to what the layers allow."""
    redirect_dir: RedirectDir = "on"
    uuid: Uuid = "null"
    """Whether the upper gets a UUID of its own."""
    metacopy: Switch = "off"
    verity: Verity = "off"
    index: Literal["auto", "on", "off"] = "auto"  # type: ignore[assignment]  # nobody wants tuple's method
    nfs_export: Switch = "off"
    """Whether file handles of the mount stay good."""
    rebase: bool = False
    """An upper that was used with other lowers is accepted, and made one of these."""
    timeout: float = FOREVER
    """Seconds the kernel may cache names (also absent ones) and attributes."""
    uid: int | None = None
    """Everything is shown as owned by this user, whatever the layers say."""
    gid: int | None = None
    uidmapping: IdTriples | None = None
    gidmapping: IdTriples | None = None
    xattr_permissions: XattrPermissions = "0"
    """Whether and in which xattr the upper keeps owners and modes; its root may say so itself."""
    noacl: bool = False
    noxattrs: bool = False
    static_nlink: bool = False
    """Directories have a link count of 1."""
    allow_other: bool = False
    mount_flags: int = 0
    """MS_* of mount(2), without MS_RDONLY."""
    security: tuple[str, ...] = ()
    """SELinux options (``context="..."``) as given, for a kernel that has SELinux."""
    transport: Transport = "auto"
    io: Io = "auto"
    writeback: Literal["auto", "on", "off"] = "auto"
    keeper: Switch = "on"
    spare: float = 0.0
    """Seconds that a process waits for further mounts, so that they take less time; 0 for none."""
    debug: bool = False
    log: bytes | None = None
    control: Literal["auto", "off"] | bytes = "auto"
    """Where the control socket is."""
    control_group: str | None = None
    """A group that may use it, by name or number."""
    events: Literal["auto", "on"] = "auto"
    """Whether changes are recorded from the beginning, or once somebody asks for them."""
    explicit: frozenset[str] = frozenset()
    """Names of the options that were given, so that a default can be told from a wish."""
    warnings: tuple[str, ...] = ()
    """One line each, for people: what was ignored, and why."""

    @property
    def rules(self) -> Rules:
        """What names and data are resolved by."""
        return {
            "follow_redirects": self.redirect_dir != "nofollow",
            "metacopy": self.metacopy == "on",
            "verity": self.verity,
        }

    @property
    def syncs(self) -> bool:
        """Whether what is written is put on disk when somebody asks."""
        return self.fsync and not self.volatile

    @property
    def read_only(self) -> bool:
        """Whether the mount takes no writes."""
        return self.ro or self.upperdir is None


_BY_NAME: Final = {option.name: option for option in OPTIONS}


# Reading text.


def parse(texts: Iterable[str]) -> Parsed:
    """Read the values of all `-o` in their order; later options win. Raises UserError for wrong values."""
    draft = Draft()
    for text in texts:
        for piece in split_options(text):
            _take(draft, piece)
    return Parsed(draft.fields, frozenset(draft.explicit), tuple(draft.warnings))


def _take(draft: Draft, piece: str) -> None:
    name, equals, text = piece.partition("=")
    option = _find(name)
    if option is None:
        draft.warnings.append(f"unknown option ignored: {one_line(piece)}")
        return
    draft.explicit.add(name)
    try:
        _check_arity(option, bool(equals))
        option.effect.apply(draft, name, text if isinstance(option.effect, Security) else unquote(text))
    except ValueError as error:
        raise UserError(f"option {piece}: {error}", hint=f"usage: {option.usage}") from None


def _find(name: str) -> Option | None:
    return _BY_NAME["x-*"] if name[:2] in ("x-", "X-") else _BY_NAME.get(name)


def _check_arity(option: Option, has_value: bool) -> None:
    if isinstance(option.effect, Nothing | Refused):
        return  # for somebody else, and they know how many they take
    if option.argument and not has_value:
        raise ValueError("needs a value")
    if has_value and not option.argument:
        raise ValueError("takes no value")


class Parsed(NamedTuple):
    """Options that were read: MountConfig fields that were given, names, warnings. `config` makes a mount of them."""

    fields: dict[str, Any]
    explicit: frozenset[str]
    warnings: tuple[str, ...]

    def config(self, mountpoint: bytes, source: str = "", *, cwd: bytes | None = None, root: bool) -> MountConfig:
        """Complete the options for one mount.

        Paths are made absolute against `cwd` (the current directory). `root` is whether the mount is made with
        privileges, which decides about `allow_other`. Raises UserError when the layers asked for make no union.
        """
        cwd = os.getcwdb() if cwd is None else cwd
        fields = {"allow_other": root, "fsname": source or "unionfsd", **self.fields}
        for name in ("upperdir", "workdir", "log"):
            if name in fields:
                fields[name] = os.path.join(cwd, fields[name])
        if isinstance(fields.get("control"), bytes):
            fields["control"] = os.path.join(cwd, fields["control"])
        for name in ("lowerdirs", "datadirs"):
            fields[name] = tuple(os.path.join(cwd, path) for path in fields.get(name, ()))
        if "verify" in fields:
            files = fields["verify"]
            fields["verify"] = tuple(file and file._replace(path=os.path.join(cwd, file.path)) for file in files)
        if not fields["lowerdirs"]:
            ignored = "".join(f"; {warning}" for warning in self.warnings)  # a slip of the pen, perhaps
            raise UserError(f"no layer given{ignored}", hint="say which with -o lowerdir=DIR[:DIR...]")
        warnings = (*self.warnings, *_check_layers(fields))
        return MountConfig(
            mountpoint=os.path.join(cwd, mountpoint),
            source=source,
            explicit=self.explicit,
            warnings=warnings,
            **fields,
        )


def _check_layers(fields: dict[str, Any]) -> Iterator[str]:
    """Refuse combinations that make no union; yields warnings about those that make one, and drops what is useless."""
    if "upperdir" in fields and "workdir" not in fields:
        raise UserError("upperdir needs a workdir", hint="add workdir=DIR, an empty directory beside the upper")
    if fields.get("metacopy") == "on":
        _check_metacopy(fields)
    if fields.get("nfs_export") == "on" and fields.get("index") == "off":
        raise UserError("nfs_export=on does not go with index=off", hint="names of hard links would part")
    if fields.get("nfs_export") == "on" and fields.get("keeper", "on") == "on":
        if "keeper" in fields:
            yield "keeper=off: with nfs_export=on nodes are not handed on to another process"
        fields["keeper"] = "off"
    if "verify" in fields and len(fields["verify"]) != len(fields["lowerdirs"]) + len(fields["datadirs"]):
        raise UserError(
            f"verify names {len(fields['verify'])} files for {len(fields['lowerdirs'])} layers",
            hint="name one for each lower, in their order, or leave it empty between colons",
        )
    if "workdir" in fields and "upperdir" not in fields and fields.get("nfs_export") != "on":
        del fields["workdir"]
        yield "workdir ignored: without upperdir the union is read-only"


def _check_metacopy(fields: dict[str, Any]) -> None:
    """Redirects lead to the data: what is renamed needs a new one (ovl.rst, "Metadata only copy up")."""
    redirects = fields.get("redirect_dir", "on")
    if redirects in ("nofollow", "off") or (redirects == "follow" and "upperdir" in fields):
        raise UserError(f"metacopy=on does not go with redirect_dir={redirects}", hint="use redirect_dir=on")
