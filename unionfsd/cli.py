"""The command line, in all the forms that callers of mount programs use.

=====================================  ==============================================================
``unionfsd [SOURCE] MOUNTPOINT -o ..``  people, podman (no source), mount.fuse3 (source first)
``unionfsd --config FILE [NAME] ..``     service managers: the mount NAME of a file, see `configfile`
``mount.fuse.unionfsd SOURCE DIR ..``   mount(8), when this program is linked there: see `_HELPER`
=====================================  ==============================================================

A failure is one line on standard error, ``unionfsd: what: why (what to do)``, and an exit code of `errors`. What is not
needed to print a version is imported late: podman asks for it often.
"""

from __future__ import annotations

import gc
import os
import sys

from unionfsd import __version__, errors
from unionfsd.errors import UserError
from unionfsd.typed import TYPE_CHECKING, Any, Final, NoReturn, cast

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from unionfsd.options import MountConfig

_USAGE = "unionfsd [SOURCE] MOUNTPOINT -o OPTION[,OPTION...]... [-f] [-d]"
_USAGE_CONFIG = "unionfsd --config FILE [NAME] [-o OPTION[,...]]... [-f] [-d]"
_USAGE_CHECK = "unionfsd --check [[SOURCE] MOUNTPOINT] -o OPTION[,OPTION...]..."
#: What `--check` returns when it found any, as unionfsctl doctor does.
_PROBLEMS = 1
_ABOUT = """\
Mount a union of directories: read-only lower layers under a writable upper one.
The layers are given by -o and are on disk what the kernel's overlayfs has.

  -o OPTION[,...]  mount options, see below; may be repeated
  --config FILE    mount what a TOML file describes, see unionfsd.toml(5);
                   options given by -o count more than those of the file
  --check          mount nothing: say what is wrong with the upper, as
                   unionfsctl doctor does, and exit with 1 if anything is
  -f               stay in the foreground
  -d               stay in the foreground and log everything
  -V, --version    print the version
  -h, --help       print this
"""


def program() -> NoReturn:
    """The whole process: `main`, and then its end.

    Nothing that is imported or read here becomes garbage, and the system takes a process back faster than the
    interpreter takes itself apart: together a fifth of the time until a mount answers.
    """
    gc.disable()
    code = main()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or errors.INTERNAL
    os._exit(code)


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


def mount_for(sender: int) -> NoReturn:
    """Mount in the background what the command line says, and tell over the descriptor `sender` how it went.

    What is not for the background is not done, and nothing is told.
    """
    from unionfsd import daemon
    from unionfsd.logs import explain

    try:
        given = _words(sys.argv[1:])
        told = given.help or given.version or given.check or given.fake
        if told or given.foreground or given.namespace or given.remounts:
            os._exit(errors.OK)
        config = _config(given)
        if config.debug:
            os._exit(errors.OK)
        daemon.check(config)
    except Exception as error:
        code, message = explain(error)
        os.write(sender, bytes([code]) + message.encode())
        os._exit(code)
    daemon.child(config, sender)


def _words(arguments: list[str]) -> _Given:
    return _read(arguments, _HELPER if os.path.basename(sys.argv[0]).startswith("mount.") else _OWN)


def _config(given: _Given) -> MountConfig:
    from unionfsd import options

    source, mountpoint, texts = _from_file(given) if given.config else (*_places(given.places), _options(given))
    return options.parse(texts).config(os.fsencode(mountpoint), source, root=os.geteuid() == 0)


def _run(arguments: list[str]) -> int:
    given = _words(arguments)
    if given.help:
        print(_help())
        return errors.OK
    if given.version:
        return main(["--version"])
    if given.check and not given.config:
        given.places = given.places or ["/"]  # where it would be mounted does not matter
    if given.namespace:
        raise UserError("-N is not supported", hint="enter the namespace first: nsenter --mount=NAMESPACE mount ...")
    if given.remounts and not (given.check or given.config):
        return _remount(given)
    config = _config(given)
    if given.check:
        return _check(config)
    if given.fake:
        return errors.OK
    from unionfsd import daemon

    foreground = given.foreground or config.debug
    code = daemon.run(config, foreground=foreground)
    if config.spare and code == errors.OK and not foreground:
        from unionfsd import sparing

        sparing.begin(config.spare, mount_for)
    return code


def _remount(given: _Given) -> int:
    from unionfsd.remounting import flags, remount

    _, mountpoint = _places(given.places)
    if given.fake:
        flags(_options(given))
    else:
        remount(mountpoint, _options(given))
    return errors.OK


def _check(config: MountConfig) -> int:
    """What is wrong with the upper of a mount that is not there; without an upper, whether the layers make a union."""
    from unionfsd.doctor import examine
    from unionfsd.opening import check_overlap, open_idle, open_stack

    for warning in config.warnings:
        print(f"unionfsd: {warning}", file=sys.stderr)
    if config.upperdir is None:
        open_stack(config).close()
        return errors.OK
    check_overlap(config)
    stack = open_idle(config.upperdir, config.lowerdirs, config.workdir, config.datadirs)
    wrong = False
    try:
        for found in examine(stack):
            print(found.line)
            wrong |= found.is_problem
    except OSError as error:
        raise UserError(f"{os.fsdecode(config.upperdir)}: {errors.reason(error)}", code=errors.LAYER) from error
    finally:
        stack.close()
    return _PROBLEMS if wrong else errors.OK


def _places(words: list[str]) -> tuple[str, str]:
    """(source, mountpoint)."""
    if not words or not words[-1]:
        raise UserError("no mountpoint given", hint=f"usage: {_USAGE}")
    if len(words) > 2:
        raise UserError(f"too many arguments: {' '.join(words)}", hint=f"usage: {_USAGE}")
    return (words[0], words[1]) if len(words) == 2 else ("", words[0])


def _from_file(given: _Given) -> tuple[str, str, list[str]]:
    """(source, mountpoint, texts of -o) of a mount that a file describes."""
    from unionfsd import configfile

    if len(given.places) > 1:
        raise UserError(f"too many arguments: {' '.join(given.places)}", hint=f"usage: {_USAGE_CONFIG}")
    described = configfile.read(given.config, *given.places)
    return "", described.mountpoint, [*described.options, *_options(given)]


def _options(given: _Given) -> list[str]:
    """All options as texts of -o, those that have a letter of their own included; what comes later wins."""
    _, dot, subtype = given.type.partition(".")
    before = [f"subtype={subtype}"] if dot else []
    return [*before, *given.options, *(["debug"] if given.debug else [])]


# Words: getopt(3), because argparse takes a tenth of the time until a mount answers.


class _Given:
    """What the command line says: places, texts of -o, and of the rest what stands in `_OWN` and `_HELPER`."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.options: list[str] = []
        self.config = self.type = self.namespace = ""
        self.help = self.version = self.foreground = self.debug = self.fake = self.check = self.ignored = False

    @property
    def remounts(self) -> bool:
        """Whether a mount that is there is to be changed."""
        from unionfsd.options.text import split_options

        return any("remount" in split_options(text) for text in self.options)


_COMMON: Final = {"-h": "help", "--help": "help", "-V": "version", "--version": "version", "-o": "options"}
_OWN: Final = {**_COMMON, "-f": "foreground", "-d": "debug", "--config": "config", "--check": "check"}
#: What mount(8) passes to a helper, "External helpers" in its manual: here -f is a dry run. Of the others: unknown
#: options are ignored anyway, there is no mtab, and nothing more to tell.
_HELPER: Final = {
    **_COMMON,
    "-f": "fake",
    "-s": "ignored",
    "-n": "ignored",
    "-v": "ignored",
    "-t": "type",
    "-N": "namespace",
}
_VALUED: Final = frozenset(("-o", "--config", "-t", "-N"))


def _getopt() -> ModuleType:
    """The module, without the translations of its messages, which would load `re`."""
    translations = "gettext" not in sys.modules and sys.modules.setdefault("gettext", cast("Any", None)) is None
    import getopt

    if translations:
        del sys.modules["gettext"]
    return getopt


def _read(arguments: list[str], known: dict[str, str]) -> _Given:
    """Options and places in any order; of an option but -o the last value counts."""
    getopt = _getopt()
    letters = "".join(name[1:] + ":" * (name in _VALUED) for name in known if not name.startswith("--"))
    words = [name[2:] + "=" * (name in _VALUED) for name in known if name.startswith("--")]
    given = _Given()
    try:
        found, given.places = getopt.gnu_getopt(arguments, letters, words)
    except getopt.GetoptError as error:
        name = f"--{error.opt}" if len(error.opt) > 1 else f"-{error.opt}"
        what = error.msg if name in known else f"unrecognized arguments: {name}"
        raise UserError(what, hint=f"usage: {_USAGE}") from None
    for name, value in found:
        if name == "-o":
            given.options.append(value)
        else:
            setattr(given, known[name], value if name in _VALUED else True)
    return given


def _help() -> str:
    """The help text, its options out of the table."""
    from textwrap import wrap

    from unionfsd.options.table import GROUPS

    lines = [f"usage: {_USAGE}", f"       {_USAGE_CONFIG}", f"       {_USAGE_CHECK}", "", _ABOUT]
    for title, rows in GROUPS:
        lines.append(f"{title}:")
        for row in rows:
            default = f" Default: {row.default}." if row.default else ""
            plain = (row.help + default).replace("`", "")
            lines += [f"  {row.usage}", *wrap(plain, 76, initial_indent=" " * 6, subsequent_indent=" " * 6)]
        lines.append("")
    return "\n".join(lines).rstrip()
