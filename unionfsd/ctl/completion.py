"""Completion of ``unionfsctl`` in bash, zsh and fish, made of the tables of its verbs.

Names of images and containers are asked of the store that the line names by ``--root``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from unionfsd.ctl.image import VERBS as IMAGE_VERBS
from unionfsd.ctl.main import VERBS, Verb
from unionfsd.errors import OK
from unionfsd.typed import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import argparse

_BASH: Final = """\
# bash completion for unionfsctl
_unionfsctl_names() {
    local at root=()
    for ((at = 3; at < COMP_CWORD - 1; at++)); do
        [[ ${COMP_WORDS[at]} != --root ]] || root=(--root "${COMP_WORDS[at+1]}")
    done
    unionfsctl image "$1" --quiet "${root[@]}" 2>/dev/null
}
_unionfsctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words= names=
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W "%(verbs)s --help --version" -- "$cur")
        return
    fi
    if ((COMP_CWORD == 2)) && [[ ${COMP_WORDS[1]} == image ]]; then
        mapfile -t COMPREPLY < <(compgen -W "%(image_verbs)s --help" -- "$cur")
        return
    fi
    case $prev in
%(values)s
    esac
    if [[ $cur == -* ]]; then
        case ${COMP_WORDS[1]} in
%(options)s
        image) case ${COMP_WORDS[2]} in
%(image_options)s
            esac ;;
        esac
    elif [[ ${COMP_WORDS[1]} == image && $prev != --* ]]; then
        case ${COMP_WORDS[2]} in
%(image_names)s
        esac
        for names in $names; do words+=" $(_unionfsctl_names "$names")"; done
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
    local -a image_verbs=(
%(image_verbs)s
    )
    if ((CURRENT == 2)); then
        _describe verb verbs
        return
    fi
    if ((CURRENT == 3)) && [[ $words[2] == image ]]; then
        _describe verb image_verbs
        return
    fi
    case $words[2] in
%(options)s
    image) case $words[3] in
%(image_options)s
        esac ;;
    esac
}
_unionfsctl_names() {
    local -a root found
    [[ -z ${words[(r)--root]} ]] || root=(--root "${words[$words[(i)--root]+1]}")
    found=(${(f)"$(unionfsctl image $1 --quiet $root 2>/dev/null)"})
    compadd -a found
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


#: What an argument of a verb of images is the name of: the verbs that list such, with --quiet.
_NAMED: Final = {
    "image": ("ls",),
    "images": ("ls",),
    "first": ("ls", "containers"),
    "second": ("ls", "containers"),
    "container": ("containers",),
    "what": ("ls", "containers"),
}


def _lists(verb: Verb) -> list[str]:
    """The verbs that list what a verb of images takes."""
    return list(dict.fromkeys(each for argument in verb.arguments for each in _NAMED.get(argument.name, ())))


def _image_flags(verb: Verb) -> list[Flag]:
    return [*_flags(verb), Flag("--root", "the store", valued=True)]


def _flags(verb: Verb) -> list[Flag]:
    found = [Flag("--json", "print JSON"), Flag("--help", "print help")]
    if verb.asks_one:
        found.append(Flag("--socket", "ask this socket", valued=True))
    for argument in verb.arguments:
        if argument.name.startswith("-"):
            values = tuple(argument.settings.get("choices", ()))
            valued = argument.settings.get("action") != "store_true"
            found.append(Flag(argument.name, argument.help, values, valued))
    return found


def bash() -> str:
    """The script for bash."""
    values = {flag.name: flag.values for verb in (*VERBS, *IMAGE_VERBS) for flag in _flags(verb) if flag.values}
    return _BASH % {
        "verbs": " ".join(verb.name for verb in VERBS),
        "values": "\n".join(f'        {name}) words="{" ".join(words)}" ;;' for name, words in values.items()),
        "options": "\n".join(
            f'            {verb.name}) words="{" ".join(name for name, *_ in _flags(verb))}" ;;'
            for verb in VERBS
            if verb.name != "image"
        ),
        "image_verbs": " ".join(verb.name for verb in IMAGE_VERBS),
        "image_options": "\n".join(
            f'            {verb.name}) words="{" ".join(flag.name for flag in _image_flags(verb))}" ;;'
            for verb in IMAGE_VERBS
        ),
        "image_names": "\n".join(
            f'            {verb.name}) names="{" ".join(_lists(verb))}" ;;' for verb in IMAGE_VERBS if _lists(verb)
        ),
    }


def zsh() -> str:
    """The script for zsh."""
    return _ZSH % {
        "verbs": _zsh_verbs(VERBS),
        "options": "\n".join(_zsh_verb(verb, _flags(verb)) for verb in VERBS if verb.name != "image"),
        "image_verbs": _zsh_verbs(IMAGE_VERBS),
        "image_options": "\n".join(_zsh_verb(verb, _image_flags(verb), _lists(verb)) for verb in IMAGE_VERBS),
    }


def _zsh_verbs(verbs: Sequence[Verb]) -> str:
    return "\n".join(f"        '{verb.name}:{_zsh_text(verb.help)}'" for verb in verbs)


def _zsh_verb(verb: Verb, flags: list[Flag], lists: Sequence[str] = ()) -> str:
    specs = []
    for name, help_text, words, valued in flags:
        value = f":value:({' '.join(words)})" if words else ":value:_files" if valued else ""
        specs.append(f"'{name}[{_zsh_text(help_text)}]{value}'")
    places = [*(f'"names\\:name\\:_unionfsctl_names {each}"' for each in lists), "files\\:path\\:_files"]
    rest = f"_alternative {' '.join(places)}" if lists else "_files"
    return f"        {verb.name}) _arguments {' '.join(specs)} '*:path:{rest}' ;;"


def _zsh_text(text: str) -> str:
    return text.replace("'", "").replace(":", "").replace("[", "(").replace("]", ")")


def fish() -> str:
    """The script for fish."""
    return "\n".join(["# fish completion for unionfsctl", *_fish_lines(), ""])


_FISH_HEAD: Final = """\
function __unionfsctl_at
    set -l words (commandline -opc)
    test (count $words) -ge (math (count $argv) + 1); and test "$words[2..$(math (count $argv) + 1)]" = "$argv"
end
function __unionfsctl_names
    set -l words (commandline -opc)
    set -l at (contains -i -- --root $words); and set -l root --root $words[(math $at + 1)]
    unionfsctl image $argv[1] --quiet $root 2>/dev/null
end"""


def _fish_lines() -> Iterator[str]:
    yield _FISH_HEAD
    for verb in VERBS:
        yield f"complete -c unionfsctl -n __fish_use_subcommand -f -a {verb.name} -d '{_fish_text(verb.help)}'"
        if verb.name != "image":
            yield from _fish_flags(verb.name, _flags(verb))
    for verb in IMAGE_VERBS:
        first = "'__unionfsctl_at image; and test (count (commandline -opc)) -eq 2'"
        yield f"complete -c unionfsctl -n {first} -f -a {verb.name} -d '{_fish_text(verb.help)}'"
        yield from _fish_flags(f"image {verb.name}", _image_flags(verb))
        for each in _lists(verb):
            at = f"'__unionfsctl_at image {verb.name}'"
            yield f"complete -c unionfsctl -n {at} -a '(__unionfsctl_names {each})'"


def _fish_flags(words: str, flags: list[Flag]) -> Iterator[str]:
    for name, help_text, values, valued in flags:
        value = f" -x -a '{' '.join(values)}'" if values else " -r" if valued else ""
        kind = f"-l {name.removeprefix('--')}" if name.startswith("--") else f"-s {name.removeprefix('-')}"
        yield f"complete -c unionfsctl -n '__unionfsctl_at {words}' {kind} -d '{_fish_text(help_text)}'{value}"


def _fish_text(text: str) -> str:
    return text.replace("'", "").replace("\\", "")
