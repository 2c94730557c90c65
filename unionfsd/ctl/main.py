"""The command line of ``unionfsctl``: the table of its verbs, and from words to exit codes.

=====  =====================================================================================
0      done
1      the mount said no (no such path, busy, a failed system call), or doctor found problems
2      wrong usage
3      doctor: a layer cannot be used
4      doctor: the upper is in use by a mount
5      no mount of ours there, or nobody answers
70     a defect
=====  =====================================================================================
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from unionfsd import __version__
from unionfsd.errors import INTERNAL, MOUNT, UserError
from unionfsd.typed import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

if TYPE_CHECKING:
    import argparse


class Argument(NamedTuple):
    """A word of a verb: `name` starts with dashes for an option. `settings` are argparse's."""

    name: str
    help: str
    settings: dict[str, Any]


class Verb(NamedTuple):
    """A row of the table. The function of its name is in the module `where` of this package."""

    name: str
    help: str
    arguments: tuple[Argument, ...]
    where: str = "verbs"

    @property
    def function(self) -> str:
        return self.name.replace("-", "_")

    @property
    def asks_one(self) -> bool:
        """Whether it asks one mount, which may be named by its socket, too."""
        return self.where in ("verbs", "live")


_PATH: Final = Argument("path", "the mountpoint, or any path under it", {"nargs": "?", "default": "."})
_ONE: Final = Argument("path", "a path on the mount; a symlink is not followed", {})

VERBS: Final[tuple[Verb, ...]] = (
    Verb("status", "what a mount is, and that it answers", (_PATH,)),
    Verb("ps", "list all mounts, and find dead ones", (), "fleet"),
    Verb("explain", "why the mount shows what it shows under a path", (_ONE,)),
    Verb("diff", "what the upper changes: added, changed, deleted", (_PATH,)),
    Verb("layers", "the layers, and what the upper can do", (_PATH,)),
    Verb(
        "du",
        "the space that the upper takes, by directory",
        (_PATH, Argument("--depth", "levels of directories to list (default: 1)", {"type": int, "default": 1})),
    ),
    Verb("stats", "what a mount did, and what it holds", (_PATH,)),
    Verb(
        "events",
        "what changes, and who changes it",
        (
            _PATH,
            Argument("--follow", "go on as things happen", {"action": "store_true"}),
            Argument("--since", "from this number on", {"type": int, "default": None, "metavar": "N"}),
        ),
    ),
    Verb("open", "who holds something of a mount: processes, and what they hold", (_PATH,)),
    Verb(
        "top",
        "a live screen: requests, latency, what is under way, hot paths, changes",
        (
            _PATH,
            Argument(
                "--interval", "seconds between two looks (default: 1)", {"type": float, "default": 1.0, "metavar": "S"}
            ),
        ),
        "live",
    ),
    Verb(
        "work",
        "what takes long and is under way, and how far it is",
        (_PATH, Argument("--follow", "until it is done", {"action": "store_true"})),
        "live",
    ),
    Verb("options", "the mount options in force", (_PATH,)),
    Verb("sync", "put the upper on disk", (_PATH,)),
    Verb(
        "freeze",
        "let no change begin, and put the upper on disk, so that it can be copied",
        (
            _PATH,
            Argument(
                "--timeout", "thaw after so many seconds at the latest (default: 60)", {"type": float, "default": 60}
            ),
        ),
    ),
    Verb("thaw", "let changes begin again", (_PATH,)),
    Verb("refresh", "look again at layers that were changed underneath the mount", (_PATH,)),
    Verb("drop-caches", "let go of what can be read again", (_PATH,)),
    Verb(
        "log",
        "the level of the log, and a new one",
        (
            _PATH,
            Argument("--level", "the new one", {"choices": ("debug", "info", "warning", "error"), "default": None}),
        ),
    ),
    Verb("reexec", "go on with the program that is installed now", (_PATH,)),
    Verb(
        "unmount",
        "unmount",
        (_PATH, Argument("--lazy", "also while it is in use", {"action": "store_true"})),
    ),
    Verb(
        "reap",
        "take away the mounts whose daemon is dead, and their sockets",
        (
            Argument("paths", "mountpoints (default: all there are)", {"nargs": "*", "metavar": "path"}),
            Argument("--dry-run", "only say which", {"action": "store_true"}),
        ),
        "fleet",
    ),
    Verb(
        "metrics",
        "figures of a mount, or of all, for Prometheus",
        (
            Argument("path", "a path on the mount (default: all mounts)", {"nargs": "?", "default": None}),
            Argument("--listen", "serve them over HTTP, as /metrics", {"metavar": "HOST:PORT", "default": None}),
        ),
        "fleet",
    ),
    Verb(
        "doctor",
        "what is wrong with an upper that is not mounted, and other forms for it",
        (
            Argument("upper", "the upper directory", {}),
            Argument("lowers", "its lowers, the top one first, to check against", {"nargs": "*", "metavar": "lower"}),
            Argument("--work", "its work directory", {"metavar": "DIR", "default": None}),
            Argument(
                "--convert-to",
                "say how its marks would become those of another form",
                {"choices": ("kernel", "user", "fuse-overlayfs"), "default": None},
            ),
            Argument("--apply", "convert it", {"action": "store_true"}),
        ),
        "doctor",
    ),
    Verb(
        "completion",
        "print the completion script for a shell",
        (Argument("shell", "bash, zsh or fish", {"choices": ("bash", "zsh", "fish")}),),
        "completion",
    ),
    Verb(
        "image",
        "import, show, mount and make images of containers",
        (Argument("words", "see unionfsctl image --help", {"nargs": "..."}),),
        "image",
    ),
    Verb("discover", "all methods of the control socket, as OpenRPC", (_PATH,)),
    Verb(
        "call",
        "call any method of the control socket",
        (
            _ONE,
            Argument("method", "its name", {}),
            Argument("params", "an object in JSON (default: {})", {"nargs": "?", "default": "{}"}),
        ),
    ),
)


_ABOUT: Final = "Ask mounts of unionfsd, and act on them."


def main(argv: Sequence[str] | None = None) -> int:
    """Run `argv` (the process's own); returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except UserError as error:
        print(f"unionfsctl: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _silence()
        return 141  # what a shell reports for a command that SIGPIPE ended


def _silence() -> None:
    """Whoever read our output has gone; what is still in the buffer must not fail at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    if arguments in (["--version"], ["-V"]):
        print(f"unionfsctl {__version__}")
        return 0
    if arguments[:1] == ["image"]:
        return _image(arguments[1:])
    given = parser().parse_args(arguments)
    from importlib import import_module

    from unionfsd.control.client import CallFailedError, GoneError

    function = getattr(import_module(f"unionfsd.ctl.{given.verb.where}"), given.verb.function)
    try:
        code: int = function(given)
        sys.stdout.flush()
    except CallFailedError as error:
        raise UserError(str(error), code=1) from None
    except (GoneError, TimeoutError) as error:
        raise UserError(f"the daemon does not answer: {error}", code=MOUNT) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(str(error), code=INTERNAL) from error
    return code


def _image(arguments: list[str]) -> int:
    from unionfsd.ctl import image

    try:
        code = image.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(str(error), code=1) from error
    return code


def parser() -> argparse.ArgumentParser:
    """The parser, made of the table."""
    top, rows = made_of("unionfsctl", _ABOUT, VERBS)
    top.add_argument("-V", "--version", action="version", version=f"unionfsctl {__version__}")
    for verb, row in rows:
        if verb.asks_one:
            row.add_argument("--socket", metavar="SOCKET", help="ask this socket; PATH is then from the mount's root")
    return top


def made_of(
    prog: str, about: str, table: Sequence[Verb]
) -> tuple[argparse.ArgumentParser, list[tuple[Verb, argparse.ArgumentParser]]]:
    """A parser for the verbs of `table`, and theirs; what it has parsed has the `Verb` as ``verb``."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(message, hint=f"{self.prog} --help tells more")

    def formatter(prog: str) -> argparse.HelpFormatter:
        # Left to itself it asks shutil, whose import takes longer than all the rest.
        return argparse.HelpFormatter(prog, width=int(os.environ.get("COLUMNS") or 80) - 2)

    top = Parser(prog, description=about, allow_abbrev=False, formatter_class=formatter)
    verbs = top.add_subparsers(metavar="VERB", required=True, prog=prog, parser_class=Parser)
    rows: list[tuple[Verb, argparse.ArgumentParser]] = []
    for verb in table:
        row = verbs.add_parser(verb.name, help=verb.help, description=verb.help, formatter_class=formatter)
        row.add_argument("--json", action="store_true", help="print JSON")
        row.set_defaults(verb=verb)
        for argument in verb.arguments:
            row.add_argument(argument.name, help=argument.help, **argument.settings)
        rows.append((verb, row))
    return top, rows
