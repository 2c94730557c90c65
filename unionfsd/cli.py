"""The command line, in all the forms that callers of mount programs use.

=====================================  ==============================================================
``unionfsd [SOURCE] MOUNTPOINT -o ..``  people, podman (no source), mount.fuse3 (source first)
``unionfsd --config FILE [NAME] ..``     service managers: the mount NAME of a file, see `configfile`
``mount.fuse.unionfsd SOURCE DIR ..``   mount(8), when this program is linked there: see `_helper_parser`
=====================================  ==============================================================

A failure is one line on standard error, ``unionfsd: what: why (what to do)``, and an exit code of `errors`. What is not
needed to print a version is imported late: podman asks for it often.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

from unionfsd import __version__, errors
from unionfsd.errors import UserError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

_USAGE = "unionfsd [SOURCE] MOUNTPOINT -o OPTION[,OPTION...]... [-f] [-d]"
_USAGE_CONFIG = "unionfsd --config FILE [NAME] [-o OPTION[,...]]... [-f] [-d]"
_ABOUT = """\
Mount a union of directories: read-only lower layers under a writable upper one.
The layers are given by -o and are on disk what the kernel's overlayfs has.

  -o OPTION[,...]  mount options, see below; may be repeated
  --config FILE    mount what a TOML file describes, see unionfsd.toml(5);
                   options given by -o count more than those of the file
  -f               stay in the foreground
  -d               stay in the foreground and log everything
  -V, --version    print the version
  -h, --help       print this
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `argv` (the process's own); returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["--version"], ["-V"]):
        print(f"unionfsd {__version__}")
        return errors.OK
    try:
        return _run(arguments)
    except Exception as error:
        from unionfsd.logs import explain

        code, message = explain(error)
        print(f"unionfsd: {message}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        return 130  # what a shell reports for a command that SIGINT ended


def _run(arguments: list[str]) -> int:
    helper = os.path.basename(sys.argv[0]).startswith("mount.")
    given = (_helper_parser() if helper else _parser()).parse_intermixed_args(arguments)
    if given.help:
        print(_help())
        return errors.OK
    if given.version:
        return main(["--version"])
    from unionfsd import daemon, options

    source, mountpoint, texts = _from_file(given) if given.config else (*_places(given.places), _options(given))
    config = options.parse(texts).config(os.fsencode(mountpoint), source, root=os.geteuid() == 0)
    if given.namespace is not None:
        raise UserError("-N is not supported", hint="enter the namespace first: nsenter --mount=NAMESPACE mount ...")
    if given.fake:
        return errors.OK
    return daemon.run(config, foreground=given.foreground or config.debug)


def _places(words: list[str]) -> tuple[str, str]:
    """(source, mountpoint)."""
    if not words or not words[-1]:
        raise UserError("no mountpoint given", hint=f"usage: {_USAGE}")
    if len(words) > 2:
        raise UserError(f"too many arguments: {' '.join(words)}", hint=f"usage: {_USAGE}")
    return (words[0], words[1]) if len(words) == 2 else ("", words[0])


def _from_file(given: argparse.Namespace) -> tuple[str, str, list[str]]:
    """(source, mountpoint, texts of -o) of a mount that a file describes."""
    from unionfsd import configfile

    if len(given.places) > 1:
        raise UserError(f"too many arguments: {' '.join(given.places)}", hint=f"usage: {_USAGE_CONFIG}")
    described = configfile.read(given.config, *given.places)
    return "", described.mountpoint, [*described.options, *_options(given)]


def _options(given: argparse.Namespace) -> list[str]:
    """All options as texts of -o, those that have a letter of their own included; what comes later wins."""
    _, dot, subtype = given.type.partition(".")
    before = [f"subtype={subtype}"] if dot else []
    return [*before, *given.options, *(["debug"] if given.debug else [])]


def _parser() -> argparse.ArgumentParser:
    parser = _common_parser()
    parser.add_argument("-f", dest="foreground", action="store_true")
    parser.add_argument("-d", dest="debug", action="store_true")
    parser.add_argument("--config", metavar="FILE")
    return parser


def _helper_parser() -> argparse.ArgumentParser:
    """What mount(8) passes to a helper, "External helpers" in its manual: here -f is a dry run."""
    parser = _common_parser()
    parser.add_argument("-f", dest="fake", action="store_true")
    parser.add_argument("-t", dest="type", default="")
    parser.add_argument("-N", dest="namespace")
    for letter in "snv":  # unknown options are ignored anyway, there is no mtab, and nothing more to tell
        parser.add_argument(f"-{letter}", action="store_true")
    return parser


def _common_parser() -> argparse.ArgumentParser:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(message, hint=f"usage: {_USAGE}")

    parser = Parser(prog="unionfsd", add_help=False, allow_abbrev=False)
    parser.add_argument("places", nargs="*")
    parser.add_argument("-o", dest="options", action="append", default=[])
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-V", "--version", action="store_true")
    parser.set_defaults(foreground=False, debug=False, fake=False, type="", namespace=None, config=None)
    return parser


def _help() -> str:
    """The help text, its options out of the table."""
    from textwrap import wrap

    from unionfsd.options.table import GROUPS

    lines = [f"usage: {_USAGE}", f"       {_USAGE_CONFIG}", "", _ABOUT]
    for title, rows in GROUPS:
        lines.append(f"{title}:")
        for row in rows:
            default = f" Default: {row.default}." if row.default else ""
            plain = (row.help + default).replace("`", "")
            lines += [f"  {row.usage}", *wrap(plain, 76, initial_indent=" " * 6, subsequent_indent=" " * 6)]
        lines.append("")
    return "\n".join(lines).rstrip()
