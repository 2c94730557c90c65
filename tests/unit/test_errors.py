"""A failure is one line, whatever bytes the paths in it have."""

from __future__ import annotations

import errno
import os

from hypothesis import given
from hypothesis import strategies as st

from unionfsd.errors import LAYER, USAGE, UserError, one_line, reason


def test_the_hint_follows_in_parentheses() -> None:
    assert str(UserError("layer /a: not a directory", hint="name a directory")) == (
        "layer /a: not a directory (name a directory)"
    )


def test_without_a_hint_there_are_no_parentheses() -> None:
    assert str(UserError("layer /a: not a directory")) == "layer /a: not a directory"


def test_the_exit_code_is_usage_unless_said() -> None:
    assert UserError("x").code == USAGE
    assert UserError("x", code=LAYER).code == LAYER


@given(st.binary(max_size=40))
def test_any_path_prints_as_one_line(path: bytes) -> None:
    text = str(UserError(f"layer {os.fsdecode(path)}: missing", hint="make\nit"))
    assert text.isprintable()
    assert text.encode()


def test_what_is_printable_is_left_as_it_is() -> None:
    assert one_line("gr\u00fcn 緑") == "grün 緑"
    assert one_line("a\tb\x1b[0m") == "a\\tb\\x1b[0m"


def test_a_reason_is_the_system_s_words_alone() -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/path")
    assert reason(error) == os.strerror(errno.ENOSPC)
    assert reason(OSError("words")) == "words"
