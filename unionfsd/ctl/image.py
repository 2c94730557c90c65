"""``unionfsctl image ...``: the table of its verbs, and from words to exit codes.

=====  ==========================================================================
0      done
1      no such image or container; what was verified is damaged; a command's own
2      wrong usage, or what came from outside is not what it should be
4      in use
5      the mount failed, or nothing is mounted there
=====  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

from unionfsd.ctl.main import Argument, Verb, made_of
from unionfsd.typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import argparse

_IMAGE: Final = Argument("image", "its name, its digest, or the beginning of that", {})
_SOURCE: Final = Argument(
    "source",
    "oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], dir:DIR, tar:FILE, root:DIR, "
    "containers-storage:[DIR@]NAME, or a path",
    {},
)
_NAMES: Final = Argument(
    "--name",
    "its name in the store (default: the one it has there)",
    {"action": "append", "default": [], "metavar": "NAME"},
)
_PLATFORM: Final = Argument("--platform", "OS/ARCHITECTURE[/VARIANT] (default: this machine's)", {"default": None})
_JOBS: Final = Argument("--jobs", "layers at once", {"type": int, "default": None})
_QUIET: Final = Argument("--quiet", "print the result only", {"action": "store_true"})
_NAMES_ONLY: Final = Argument("--quiet", "print names only", {"action": "store_true"})
_MAX: Final = Argument(
    "--max-layer", "refuse layers that unpack to more GiB (default: 64)", {"type": int, "default": 64}
)
_DISCARD: Final = Argument("--discard-blobs", "do not keep layers as they came", {"action": "store_true"})
_OPTIONS: Final = Argument(
    "-o", "mount options, see unionfsd(8)", {"dest": "options", "action": "append", "default": []}
)
_COMPRESSION: Final = Argument(
    "--compression", "gzip, zstd or none", {"choices": ("gzip", "zstd", "none"), "default": "gzip"}
)
_TIMESTAMP: Final = Argument(
    "--timestamp",
    "no time is later than this, in s since 1970 (default: $SOURCE_DATE_EPOCH)",
    {"type": int, "default": None},
)
_POLICY: Final = Argument("--policy", "a file of rules (default: policy.toml of the store)", {"default": None})
_PLAIN: Final = Argument("--plain-http", "without TLS also to other machines", {"action": "store_true"})
_TLS: Final = Argument(
    "--tls-verify",
    "false: a certificate that nobody vouches for, or no TLS, will do",
    {"choices": ("true", "false"), "default": "true"},
)
_VERIFY: Final = Argument(
    "--verify",
    "check every object and all data when it is first used: EIO for what was changed",
    {"action": "store_true"},
)
_CONTAINER: Final = Argument("container", "its name", {})

VERBS: Final[tuple[Verb, ...]] = (
    Verb(
        "import",
        "unpack an image into the store",
        (_SOURCE, _NAMES, _PLATFORM, _JOBS, _MAX, _DISCARD, _QUIET, _POLICY),
        "image_move",
    ),
    Verb(
        "pull",
        "unpack an image of a registry into the store",
        (
            Argument("source", "docker://HOST/NAME[:TAG][@DIGEST], or the name alone", {}),
            *(_NAMES, _PLATFORM, _JOBS, _MAX, _DISCARD, _QUIET, _POLICY, _PLAIN, _TLS),
            Argument("--mirror", "HOST to ask first", {"action": "append", "default": [], "metavar": "HOST"}),
        ),
        "image_move",
    ),
    Verb(
        "push",
        "push an image, and its signatures, to a registry",
        (
            _IMAGE,
            Argument("to", "docker://HOST/NAME[:TAG] (default: its name)", {"nargs": "?"}),
            Argument("--referrers", "signatures also as OCI 1.1 referrers", {"action": "store_true"}),
            *(_PLAIN, _TLS),
            _QUIET,
        ),
        "image_move",
    ),
    Verb(
        "tags",
        "list the tags of a repository in a registry",
        (Argument("repository", "docker://HOST/NAME, or the name alone", {}), _PLAIN, _TLS),
        "image_move",
    ),
    Verb(
        "sign",
        "sign an image, in cosign's format; $COSIGN_PASSWORD is for an encrypted key",
        (
            _IMAGE,
            Argument("--key", "the private key, in PEM or as cosign has it", {"required": True}),
            Argument("--as", "the name to sign it as (default: its own)", {"dest": "name", "default": None}),
        ),
        "image_move",
    ),
    Verb(
        "generate-key",
        "make a pair of keys to sign with, PREFIX.key and PREFIX.pub, as cosign does; $COSIGN_PASSWORD encrypts it",
        (Argument("--prefix", "where, but for .key and .pub (default: cosign)", {"default": "cosign"}),),
        "image_move",
    ),
    Verb(
        "verify-signature",
        "check that an image is signed by a key",
        (_IMAGE, Argument("--key", "a public key, in PEM", {"action": "append", "required": True})),
        "image_move",
    ),
    Verb("ls", "list images", (_NAMES_ONLY,), "image_show"),
    Verb("inspect", "an image: configuration, layers, where each lies", (_IMAGE,), "image_show"),
    Verb("history", "each layer, with the instruction that made it", (_IMAGE,), "image_show"),
    Verb("tree", "images as a tree of the layers they share", (), "image_show"),
    Verb("tag", "give an image another name", (_IMAGE, Argument("name", "the new name", {})), "image_show"),
    Verb("rm", "remove a name; with the last one the image", (_IMAGE,), "image_show"),
    Verb("gc", "remove what no image, container or mount needs", (), "image_show"),
    Verb("du", "the space that images take", (), "image_show"),
    Verb(
        "verify",
        "read everything again and compare it with what was imported",
        (
            Argument("images", "images (default: all)", {"nargs": "*", "metavar": "image"}),
            Argument("--unpack", "unpack every layer again beside it, and compare that, too", {"action": "store_true"}),
        ),
        "image_show",
    ),
    Verb(
        "diff",
        "what differs between two images or containers: A added, C changed, D deleted",
        (
            Argument("first", "an image, or a container, which alone is compared with its image", {}),
            Argument("second", "another", {"nargs": "?", "default": None}),
        ),
        "image_show",
    ),
    Verb(
        "mount",
        "mount an image read-only, one of podman's or Docker's in place: containers-storage:[DIR@]NAME",
        (_IMAGE, Argument("mountpoint", "where", {}), _VERIFY, _OPTIONS, _POLICY),
        "image_run",
    ),
    Verb(
        "umount",
        "unmount an image or a container",
        (Argument("what", "a mountpoint, or a container", {}),),
        "image_run",
    ),
    Verb(
        "create",
        "make a container: an image with a writable layer",
        (_IMAGE, Argument("--name", "its name (default: made up)", {"default": None})),
        "image_run",
    ),
    Verb(
        "start",
        "mount a container, and print where",
        (
            _CONTAINER,
            Argument("mountpoint", "where (default: in the store)", {"nargs": "?", "default": None}),
            _VERIFY,
            _OPTIONS,
            _POLICY,
        ),
        "image_run",
    ),
    Verb("containers", "list containers", (_NAMES_ONLY,), "image_run"),
    Verb("remove", "remove a container", (_CONTAINER,), "image_run"),
    Verb(
        "run",
        "run a command in a container of an image",
        (
            Argument("--name", "keep the container, by this name", {"default": None}),
            Argument("--runner", "chroot, crun or runc", {"choices": ("chroot", "crun", "runc"), "default": "chroot"}),
            Argument("--env", "NAME=VALUE", {"action": "append", "default": []}),
            Argument("--workdir", "the directory to run it in", {"default": None}),
            Argument("--user", "USER[:GROUP]", {"default": None}),
            Argument("--no-entrypoint", "leave out the image's entrypoint", {"action": "store_true"}),
            _VERIFY,
            _OPTIONS,
            _POLICY,
            _IMAGE,
            Argument("command", "the command (default: the image's)", {"nargs": "..."}),
        ),
        "image_run",
    ),
    Verb(
        "hold",
        "run a command that has the layers of an image, in the place of the word @layers, the top one first",
        (_POLICY, _IMAGE, Argument("command", "the command", {"nargs": "..."})),
        "image_run",
    ),
    Verb(
        "commit",
        "make an image of a container",
        (
            _CONTAINER,
            Argument("name", "the name of the image", {}),
            Argument("--change", "KEY=VALUE of its configuration", {"action": "append", "default": []}),
            Argument("--author", "who made it", {"default": ""}),
            Argument("--message", "what was made", {"default": ""}),
            _COMPRESSION,
            _TIMESTAMP,
            _QUIET,
        ),
        "image_move",
    ),
    Verb(
        "export",
        "write an image for others: oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], dir:DIR",
        (_IMAGE, Argument("to", "where", {}), _QUIET),
        "image_move",
    ),
    Verb(
        "export-layer",
        "write the tar of a container's upper, or of a layer of an image, and print its DiffID",
        (
            Argument("what", "a container, or an image with --layer", {}),
            Argument("file", "where", {}),
            Argument("--layer", "the number of a layer, the lowest is 0", {"type": int, "default": None}),
            _TIMESTAMP,
        ),
        "image_move",
    ),
    Verb(
        "config",
        "what the image runs: environment, directory, command",
        (_IMAGE, Argument("--shell", "as assignments for a shell", {"action": "store_true"})),
        "image_run",
    ),
)

_ABOUT: Final = "Images: import them, look at them, mount them, run them, make them."


def image(given: argparse.Namespace) -> int:
    """The verb of the table of ``unionfsctl``."""
    return run(given.words)


def run(arguments: Sequence[str]) -> int:
    """Run the words after ``image``; returns an exit code."""
    given = parser().parse_args(arguments)
    from importlib import import_module

    function = getattr(import_module(f"unionfsd.ctl.{given.verb.where}"), given.verb.function.replace("-", "_") + "_")
    code: int = function(given)
    return code


def parser() -> argparse.ArgumentParser:
    """The parser, made of the table; the store may be named before the verb, too."""
    import argparse

    top, rows = made_of("unionfsctl image", _ABOUT, VERBS)
    help_ = "the store (default: /var/lib/unionfsd, or of the user)"
    top.add_argument("--root", metavar="DIR", help=help_)
    for _, row in rows:
        row.add_argument("--root", metavar="DIR", default=argparse.SUPPRESS, help=help_)
    return top
