"""Tests of the core and of mounts, run again by who has no rights over the machine; all of them: --rootless."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.rootless import Who, run_pytest

MODULES = ("attributes", "copyup", "links", "markers", "namespace", "owners", "poor_uppers", "xattrs")

#: All of these modules, but of one only so much.
SLICE = "not test_namespace or made_over or only_an_empty or new_directory or hard_link"


def test_random_programs_in_a_user_namespace(disk: Path) -> None:
    done = run_pytest("userns", disk, ["tests/union/test_model.py"], seconds=100)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize("who", ["userns", "user"])
def test_of_a_mount(who: Who, disk: Path) -> None:
    words = [*(f"tests/mount/test_{module}.py" for module in MODULES), "-k", SLICE, "--mode=channel-cached"]
    done = run_pytest(who, disk, words, seconds=280)
    assert done.returncode == 0, done.stdout + done.stderr
