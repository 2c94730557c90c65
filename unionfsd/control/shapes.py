"""What values look like on the control socket: JSON Schemas of results, and parameters with what reads them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from unionfsd.control.protocol import Json
from unionfsd.typed import Any, Final

MAX_NUMBER: Final = 2**53

Schema = dict[str, Any]

STRING: Final[Schema] = {"type": "string"}
INTEGER: Final[Schema] = {"type": "integer"}
NUMBER: Final[Schema] = {"type": "number"}
BOOLEAN: Final[Schema] = {"type": "boolean"}
ANY: Final[Schema] = {}


def optional(schema: Schema) -> Schema:
    """The same, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def words(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def record(title: str = "", **fields: Schema) -> Schema:
    """An object with exactly these fields; with a `title` where it stands in several places."""
    name = {"title": title} if title else {}
    return name | {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def mapping(values: Schema) -> Schema:
    """An object with any fields, of one kind."""
    return {"type": "object", "additionalProperties": values}


# Parameters.


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter, by name. `read` makes a Python value of a JSON one, ValueError with the reason when it cannot."""

    name: str
    help: str
    schema: Schema
    read: Callable[[Json], Any]
    default: Json = None
    required: bool = False


# Reading.


def read_path(value: Json) -> bytes:
    if not isinstance(value, str):
        raise ValueError("not a string")
    if "\0" in value:
        raise ValueError("a NUL in it")
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError("not the name of a file") from None


def read_flag(value: Json) -> bool:
    if not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value


def read_between(low: int, high: int) -> Callable[[Json], int]:
    def read(value: Json) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"no integer from {low} to {high}")
        return value

    return read


def read_seconds(most: float) -> Callable[[Json], float]:
    def read(value: Json) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise ValueError("no positive number")
        if value > most:
            raise ValueError(f"more than {most:.0f}")
        return float(value)

    return read


def read_number_or_none(value: Json) -> int | None:
    return None if value is None else read_between(0, MAX_NUMBER)(value)


def read_word(*values: str) -> Callable[[Json], str | None]:
    def read(value: Json) -> str | None:
        if value is not None and value not in values:
            raise ValueError(f"not one of {', '.join(values)}")
        word: str | None = value
        return word

    return read


def integer(name: str, help: str, low: int, high: int, default: int) -> Param:
    return Param(name, help, {"type": "integer", "minimum": low, "maximum": high}, read_between(low, high), default)
