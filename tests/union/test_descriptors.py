"""What the kernel has forgotten keeps no descriptor open, removed or not; nor does a name that was only looked at."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.union.client import Client, Path
from tests.union.stack import stacked
from tests.union.trees import directory, regular

COUNT = 8


def remove(client: Client, path: Path) -> None:
    client.listdir(path)
    client.unlink((*path, b"f"))
    client.rmdir(path)


def remove_and_make(client: Client, path: Path) -> None:
    remove(client, path)
    client.mkdir(path, 0o755)


def rename(client: Client, path: Path) -> None:
    client.rename(path, (*path[:-1], path[-1] + b"x"), 0)


def change(client: Client, path: Path) -> None:
    client.read((*path, b"f"), 10, 0)
    client.chmod((*path, b"f"), 0o600)
    client.chmod(path, 0o700)


@pytest.mark.parametrize("work", [remove, remove_and_make, rename, change])
@pytest.mark.parametrize("metacopy", ["off", "on"])
def test_nothing_stays_open(work: Callable[[Client, Path], None], metacopy: str) -> None:
    tree = directory({b"d%d" % number: directory({b"f": regular()}) for number in range(COUNT)})
    with stacked([directory({b"u": tree})], directory()) as stack:
        union = stack.union(metacopy=metacopy)
        client = Client(union)
        for number in range(COUNT):
            work(client, (b"u", b"d%d" % number))
        client.forget_all()
        assert union.known() == 1
        assert union.holdings().cached_fds == 0
        union.close()
