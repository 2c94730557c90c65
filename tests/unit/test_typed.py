"""The tuples with names that modules are made of, against those of the standard library."""

from __future__ import annotations

import copy
import pickle
import typing
from collections.abc import Callable
from typing import Any

import pytest

from unionfsd import typed

# The module is typing's own for a type checker, so what is looked at here is looked at as Any.
OURS: Any = typed


def _classes(base: Any) -> tuple[Any, Any, Any]:
    class Point(base):  # type: ignore[misc]
        """A point."""

        x: int
        y: int = 7
        label: str = "none"

        @property
        def sum(self) -> int:
            return int(self.x + self.y)

        def __str__(self) -> str:
            return f"{self.x} and {self.y}"

    class Empty(base):  # type: ignore[misc]
        pass

    class One(base):  # type: ignore[misc]
        only: int

    return Point, Empty, One


class Kept(OURS.NamedTuple):  # type: ignore[misc]
    """One that can be found by its name, as pickle does."""

    a: int
    b: bytes = b""


def _outcome(function: Callable[..., Any]) -> Any:
    try:
        return function()
    except (TypeError, ValueError) as error:
        return TypeError if isinstance(error, TypeError) else ValueError


USES: list[Callable[[Any, Any, Any], Any]] = [
    lambda point, empty, one: tuple(point(1)),
    lambda point, empty, one: tuple(point(1, label="a", y=3)),
    lambda point, empty, one: tuple(point(x=1)),
    lambda point, empty, one: tuple(empty()),
    lambda point, empty, one: tuple(one(5)),
    lambda point, empty, one: repr(point(1)),
    lambda point, empty, one: str(point(1)),
    lambda point, empty, one: repr(one(1)),
    lambda point, empty, one: repr(empty()),
    lambda point, empty, one: (point(1).x, point(1).y, point(1).label, point(1).sum),
    lambda point, empty, one: point(1) == (1, 7, "none") and hash(point(1)) == hash((1, 7, "none")),
    lambda point, empty, one: tuple(point(1)._replace(y=2)),
    lambda point, empty, one: tuple(point._make([4, 5, "b"])),
    lambda point, empty, one: point._make([4]),
    lambda point, empty, one: point(1)._asdict(),
    lambda point, empty, one: point._fields,
    lambda point, empty, one: point.__match_args__,
    lambda point, empty, one: point.__doc__,
    lambda point, empty, one: (point.__name__, point.__module__, point.__qualname__),
    lambda point, empty, one: copy.deepcopy(point(1)) == point(1),
    lambda point, empty, one: point(),
    lambda point, empty, one: point(1, 2, "c", 4),
    lambda point, empty, one: point(1, z=4),
    lambda point, empty, one: point(1, x=4),
    lambda point, empty, one: hasattr(point(1), "__dict__"),
    lambda point, empty, one: point.y is point.x,
    lambda point, empty, one: point.__new__.__name__,
]


@pytest.mark.parametrize("use", USES)
def test_they_are_those_of_the_library(use: Callable[[Any, Any, Any], Any]) -> None:
    ours = _outcome(lambda: use(*_classes(OURS.NamedTuple)))
    assert ours == _outcome(lambda: use(*_classes(typing.NamedTuple)))


def test_a_field_can_not_be_set() -> None:
    point, _, _ = _classes(OURS.NamedTuple)
    with pytest.raises(AttributeError):
        point(1).x = 2


def test_a_field_that_there_is_not_can_not_be_replaced() -> None:
    with pytest.raises(TypeError, match="Kept has no 'c'"):
        Kept(1)._replace(c=2)


def test_one_survives_being_pickled() -> None:
    kept = pickle.loads(pickle.dumps(Kept(1, b"x")))
    assert kept == Kept(1, b"x")
    assert type(kept) is Kept


def test_classes_of_as_many_fields_have_their_own_names() -> None:
    class Other(OURS.NamedTuple):  # type: ignore[misc]
        c: int
        d: int

    assert (Other(c=1, d=2).d, Kept(a=1, b=b"2").b) == (2, b"2")
    with pytest.raises(TypeError):
        Other(a=1, b=2)


def test_a_tuple_is_matched_by_its_fields() -> None:
    found: Any = Kept(3, b"y")
    match found:
        case Kept(a=3, b=value):
            assert value == b"y"
        case _:
            pytest.fail("not matched")
