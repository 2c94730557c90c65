"""Completions of `unionfsd` and `unionfsctl` for bash, zsh and fish, from the tables of options and verbs."""

from __future__ import annotations

from collections.abc import Iterator

from unionfsd.ctl.main import VERBS
from unionfsd.options.table import OPTIONS

_NAMES = [f"{option.name}=" if option.argument else option.name for option in OPTIONS if option.name != "x-*"]

_BASH_UNIONFSD = """\
# bash completion for unionfsd
_unionfsd() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} line=${{COMP_LINE:0:COMP_POINT}}
    # Bash ends words at = and : too, so what was typed of the options is found in the line.
    local typed=${{line##* }}
    local option=${{typed##*,}}
    case "${{line%"$typed"}},$option" in
    *'-o ,'*=*) COMPREPLY=($(compgen -f -- "$word")) ;;
    *'-o ,'*)
        COMPREPLY=($(compgen -P "${{word%"$option"}}" -W '{names}' -- "$option"))
        compopt -o nospace +o filenames 2>/dev/null
        ;;
    *,-*) COMPREPLY=($(compgen -W '-o -f -d -h -V --config --help --version' -- "$word")) ;;
    *) COMPREPLY=($(compgen -f -- "$word")) ;;
    esac
}}
complete -o filenames -F _unionfsd unionfsd
"""

_BASH_UNIONFSCTL = """\
# bash completion for unionfsctl
_unionfsctl() {{
    local word=${{COMP_WORDS[COMP_CWORD]}}
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W '{verbs} --help --version' -- "$word"))
        return
    fi
    case $word in
    -*)
        case ${{COMP_WORDS[1]}} in
{options}
        *) COMPREPLY=($(compgen -W '--json --help' -- "$word")) ;;
        esac
        ;;
    *) COMPREPLY=($(compgen -f -- "$word")) ;;
    esac
}}
complete -o filenames -F _unionfsctl unionfsctl
"""

_ZSH_UNIONFSD = """\
#compdef unionfsd
_unionfsd_options() {{
    local -a words=({names})
    compset -P '*,'
    if compset -P '*[=:]'; then
        _files
    else
        compadd -S '' -- $words
    fi
}}
_arguments \\
    '*-o[mount options]:options:_unionfsd_options' \\
    '-f[stay in the foreground]' \\
    '-d[stay in the foreground and log everything]' \\
    '--config[mount what a TOML file describes]:file:_files' \\
    '(- *)'{{-h,--help}}'[print a summary]' \\
    '(- *)'{{-V,--version}}'[print the version]' \\
    '*:directory:_files -/'
"""

_ZSH_UNIONFSCTL = """\
#compdef unionfsctl
_unionfsctl() {{
    local -a verbs=(
{verbs}
    )
    if ((CURRENT == 2)); then
        _describe verb verbs
        return
    fi
    case $words[2] in
{options}
    esac
}}
_unionfsctl "$@"
"""


def files() -> Iterator[tuple[str, str]]:
    """(path beneath the data directory, text) of every completion file."""
    yield "bash-completion/completions/unionfsd", _BASH_UNIONFSD.format(names=" ".join(_NAMES))
    yield "bash-completion/completions/unionfsctl", _bash_unionfsctl()
    yield "zsh/site-functions/_unionfsd", _ZSH_UNIONFSD.format(names=" ".join(_quoted(name) for name in _NAMES))
    yield "zsh/site-functions/_unionfsctl", _zsh_unionfsctl()
    yield "fish/vendor_completions.d/unionfsd.fish", "\n".join(_fish_unionfsd()) + "\n"
    yield "fish/vendor_completions.d/unionfsctl.fish", "\n".join(_fish_unionfsctl()) + "\n"


def _quoted(words: str) -> str:
    return "'" + words.replace("'", "'\\''") + "'"


def _flags(verb: str) -> list[tuple[str, str]]:
    """(flag, help) of a verb of unionfsctl."""
    own = next(row for row in VERBS if row.name == verb).arguments
    return [("--json", "print JSON"), *((one.name, one.help) for one in own if one.name.startswith("-"))]


def _bash_unionfsctl() -> str:
    def row(verb: str) -> str:
        flags = " ".join(name for name, _ in _flags(verb))
        return f"        {verb}) COMPREPLY=($(compgen -W '{flags} --help' -- \"$word\")) ;;"

    options = "\n".join(row(verb.name) for verb in VERBS)
    return _BASH_UNIONFSCTL.format(verbs=" ".join(verb.name for verb in VERBS), options=options)


def _zsh_unionfsctl() -> str:
    def flags(verb: str) -> str:
        plain = str.maketrans({":": "", "[": "(", "]": ")"})
        return " ".join(_quoted(f"{name}[{about.translate(plain)}]") for name, about in _flags(verb))

    verbs = "\n".join(f"        {_quoted(f'{verb.name}:{verb.help}')}" for verb in VERBS)
    options = "\n".join(f"    {verb.name}) _arguments {flags(verb.name)} '*:path:_files' ;;" for verb in VERBS)
    return _ZSH_UNIONFSCTL.format(verbs=verbs, options=options)


def _fish_unionfsd() -> Iterator[str]:
    yield "# fish completion for unionfsd"
    yield "function __unionfsd_options"
    yield "    set -l typed (commandline -ct | string replace -r '[^,]*$' '')"
    yield f'    printf "$typed%s\\n" {" ".join(_quoted(name) for name in _NAMES)}'
    yield "end"
    yield "complete -c unionfsd -s o -x -a '(__unionfsd_options)' -d 'mount options'"
    yield "complete -c unionfsd -s f -d 'stay in the foreground'"
    yield "complete -c unionfsd -s d -d 'stay in the foreground and log everything'"
    yield "complete -c unionfsd -l config -r -d 'mount what a TOML file describes'"
    yield "complete -c unionfsd -s h -l help -d 'print a summary'"
    yield "complete -c unionfsd -s V -l version -d 'print the version'"


def _fish_unionfsctl() -> Iterator[str]:
    yield "# fish completion for unionfsctl"
    for verb in VERBS:
        yield f"complete -c unionfsctl -n __fish_use_subcommand -a {verb.name} -d {_fish(verb.help)}"
        for name, about in _flags(verb.name):
            seen = f"-n '__fish_seen_subcommand_from {verb.name}'"
            yield f"complete -c unionfsctl {seen} -l {name.removeprefix('--')} -d {_fish(about)}"


def _fish(words: str) -> str:
    return "'" + words.replace("\\", "\\\\").replace("'", "\\'") + "'"
