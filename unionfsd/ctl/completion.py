"""Completion of ``unionfsctl`` in bash, zsh and fish, made of the table of its verbs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from unionfsd.ctl.main import VERBS, Verb
from unionfsd.errors import OK

if TYPE_CHECKING:
    import argparse

_BASH: Final = """\
# bash completion for unionfsctl
_unionfsctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W "%(verbs)s --help --version" -- "$cur")
        return
    fi
    case $prev in
%(values)s
    esac
    if [[ $cur == -* ]]; then
        case ${COMP_WORDS[1]} in
%(options)s
        esac
    fi
    if [[ $words ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
    else
        compopt -o filenames
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
    fi
}
complete -F _unionfsctl unionfsctl
"""

_ZSH: Final = """\
#compdef unionfsctl
_unionfsctl() {
    local -a verbs=(
%(verbs)s
    )
    if ((CURRENT == 2)); then
        _describe verb verbs
        return
    fi
    case $words[2] in
%(options)s
    esac
}
_unionfsctl "$@"
"""


def completion(given: argparse.Namespace) -> int:
    """Print the script for a shell."""
    print({"bash": bash, "zsh": zsh, "fish": fish}[given.shell](), end="")
    return OK


class Flag(NamedTuple):
    """An option of a verb: what it takes, if it takes something."""

    name: str
    help: str
    values: tuple[str, ...] = ()
    valued: bool = False


def _flags(verb: Verb) -> list[Flag]:
    found = [Flag("--json", "print JSON"), Flag("--help", "print help")]
    if verb.asks_one:
        found.append(Flag("--socket", "ask this socket", valued=True))
    for argument in verb.arguments:
        if argument.name.startswith("-"):
            values = tuple(argument.settings.get("choices", ()))
            found.append(Flag(argument.name, argument.help, values, "action" not in argument.settings))
    return found


def bash() -> str:
    """The script for bash."""
    values = {flag.name: flag.values for verb in VERBS for flag in _flags(verb) if flag.values}
    return _BASH % {
        "verbs": " ".join(verb.name for verb in VERBS),
        "values": "\n".join(f'        {name}) words="{" ".join(words)}" ;;' for name, words in values.items()),
        "options": "\n".join(
            f'            {verb.name}) words="{" ".join(name for name, *_ in _flags(verb))}" ;;' for verb in VERBS
        ),
    }


def zsh() -> str:
    """The script for zsh."""
    return _ZSH % {
        "verbs": "\n".join(f"        '{verb.name}:{_zsh_text(verb.help)}'" for verb in VERBS),
        "options": "\n".join(_zsh_verb(verb) for verb in VERBS),
    }


def _zsh_verb(verb: Verb) -> str:
    specs = []
    for name, help_text, words, valued in _flags(verb):
        value = f":value:({' '.join(words)})" if words else ":value:_files" if valued else ""
        specs.append(f"'{name}[{_zsh_text(help_text)}]{value}'")
    return f"        {verb.name}) _arguments {' '.join(specs)} '*:path:_files' ;;"


def _zsh_text(text: str) -> str:
    return text.replace("'", "").replace(":", "").replace("[", "(").replace("]", ")")


def fish() -> str:
    """The script for fish."""
    return "\n".join(["# fish completion for unionfsctl", *_fish_lines(), ""])


def _fish_lines() -> Iterator[str]:
    for verb in VERBS:
        help_text = verb.help.replace("'", "")
        yield f"complete -c unionfsctl -n __fish_use_subcommand -f -a {verb.name} -d '{help_text}'"
        for name, help_text, words, valued in _flags(verb):
            text = help_text.replace("'", "")
            value = f" -x -a '{' '.join(words)}'" if words else " -r" if valued else ""
            seen = f"-n '__fish_seen_subcommand_from {verb.name}'"
            yield f"complete -c unionfsctl {seen} -l {name.removeprefix('--')} -d '{text}'{value}"
