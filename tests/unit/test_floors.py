"""The floors of ARCHITECTURE.md hold: imports point down only, and what is confined to one module stays there.

The table in ARCHITECTURE.md is the rule; this file only reads it. Every import counts, also one inside a function,
under TYPE_CHECKING, or by `importlib.import_module` with a literal name.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "unionfsd"
MAX_LINES = 500
TRIO_FLOOR = 10
# Import -> the only module that may have it. Modules are named relative to the package: "fuse.libfuse".
CONFINED = {"pyfuse3": "fuse.libfuse", "ctypes": "syscalls"}
# The prefix of every xattr of the on-disk format; docstrings may mention it.
FORMAT_LITERAL = "overlay."
FORMAT_MODULE = "format"
# (importer, imported) by home, forbidden although it points down.
FORBIDDEN = {("images", "union")}


def home(module: str) -> str:
    """What the table lists: a module of the package itself, or the sub-package that a module lives in."""
    return module.partition(".")[0]


def read_floors(text: str) -> dict[str, int]:
    """Home -> floor, from the Markdown table whose first column is headed "floor"."""
    floors: dict[str, int] = {}
    rows = iter(text.splitlines())
    for row in rows:
        if [cell.lower() for cell in cells(row)[:1]] == ["floor"]:
            break
    for row in rows:
        match cells(row):
            case [floor, modules, *_] if floor.isdigit():
                floors |= {name.strip().rstrip("/"): int(floor) for name in modules.split(",")}
            case [rule, *_] if not rule.strip("-: "):
                continue
            case _:
                break
    # The package's own __init__ holds the version and imports nothing, nor does `typed`, which stands for a module of
    # Python's; __main__ only calls the command line.
    return {"": -1, "typed": -1, "__main__": max(floors.values(), default=0) + 1} | floors


def cells(row: str) -> list[str]:
    """The cells of a line of a Markdown table, without backticks; of any other line, none."""
    if not row.lstrip().startswith("|"):
        return []
    return [cell.strip() for cell in row.replace("`", "").strip().strip("|").split("|")]


def discover() -> dict[str, Path]:
    """Every module of the package, by its name relative to the package."""
    base = ROOT / PACKAGE
    return {
        ".".join(path.relative_to(base).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in base.rglob("*.py")
    }


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported; `from a import b` yields "a.b"."""
    here = [PACKAGE, *filter(None, module.split("."))]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(source, names, level):
                above = here[: len(here) - (level or 0) + is_package] if level else []
                prefix = ".".join([*above, *([source] if source else [])])
                yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in names)
            case ast.Call(
                ast.Name("__import__" | "import_module") | ast.Attribute(attr="import_module"),
                [ast.Constant(str(name)), *_],
            ):
                yield node.lineno, name


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, value) of every string or bytes literal that is not a docstring."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            match node.value:
                case str(value):
                    yield node.lineno, value
                case bytes(raw):
                    yield node.lineno, raw.decode("latin-1")


def import_fault(importer: str, imported: str, floors: dict[str, int]) -> str | None:
    """Why `importer` may not import the absolute name `imported`; None when it may."""
    top, _, inner = imported.partition(".")
    if CONFINED.get(top, importer) != importer:
        return f"{top} is for {CONFINED[top]} only"
    if top == "trio" and floors[home(importer)] < TRIO_FLOOR:
        return f"trio starts at floor {TRIO_FLOOR}"
    if top != PACKAGE:
        return None
    # `from unionfsd import __version__` names no module but the package itself.
    target = home(inner) if home(inner) in floors else ""
    source = home(importer)
    if (source, target) in FORBIDDEN:
        return f"{source} never imports {target}"
    if source != target and floors[target] >= floors[source]:
        return f"{target} (floor {floors[target]}) is not below {source} (floor {floors[source]})"
    return None


def faults(source: str, module: str, floors: dict[str, int], *, is_package: bool = False) -> list[str]:
    """Every breach of the rules in the text of one module, as "line: what"."""
    if home(module) not in floors:
        return [f"1: {module} is not in the table of floors"]
    tree = ast.parse(source)
    found = [
        f"{line}: {fault}"
        for line, name in imports(tree, module, is_package)
        if (fault := import_fault(module, name, floors))
    ]
    if module != FORMAT_MODULE:
        found += [
            f"{line}: {FORMAT_LITERAL!r} outside format" for line, text in literals(tree) if FORMAT_LITERAL in text
        ]
    if (lines := source.count("\n")) > MAX_LINES:
        found.append(f"{lines}: more than {MAX_LINES} lines")
    # One statement may import several names from a module.
    return list(dict.fromkeys(found))


TABLE = """
| number | not this one |
|---|---|
| 9 | errors |

| Floor | module in unionfsd/ | one line |
|---|:--|---|
| 0 | `errors`, `syscalls` | own exceptions |
| 1 | format, options | codec |
| 6 | union | composes |
| 7 | `fuse/`, images/ | transports |
| 9 | cli | verbs |

| 8 | daemon | belongs to no table |
"""
FLOORS = read_floors(TABLE)


def test_the_table_is_read() -> None:
    assert FLOORS == {
        "": -1,
        "typed": -1,
        "errors": 0,
        "syscalls": 0,
        "format": 1,
        "options": 1,
        "union": 6,
        "fuse": 7,
        "images": 7,
        "cli": 9,
        "__main__": 10,
    }


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("format", "from unionfsd import syscalls, __version__"),
        ("format", "PREFIX = b'trusted.overlay.'"),
        ("options", '"""About trusted.overlay.opaque."""\nimport os'),
        ("options", "from . import errors"),
        ("syscalls", "import ctypes"),
        ("fuse.channel", "from unionfsd.fuse.wire import Header\nfrom . import wire\nfrom .. import union"),
        ("fuse.libfuse", "import pyfuse3"),
        ("cli", "def main():\n    from unionfsd.fuse import channel"),
        ("__main__", "from unionfsd.cli import main"),
        ("errors", "pass\n" * MAX_LINES),
    ],
)
def test_what_the_rules_allow(module: str, source: str) -> None:
    assert faults(source, module, FLOORS) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("format", "import unionfsd.union"),
        ("format", "from unionfsd import options"),
        ("format", "from unionfsd.options import parse"),
        ("format", "from . import options"),
        ("format", "from .options import parse, Option"),
        ("fuse.channel", "from ..images import oci"),
        ("fuse.channel", "from ..cli import main"),
        ("errors", "def late():\n    from unionfsd import union"),
        ("errors", "if TYPE_CHECKING:\n    from unionfsd.union import Union"),
        ("errors", "importlib.import_module('unionfsd.union')"),
        ("", "from unionfsd import errors"),
        ("images.oci", "from unionfsd.union import Union"),
        ("fuse.channel", "import pyfuse3"),
        ("union", "from ctypes import CDLL"),
        ("options", "import trio.lowlevel"),
        ("options", "NAME = 'user.overlay.opaque'"),
        ("union", "NAME = f'{kind}.overlay.opaque'.encode()"),
        ("union", "NAME = b'trusted.overlay.'"),
        ("stray", ""),
        ("errors", "pass\n" * (MAX_LINES + 1)),
    ],
)
def test_what_the_rules_refuse(module: str, source: str) -> None:
    assert len(faults(source, module, FLOORS)) == 1


def test_relative_imports_of_a_package_start_at_the_package() -> None:
    assert faults("from . import wire\nfrom ..errors import UserError", "fuse", FLOORS, is_package=True) == []
    assert len(faults("from ..images import oci", "fuse", FLOORS, is_package=True)) == 1


@pytest.mark.parametrize("module", sorted(discover()), ids=lambda module: module or PACKAGE)
def test_module_keeps_to_its_floor(module: str) -> None:
    floors = read_floors((ROOT / "ARCHITECTURE.md").read_text())
    path = discover()[module]
    found = faults(path.read_text(), module, floors, is_package=path.name == "__init__.py")
    assert not found, "\n".join(f"{path.relative_to(ROOT)}:{fault}" for fault in found)
