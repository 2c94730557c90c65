"""`python -m unionfsd.control FILE`: write the tables of all methods into FILE, below the line that says so."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from unionfsd.control.protocol import ERRORS
from unionfsd.control.schema import METHODS, TYPES, Method
from unionfsd.control.shapes import Schema
from unionfsd.typed import Final

MARK: Final = "<!-- What follows is written by `python -m unionfsd.control docs/control.md`. -->"


def reference() -> Iterator[str]:
    """The methods and the errors as Markdown, line by line."""
    yield "## Methods"
    for method in METHODS:
        yield from ("", f"### {method.name}", "", method.summary + (" *Acts.*" if method.acts else ""))
        yield from ("", method.note) if method.note else ()
        yield from _params(method)
        yield from ("", f"Result: `{_shape(method.result)}`")
    yield from ("", "## Types", "")
    yield from (f"- {schema['title']}: `{_spelt(schema)}`" for schema in TYPES)
    yield from ("", "## Errors", "", "| code | meaning |", "| --- | --- |")
    yield from (f"| {code} | {meaning} |" for code, meaning in ERRORS.items())


def _params(method: Method) -> Iterator[str]:
    if method.params:
        yield from ("", "| parameter | type | default | meaning |", "| --- | --- | --- | --- |")
    for param in method.params:
        default = "required" if param.required else f"`{json.dumps(param.default)}`"
        yield f"| `{param.name}` | {_shape(param.schema)} | {default} | {param.help} |".replace(" | null", " or null")


def _shape(schema: Schema) -> str:
    """A schema in a line; one with a title has a line of its own elsewhere."""
    return str(schema["title"]) if "title" in schema else _spelt(schema)


def _spelt(schema: Schema) -> str:
    if "anyOf" in schema:
        return f"{_shape(schema['anyOf'][0])} or null"
    if "enum" in schema:
        return " or ".join(f'"{word}"' for word in schema["enum"])
    if schema.get("type") == "array":
        return f"[{_shape(schema['items'])}, ...]"
    if "properties" in schema:
        return "{" + ", ".join(f"{name}: {_shape(inner)}" for name, inner in schema["properties"].items()) + "}"
    if schema.get("additionalProperties"):
        return "{name: " + _shape(schema["additionalProperties"]) + ", ...}"
    return str(schema.get("type", "any"))


def renewed(text: str) -> str:
    """`text`, a whole document, with its reference made anew."""
    head, mark, _ = text.partition(MARK)
    if not mark:
        raise SystemExit(f"the line is missing below which the reference goes: {MARK}")
    return head + "\n".join([mark, "", *reference()]).rstrip() + "\n"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(renewed(document.read_text()))
