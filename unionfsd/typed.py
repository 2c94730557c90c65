"""What modules take from `typing`, as far as a running program needs it.

Importing typing, and what its NamedTuple does to describe a class to those who ask at run time, whom we do not have,
were a fifth of the time until a mount answers. For a type checker every name here is typing's own; at run time all but
NamedTuple are placeholders that do nothing, good for annotations (which nobody evaluates: every module postpones them)
and for aliases.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO as IO
    from typing import Any as Any
    from typing import Final as Final
    from typing import Literal as Literal
    from typing import NamedTuple as NamedTuple
    from typing import NoReturn as NoReturn
    from typing import Protocol as Protocol
    from typing import TextIO as TextIO
    from typing import TypeAlias as TypeAlias
    from typing import TypedDict as TypedDict
    from typing import TypeVar as TypeVar
    from typing import cast as cast
else:
    from collections import namedtuple

    TypedDict = dict

    class Any: ...

    Final = NoReturn = TextIO = TypeAlias = Any

    class Protocol: ...

    class Literal:
        def __class_getitem__(cls, values):
            return cls

    class IO(Literal): ...

    def cast(kind, value):
        return value

    class TypeVar:
        def __init__(self, name):
            pass

    class _Fields(type):
        """Makes of a class that lists fields, with defaults and methods, a tuple with names, as typing's own does."""

        def __new__(cls, name, bases, body):
            fields = body.get("__annotations__", ())
            defaults = [body.pop(field) for field in fields if field in body]
            made = namedtuple(name, fields, defaults=defaults, module=body["__module__"])
            for key, value in body.items():
                setattr(made, key, value)
            return made

    NamedTuple = type.__new__(_Fields, "NamedTuple", (), {})
