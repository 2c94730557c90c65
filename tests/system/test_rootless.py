"""Tests run again by who has no rights over the machine."""

from __future__ import annotations

from pathlib import Path

from tests.system.rootless import run_pytest


def test_random_programs_in_a_user_namespace(disk: Path) -> None:
    done = run_pytest("userns", disk, ["tests/union/test_model.py"], seconds=100)
    assert done.returncode == 0, done.stdout + done.stderr
