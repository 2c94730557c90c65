"""Tests of the core and of mounts, run again by who has no rights over the machine; all of them: --rootless."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.rootless import Who, run_pytest

NAMES = "made_over or only_an_empty or new_directory or (test_xattrs and (upper or what_fails))"
SLICES: dict[Who, str] = {"userns": f"{NAMES} or hard_link", "user": NAMES}


def test_random_programs_in_a_user_namespace(disk: Path) -> None:
    done = run_pytest("userns", disk, ["tests/union/test_model.py"], seconds=100)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(120)
@pytest.mark.parametrize("who", SLICES)
def test_names_and_attributes(who: Who, disk: Path) -> None:
    words = ["tests/mount/test_namespace.py", "tests/mount/test_xattrs.py", "-k", SLICES[who], "--mode=channel-cached"]
    done = run_pytest(who, disk, words, seconds=100)
    assert done.returncode == 0, done.stdout + done.stderr
