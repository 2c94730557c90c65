"""What modules take from `typing`, as far as a running program needs it.

Importing typing, and what its NamedTuple does to describe a class to those who ask at run time, whom we do not have,
were a fifth of the time until a mount answers; that collections.namedtuple compiles a constructor for each of seventy
classes, another tenth. For a type checker every name here is typing's own; at run time all but NamedTuple are
placeholders that do nothing, good for annotations (which nobody evaluates: every module postpones them) and for
aliases.
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
    from types import FunctionType

    try:
        from _collections import _tuplegetter as _field
    except ImportError:  # as collections does where that is written in Python
        from operator import itemgetter

        def _field(index, doc):
            return property(itemgetter(index))

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

    def _make(cls, values):
        made = tuple.__new__(cls, values)
        if len(made) != len(cls._fields):
            raise TypeError(f"{cls.__name__} takes {len(cls._fields)} values, not {len(made)}")
        return made

    def _replace(self, /, **changed):
        made = tuple.__new__(type(self), map(changed.pop, self._fields, self))
        if changed:
            raise ValueError(f"{type(self).__name__} has no {sorted(changed)[0]!r}")
        return made

    def _asdict(self):
        return dict(zip(self._fields, self, strict=True))

    def _repr(self):
        fields = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True))
        return f"{type(self).__name__}({fields})"

    def _values(self):
        return tuple(self)

    _COMMON = {
        "__slots__": (),
        "__repr__": _repr,
        "__getnewargs__": _values,
        "_make": classmethod(_make),
        "_replace": _replace,
        "_asdict": _asdict,
    }

    _CONSTRUCTORS = {}

    def _constructor(fields):
        """The code of a __new__ that takes `fields`: compiled once for as many, whatever their names."""
        code = _CONSTRUCTORS.get(len(fields))
        if code is None:
            arguments = "".join(f"_{index}, " for index in range(len(fields)))
            code = eval(f"lambda _cls, {arguments[:-2]}: _new(_cls, ({arguments}))").__code__
            _CONSTRUCTORS[len(fields)] = code
        return code.replace(co_varnames=("_cls", *fields), co_name="__new__")

    class _Fields(type):
        """Makes of a class that lists fields, with defaults and methods, a tuple with names, as typing's own does."""

        def __new__(cls, name, bases, body):
            fields = tuple(body.get("__annotations__", ()))
            defaults = tuple(body.pop(field) for field in fields if field in body)
            made = FunctionType(_constructor(fields), {"_new": tuple.__new__}, "__new__", defaults)
            made.__qualname__ = f"{name}.__new__"
            own = {field: _field(index, None) for index, field in enumerate(fields)}
            own |= {"__new__": made, "__match_args__": fields, "_fields": fields}
            own["_field_defaults"] = dict(zip(fields[len(fields) - len(defaults) :], defaults, strict=True))
            own["__doc__"] = f"{name}({', '.join(fields)})"
            return type(name, (tuple,), own | _COMMON | body)

    NamedTuple = type.__new__(_Fields, "NamedTuple", (), {})
