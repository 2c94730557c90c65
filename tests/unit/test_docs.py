"""What the documents say of the tests is so."""

from __future__ import annotations

import re

import pytest

from tests.harness import PROJECT


@pytest.mark.parametrize("document", ["recovery.md", "survival.md"])
def test_every_test_that_is_named_is_there(document: str) -> None:
    """The tables of what may happen name the tests that show it."""
    text = (PROJECT / "docs" / document).read_text()
    modules = list((PROJECT / "tests").rglob("*.py"))
    known = {module.stem for module in modules}
    known |= {name for module in modules for name in re.findall(r"def (test_\w+)", module.read_text())}
    assert [path for path in re.findall(r"tests/[\w/]+\.py", text) if not (PROJECT / path).exists()] == []
    assert sorted(set(re.findall(r"\btest_\w+", text)) - known) == []
