"""What a mount imports before it answers, and what stands in for what it leaves out."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import pickle
import pkgutil
import subprocess
import sys
import typing
from collections.abc import Callable

import pytest

import unionfsd
from tests.harness import PROJECT
from unionfsd import logger, typed
from unionfsd.options import MountConfig

#: Each took a twentieth of the start, or more.
COSTLY = {"argparse", "dataclasses", "inspect", "json", "logging", "re", "subprocess", "tempfile", "trio", "typing"}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(unionfsd.__path__, "unionfsd.")
    if not module.name.endswith("__main__") and ".images" not in module.name and ".ctl" not in module.name
)


def test_what_a_mount_needs_is_not_imported_with_what_it_does_not() -> None:
    program = (
        "before = set(sys.modules)\n"
        "import unionfsd.start, unionfsd.cli, unionfsd.daemon, unionfsd.union, unionfsd.fuse.channels\n"
        "print(' '.join(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-IS", "-c", f"import sys; sys.path.append({str(PROJECT)!r})\n{program}"],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    brought = set(done.stdout.split())
    assert "unionfsd.union" in brought
    assert not brought & COSTLY


def test_words_are_read_without_what_only_messages_need() -> None:
    program = (
        f"import sys; sys.path.append({str(PROJECT)!r})\n"
        "from unionfsd.cli import _words\n"
        "print(_words(['-o', 'ro', '/m']).options, 're' in sys.modules, 'gettext' in sys.modules)\n"
        "import gettext\n"
    )
    done = subprocess.run([sys.executable, "-IS", "-c", program], stdout=subprocess.PIPE, check=True, text=True)
    assert done.stdout == "['ro'] False False\n"


# `typed` against typing.


def tuples() -> list[type]:
    """Every class of the package that is a NamedTuple."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for of in vars(module).values():
            if inspect.isclass(of) and issubclass(of, tuple) and hasattr(of, "_fields") and of.__module__ == name:
                found[f"{name}.{of.__qualname__}"] = of
    assert len(found) > 70
    return list(found.values())


@pytest.mark.parametrize("ours", tuples(), ids=lambda of: f"{of.__module__}.{of.__qualname__}")
def test_a_named_tuple_is_one_of_typing(ours: type) -> None:
    source = inspect.getsource(ours)
    space = dict(vars(sys.modules[ours.__module__]), NamedTuple=typing.NamedTuple)
    exec(f"from __future__ import annotations\n{source}", space)
    theirs = space[ours.__name__]
    for name in ("_fields", "_field_defaults", "__doc__", "__match_args__"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.__annotations__.keys() == theirs.__annotations__.keys()
    assert inspect.signature(ours).parameters.keys() == inspect.signature(theirs).parameters.keys()
    assert dir(ours) == [name for name in dir(theirs) if name != "__orig_bases__"]


class Point(typed.NamedTuple):
    """A point."""

    x: int
    """Across."""
    y: int = 2

    def sum(self) -> int:
        return self.x + self.y

    @property
    def twice(self) -> int:
        return 2 * self.sum()

    @classmethod
    def origin(cls) -> Point:
        return cls(0, 0)


def test_a_named_tuple_does_what_is_expected_of_one() -> None:
    point = Point(1)
    assert (point.x, point.y, point.sum(), point.twice) == (1, 2, 3, 6)
    assert point == (1, 2) == Point(y=2, x=1)
    assert point._replace(x=5) == Point(5, 2)
    assert point._asdict() == {"x": 1, "y": 2}
    assert repr(point) == "Point(x=1, y=2)"
    assert Point.__doc__ == "A point."
    assert Point.origin() == Point._make((0, 0))
    assert pickle.loads(pickle.dumps(point)) == copy.copy(point) == point
    assert json.dumps(point) == "[1, 2]"
    match point:
        case Point(x, y):
            assert (x, y) == (1, 2)
    with pytest.raises(AttributeError):
        point.x = 3  # type: ignore[misc]
    assert not hasattr(point, "__dict__")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Point(),  # type: ignore[call-arg]
        lambda: Point(1, 2, 3),  # type: ignore[call-arg]
        lambda: Point(1, z=4),  # type: ignore[call-arg]
        lambda: Point(1, x=4),  # type: ignore[misc]
        lambda: Point._make([1]),
        lambda: Point._make([1, 2, 3]),
    ],
)
def test_a_named_tuple_takes_its_fields_and_nothing_else(wrong: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match="Point"):
        wrong()


def test_a_field_that_there_is_not_can_not_be_replaced() -> None:
    with pytest.raises(ValueError, match="Point has no 'z'"):
        Point(1)._replace(z=2)  # type: ignore[call-arg]


def test_named_tuples_of_as_many_fields_have_their_own_names() -> None:
    class Other(typed.NamedTuple):
        across: int
        down: int

    class Empty(typed.NamedTuple):
        pass

    assert (Other(down=1, across=2), Point(y=1, x=2).y, Empty()) == ((2, 1), 1, ())
    with pytest.raises(TypeError, match="'x'"):
        Other(x=1, y=2)  # type: ignore[call-arg]


def test_the_whole_configuration_is_such_a_tuple() -> None:
    assert MountConfig.__mro__[1] is tuple


# `logger`: what is said is logged as was configured before anything was said.


def said(program: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", f"import sys\nfrom unionfsd import logger\n{program}"]
    return subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True)


CONFIGURED = """
def start():
    from unionfsd import logs
    logs.start(debug=False, path=None, quiet=True)
logger.configure(start)
log = logger.get_logger("unionfsd.some")
"""


def test_nobody_who_says_nothing_has_a_logger() -> None:
    done = said(f"{CONFIGURED}\nlog.debug('%d', 1)\nprint('logging' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_first_word_is_logged_as_configured() -> None:
    done = said(f"{CONFIGURED}\nlog.info('no')\nlog.warning('%d of %s', 1, log.name)\nlog.debug('no')")
    assert done.stderr == "unionfsd: warning: 1 of unionfsd.some\n"


def test_what_is_configured_after_the_first_word_counts_at_once() -> None:
    program = "import logging\nlogger.configure(lambda: print('now'))\nprint('then')"
    assert said(program).stdout == "now\nthen\n"


def test_an_exception_is_logged_with_its_traceback_and_its_place() -> None:
    program = "\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    log.exception('defect')\n"
    assert "ZeroDivisionError" in said(CONFIGURED + program).stderr
    place = "import logging\nlogging.basicConfig(format='%(lineno)d %(funcName)s')\n"
    done = said(f"{place}\ndef here():\n    logger.get_logger('x').warning('')\nhere()")
    assert done.stderr.split() == ["7", "here"]


def test_a_logger_can_be_told_from_another() -> None:
    assert logger.get_logger("a").name == "a"
