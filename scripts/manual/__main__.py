"""`python -m scripts.manual DIRECTORY`: write manual pages and completions as they lie beneath PREFIX/share."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from unionfsd import __version__
from unionfsd.ctl import main as ctl

from . import completions, roff

_DOCS: Final = Path(__file__).resolve().parents[2] / "docs"
_SEE_ALSO: Final = "\n## See also\n\n{}\n"


def pages() -> Iterator[tuple[str, str]]:
    """(path beneath the data directory, text) of every manual page."""
    yield "man/man8/unionfsd.8", _page("unionfsd", 8, "mount a union of directories", _unionfsd())
    yield "man/man1/unionfsctl.1", _page("unionfsctl", 1, "ask mounts of unionfsd, and act on them", _unionfsctl())
    configuration = _document("configuration.md") + _SEE_ALSO.format("unionfsd(8), systemd.mount(5)")
    yield "man/man5/unionfsd.toml.5", _page("unionfsd.toml", 5, "mounts described in a file", configuration)


def _page(name: str, section: int, about: str, markdown: str) -> str:
    return roff.page(name, section, about, markdown, version=__version__)


def _document(name: str) -> str:
    """A file of docs/, its links to the others written as what they are installed as."""
    text = (_DOCS / name).read_text()
    text = text.replace("[options.md](options.md)", "**unionfsd**(8)")
    return text.replace("[configuration.md](configuration.md)", "**unionfsd.toml**(5)")


def _unionfsd() -> str:
    """docs/options.md, whose first lines are how it is called."""
    title, synopsis, rest = _document("options.md").split("\n\n", 2)
    parts = [title, "## Synopsis", synopsis, "## Description", rest]
    return "\n\n".join(parts) + _SEE_ALSO.format("unionfsctl(1), unionfsd.toml(5), mount(8), fusermount3(1)")


def _unionfsctl() -> str:
    """The table of its verbs, and of its exit codes."""
    lines = ["## Synopsis", "", "    unionfsctl VERB [--json] [OPTION...] [PATH...]", "", "## Verbs", ""]
    for verb in ctl.VERBS:
        words = [argument.name for argument in verb.arguments if not argument.name.startswith("-")]
        lines += [f"### {' '.join([verb.name, *words])}", "", f"{_sentence(verb.help)}", ""]
        lines += ["| argument | meaning |", "| --- | --- |"] if verb.arguments else []
        lines += [f"| `{one.name}` | {_sentence(one.help)} |" for one in verb.arguments]
        lines.append("")
    lines += ["## Exit codes", "", "| code | meaning |", "| --- | --- |"]
    assert ctl.__doc__ is not None
    lines += [f"| {code} | {_sentence(about)} |" for code, about in re.findall(r"(?m)^(\d+) +(.*)$", ctl.__doc__)]
    return "\n".join(lines) + _SEE_ALSO.format("unionfsd(8)")


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def write(directory: Path) -> None:
    for name, text in (*pages(), *completions.files()):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
